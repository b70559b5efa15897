# SPDX-License-Identifier: Apache-2.0
"""Reads the TPU compiler's scheduled program: what runs, how often, for how many cycles, and what crosses the links.

The text of `Compiled.as_text()` is in the order of execution. Each fusion, copy and convert carries the compiler's own
`estimated_cycles`; collectives and Pallas kernels carry none. A loop's body stands there once and says nowhere how
often: its condition compares a counter with a constant.
"""

import dataclasses
import functools
import math
import pathlib
import re
from collections.abc import Iterator

import numpy as np

BYTES = {"pred": 1, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4}
BYTES |= {"s4": 0.5, "u4": 0.5, "s64": 8, "u64": 8, "f64": 8}
COLLECTIVES = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute")

HEADER = re.compile(r"(ENTRY )?%?([\w.\-<>]+) \(.*\{$")
INSTRUCTION = re.compile(r"  (?:ROOT )?%([\w.\-<>]+) = (.*)")
ARRAY = re.compile(r"(\w+)\[([\d,]*)\]")


@dataclasses.dataclass(frozen=True)
class Instruction:
  name: str
  shape: str  # of what it gives, as XLA writes it
  opcode: str
  text: str  # operands and attributes

  @functools.cached_property
  def cycles(self) -> int:
    """The compiler's estimate, 0 where it makes none."""
    found = re.search(r'"estimated_cycles":"(\d+)"', self.text)
    return int(found[1]) if found else 0

  @property
  def operands(self) -> list[str]:
    """Names, up to the end of the argument list."""
    return re.findall(r"%([\w.\-<>]+)", self.text.partition(")")[0])

  def called(self, attribute: str) -> list[str]:
    """The computations that `attribute` names."""
    found = re.search(rf"\b{attribute}=(\{{[^}}]*\}}|%?[\w.\-<>]+)", self.text)
    return re.findall(r"[\w.\-<>]+", found[1]) if found else []

  @property
  def is_kernel(self) -> bool:
    """Whether it is a Pallas kernel."""
    return self.opcode == "custom-call" and 'custom_call_target="tpu_custom_call"' in self.text

  @property
  def source(self) -> str:
    """Where in the model it comes from, as JAX names it; empty for what the compiler made up."""
    found = re.search(r'op_name="([^"]*)"', self.text)
    return found[1] if found else ""


def size(shape: str) -> float:
  """Bytes of all arrays in a shape."""
  arrays = ARRAY.findall(shape)
  return sum(BYTES[kind] * math.prod(int(n) for n in dims.split(",") if n) for kind, dims in arrays if kind in BYTES)


@dataclasses.dataclass(frozen=True)
class Program:
  """Computations by name, each in the order of execution."""

  computations: dict[str, list[Instruction]]
  entry: str

  def executed(self, computation: str | None = None, times: int = 1) -> Iterator[tuple[Instruction, int]]:
    """What runs and how often: bodies of loops by their trips, of a conditional the branch of the most cycles.

    What has no cycles of its own, a kernel or a collective, does not count in that choice.
    """
    for one in self.computations[computation or self.entry]:
      if one.opcode == "while":
        yield from self.executed(one.called("body")[0], times * self._trips(one.called("condition")[0]))
      elif one.opcode == "conditional":
        names = one.called("branch_computations") or one.called("true_computation") + one.called("false_computation")
        branches = [list(self.executed(name, times)) for name in names]
        yield from max(branches, key=lambda branch: sum(x.cycles * n for x, n in branch))
      elif one.opcode == "call":
        yield from self.executed(one.called("to_apply")[0], times)
      else:
        yield one, times

  def _trips(self, condition: str) -> int:
    constants = [one.text for one in self.computations[condition] if one.opcode == "constant"]
    bounds = [int(n) for text in constants for n in re.findall(r"^(\d+)\)", text)]
    if len(bounds) != 1:
      raise ValueError(f"the loop condition {condition} compares with {bounds}, and not with one constant")
    return bounds[0]

  @functools.cached_property
  def shapes(self) -> dict[str, str]:
    """The shape of each instruction by its name."""
    return {one.name: one.shape for instructions in self.computations.values() for one in instructions}

  @functools.cached_property
  def home(self) -> dict[str, str]:
    """The computation in which each instruction stands, by its name."""
    return {one.name: name for name, instructions in self.computations.items() for one in instructions}

  def traffic(self, one: Instruction) -> float:
    """Bytes that an instruction reads and writes, each operand once and whole, wherever it lies."""
    return size(one.shape) + sum(size(self.shapes.get(name, "")) for name in one.operands)

  def collective(self, one: Instruction) -> Instruction | None:
    """The collective that an instruction is, or that a fusion is made of."""
    if one.opcode.removesuffix("-start") in COLLECTIVES:
      return one
    if one.opcode in ("fusion", "async-start"):
      for name in one.called("calls"):
        return next((x for x in map(self.collective, self.computations[name]) if x), None)
    return None


def parse(text: str) -> Program:
  """Raises ValueError on a text that is no scheduled program."""
  computations, current, entry = {}, None, ""
  for line in text.splitlines():
    if current is None:
      if header := HEADER.match(line):
        current = computations.setdefault(header[2], [])
        entry = header[2] if header[1] else entry
    elif line.rstrip() == "}":
      current = None
    elif found := INSTRUCTION.match(line):
      current.append(_instruction(found[1], found[2]))
    elif current:  # a kernel's attributes go over several lines
      current[-1] = dataclasses.replace(current[-1], text=current[-1].text + line)
  if not entry or "is_scheduled=true" not in text.partition("\n")[0]:
    raise ValueError("this is no scheduled program: it has no entry, or does not say is_scheduled=true")
  return Program(computations, entry)


def _instruction(name: str, rest: str) -> Instruction:
  """Splits `shape opcode(operands), attributes`; a tuple's shape is in parentheses and may hold some."""
  end, depth = 0, 0
  for end, letter in enumerate(rest):  # noqa: B007
    depth += (letter in "({[") - (letter in ")}]")
    if letter == " " and depth == 0:
      break
  opcode, _, text = rest[end + 1 :].partition("(")
  return Instruction(name, rest[:end], opcode, text)


def groups(text: str) -> np.ndarray:
  """The groups of devices that a collective's attributes name, [groups, devices], by their place in the mesh.

  Three ways of writing: {{0,1},{2,3}}; [2,4]<=[8], iota reshaped, perhaps transposed; and a mesh with the axes in which
  a group runs. Raises ValueError on a fourth.
  """
  if found := re.search(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\((.*?)\))? \{([^}]*)\}", text):
    axes = re.findall(r"'(\w+)'=(\d+)", found[1])
    names, sizes = [name for name, _ in axes], [int(n) for _, n in axes]
    ids = _iota(found[2]) if found[2] else np.arange(math.prod(sizes))
    inside = [names.index(name) for name in re.findall(r"'(\w+)'", found[3])]
    outside = [i for i in range(len(names)) if i not in inside]
    return ids.reshape(sizes).transpose(outside + inside).reshape(-1, math.prod(sizes[i] for i in inside))
  if found := re.search(r"replica_groups=(\[[\d,]+\]<=\[[\d,]+\](?:T\([\d,]+\))?)", text):
    shape, _, iota = found[1].partition("<=")
    return _iota(iota).reshape([int(n) for n in shape[1:-1].split(",")])
  if found := re.search(r"replica_groups=\{(\{[\d,{}]*\})\}", text):
    return np.array([[int(n) for n in group.split(",")] for group in re.findall(r"\{([\d,]+)\}", found[1])])
  if found := re.search(r"source_target_pairs=\{(\{[\d,{}]*\})\}", text):
    return np.array([[int(n) for n in pair.split(",")] for pair in re.findall(r"\{([\d,]+)\}", found[1])])
  raise ValueError(f"no groups of devices in {text[:200]}")


def _iota(text: str) -> np.ndarray:
  """`[4,2]T(1,0)`: numbers from 0 in that shape, transposed."""
  shape, _, order = text.partition("T")
  numbers = np.arange(math.prod(sizes := [int(n) for n in re.findall(r"\d+", shape)])).reshape(sizes)
  return numbers.transpose([int(n) for n in re.findall(r"\d+", order)]) if order else numbers


def kernel_cycles(dump: pathlib.Path) -> dict[str, int]:
  """Cycles of each Pallas kernel by its instruction's name: the bundles of instructions in its loops, times the trips.

  `dump` holds what LIBTPU_INIT_ARGS of `compiling.py` asked for. A bundle issues in a cycle; what waits for memory
  is not in it, nor what a predicate skips.
  """
  cycles = {}
  for path in dump.glob("*final_bundles.txt"):
    name = re.fullmatch(r"\d+-(.+)-\d+-final_bundles\.txt", path.name)
    if name and "schedule-analysis" not in path.name:
      cycles[name[1]] = _bundle_cycles(path.read_text())
  return cycles


def _bundle_cycles(text: str) -> int:
  """A line is a bundle, `0x1f LB: >> { ... }`; the number of > is the depth of loops around it."""
  bundles, trips = [0] * 9, [1] * 9
  for line in text.splitlines():
    found = re.match(r"\s*(?:0x[0-9a-f]+|\d+)\s+(?:[A-Z]{2})?\s*:\s*(>*)", line)
    if found:
      depth = len(found[1])
      bundles[depth] += 1
      if last := re.search(r", (\d+) /\* loop exit test \*/", line):
        trips[depth] = int(last[1])
  return sum(n * math.prod(trips[1 : depth + 1]) for depth, n in enumerate(bundles))
