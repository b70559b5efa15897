# SPDX-License-Identifier: Apache-2.0
"""The device mesh (data, FSDP and tensor parallelism), and the named sharding specs.

Three axes, always all three. `replica` is plain data parallelism and the only axis that may cross
slices; `data` splits the batch too and shards parameters and optimizer state (FSDP, ZeRO-3);
`model` is Megatron's tensor parallelism. A laptop is the mesh (1, 1, 1): there is no other code
path for it.
"""

import math

import jax
from jax.experimental.mesh_utils import create_device_mesh, create_hybrid_device_mesh
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from gpt2_jax.compat import device_platform

AXES = ("replica", "data", "model")
ROWS = ("replica", "data")  # the axes that split a batch

BATCH = P(ROWS, None)  # [B, T] tokens
RESIDUAL = P(ROWS, None, None)  # [B, T, D]
HIDDEN = P(ROWS, None, "model")  # [B, T, F], and logits [B, T, V]
HEADS = P(ROWS, None, "model", None)  # [B, T, H, K]


def make_mesh(replica: int = 1, data: int = -1, model: int = 1, devices=None) -> Mesh:
  """The mesh over `devices` (default: all); one axis may be -1 and takes the devices that are left.

  Where the devices are several TPU slices, `replica` runs over the slices first, and no other axis
  leaves its slice. Raises ValueError if the sizes do not multiply to the number of devices, or
  `replica` is no multiple of the slices.
  """
  # 1. The sizes, with -1 taking the rest.
  devices = jax.devices() if devices is None else devices
  sizes, count = [replica, data, model], len(devices)
  if sizes.count(-1) > 1 or any(size < 1 and size != -1 for size in sizes):
    raise ValueError(
      f"mesh {tuple(sizes)}: sizes are 1 or more, and at most one is -1 (the rest of the devices)"
    )
  if -1 in sizes:
    sizes[sizes.index(-1)] = max(1, count // -math.prod(sizes))
  if math.prod(sizes) != count:
    raise ValueError(
      f"mesh (replica, data, model) = ({replica}, {data}, {model}) does not multiply to the "
      f"{count} devices here; "
      f"give sizes whose product is {count} (-1 takes the rest)"
    )

  # 2. One slice, or one machine: JAX places the axes on the torus.
  slices = count_slices(devices)
  if slices == 1:
    placed = create_device_mesh(sizes, devices, allow_split_physical_axes=True)
    return Mesh(placed, AXES, axis_types=(AxisType.Explicit,) * 3)

  # 3. Several slices: `replica` over the data center's network, and inside a slice what is left.
  if sizes[0] % slices:
    raise ValueError(
      f"mesh (replica, data, model) = {tuple(sizes)} over {slices} slices: only replica may cross "
      f"slices, so it is a multiple of them; set --config.mesh.replica={slices} and data and model "
      f"to the {count // slices} of one slice"
    )
  within = (sizes[0] // slices, *sizes[1:])
  placed = create_hybrid_device_mesh(
    within, (slices, 1, 1), devices, process_is_granule=False, allow_split_physical_axes=True
  )
  return Mesh(placed, AXES, axis_types=(AxisType.Explicit,) * 3)


def count_slices(devices) -> int:
  """How many TPU slices the devices are; hosts of other platforms are not told apart."""
  slices = {getattr(device, "slice_index", 0) for device in devices if device.platform == "tpu"}
  return max(1, len(slices))


def abstract_mesh(replica: int, data: int, model: int) -> AbstractMesh:
  """A mesh without devices, for `jax.eval_shape` and tracing at the real sizes."""
  return AbstractMesh((replica, data, model), AXES, axis_types=(AxisType.Explicit,) * 3)


def axis_size(*names: str) -> int:
  """Product of the sizes of the named axes of the mesh in force; absent ones count 1."""
  shape = jax.sharding.get_abstract_mesh().shape
  return math.prod(shape.get(name, 1) for name in names)


def platform() -> str:
  """What the mesh in force is made of: "tpu", "gpu" or "cpu"; without devices it is "cpu"."""
  device = jax.sharding.get_abstract_mesh().abstract_device
  return device_platform(device) if device else "cpu"


def check_divides(size: int, what: str, *names: str, way_out: str) -> None:
  """Raises ValueError unless the mesh axes `names` divide `size`."""
  parts = axis_size(*names)
  if size % parts:
    raise ValueError(
      f"{what} of {size} does not divide by the {' x '.join(names)} axes of {parts}; {way_out}"
    )


def unshard(x):
  """All-gathers x over the `data` axis (FSDP unshard); its gradient is reduce-scattered."""
  without_data = {"data": None, ("model", "data"): "model"}
  spec = jax.typeof(x).sharding.spec
  parts = (without_data.get(name, name) for name in spec.update(reduced=frozenset()))
  reduced = frozenset(ROWS) if spec.reduced else frozenset()  # see unreduced.py
  return jax.sharding.reshard(x, P(*parts, reduced=reduced))


def padded(size: int, multiple: int) -> int:
  """`size` rounded up to a multiple."""
  return -(-size // multiple) * multiple


def concrete(tree, mesh: Mesh):
  """`jax.eval_shape`'s answer with shardings on real devices, as a restore wants its targets."""

  def place(leaf):
    spec = leaf.sharding.spec if leaf.sharding else P()  # a scalar has none
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, spec))

  return jax.tree.map(place, tree)
