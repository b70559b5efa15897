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
from gpt2_jax.plan.program import Instruction, Program, arrays, stored_size

# A pipelined grid loads its first window before the first of its steps, and stores the last one
# after the last: its loop has two trips more.
PIPELINE_TRIPS = 2
MATMUL_OPCODES = ("convolution", "dot")  # on a TPU a matmul is a convolution


@dataclasses.dataclass(frozen=True)
class Bundles:
  """VLIW bundles of an operation or of the body of a loop in it, apart from its inner loops."""

  count: int
  trips: int = 1
  loops: tuple["Bundles", ...] = ()

  def cycles(self, grid: int | None = None) -> int:
    """Cycles of one run, a bundle a cycle; `grid` are the steps of the pipeline, if known.

    Waiting for memory is not counted, and bundles that a predicate skips are.
    """
    total = self.count
    for loop in self.loops:
      is_pipeline = grid is not None and loop.trips - grid in range(PIPELINE_TRIPS + 1)
      total += (grid if is_pipeline else loop.trips) * loop.cycles()
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
      self.hbm_bytes(instruction) / chip.hbm_bandwidth * chip.clock,
      2 * multiply_adds / chip.flops * chip.clock,
      instruction.cycles if multiply_adds else 0.0,
    )

  def multiply_adds(self, instruction: Instruction) -> float:
    """Multiply-adds of the matmuls in an instruction.

    Of [M, K] and [K, N] they are M K N, the root of the product of all three sizes, so no layout
    has to be read. A kernel's are what its author says.
    """
    if instruction.is_kernel:
      return _author_estimate(instruction, "flops") / 2
    if instruction.opcode in MATMUL_OPCODES:
      sizes = [_elements(instruction.shape)]
      for name in instruction.operands[:2]:
        sizes.append(_elements(self.program.shapes[name]))

      # A batch of B matmuls is a convolution that is dilated by B, and B is in all three sizes.
      dilated = re.search(r"lhs_dilate=([\dx]+)", instruction.text)
      batch = math.prod(map(int, dilated[1].split("x"))) if dilated else 1
      return math.sqrt(math.prod(sizes) / batch)

    total = 0.0
    for name in instruction.called("calls"):
      total += sum(map(self.multiply_adds, self.program.computations[name]))
    return total

  def hbm_bytes(self, instruction: Instruction) -> float:
    """HBM bytes that an instruction reads and writes.

    A kernel may read an operand several times. Then its author's figure is the larger one; operands
    in VMEM are taken off it.
    """
    traffic = hbm_traffic(self.program, instruction)
    if not instruction.is_kernel:
      return traffic

    on_chip = 0.0
    for shape in (instruction.shape, *map(self.program.shapes.get, instruction.operands)):
      on_chip += sum(nbytes for nbytes, in_hbm in arrays(shape or "") if not in_hbm)
    return max(traffic, _author_estimate(instruction, "bytes_accessed") - on_chip)

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


def _author_estimate(instruction: Instruction, name: str) -> float:
  """A number in the `cost_estimate` of a kernel; 0 if it has none."""
  match = re.search(rf'"cost_estimate":\{{[^}}]*"{name}":"(\d+)"', instruction.text)
  return float(match[1]) if match else 0.0


def is_asynchronous(instruction: Instruction) -> bool:
  """Whether it starts or ends what other engines do meanwhile: a copy, or another core's work."""
  stem, _, suffix = instruction.opcode.rpartition("-")
  stems = ("copy", "slice", "dynamic-slice", "async", "call")
  return stem in stems and suffix in ("start", "update", "done")


def copied_bytes(instruction: Instruction) -> float:
  """HBM bytes of the copy that starts here; 0 if none starts, or none of it is in HBM."""
  if not is_asynchronous(instruction) or not instruction.opcode.endswith("-start"):
    return 0.0
  # The shape is a tuple of both ends and a mark. Of a slice, the smaller one is what moves.
  ends = list(arrays(instruction.shape))[:2]
  moved = min(nbytes for nbytes, _ in ends)
  return moved * sum(in_hbm for _, in_hbm in ends)


def _grid(instruction: Instruction, bundles: Bundles) -> int | None:
  """Steps of an operation's pipeline: the compiler writes those of a fusion."""
  if instruction.is_kernel:
    # All dimensions of a kernel's grid are one loop, its longest.
    loops = bundles.loops
    trips = max(loops, key=lambda loop: loop.trips * loop.cycles()).trips if loops else 1
    return max(1, trips - PIPELINE_TRIPS)
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
    return stored_size(user.shape)
  # An update in place reads nothing of the array that it updates.
  if user.opcode == "dynamic-update-slice" and position == 0:
    return 0.0
  if user.opcode != "fusion":
    return stored_size(program.shapes[operand])

  # In a fusion: what its instructions read of the parameter, through other names of it.
  parameter = program.parameters[user.called("calls")[0]][position]
  whole, total = stored_size(program.shapes[parameter]), 0.0
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
    yield stored_size(program.shapes[instruction.operands[1]])
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
  # Each entry of the stack is a loop that is open: its bundles, its trips, its inner loops.
  stack = [[0, 1, []]]

  def close() -> None:
    count, trips, loops = stack.pop()
    stack[-1][2].append(Bundles(count, trips, tuple(loops)))

  for line in text.splitlines():
    # `0x1f LB: >> { ... }`; LB is the first bundle of a loop's body. An empty bundle, `{}`, has no
    # marks and is where the one before it is.
    bundle = re.match(r"\s*(?:0x[0-9a-f]+|\d+)\s+([A-Z]{2})?\s*:\s*(>*)\s*(\{\})?", line)
    if not bundle:
      continue
    depth = len(stack) - 1 if bundle[3] else len(bundle[2])
    is_new = bundle[1] == "LB"
    while len(stack) - 1 > depth or (is_new and len(stack) - 1 == depth > 0):
      close()
    while len(stack) - 1 < depth:
      stack.append([0, 1, []])
    stack[-1][0] += 1
    if last := re.search(r", (\d+) /\* loop exit test \*/", line):
      stack[-1][1] = int(last[1])

  while len(stack) > 1:
    close()
  count, trips, loops = stack[0]
  return Bundles(count, trips, tuple(loops))
