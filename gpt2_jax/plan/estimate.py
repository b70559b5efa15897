# SPDX-License-Identifier: Apache-2.0
"""Estimates step time and MFU of a compiled step: matmuls, kernels, HBM traffic, collectives.

The estimate is a range. Its fast end is what the program asks for:

- An operation takes what cost.py says: its instructions, its HBM traffic at the full bandwidth, or
  its multiply-adds at the peak, whichever is the largest.
- A copy between HBM and VMEM, which the DMA engines do beside other work, is exposed as far as no
  other work was scheduled meanwhile.
- A collective (all-gather, reduce-scatter, all-reduce) moves its bytes over the ICI links of its
  group, without latency. A ring uses both directions, a line one. Between slices, a chip has its
  share of its host's network (DCN).
- A collective overlaps with what the compiler scheduled between its start and its end. It is
  exposed if that is shorter, or if the collective blocks.

The slow end adds ALLOWANCE to all work. It stands for what is in none of the above: a DMA that is
slow to begin, operations that wait for each other, copies and collectives that share the HBM.
"""

import collections
import dataclasses
import math
import re
from collections.abc import Callable, Iterator

import numpy as np

from gpt2_jax.plan.compiling import Compiled, Scheduled
from gpt2_jax.plan.cost import copied_bytes
from gpt2_jax.plan.program import Instruction, replica_groups, size
from gpt2_jax.runs.metrics import flops_per_token
from gpt2_jax.sharding import AXES

# What fills a step. These are keys of plan.json.
MATMULS, KERNELS, MEMORY_BOUND = "matrix products", "attention kernels", "elementwise, copies"
# Of all work, at the slow end.
ALLOWANCE = 0.1


@dataclasses.dataclass(frozen=True)
class Collective:
  """All collectives of a step of one kind (all-gather, all-reduce, ...) over the same mesh axes."""

  kind: str
  axes: str
  count: int  # in a step
  bytes: float  # of the full array, each time
  seconds: float  # in a step, exposed or not
  exposed: float  # seconds in a step


@dataclasses.dataclass(frozen=True)
class Estimate:
  """The estimated step: seconds by what fills it; `fast` and `slow` are the ends of the range."""

  fast: dict[str, float]
  slow: dict[str, float]
  collectives: list[Collective]
  model_flops: float  # of a step, on all chips: 6 N + attention, without recomputation
  tokens: int  # of a step
  peak: float  # FLOP/s of all chips
  moved: float  # bytes that memory-bound operations move in a chip's HBM

  @property
  def exposed(self) -> float:
    """Seconds of communication that nothing hides."""
    return sum(collective.exposed for collective in self.collectives)

  @property
  def communication(self) -> float:
    """Seconds of communication, hidden or not."""
    return sum(collective.seconds for collective in self.collectives)

  @property
  def step(self) -> tuple[float, float]:
    """Seconds of a step, exposed communication included: the fast end and the slow end."""
    return sum(self.fast.values()) + self.exposed, sum(self.slow.values()) + self.exposed

  def mfu(self, seconds: float) -> float:
    """Model FLOPs utilization of a step that takes `seconds`."""
    return self.model_flops / self.peak / seconds


def estimate(compiled: Compiled) -> Estimate:
  """Estimates the time of a compiled training step."""
  tokens = compiled.batch_size * compiled.model.n_ctx
  return estimate_program(compiled, flops_per_token(compiled.model) * tokens, tokens)


def estimate_program(compiled: Scheduled, model_flops: float, tokens: int) -> Estimate:
  """Estimates the time of a program, instruction by instruction.

  `model_flops` and `tokens` are those of one run of it on all chips.
  """
  chip = compiled.topology.chip
  work_seconds = dict.fromkeys((MATMULS, KERNELS, MEMORY_BOUND), 0.0)
  moved = 0
  crossings = collections.defaultdict(list)  # by kind and axes

  for instructions, times in _executed_computations(compiled):
    for position, instruction in enumerate(instructions):
      # 1. Communication: the part of it that no other work hides is exposed.
      if crossing := _crossing(compiled, instruction):
        kind, axes, nbytes, seconds = crossing
        hidden = min(seconds, _overlapping_seconds(compiled, instructions, position))
        crossings[kind, axes].append((times, nbytes, seconds * times, (seconds - hidden) * times))
        continue

      # 2. Copies by the DMA engines, in the same way.
      if nbytes := copied_bytes(instruction):
        seconds = nbytes / chip.hbm_bandwidth
        hidden = min(seconds, _overlapping_seconds(compiled, instructions, position))
        work_seconds[MEMORY_BOUND] += (seconds - hidden) * times
        moved += nbytes * times
        continue

      # 3. Work.
      cost = compiled.costs.cost(instruction)
      work = _work(compiled, instruction)
      work_seconds[work] += cost.cycles / chip.clock * times
      if work == MEMORY_BOUND:
        moved += cost.hbm / chip.clock * chip.hbm_bandwidth * times

  merged = [_merge(kind, axes, rows) for (kind, axes), rows in crossings.items()]
  return Estimate(
    fast=work_seconds,
    slow={work: seconds * (1 + ALLOWANCE) for work, seconds in work_seconds.items()},
    collectives=sorted(merged, key=lambda collective: -collective.seconds),
    model_flops=model_flops,
    tokens=tokens,
    peak=chip.flops * compiled.topology.chips,
    moved=moved,
  )


def _merge(kind: str, axes: str, rows: list[tuple[int, float, float, float]]) -> Collective:
  """Sums over rows of (times, bytes, seconds, exposed seconds); bytes are the mean."""
  times, sizes, seconds, exposed = zip(*rows, strict=True)
  count = sum(times)
  mean_bytes = np.dot(times, sizes) / count
  return Collective(kind, axes, count, mean_bytes, sum(seconds), sum(exposed))


def _executed_computations(compiled: Scheduled) -> Iterator[tuple[list[Instruction], int]]:
  """Each executed computation once, with its count. A loop's body is a computation of its own."""
  program = compiled.program
  counts = {}
  for instruction, times in program.executed():
    counts[program.computation_of[instruction.name]] = times

  for name, times in counts.items():
    yield program.computations[name], times


def _work(compiled: Scheduled, instruction: Instruction) -> str:
  """What an instruction is: a kernel, a matmul (alone or in a fusion), or bound by memory."""
  if instruction.is_kernel:
    return KERNELS

  return MATMULS if compiled.costs.multiply_adds(instruction) else MEMORY_BOUND


def _crossing(
  compiled: Scheduled, instruction: Instruction
) -> tuple[str, str, float, float] | None:
  """Kind, axes, bytes of the full array and seconds of the collective that starts here, if any."""
  # 1. Between slices the hosts exchange what their chips hold: each its part of an array that was
  #    reduced inside the slice before.
  transfer = None
  if instruction.opcode == "send":
    transfer = re.search(r'_xla_megascale_transfer_type="(\w+)"', instruction.text)
  if transfer:
    kind = transfer[1].lower().replace("_", "-")
    nbytes = size(instruction.shape.partition("]")[0] + "]")
    n = compiled.topology.slices
    rounds = 2 if kind == "all-reduce" else 1
    seconds = rounds * nbytes * (n - 1) / n / compiled.topology.chip.dcn_bandwidth
    return kind, "slices", nbytes, seconds

  # 2. Inside a slice.
  collective = _started_collective(compiled, instruction)
  if collective is None:
    return None
  devices = replica_groups(collective.text)
  nbytes = _full_bytes(collective)
  kind = _kind(instruction, collective)
  return kind, _axes(compiled, devices), nbytes, _ici_seconds(compiled, kind, nbytes, devices)


def _started_collective(compiled: Scheduled, instruction: Instruction) -> Instruction | None:
  """The collective that starts here; None for a fusion that only continues or ends one."""
  called = "".join(instruction.called("calls"))
  if (
    instruction.opcode.endswith("-done")
    or instruction.name.startswith("async-collective-done")
    or "async_collective_fusion" in called
  ):
    return None
  return compiled.program.collective(instruction)


def _kind(instruction: Instruction, collective: Instruction) -> str:
  """The collective's kind. A TPU's reduce-scatter is a fusion: all-reduce, then a slice of it."""
  if "".join(instruction.called("calls")).startswith("all-reduce-scatter"):
    return "reduce-scatter"
  return collective.opcode.removesuffix("-start")


def _overlapping_seconds(
  compiled: Scheduled, instructions: list[Instruction], position: int
) -> float:
  """Seconds of other work between a collective's start and its end; 0 for one that blocks."""
  end = _end_of(instructions, instructions[position])
  if end is None:
    return 0.0
  between = instructions[position + 1 : end]
  cycles = sum(compiled.costs.cost(instruction).cycles for instruction in between)
  return cycles / compiled.topology.chip.clock


def _end_of(instructions: list[Instruction], start: Instruction) -> int | None:
  """The position at which an asynchronous collective ends; None for a collective that blocks."""
  # 1. A fusion of the compiler's own: the name of its end differs by one word.
  if start.name.startswith("async-collective-start"):
    done = start.name.replace("start", "done", 1)
    return _position(instructions, lambda x: x.name == done)

  # 2. Between slices: the end waits for a receive that has the same rendezvous.
  if start.opcode == "send":
    rendezvous = re.search(r'_xla_host_transfer_rendezvous="([^"]*)"', start.text)[0]
    received = set()
    for instruction in instructions:
      if instruction.opcode == "recv" and rendezvous in instruction.text:
        received.add(instruction.name)
    return _position(
      instructions, lambda x: x.opcode == "recv-done" and not received.isdisjoint(x.operands)
    )

  # 3. Otherwise (`all-gather-start`) the start is an operand of the end.
  if start.opcode.endswith("-start"):
    return _position(
      instructions, lambda x: x.opcode.endswith("-done") and start.name in x.operands
    )
  return None


def _position(
  instructions: list[Instruction], matches: Callable[[Instruction], bool]
) -> int | None:
  """The position of the first instruction that matches."""
  for position, instruction in enumerate(instructions):
    if matches(instruction):
      return position
  return None


def _full_bytes(collective: Instruction) -> float:
  """Bytes of the full array: after an all-gather, before a reduce-scatter."""
  # The shape is a tuple of operand, result and marks, of which the full array is the largest.
  if collective.opcode in ("all-gather-start", "collective-permute-start"):
    return max(map(size, re.findall(r"\w+\[[\d,]*\]", collective.shape)))

  parts = 1
  if collective.opcode == "reduce-scatter":
    parts = replica_groups(collective.text).shape[1]
  return size(collective.shape) * parts


def _axes(compiled: Scheduled, devices: np.ndarray) -> str:
  """Names of the mesh axes along which the groups run; `devices` are [groups, devices]."""
  shape = [compiled.mesh[name] for name in AXES]
  names = []
  for name, along in zip(AXES, np.unravel_index(devices, shape), strict=True):
    if (along != along[:, :1]).any():
      names.append(name)
  return " x ".join(names) or "one device"


def _ici_seconds(compiled: Scheduled, kind: str, nbytes: float, devices: np.ndarray) -> float:
  """Seconds of one collective over ICI links; `nbytes` are those of the full array."""
  topology = compiled.topology
  if kind == "collective-permute":
    return nbytes / topology.chip.ici_bandwidth

  # 1. Links of a chip that carry: along each axis of the torus on which the group extends, both
  #    directions if the group is all of a ring, else one.
  links = 0
  coordinates = compiled.places[devices[0]].T[1:]  # without the slice
  for axis, (length, along) in enumerate(zip(topology.shape, coordinates, strict=False)):
    extent = len(set(along))
    if extent > 1:
      links += 2 if extent == length and topology.wraps_around(axis) else 1
  if not links:
    return 0.0

  # 2. An all-reduce is a reduce-scatter and an all-gather; each sends all parts but one's own.
  n = devices.shape[1]
  rounds = 2 if kind == "all-reduce" else 1
  return rounds * nbytes * (n - 1) / n / (links * topology.chip.ici_bandwidth)


def hours(estimate_: Estimate, tokens: float) -> tuple[float, float]:
  """The range of hours that training on `tokens` takes."""
  steps = math.ceil(tokens / estimate_.tokens)
  fast, slow = estimate_.step
  return steps * fast / 3600, steps * slow / 3600
