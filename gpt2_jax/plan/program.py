# SPDX-License-Identifier: Apache-2.0
"""Parses scheduled HLO of the TPU compiler: instructions, trip counts, cycles and collectives.

The text of `Compiled.as_text()` is in the order of execution. Each fusion, copy and convert carries
the compiler's own `estimated_cycles`; collectives and Pallas kernels carry none. The body of a loop
is written once, without its trip count: that is the constant with which its condition compares.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Iterator

import numpy as np

# Bytes of an element, by XLA's name of its type. What is not here (a `token[]`) carries no data.
ELEMENT_BYTES = {
  **dict.fromkeys(("s4", "u4"), 0.5),
  **dict.fromkeys(("pred", "s8", "u8"), 1),
  **dict.fromkeys(("s16", "u16", "bf16", "f16"), 2),
  **dict.fromkeys(("s32", "u32", "f32"), 4),
  **dict.fromkeys(("s64", "u64", "f64"), 8),
}
COLLECTIVES = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute")

_HEADER = re.compile(r"(ENTRY )?%?([\w.\-<>]+) \(.*\{$")
_INSTRUCTION = re.compile(r"  (?:ROOT )?%([\w.\-<>]+) = (.*)")
_ARRAY = re.compile(r"(\w+)\[([\d,]*)\](\{[^}]*\})?")


@dataclasses.dataclass(frozen=True)
class Instruction:
  """One HLO instruction: its name, result shape, opcode, and the text of the rest."""

  name: str
  shape: str  # of the result, as XLA writes it
  opcode: str
  text: str  # operands and attributes

  @functools.cached_property
  def cycles(self) -> int:
    """The compiler's estimate, 0 if it makes none."""
    match = re.search(r'"estimated_cycles":"(\d+)"', self.text)
    return int(match[1]) if match else 0

  @property
  def operands(self) -> list[str]:
    """Names of the operands: those up to the end of the argument list."""
    return re.findall(r"%([\w.\-<>]+)", self.text.partition(")")[0])

  def called(self, attribute: str) -> list[str]:
    """Names of the computations in an attribute (`calls`, `body`, `branch_computations`)."""
    match = re.search(rf"\b{attribute}=(\{{[^}}]*\}}|%?[\w.\-<>]+)", self.text)
    return re.findall(r"[\w.\-<>]+", match[1]) if match else []

  @property
  def is_kernel(self) -> bool:
    """Whether it is a Pallas kernel."""
    return self.opcode == "custom-call" and 'custom_call_target="tpu_custom_call"' in self.text

  @property
  def source(self) -> str:
    """The `op_name` that JAX gave it; empty for what the compiler added."""
    match = re.search(r'op_name="([^"]*)"', self.text)
    return match[1] if match else ""


def arrays(shape: str) -> Iterator[tuple[float, bool]]:
  """Bytes that each array in an HLO shape takes in memory, and whether that is HBM.

  The shape may be a tuple. Memory is in tiles: `T(8,128)` in a layout rounds the two minor axes up.
  `S(1)` is the memory on the chip (VMEM), other numbers are smaller ones.
  """
  for element_type, dimensions, layout in _ARRAY.findall(shape):
    if element_type in ELEMENT_BYTES:
      lengths = _integers(dimensions)
      tile = re.search(r"^\{([\d,]*):T\(([\d,]+)\)", layout)
      if tile and lengths:
        # The layout names the axes from the minor one on, and a tile begins with the major one.
        for axis, length in zip(_integers(tile[1]), reversed(_integers(tile[2])), strict=False):
          lengths[axis] = math.ceil(lengths[axis] / length) * length
      yield ELEMENT_BYTES[element_type] * math.prod(lengths), "S(" not in layout


def size(shape: str) -> float:
  """Bytes of all arrays in an HLO shape, as many as their elements have."""
  total = 0.0
  for element_type, dimensions, _ in _ARRAY.findall(shape):
    if element_type in ELEMENT_BYTES:
      total += ELEMENT_BYTES[element_type] * math.prod(_integers(dimensions))
  return total


def stored_size(shape: str) -> float:
  """Bytes that all arrays in an HLO shape take in memory."""
  return sum(nbytes for nbytes, _ in arrays(shape))


@dataclasses.dataclass(frozen=True)
class Program:
  """A scheduled HLO module: computations by name, each in the order of execution."""

  computations: dict[str, list[Instruction]]
  entry: str

  def executed(
    self, computation: str | None = None, times: int = 1
  ) -> Iterator[tuple[Instruction, int]]:
    """Each executed instruction with its count: a loop by its trips, a conditional by one branch.

    The branch is the one with the most cycles. Kernels and collectives have no cycles of their own,
    so they do not count in that choice.
    """
    for instruction in self.computations[computation or self.entry]:
      if body := self.body(instruction):
        name, trips = body
        yield from self.executed(name, times * trips)
      else:
        yield instruction, times

  def body(self, instruction: Instruction) -> tuple[str, int] | None:
    """The computation that a loop, a branch or a call runs, and how often; None of all else."""
    called = instruction.called
    if instruction.opcode == "while":
      return called("body")[0], self._trip_count(called("condition")[0])
    if instruction.opcode == "call":
      return called("to_apply")[0], 1
    if instruction.opcode != "conditional":
      return None

    # An indexed conditional lists its branches; one on a bool names the two.
    branches = called("branch_computations")
    branches = branches or called("true_computation") + called("false_computation")
    return max(branches, key=lambda name: _total_cycles(self.executed(name))), 1

  def _trip_count(self, condition: str) -> int:
    bounds = []
    # `compare(%counter, %twelve)`: the text of a scalar constant begins with its number.
    for instruction in self.computations[condition]:
      if instruction.opcode == "constant":
        bounds += map(int, re.findall(r"^(\d+)\)", instruction.text))

    if len(bounds) != 1:
      raise ValueError(
        f"the loop condition {condition} compares with {bounds}, and not with one constant"
      )
    return bounds[0]

  @functools.cached_property
  def shapes(self) -> dict[str, str]:
    """The result shape of each instruction, by its name."""
    # Names are unique in a module, so the computation is not part of the key.
    shapes = {}
    for instructions in self.computations.values():
      for instruction in instructions:
        shapes[instruction.name] = instruction.shape
    return shapes

  @functools.cached_property
  def users(self) -> dict[str, list[tuple[Instruction, int]]]:
    """The instructions that take each result, with its position among their operands."""
    users = {}
    for instructions in self.computations.values():
      for instruction in instructions:
        for position, name in enumerate(instruction.operands):
          users.setdefault(name, []).append((instruction, position))
    return users

  @functools.cached_property
  def parameters(self) -> dict[str, dict[int, str]]:
    """The names of each computation's parameters, by position."""
    parameters = {}
    for computation, instructions in self.computations.items():
      parameters[computation] = {}
      for instruction in instructions:
        if instruction.opcode == "parameter":
          position = int(instruction.text.partition(")")[0])
          parameters[computation][position] = instruction.name
    return parameters

  def instruction(self, name: str) -> Instruction:
    """The instruction of that name."""
    return self._instructions[name]

  @functools.cached_property
  def _instructions(self) -> dict[str, Instruction]:
    return {x.name: x for body in self.computations.values() for x in body}

  def collective(self, instruction: Instruction) -> Instruction | None:
    """The collective that an instruction is, or the first one inside its fusion; None if none."""
    if instruction.opcode.removesuffix("-start") in COLLECTIVES:
      return instruction

    # A fusion around a collective calls one computation, and so does an asynchronous start. That of
    # another core, such as the SparseCore, applies it.
    attribute = "to_apply" if instruction.opcode == "call-start" else "calls"
    called = instruction.called(attribute)
    if instruction.opcode in ("fusion", "async-start", "call-start") and called:
      for inner in self.computations[called[0]]:
        if collective := self.collective(inner):
          return collective
    return None


def _total_cycles(executed: Iterator[tuple[Instruction, int]]) -> int:
  return sum(instruction.cycles * times for instruction, times in executed)


def parse(text: str) -> Program:
  """Parses the text of a scheduled HLO module. Raises ValueError on any other text."""
  computations, current, entry = {}, None, ""

  for line in text.splitlines():
    # 1. Between computations only a header matters: it opens the next one.
    if current is None:
      if header := _HEADER.match(line):
        current = computations.setdefault(header[2], [])
        entry = header[2] if header[1] else entry

    # 2. Inside one, each line is an instruction. The attributes of a kernel go over several lines,
    #    which belong to the instruction before them.
    #    Behind the brace may stand the core that runs it: `}, execution_thread="sparsecore"`.
    elif line == "}" or line.startswith("}, execution_thread="):
      current = None
    elif match := _INSTRUCTION.match(line):
      current.append(_parse_instruction(match[1], match[2]))
    elif current:
      current[-1] = dataclasses.replace(current[-1], text=current[-1].text + line)

  if not entry or "is_scheduled=true" not in text.partition("\n")[0]:
    raise ValueError(
      "this is not a scheduled program: it has no entry, or does not say is_scheduled=true"
    )
  return Program(computations, entry)


def _parse_instruction(name: str, rest: str) -> Instruction:
  """Splits `shape opcode(operands), attributes`.

  The shape of a tuple is in parentheses and has spaces, so it ends at the first space outside of
  all brackets.
  """
  end, depth = 0, 0
  for end, letter in enumerate(rest):  # noqa: B007
    depth += (letter in "({[") - (letter in ")}]")
    if letter == " " and depth == 0:
      break

  opcode, _, text = rest[end + 1 :].partition("(")
  return Instruction(name, rest[:end], opcode, text)


def replica_groups(text: str) -> np.ndarray:
  """The device groups in a collective's attributes, [groups, devices], by position in the mesh.

  XLA writes them in three ways: lists; an iota that is reshaped and perhaps transposed; and a mesh
  with the axes along which a group runs. Raises ValueError on any other.
  """
  # 1. replica_groups=mesh['a'=2,'b'=3], device_ids=([6]T(0)) {'b'}
  mesh_form = r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\((.*?)\))? \{([^}]*)\}"
  if match := re.search(mesh_form, text):
    return _mesh_groups(match[1], match[2], match[3])

  # 2. replica_groups=[2,4]<=[4,2]T(1,0)
  if match := re.search(r"replica_groups=(\[[\d,]+\]<=\[[\d,]+\](?:T\([\d,]+\))?)", text):
    shape, _, iota = match[1].partition("<=")
    return _iota(iota).reshape(_integers(shape))

  # 3. replica_groups={{0,1},{2,3}}, and for a permute its pairs of devices.
  if match := re.search(r"(?:replica_groups|source_target_pairs)=\{(\{[\d,{}]*\})\}", text):
    return np.array([_integers(group) for group in re.findall(r"\{([\d,]+)\}", match[1])])

  raise ValueError(f"no groups of devices in {text[:200]}")


def _mesh_groups(axes: str, device_ids: str | None, group_axes: str) -> np.ndarray:
  """Groups along the axes `group_axes` of a mesh whose axes are `axes`."""
  names = re.findall(r"'(\w+)'=", axes)
  sizes = list(map(int, re.findall(r"=(\d+)", axes)))
  ids = _iota(device_ids) if device_ids else np.arange(math.prod(sizes))

  # The axes along which a group runs go last, so that a row is a group.
  inside = [names.index(name) for name in re.findall(r"'(\w+)'", group_axes)]
  outside = [axis for axis in range(len(names)) if axis not in inside]
  group_size = math.prod(sizes[axis] for axis in inside)
  return ids.reshape(sizes).transpose(outside + inside).reshape(-1, group_size)


def _integers(text: str) -> list[int]:
  return list(map(int, re.findall(r"\d+", text)))


def _iota(text: str) -> np.ndarray:
  """`[4,2]T(1,0)`: the numbers from 0 in that shape, transposed."""
  shape, _, order = text.partition("T")
  sizes = _integers(shape)
  numbers = np.arange(math.prod(sizes)).reshape(sizes)
  return numbers.transpose(_integers(order)) if order else numbers
