# SPDX-License-Identifier: Apache-2.0
"""What accelerators are: peaks, memories, clocks, links. One JAX device each (tpu7x shows a chip as two).

Sources: cloud.google.com/tpu/docs (a page a generation), NVIDIA's data sheets (dense, without sparsity). `hbm` of a TPU
is what its compiler allows a program (libtpu 0.0.42), less than is on the chip. A clock is the TensorCore's.
"""

import dataclasses
import math

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
  """FLOP/s are dense bfloat16; bandwidths are bytes/s; a link's counts one direction of one link."""

  kinds: tuple[str, ...]  # `device_kind`, as JAX tells it
  flops: float
  hbm: float = 0.0  # bytes
  hbm_bandwidth: float = 0.0
  clock: float = 0.0  # Hz
  link: float = 0.0  # to a neighbour in the torus
  dcn: float = 0.0  # a chip's share of its host's network, between slices
  ring: int = 0  # see Topology.closes
  config: str = "default"  # libtpu's name of how its cores show as devices
  dimensions: int = 2  # of the torus


TPUS = {
  "v4": Chip(("TPU v4",), 275e12, 30.75 * GIB, 1228e9, 1.05e9, 50e9, 6.25e9, 4, "megacore", 3),
  "v5e": Chip(("TPU v5 lite", "TPU v5e"), 197e12, 15.75 * GIB, 819e9, 1.5e9, 50e9, 3.125e9, 16),
  "v5p": Chip(("TPU v5", "TPU v5p"), 459e12, 95.73 * GIB, 2765e9, 1.75e9, 100e9, 6.25e9, 4, "megacore", 3),
  "v6e": Chip(("TPU v6 lite", "TPU v6e"), 918e12, 31.24 * GIB, 1640e9, 1.75e9, 100e9, 12.5e9, 16),
}
OTHERS = (
  Chip(("TPU v3",), 123e12 / 2),
  Chip(("NVIDIA A100-SXM4-40GB", "NVIDIA A100-SXM4-80GB"), 312e12),
  Chip(("NVIDIA H100 80GB HBM3", "NVIDIA H200"), 989e12),
)
SHAPES = {4: "2x2", 8: "2x4", 16: "4x4", 32: "4x8", 64: "8x8", 128: "8x16", 256: "16x16"}  # of v5e and v6e, by chips


def peak_flops(device_kind: str) -> float | None:
  """Dense bfloat16 FLOP/s of a device, or None where it is not known (a CPU)."""
  return next((chip.flops for chip in (*TPUS.values(), *OTHERS) if device_kind in chip.kinds), None)


@dataclasses.dataclass(frozen=True)
class Topology:
  """A slice of a pod, or several: `v5e:8x8`, or as it is rented, `v5e-64`."""

  generation: str
  shape: tuple[int, ...]
  slices: int = 1

  @property
  def chip(self) -> Chip:
    return TPUS[self.generation]

  @property
  def chips(self) -> int:
    return math.prod(self.shape) * self.slices

  def closes(self, axis: int) -> bool:
    """Whether an axis of the torus closes to a ring: 16 long in two dimensions; in three, of a slice of whole cubes."""
    lengths = self.shape if self.chip.dimensions == 3 else self.shape[axis : axis + 1]
    return all(length % self.chip.ring == 0 for length in lengths)

  @property
  def name(self) -> str:
    """As libtpu takes it."""
    return f"{self.generation}:{'x'.join(map(str, self.shape))}"

  def __str__(self):
    return self.name if self.slices == 1 else f"{self.slices} x {self.name}"


def topology(name: str, slices: int = 1) -> Topology:
  """Reads `v5e:8x8`, `v5e-64`, `v4:4x4x4`. Raises ValueError on what is none, with those that are."""
  generation, _, rest = name.partition(":") if ":" in name else name.partition("-")
  if ":" not in name and generation in ("v5e", "v6e") and rest.isdigit():
    rest = SHAPES.get(int(rest), rest)
  shape = tuple(int(n) for n in rest.split("x") if n.isdigit())
  chip = TPUS.get(generation)
  if chip is None or len(shape) != chip.dimensions or rest != "x".join(map(str, shape)) or not all(shape):
    raise ValueError(
      f"--topology={name} is none: give a generation ({', '.join(TPUS)}) and a shape, v5e:8x8 or v5e-64 (v6e alike), "
      f"v4:4x4x4 (v5p alike)"
    )
  if slices < 1:
    raise ValueError(f"--slices={slices} is below 1")
  return Topology(generation, shape, slices)
