# SPDX-License-Identifier: Apache-2.0
"""The cost of one operation of a compiled TPU step: the largest of three bounds, in cycles.

- Instructions: the VLIW bundles of its code, a bundle a cycle, times the trips of its loops.
- HBM: the bytes that it reads and writes there, at the full bandwidth. Operands in VMEM move
  nothing, and of an array of which it takes a slice only the slice moves.
- Multiply-adds, at the peak of the matrix unit (MXU). Bundles do not show that a matmul waits for
  it, so of a matmul the compiler's own estimate of cycles is a fourth bound.

The compiler's estimate is not used for what is bound by memory: there it is a flat rate of some 70
elements a cycle, whatever the operation and wherever its operands lie.
"""

import dataclasses
import math
import pathlib
import re
from collections.abc import Iterator, Mapping

from gpt2_jax.chips import Tpu
from gpt2_jax.plan.program import Instruction, Program, arrays, size

# A pipelined grid loads its first window before the first of its steps, and stores the last one
# after the last: its loop has two trips more.
PIPELINE_TRIPS = 2
MATMUL_OPCODES = ("convolution", "dot")  # on a TPU a matmul is a convolution


@dataclasses.dataclass(frozen=True)
class Bundles:
  """VLIW bundles of an operation by the depth of the loop they are in, and each depth's trips."""

  counts: tuple[int, ...]
  trips: tuple[int, ...]  # that of depth 0 is 1

  def cycles(self, grid: int | None = None) -> int:
    """Cycles of all trips, a bundle a cycle; `grid` are the steps of the outermost loop, if known.

    Waiting for memory is not counted, and bundles that a predicate skips are.
    """
    trips = list(self.trips)
    if grid and trips[1] - grid in range(PIPELINE_TRIPS + 1):
      trips[1] = grid
    total = 0
    for depth, count in enumerate(self.counts):
      total += count * math.prod(trips[: depth + 1])
    return total


@dataclasses.dataclass(frozen=True)
class Cost:
  """Cycles of an operation by what bounds it."""

  instructions: float = 0.0
  hbm: float = 0.0
  multiply_adds: float = 0.0
  compiler: float = 0.0  # the compiler's own estimate, of a matmul

  @property
  def cycles(self) -> float:
    return max(self.instructions, self.hbm, self.multiply_adds, self.compiler)


class CostModel:
  """Costs of the operations of a program, from its text and the compiler's dump of bundles."""

  def __init__(self, program: Program, bundles: Mapping[str, Bundles], chip: Tpu):
    self.program = program
    self.chip = chip
    self._bundles = dict(bundles)
    self._codes: dict[str, str] = {}  # of computations, by name
    self._same_code = self._by_code()

  def cost(self, instruction: Instruction) -> Cost:
    """The cost of an instruction itself; a loop's or branch's body is not part of it."""
    # Loops cost what is in them; asynchronous copies and allocations take no time of the core.
    if instruction.opcode in ("while", "conditional", "call") or is_asynchronous(instruction):
      return Cost()
    if instruction.opcode == "custom-call" and not instruction.is_kernel:
      return Cost()

    # What has neither code nor an estimate is a view of an array, or a scalar.
    bundles = self._bundles_of(instruction)
    if bundles is None and instruction.is_kernel:
      raise ValueError(
        f"the compiler dumped no instructions of {instruction.name}: "
        f"was libtpu loaded before open_topology?"
      )
    if bundles is None and not instruction.cycles:
      return Cost()
    multiply_adds = self.multiply_adds(instruction)
    chip = self.chip
    return Cost(
      bundles.cycles(_grid(instruction, bundles)) if bundles else 0.0,
      hbm_traffic(self.program, instruction) / chip.hbm_bandwidth * chip.clock,
      2 * multiply_adds / chip.flops * chip.clock,
      instruction.cycles if multiply_adds else 0.0,
    )

  def multiply_adds(self, instruction: Instruction) -> float:
    """Multiply-adds of the matmuls in an instruction.

    Of [M, K] and [K, N] they are M K N, the root of the product of all three sizes. So no layout
    has to be read; only a matmul of batches would be counted too high.
    """
    if instruction.opcode in MATMUL_OPCODES:
      sizes = [_elements(instruction.shape)]
      for name in instruction.operands[:2]:
        sizes.append(_elements(self.program.shapes[name]))
      return math.sqrt(math.prod(sizes))

    total = 0.0
    for name in instruction.called("calls"):
      total += sum(map(self.multiply_adds, self.program.computations[name]))
    return total

  def _bundles_of(self, instruction: Instruction) -> Bundles | None:
    """The bundles of an instruction; the compiler dumps equal code once, under one name of it."""
    if instruction.name in self._bundles:
      return self._bundles[instruction.name]
    return self._same_code.get(self._code(instruction))

  def _by_code(self) -> dict[str, Bundles]:
    """The dumped bundles by what is computed."""
    # A kernel may be dumped under a name that is not in the program any more.
    by_code = {_stem(name): bundles for name, bundles in self._bundles.items()}
    for instructions in self.program.computations.values():
      for instruction in instructions:
        if instruction.name in self._bundles:
          by_code[self._code(instruction)] = self._bundles[instruction.name]
    by_code.pop(None, None)
    return by_code

  def _code(self, instruction: Instruction) -> str | None:
    """What an instruction computes, without names: equal for two that have the same code."""
    if instruction.is_kernel:
      # `fused_attention_forward.1` and `.2` are one kernel.
      return _stem(instruction.name)
    if instruction.opcode != "fusion":
      return None
    return f"{instruction.shape} {self._computation_code(instruction.called('calls')[0])}"

  def _computation_code(self, computation: str) -> str:
    if computation in self._codes:
      return self._codes[computation]
    numbers = {}
    lines = []
    for instruction in self.program.computations[computation]:
      numbers[instruction.name] = f"%{len(numbers)}"
      text = re.sub(r"(metadata=\{[^}]*\}|backend_config=.*)", "", instruction.text)
      text = re.sub(r"%([\w.\-<>]+)", lambda name: numbers.get(name[1], "%"), text)
      lines.append(f"{instruction.shape} {instruction.opcode} {text}")
    return self._codes.setdefault(computation, "\n".join(lines))


def _stem(name: str) -> str:
  return name.partition(".")[0]


def is_asynchronous(instruction: Instruction) -> bool:
  """Whether it starts or ends a copy between memories, which the DMA engines do meanwhile."""
  stem = instruction.opcode.removesuffix("-start").removesuffix("-done")
  return stem != instruction.opcode and stem in ("copy", "slice", "async", "dynamic-slice")


def copied_bytes(instruction: Instruction) -> float:
  """HBM bytes of the copy that starts here; 0 if none starts, or none of it is in HBM."""
  if not is_asynchronous(instruction) or not instruction.opcode.endswith("-start"):
    return 0.0
  # The shape is a tuple of both ends and a mark. Of a slice, the smaller one is what moves.
  ends = list(arrays(instruction.shape))[:2]
  moved = min(nbytes for nbytes, _ in ends)
  return moved * sum(in_hbm for _, in_hbm in ends)


def _grid(instruction: Instruction, bundles: Bundles) -> int | None:
  """Steps of an operation's outermost loop: the compiler writes those of a fusion."""
  if instruction.is_kernel:
    return max(1, bundles.trips[1] - PIPELINE_TRIPS)
  bounds = re.search(r'"iteration_bounds":\[([^\]]*)\]', instruction.text)
  steps = re.findall(r"\d+", bounds[1]) if bounds else []
  return math.prod(map(int, steps)) if steps else None


def _elements(shape: str) -> int:
  """Elements of all arrays in a shape."""
  total = 0
  for dimensions in re.findall(r"\w+\[([\d,]*)\]", shape):
    total += math.prod(int(length) for length in dimensions.split(",") if length)
  return total


# ---- HBM traffic


def hbm_traffic(program: Program, instruction: Instruction) -> float:
  """HBM bytes that an instruction reads and writes: each operand once, and of slices the slice."""
  # 1. The operands that lie in HBM.
  total = 0.0
  for position, name in enumerate(instruction.operands):
    shape = program.shapes.get(name, "")
    hbm_bytes = sum(nbytes for nbytes, in_hbm in arrays(shape) if in_hbm)
    if hbm_bytes:
      total += min(hbm_bytes, _bytes_read(program, instruction, position))

  # 2. The results, each where it lies.
  results = list(arrays(instruction.shape))
  written = list(_bytes_written(program, instruction))
  if len(written) != len(results):
    written = [nbytes for nbytes, _ in results]
  for nbytes, (_, in_hbm) in zip(written, results, strict=True):
    total += nbytes * in_hbm
  return total


def _bytes_read(program: Program, user: Instruction, position: int) -> float:
  """Bytes that an instruction reads of the operand at a position, all or a slice of it."""
  operand = user.operands[position]
  if user.opcode in ("dynamic-slice", "slice", "gather") and position == 0:
    return size(user.shape)
  # An update in place reads nothing of the array that it updates.
  if user.opcode == "dynamic-update-slice" and position == 0:
    return 0.0
  if user.opcode != "fusion":
    return size(program.shapes[operand])

  # In a fusion: what its instructions read of the parameter, through other names of it.
  parameter = program.parameters[user.called("calls")[0]][position]
  whole, total = size(program.shapes[parameter]), 0.0
  waiting = [parameter]
  while waiting:
    name = waiting.pop()
    for inner, place in program.users.get(name, []):
      if inner.opcode in ("bitcast", "get-tuple-element"):
        waiting.append(inner.name)
      elif inner.opcode != "tuple":
        total += _bytes_read(program, inner, place)
  return min(whole, total)


def _bytes_written(program: Program, instruction: Instruction) -> Iterator[float]:
  """Bytes that an instruction writes of each of its results: of an update in place, the update."""
  if instruction.opcode == "dynamic-update-slice":
    yield size(program.shapes[instruction.operands[1]])
    return
  if instruction.opcode != "fusion":
    yield from (nbytes for nbytes, _ in arrays(instruction.shape))
    return

  inner = {x.name: x for x in program.computations[instruction.called("calls")[0]]}
  root = list(inner.values())[-1]
  for name in root.operands if root.opcode == "tuple" else [root.name]:
    result = inner[name]
    # A bitcast is another name of what it is of.
    while result.opcode == "bitcast" and result.operands[0] in inner:
      result = inner[result.operands[0]]
    yield sum(_bytes_written(program, result))


# ---- the compiler's dump


def read_bundles(dump: pathlib.Path) -> dict[str, Bundles]:
  """The bundles of each operation with code of its own, by the name of its instruction.

  `dump` holds what LIBTPU_INIT_ARGS of compiling.py asks for.
  """
  # `17-fused_attention.1-01-final_bundles.txt`; the analyses of the schedule have like names.
  bundles = {}
  for path in dump.glob("*final_bundles.txt"):
    name = re.fullmatch(r"\d+-(.+)-\d+-final_bundles\.txt", path.name)
    if name and "schedule-analysis" not in path.name:
      bundles[name[1]] = parse_bundles(path.read_text())
  return bundles


def parse_bundles(text: str) -> Bundles:
  """Counts bundles and trips. A line is a bundle; the number of `>` is the depth of its loops."""
  counts, trips = [0] * 9, [1] * 9
  for line in text.splitlines():
    # `0x1f LB: >> { ... }`
    bundle = re.match(r"\s*(?:0x[0-9a-f]+|\d+)\s+(?:[A-Z]{2})?\s*:\s*(>*)", line)
    if bundle:
      depth = len(bundle[1])
      counts[depth] += 1
      if last := re.search(r", (\d+) /\* loop exit test \*/", line):
        trips[depth] = int(last[1])
  return Bundles(tuple(counts), tuple(trips))
