# SPDX-License-Identifier: Apache-2.0
"""TPU types, topologies and prices: the one table that plan, launch/gke.py and tpu_vm.sh read.

It also holds the peak FLOP/s of some GPUs, for the MFU of a run. The two scripts load this file by
its path, without the package, which may not be installed there. So it imports the standard
library only, and Python 3.9 is enough.

  python3 gpt2_jax/chips.py accelerator v5e:8x8   # what launch/tpu_vm.sh asks

Sources: cloud.google.com/tpu/docs (a page a generation), NVIDIA's data sheets (dense, without
sparsity). Names on Google Cloud: cloud.google.com/tpu/docs/runtimes (TPU software versions) and
cloud.google.com/kubernetes-engine/docs/concepts/tpus (GKE).
"""

from __future__ import annotations  # `float | None` in Python 3.9, which macOS has

import dataclasses
import math
import re
import sys

GIB = 2**30

# In every machine type that slices of several hosts are made of.
CHIPS_PER_HOST = 4


@dataclasses.dataclass(frozen=True)
class Chip:
  """What JAX shows as one device, and its peak FLOP/s (dense, bfloat16)."""

  device_kinds: tuple[str, ...]  # `device_kind` of a jax.Device
  flops: float


@dataclasses.dataclass(frozen=True)
class Tpu(Chip):
  """A TPU chip, as plan computes with it and as Google Cloud names and sells it.

  Bandwidths are bytes/s. `hbm` is what the TPU's compiler allows a program (libtpu 0.0.42), which
  is less than the chip has.
  """

  hbm: float  # bytes
  hbm_bandwidth: float
  clock: float  # Hz, of a TensorCore
  ici_bandwidth: float  # of one link to a neighbour in the torus, in one direction
  dcn_bandwidth: float  # a chip's share of its host's network, between slices
  wrap_multiple: int  # see Topology.wraps_around
  dimensions: int  # of the torus
  libtpu_config: str  # libtpu's name of how a chip's cores show as devices
  accelerator_prefix: str  # of Google Cloud's accelerator type, `v5litepod-64`
  cores_per_chip: int  # the number in that type counts TensorCores
  runtime_version: str  # the image of a TPU VM
  gke_accelerator: str  # the node label cloud.google.com/gke-tpu-accelerator
  usd_per_chip_hour: float


# Prices: on demand, in US regions, as others quoted the Cloud Billing catalog on 2026-08-24. They
# change and differ by region, and spot is cheaper: cloud.google.com/tpu/pricing holds.
TPUS = {
  "v4": Tpu(
    device_kinds=("TPU v4",),
    flops=275e12,
    hbm=30.75 * GIB,
    hbm_bandwidth=1228e9,
    clock=1.05e9,
    ici_bandwidth=50e9,
    dcn_bandwidth=6.25e9,
    wrap_multiple=4,
    dimensions=3,
    libtpu_config="megacore",
    accelerator_prefix="v4",
    cores_per_chip=2,
    runtime_version="tpu-ubuntu2204-base",
    gke_accelerator="tpu-v4-podslice",
    usd_per_chip_hour=3.22,
  ),
  "v5e": Tpu(
    device_kinds=("TPU v5 lite", "TPU v5e"),
    flops=197e12,
    hbm=15.75 * GIB,
    hbm_bandwidth=819e9,
    clock=1.5e9,
    ici_bandwidth=50e9,
    dcn_bandwidth=3.125e9,
    wrap_multiple=16,
    dimensions=2,
    libtpu_config="default",
    accelerator_prefix="v5litepod",
    cores_per_chip=1,
    runtime_version="v2-alpha-tpuv5-lite",
    gke_accelerator="tpu-v5-lite-podslice",
    usd_per_chip_hour=1.20,
  ),
  "v5p": Tpu(
    device_kinds=("TPU v5", "TPU v5p"),
    flops=459e12,
    hbm=95.73 * GIB,
    hbm_bandwidth=2765e9,
    clock=1.75e9,
    ici_bandwidth=100e9,
    dcn_bandwidth=6.25e9,
    wrap_multiple=4,
    dimensions=3,
    libtpu_config="megacore",
    accelerator_prefix="v5p",
    cores_per_chip=2,
    runtime_version="v2-alpha-tpuv5",
    gke_accelerator="tpu-v5p-slice",
    usd_per_chip_hour=4.20,
  ),
  "v6e": Tpu(
    device_kinds=("TPU v6 lite", "TPU v6e"),
    flops=918e12,
    hbm=31.24 * GIB,
    hbm_bandwidth=1640e9,
    clock=1.75e9,
    ici_bandwidth=100e9,
    dcn_bandwidth=12.5e9,
    wrap_multiple=16,
    dimensions=2,
    libtpu_config="default",
    accelerator_prefix="v6e",
    cores_per_chip=1,
    runtime_version="v2-alpha-tpuv6e",
    gke_accelerator="tpu-v6e-slice",
    usd_per_chip_hour=2.70,
  ),
}

OTHER_CHIPS = (
  Chip(("TPU v3",), 123e12 / 2),  # a device is a core, of which a chip has two
  Chip(("NVIDIA A100-SXM4-40GB", "NVIDIA A100-SXM4-80GB"), 312e12),
  Chip(("NVIDIA H100 80GB HBM3", "NVIDIA H200"), 989e12),
)

# Google's default shape of a slice, by the number of its chips and the dimensions of its torus. The
# name of an accelerator type says only how many chips, so a TPU VM gets this shape.
DEFAULT_SHAPES = {
  2: {
    1: (1, 1),
    4: (2, 2),
    8: (2, 4),
    16: (4, 4),
    32: (4, 8),
    64: (8, 8),
    128: (8, 16),
    256: (16, 16),
  },
  3: {
    4: (2, 2, 1),
    8: (2, 2, 2),
    16: (2, 2, 4),
    32: (2, 4, 4),
    64: (4, 4, 4),
    128: (4, 4, 8),
    256: (4, 8, 8),
    512: (8, 8, 8),
    1024: (8, 8, 16),
    2048: (8, 16, 16),
  },
}


def peak_flops(device_kind: str) -> float | None:
  """Peak FLOP/s of a JAX device (dense bfloat16), or None for one that is not known (a CPU)."""
  for chip in (*TPUS.values(), *OTHER_CHIPS):
    if device_kind in chip.device_kinds:
      return chip.flops
  return None


@dataclasses.dataclass(frozen=True)
class Topology:
  """A TPU slice (`v5e:8x8`), or several of them that the data-center network joins."""

  generation: str
  shape: tuple[int, ...]
  slices: int = 1

  @property
  def chip(self) -> Tpu:
    return TPUS[self.generation]

  @property
  def chips(self) -> int:
    return math.prod(self.shape) * self.slices

  @property
  def name(self) -> str:
    """The name of one slice as libtpu takes it."""
    return f"{self.generation}:{'x'.join(map(str, self.shape))}"

  @property
  def host_bounds(self) -> tuple[int, int, int]:
    """Chips of one host along each axis, for libtpu: 2 x 2, or a row of at most 2."""
    if self.chip.dimensions == 2 and self.shape[0] == 1:
      return 1, min(2, self.shape[1]), 1
    return 2, 2, 1

  def wraps_around(self, axis: int) -> bool:
    """Whether an axis of the torus has wraparound links, which make it a ring.

    In two dimensions an axis of 16 has. In three every axis has, if the slice is made of whole
    cubes of 4 x 4 x 4; otherwise none has.
    """
    lengths = self.shape
    if self.chip.dimensions == 2:
      lengths = self.shape[axis : axis + 1]
    return all(length % self.chip.wrap_multiple == 0 for length in lengths)

  def __str__(self):
    return self.name if self.slices == 1 else f"{self.slices} x {self.name}"


def parse_topology(name: str, slices: int = 1) -> Topology:
  """Parses `v5e:8x8`, `v4:4x4x4`, or `v5e-64` (a default shape). Raises ValueError on others."""
  separator = ":" if ":" in name else "-"
  generation, _, rest = name.partition(separator)
  chip = TPUS.get(generation)

  # A number of chips has one default shape. In v4 and v5p the number counts cores, which is easily
  # mistaken, so they take a shape only.
  shape = ()
  if chip is not None and separator == ":" and re.fullmatch(r"[1-9][0-9]*(x[1-9][0-9]*)*", rest):
    shape = tuple(map(int, rest.split("x")))
  elif chip is not None and chip.dimensions == 2 and re.fullmatch(r"[1-9][0-9]*", rest):
    shape = DEFAULT_SHAPES[2].get(int(rest), ())

  # An empty shape was not understood, or is not a size that Google offers.
  if chip is None or len(shape) != chip.dimensions:
    raise ValueError(
      f"--topology={name[:80]} is not a topology: give a generation ({', '.join(TPUS)}) and a "
      f"shape, v5e:8x8 or v5e-64 (v6e alike), v4:4x4x4 (v5p alike)"
    )
  if slices < 1:
    raise ValueError(f"--slices={slices} is below 1")
  return Topology(generation, shape, slices)


def accelerator_type(generation: str, chips: int) -> str:
  """Google Cloud's name of a slice: `v5litepod-64` has 64 chips, `v4-128` 128 cores (64 chips)."""
  chip = TPUS[generation]
  return f"{chip.accelerator_prefix}-{chips * chip.cores_per_chip}"


def parse_accelerator(name: str) -> tuple[str, int]:
  """The generation and the number of chips of one slice that can be asked for as a TPU VM.

  Takes an accelerator type (`v5e-64` or `v5litepod-64`, `v4-128`) or a shape (`v5e:8x8`). Raises
  ValueError if Google Cloud has no such slice, or would give it another shape.
  """
  form = r"(v4|v5e|v5litepod|v5p|v6e)(?:-([0-9]{1,5})|:([0-9]{1,2}(?:x[0-9]{1,2}){1,2}))"
  match = re.fullmatch(form, name)
  if match is None:
    raise ValueError(
      f"--topology='{name}' is not a topology; one looks like v5e-64, v4-128, v5p-64, v5e:8x8"
    )
  generation = "v5e" if match[1] == "v5litepod" else match[1]
  chip = TPUS[generation]
  default_shapes = DEFAULT_SHAPES[chip.dimensions]

  # A shape is only a way to write the number: the type's name has no room for another shape.
  if match[3]:
    shape = tuple(map(int, match[3].split("x")))
    if shape not in default_shapes.values():
      raise ValueError(
        f"--topology={name} is not the default shape of its size, the only one asked for here"
      )
    return generation, math.prod(shape)

  # v5e and v6e come in a few sizes.
  number = int(match[2])
  if chip.dimensions == 2 and number not in default_shapes:
    *sizes, largest = map(str, default_shapes)
    raise ValueError(
      f"--topology={name}: {generation} comes in {', '.join(sizes)} or {largest} chips"
    )

  # v4 and v5p come in whole hosts; the number counts cores.
  host = CHIPS_PER_HOST * chip.cores_per_chip
  if chip.dimensions == 3 and (number < host or number % host):
    raise ValueError(
      f"--topology={name}: {generation} comes in multiples of {host} cores "
      f"({CHIPS_PER_HOST} chips); v4-128 has 64 chips"
    )
  return generation, number // chip.cores_per_chip


def hosts_of_slice(generation: str, chips: int) -> int:
  """How many hosts a slice has as a TPU VM. One of 8 chips in two dimensions is a single host."""
  if TPUS[generation].dimensions == 2 and chips == 8:
    return 1
  return max(1, chips // CHIPS_PER_HOST)


def main(arguments: list[str]) -> int:
  """Prints one line for launch/tpu_vm.sh: generation, type, runtime version, chips, cents, hosts.

  Chips and hosts are those of one slice, cents the list price of a chip-hour. Bad input is one line
  on stderr and status 2.
  """
  if len(arguments) != 2 or arguments[0] != "accelerator":
    print("error: usage: chips.py accelerator TOPOLOGY", file=sys.stderr)
    return 2

  try:
    generation, chips = parse_accelerator(arguments[1])
  except ValueError as error:
    print(f"error: {error}", file=sys.stderr)
    return 2

  # Whole cents, since bash knows no fractions.
  chip = TPUS[generation]
  cents = round(100 * chip.usd_per_chip_hour)
  name = accelerator_type(generation, chips)
  hosts = hosts_of_slice(generation, chips)
  print(generation, name, chip.runtime_version, chips, cents, hosts)
  return 0


if __name__ == "__main__":
  sys.exit(main(sys.argv[1:]))
