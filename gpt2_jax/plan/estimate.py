# SPDX-License-Identifier: Apache-2.0
"""From a compiled step to its time: a range, what fills it, and what crosses the links. All of it is an estimate.

- Products and kernels take the cycles that the compiler counts.
- For what is bound by memory the compiler's figure comes to about 40 % of the chip's HBM bandwidth. The slow end of the
  range believes it; the fast end moves the same bytes at the full bandwidth.
- A collective takes its bytes over the links that its group has in the torus: both directions of a ring, one of a line,
  no latency. Between slices what a chip sends goes over its share of the host's network. A collective hides behind
  what the compiler scheduled between its start and its end, and is exposed where that is shorter, or where it blocks.
"""

import collections
import dataclasses
import math
import re

import numpy as np

from gpt2_jax.metrics import flops_per_token
from gpt2_jax.plan.compiling import Compiled
from gpt2_jax.plan.program import Instruction, groups, size
from gpt2_jax.sharding import AXES

PRODUCTS, KERNELS, MEMORY = "matrix products", "attention kernels", "elementwise, copies"


@dataclasses.dataclass(frozen=True)
class Collective:
  """One kind over one set of mesh axes: how often in a step, bytes of the whole array each time, seconds in a step."""

  kind: str
  axes: str
  count: int
  bytes: float
  seconds: float
  exposed: float


@dataclasses.dataclass(frozen=True)
class Estimate:
  """Seconds in a step; `fast` and `slow` are the ends of the range."""

  fast: dict[str, float]
  slow: dict[str, float]
  collectives: list[Collective]
  model_flops: float  # of a step, on all chips: 6 N + attention, recomputation not counted
  tokens: int  # of a step
  peak: float  # FLOP/s of all chips
  moved: float  # bytes that elementwise operations move on a chip

  @property
  def exposed(self) -> float:
    return sum(one.exposed for one in self.collectives)

  @property
  def communication(self) -> float:
    return sum(one.seconds for one in self.collectives)

  @property
  def step(self) -> tuple[float, float]:
    """The range of a step, exposed communication included."""
    return sum(self.fast.values()) + self.exposed, sum(self.slow.values()) + self.exposed

  def mfu(self, seconds: float) -> float:
    """Model FLOPs utilization of a step that takes `seconds`."""
    return self.model_flops / self.peak / seconds


def estimate(compiled: Compiled) -> Estimate:
  fast, slow, moved = (
    dict.fromkeys((PRODUCTS, KERNELS, MEMORY), 0.0),
    dict.fromkeys((PRODUCTS, KERNELS, MEMORY), 0.0),
    0,
  )
  chip, found = compiled.topology.chip, collections.defaultdict(list)
  for instructions, times in _sequences(compiled):
    for place, one in enumerate(instructions):
      if crossing := _crossing(compiled, one):
        kind, axes, nbytes, seconds = crossing
        hidden = min(seconds, _behind(compiled, instructions, place))
        found[kind, axes].append((times, nbytes, seconds * times, (seconds - hidden) * times))
      kind, seconds = _work(compiled, one), _cycles(compiled, one) / chip.clock
      at_full_speed = compiled.program.traffic(one) / chip.hbm_bandwidth
      slow[kind] += seconds * times
      fast[kind] += (min(seconds, at_full_speed) if kind == MEMORY else seconds) * times
      moved += min(seconds, at_full_speed) * chip.hbm_bandwidth * times if kind == MEMORY else 0
  tokens = compiled.batch_size * compiled.model.n_ctx
  return Estimate(
    fast=fast,
    slow=slow,
    collectives=sorted((_merged(*key, rows) for key, rows in found.items()), key=lambda one: -one.seconds),
    model_flops=flops_per_token(compiled.model) * tokens,
    tokens=tokens,
    peak=chip.flops * compiled.topology.chips,
    moved=moved,
  )


def _merged(kind: str, axes: str, rows: list) -> Collective:
  times, sizes, seconds, exposed = zip(*rows, strict=True)
  count = sum(times)
  return Collective(kind, axes, count, np.dot(times, sizes) / count, sum(seconds), sum(exposed))


def _sequences(compiled: Compiled):
  """Each executed computation once, with how often it runs: instructions of loops and branches stand in their own."""
  program = compiled.program
  names = collections.Counter()
  for one, times in program.executed():
    names[program.home[one.name]] = times
  for name, times in names.items():
    yield program.computations[name], times


def _cycles(compiled: Compiled, one: Instruction) -> int:
  """Of an instruction that is itself executed; what loops and branches hold counts where it stands."""
  return 0 if one.opcode in ("while", "conditional", "call") else compiled.kernels.get(one.name, one.cycles)


def _work(compiled: Compiled, one: Instruction) -> str:
  if one.is_kernel:
    return KERNELS
  inside = [x.opcode for name in one.called("calls") for x in compiled.program.computations[name]]
  return PRODUCTS if {"convolution", "dot"} & {one.opcode, *inside} else MEMORY


def _crossing(compiled: Compiled, one: Instruction) -> tuple[str, str, float, float] | None:
  """Kind, axes, bytes of the whole array and seconds of the collective that begins with this instruction."""
  if transfer := re.search(r'_xla_megascale_transfer_type="(\w+)"', one.text) if one.opcode == "send" else None:
    # Between slices the hosts exchange what their chips hold, each its part of an array that was reduced inside.
    nbytes, n = size(one.shape.partition("]")[0] + "]"), compiled.topology.slices
    kind = transfer[1].lower().replace("_", "-")
    rounds = 2 if kind == "all-reduce" else 1
    return kind, "slices", nbytes, rounds * nbytes * (n - 1) / n / compiled.topology.chip.dcn
  collective = _starts(compiled, one)
  if collective is None:
    return None
  devices, nbytes, kind = groups(collective.text), _whole(collective), _kind(compiled, one, collective)
  return kind, _axes(compiled, devices), nbytes, _link_seconds(compiled, kind, nbytes, devices)


def _starts(compiled: Compiled, one: Instruction) -> Instruction | None:
  """The collective that begins with this instruction; a fusion that carries one on, or ends it, begins none."""
  called = "".join(one.called("calls"))
  if (
    one.opcode.endswith("-done") or "async_collective_fusion" in called or one.name.startswith("async-collective-done")
  ):
    return None
  return compiled.program.collective(one)


def _kind(compiled: Compiled, one: Instruction, collective: Instruction) -> str:
  """On a TPU a reduce-scatter is a fusion of an all-reduce with the slice of it that is kept."""
  scatter = "".join(one.called("calls")).startswith("all-reduce-scatter")
  return "reduce-scatter" if scatter else collective.opcode.removesuffix("-start")


def _behind(compiled: Compiled, instructions: list[Instruction], place: int) -> float:
  """Seconds of other work between a collective's start and its end; 0 where it blocks."""
  one = instructions[place]
  if one.name.startswith("async-collective-start"):
    ends = [i for i, x in enumerate(instructions) if x.name == one.name.replace("start", "done", 1)]
  elif one.opcode == "send":
    meeting = re.search(r'_xla_host_transfer_rendezvous="([^"]*)"', one.text)[0]
    received = [x.name for x in instructions if x.opcode == "recv" and meeting in x.text]
    ends = [i for i, x in enumerate(instructions) if x.opcode == "recv-done" and set(received) & set(x.operands)]
  elif one.opcode.endswith("-start"):
    ends = [i for i, x in enumerate(instructions) if x.opcode.endswith("-done") and one.name in x.operands]
  else:
    return 0.0
  between = instructions[place + 1 : ends[0]] if ends else []
  return sum(_cycles(compiled, x) for x in between) / compiled.topology.chip.clock


def _whole(collective: Instruction) -> float:
  """Bytes of what is gathered, or of what is reduced before it is scattered."""
  if collective.opcode in ("all-gather-start", "collective-permute-start"):  # a tuple: operand, result, and marks
    return max(size(array) for array in re.findall(r"\w+\[[\d,]*\]", collective.shape))
  parts = groups(collective.text).shape[1] if collective.opcode == "reduce-scatter" else 1
  return size(collective.shape) * parts


def _axes(compiled: Compiled, devices: np.ndarray) -> str:
  """The mesh axes along which the groups run."""
  places = np.stack(np.unravel_index(devices, [compiled.mesh[name] for name in AXES]))
  varies = [name for name, along in zip(AXES, places, strict=True) if (along != along[:, :1]).any()]
  return " x ".join(varies) or "one device"


def _link_seconds(compiled: Compiled, kind: str, nbytes: float, devices: np.ndarray) -> float:
  """Seconds of one collective; `nbytes` is the whole array's: what is gathered, or what is reduced."""
  chip, shape = compiled.topology.chip, compiled.topology.shape
  coordinates = compiled.places[devices[0]].T[1:]
  if kind == "collective-permute":
    return nbytes / chip.link
  links = 0
  for axis, (length, along) in enumerate(zip(shape, coordinates, strict=False)):
    extent = len(set(along))
    links += 0 if extent == 1 else 2 if extent == length and compiled.topology.closes(axis) else 1
  n, rounds = devices.shape[1], 2 if kind == "all-reduce" else 1
  return rounds * nbytes * (n - 1) / n / (links * chip.link) if links else 0.0


def hours(estimate_: Estimate, tokens: float) -> tuple[float, float]:
  """The range of hours that `tokens` take."""
  fast, slow = (math.ceil(tokens / estimate_.tokens) * seconds / 3600 for seconds in estimate_.step)
  return fast, slow
