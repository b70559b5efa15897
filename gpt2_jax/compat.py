# SPDX-License-Identifier: Apache-2.0
"""Differences between versions of JAX, from 0.7.2 (Google Colab's) on: here and nowhere else.

The newest version has the plain path. An older one is asked for the same thing in its own words,
and gives the same numbers.
"""

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P


def get_mesh() -> Mesh:
  """The mesh in force (`jax.set_mesh`), outside of `jax.jit`: `jax.sharding.get_mesh` of 0.8.1."""
  if jax.__version_info__ >= (0, 8, 1):
    return jax.sharding.get_mesh()

  from jax._src import mesh  # it has no public name there

  return mesh.get_concrete_mesh()


def has_unreduced() -> bool:
  """Whether sums may stay unreduced over a mesh axis: `P(unreduced=...)` works from 0.10.2."""
  return jax.__version_info__ >= (0, 10, 2)


def device_platform(device: jax.sharding.AbstractDevice) -> str:
  """The platform of an abstract mesh's device, "tpu", "gpu" or "cpu": `.platform`, from 0.10.1."""
  if jax.__version_info__ >= (0, 10, 1):
    return device.platform

  # Of a GPU, the kind is the name on the card.
  kind = device.device_kind
  if kind == "cpu":
    return "cpu"
  return "tpu" if kind.startswith("TPU") else "gpu"


def bernoulli(key, p: float, shape: tuple[int, ...], spec: P):
  """`jax.random.bernoulli` with an `out_sharding`, which it has from 0.8.1: True with odds p."""
  if jax.__version_info__ >= (0, 8, 1):
    return jax.random.bernoulli(key, p, shape, out_sharding=spec)

  # The newer function's own definition, bit for bit.
  return jax.random.uniform(key, shape, out_sharding=spec) < p


def categorical(key, logits_V):
  """`jax.random.categorical` for one row of logits, in a `jax.vmap` over rows of a mesh."""
  if jax.__version_info__ >= (0, 10):
    return jax.random.categorical(key, logits_V)

  # The newer function's own definition, bit for bit.
  spec = _whole_row()
  gumbel_V = jax.random.gumbel(key, logits_V.shape, logits_V.dtype, out_sharding=spec)
  return jnp.argmax(gumbel_V + logits_V)


def uniform(key, shape: tuple[int]):
  """`jax.random.uniform` of one row, in a `jax.vmap` over rows of a mesh."""
  if jax.__version_info__ >= (0, 10):
    return jax.random.uniform(key, shape)
  return jax.random.uniform(key, shape, out_sharding=_whole_row())


def _whole_row() -> P | None:
  """The spec of a row that no axis of the mesh splits.

  In a `jax.vmap` over rows that a mesh splits, JAX before 0.10 draws only where it is told this.
  """
  return None if jax.sharding.get_abstract_mesh().empty else P(None)


def check_compiles_ahead() -> None:
  """Raises ValueError where JAX is too old for a plan: before 0.10, kernels lose their names.

  Their libtpu, too, words what does not fit in another way.
  """
  if jax.__version_info__ < (0, 10):
    raise ValueError(
      f"a plan is made with JAX 0.10 or newer, and this is {jax.__version__}; in an environment of "
      "its own: pip install 'gpt2_jax[plan]' 'jax[tpu]>=0.10.2'"
    )
