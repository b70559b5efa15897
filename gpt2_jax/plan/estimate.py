# SPDX-License-Identifier: Apache-2.0
"""Estimates step time and MFU of a compiled step: matmuls, kernels, HBM traffic, collectives.

The estimate is a range. Its fast end is what the program asks for:

- An operation takes what cost.py says: its instructions, its HBM traffic at the full bandwidth, or
  its multiply-adds at the peak, whichever is the largest.
- A copy between HBM and VMEM, which the DMA engines do beside other work, is exposed as far as no
  other work was scheduled meanwhile. It has the bandwidth that this work leaves over.
- A collective (all-gather, reduce-scatter, all-reduce) moves its bytes over the ICI links of its
  group, without latency. A ring uses both directions, a line one. An all-to-all moves them through
  the bisection of its group. Between slices, a chip has its
  share of its host's network (DCN).
- A collective overlaps with what the compiler scheduled between its start and its end, whether the
  TensorCore or a SparseCore sends it. It is exposed if that is shorter, or if it blocks.
  Collectives over one mesh axis take turns on its links, and copies on the DMA engines.

The slow end adds ALLOWANCE to all work. It stands for what is in none of the above: a DMA that is
slow to begin, operations that wait for each other, collectives that share the HBM with work, the
latency of links and the launch of the step.
"""

import collections
import dataclasses
import math
import re

import numpy as np

from gpt2_jax.plan.compiling import Compiled, Scheduled
from gpt2_jax.plan.cost import copied_bytes
from gpt2_jax.plan.program import Instruction, replica_groups, size, stored_size
from gpt2_jax.runs.metrics import flops_per_token
from gpt2_jax.sharding import AXES

# What fills a step. These are keys of plan.json.
MATMULS, KERNELS, MEMORY_BOUND = "matrix products", "kernels", "elementwise, copies"
COPY = "copy"  # in place of a collective's kind and axes
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
  model_flops: float  # of a step, on all chips: 6 N (frozen: 4 N) + attention, no recomputation
  tokens: int  # of a step
  peak: float  # FLOP/s of all chips
  moved: float  # bytes that memory-bound operations move in a chip's HBM
  hbm_bytes: float  # that all operations and copies move there

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
  # A frozen weight has no gradient, which is a third of its FLOPs.
  of_token = flops_per_token(compiled.model) - 2 * compiled.frozen_weights
  if compiled.teacher is not None:  # it computes forward alone, a third
    of_token += flops_per_token(compiled.teacher) / 3
  return estimate_program(compiled, of_token * tokens, tokens)


def estimate_program(compiled: Scheduled, model_flops: float, tokens: int) -> Estimate:
  """Estimates the time of a program, instruction by instruction.

  `model_flops` and `tokens` are those of one run of it on all chips.
  """
  walk = _Walk(compiled)
  walk.run(compiled.program.entry, 1)

  collectives = [_merge(kind, axes, rows) for (kind, axes), rows in walk.collectives.items()]
  return Estimate(
    fast=walk.work,
    slow={work: seconds * (1 + ALLOWANCE) for work, seconds in walk.work.items()},
    collectives=sorted(collectives, key=lambda collective: -collective.seconds),
    model_flops=model_flops,
    tokens=tokens,
    peak=compiled.topology.chip.flops * compiled.topology.chips,
    moved=walk.moved,
    hbm_bytes=walk.hbm_bytes,
  )


def _merge(kind: str, axes: str, rows: list[tuple[int, "_Transfer"]]) -> Collective:
  """Sums rows of (times, collective); bytes are the mean."""
  count, nbytes, seconds, exposed = 0, 0.0, 0.0, 0.0
  for times, transfer in rows:
    count += times
    nbytes += times * transfer.bytes
    seconds += times * transfer.seconds
    exposed += times * transfer.exposed
  return Collective(kind, axes, count, nbytes / count, seconds, exposed)


# ---- the schedule of a program


@dataclasses.dataclass(eq=False)
class _Transfer:
  """A collective or a copy, which other engines than the TensorCore carry out."""

  kind: str  # COPY, or that of the collective
  axes: str
  bytes: float
  seconds: float
  begin: float = 0.0
  delay: float = 0.0  # of a copy, by work that uses the HBM
  before: "_Transfer | None" = None  # the one that it waited for, in the same lane
  exposed: float = 0.0

  @property
  def end(self) -> float:
    return self.begin + self.seconds + self.delay


class _Timeline:
  """The time of the TensorCore, and what is in flight beside it."""

  def __init__(self):
    self.now = 0.0
    self._pending: dict[str, _Transfer] = {}  # by the name of what its end waits for
    self._last: dict[str, _Transfer] = {}  # of each lane: a mesh axis, the DMA engines
    self._names: dict[str, str] = {}  # other names of those in _pending

  def start(self, transfer: _Transfer, name: str | None) -> None:
    """Queues a transfer in its lanes, and waits for it if it has no name to wait for later."""
    lanes = transfer.axes.split(" x ")
    busy = [self._last[lane] for lane in lanes if lane in self._last]
    transfer.begin = self.now
    for earlier in busy:
      if earlier.end > transfer.begin:
        transfer.begin, transfer.before = earlier.end, earlier

    self._last.update(dict.fromkeys(lanes, transfer))
    if name is None:
      self._wait(transfer)
    else:
      self._pending[name] = transfer

  def work(self, seconds: float, hbm_seconds: float) -> None:
    """Work, for `hbm_seconds` of which the HBM is busy: copies that are in flight wait so long."""
    copy = self._last.get(COPY)
    while copy and copy.end > self.now:
      if copy.begin > self.now:
        copy.begin += hbm_seconds
      else:
        copy.delay += hbm_seconds
      copy = copy.before
    self.now += seconds

  def rename(self, old: str, new: str) -> None:
    """What waits for `new` waits for `old`, which may start later."""
    self._names[new] = old

  def end(self, name: str) -> None:
    """Waits for the transfer of that name, if there is one."""
    while name not in self._pending and name in self._names:
      name = self._names[name]
    if name in self._pending:
      self._wait(self._pending.pop(name))

  def end_all(self) -> None:
    for name in list(self._pending):
      self.end(name)

  def _wait(self, transfer: _Transfer) -> None:
    """Waits; the time is that of the transfer, and of those for which it waited itself."""
    now, self.now = self.now, max(self.now, transfer.end)
    while transfer and transfer.end > now:
      # All of it, or what is left of it.
      whole = transfer.seconds + transfer.delay
      transfer.exposed += whole if transfer.begin >= now else min(whole, transfer.end - now)
      transfer = transfer.before


class _Walk:
  """Adds up a program's work and transfers in the order of its schedule."""

  def __init__(self, compiled: Scheduled):
    self.compiled = compiled
    self.work = dict.fromkeys((MATMULS, KERNELS, MEMORY_BOUND), 0.0)  # seconds
    self.collectives = collections.defaultdict(list)  # (times, transfer), by kind and axes
    self.moved = 0.0
    self.hbm_bytes = 0.0

  def run(self, computation: str, times: int) -> tuple[float, float]:
    """Seconds of one run of a computation, of which there are `times`, and those of its HBM."""
    compiled = self.compiled
    chip = compiled.topology.chip
    timeline = _Timeline()
    transfers, hbm_bytes = [], 0.0

    for instruction in compiled.program.computations[computation]:
      if body := compiled.program.body(instruction):
        name, trips = body
        seconds, hbm_seconds = self.run(name, times * trips)
        timeline.work(trips * seconds, trips * hbm_seconds)
        hbm_bytes += trips * hbm_seconds * chip.hbm_bandwidth
        continue

      # 1. Collectives and copies: what no work hides is exposed.
      _follow(timeline, instruction)
      if transfer := _transfer(compiled, instruction):
        timeline.start(transfer, _end_name(instruction))
        transfers.append(transfer)
        continue

      # 2. Work.
      cost = compiled.costs.cost(instruction)
      seconds, hbm_seconds = cost.cycles / chip.clock, cost.hbm / chip.clock
      timeline.work(seconds, hbm_seconds)
      self._add_work(_work(compiled, instruction), seconds * times, hbm_seconds * times)
      hbm_bytes += hbm_seconds * chip.hbm_bandwidth

    # 3. What nothing here waits for ends with the computation.
    timeline.end_all()
    hbm_bytes += self._add_transfers(transfers, times)
    return timeline.now, hbm_bytes / chip.hbm_bandwidth

  def _add_work(self, work: str, seconds: float, hbm_seconds: float) -> None:
    nbytes = hbm_seconds * self.compiled.topology.chip.hbm_bandwidth
    self.work[work] += seconds
    self.hbm_bytes += nbytes
    self.moved += nbytes if work == MEMORY_BOUND else 0.0

  def _add_transfers(self, transfers: list[_Transfer], times: int) -> float:
    """Adds what a computation transferred; returns the bytes of one run's copies."""
    copied = 0.0
    for transfer in transfers:
      if transfer.kind == COPY:
        copied += transfer.bytes
        self.work[MEMORY_BOUND] += transfer.exposed * times
      else:
        self.collectives[transfer.kind, transfer.axes].append((times, transfer))

    self.moved += copied * times
    self.hbm_bytes += copied * times
    return copied


def _follow(timeline: _Timeline, instruction: Instruction) -> None:
  """Waits for what ends here, and follows what is handed on under another name."""
  stem, _, suffix = instruction.opcode.rpartition("-")
  # 1. A fusion of the compiler's own starts and ends a collective: `_end_name` is this name.
  if instruction.opcode == "fusion":
    timeline.end(instruction.name)

  # 2. Between slices: what is received has the name of the rendezvous.
  elif instruction.opcode == "recv":
    timeline.rename(_rendezvous(instruction), instruction.name)

  # 3. Else the start is an operand of the end, or of an update between them.
  elif suffix == "done" and stem != "send":
    for name in instruction.operands:
      timeline.end(name)
  elif suffix == "update":
    for name in instruction.operands:
      timeline.rename(name, instruction.name)


def _end_name(start: Instruction) -> str | None:
  """The name under which the transfer that starts here is waited for; None if it blocks."""
  if start.name.startswith("async-collective-start"):
    return start.name.replace("start", "done", 1)
  if start.opcode == "send":
    return _rendezvous(start)
  is_async = start.opcode.endswith(("-start", "-update"))
  return start.name if is_async else None


def _rendezvous(instruction: Instruction) -> str:
  match = re.search(r'_xla_host_transfer_rendezvous="([^"]*)"', instruction.text)
  return match[0] if match else ""


def _transfer(compiled: Scheduled, instruction: Instruction) -> _Transfer | None:
  """The collective or copy that starts here, if any."""
  start = instruction
  # The SparseCore is started without operands, and gets them by an update.
  if instruction.opcode == "call-start" and not instruction.operands:
    return None
  if instruction.opcode == "call-update":
    start = compiled.program.instruction(instruction.operands[0])
    if start.operands:
      return None

  if crossing := _crossing(compiled, start):
    return _Transfer(*crossing)

  # What a SparseCore does beside collectives is bound by memory: it looks up rows.
  nbytes = copied_bytes(instruction)
  if start.opcode == "call-start":
    nbytes = 2 * stored_size(compiled.program.computations[start.called("to_apply")[0]][-1].shape)
  if not nbytes:
    return None
  return _Transfer(COPY, COPY, nbytes, nbytes / compiled.topology.chip.hbm_bandwidth)


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


def _full_bytes(collective: Instruction) -> float:
  """Bytes of the full array: after an all-gather, before a reduce-scatter."""
  # 1. A start's shape is a tuple of operands, results and marks, which are scalars.
  arrays_only = " ".join(re.findall(r"\w+\[[\d,]+\]", collective.shape))
  if collective.opcode == "collective-permute-start":
    return size(arrays_only) / 2
  parts = 1
  if collective.opcode != "collective-permute":
    parts = replica_groups(collective.text).shape[1]
  if collective.opcode in ("all-gather-start", "reduce-scatter-start"):
    return size(arrays_only) / (1 + 1 / parts)

  # 2. Else it is the result's.
  return size(collective.shape) * (parts if collective.opcode == "reduce-scatter" else 1)


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
  links, across = 0, 0.0
  coordinates = compiled.places[devices[0]].T[1:]  # without the slice
  for axis, (length, along) in enumerate(zip(topology.shape, coordinates, strict=False)):
    extent = len(set(along))
    if extent > 1:
      directions = 2 if extent == length and topology.wraps_around(axis) else 1
      links += directions
      across = max(across, extent / directions / 4)
  if not links:
    return 0.0

  # An all-to-all is bound by the links that cut a torus in two: half of what each chip has goes to
  # the other half, over one chip's link for as many chips as are in a row.
  if kind == "all-to-all":
    return across * nbytes / topology.chip.ici_bandwidth

  # 2. An all-reduce is a reduce-scatter and an all-gather; each sends all parts but one's own.
  n = devices.shape[1]
  rounds = 2 if kind == "all-reduce" else 1
  return rounds * nbytes * (n - 1) / n / (links * topology.chip.ici_bandwidth)


def hours(estimate_: Estimate, tokens: float) -> tuple[float, float]:
  """The range of hours that training on `tokens` takes."""
  steps = math.ceil(tokens / estimate_.tokens)
  fast, slow = estimate_.step
  return steps * fast / 3600, steps * slow / 3600
