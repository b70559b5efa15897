# SPDX-License-Identifier: Apache-2.0
"""The matrix product: float32 master weights, operands in the compute dtype, sums in float32.

One function owns how a product is written down, because the form decides the speed: XLA's CPU backend wants
two dimensions and float32 sums forward and backward (bfloat16 runs at a quarter of its speed otherwise), and
FSDP wants the weight cast before it is gathered and its gradient scattered where it is summed.
"""

import functools
import math

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec as P

from gpt2_jax.sharding import ROWS, axis_size


def dot(a, b, contract: tuple[int, int], out_sharding: P):
  """`a` and `b`, two dimensions each, summed over one dimension of each in float32."""
  rows = a.shape[0]
  few = rows < 8 and contract[0] == 1 and a.dtype == jnp.bfloat16 and axis_size(*ROWS) == 1
  if few:  # decoding a few rows: XLA's CPU backend needs eight for its bfloat16 kernels, 15 times as fast
    a = jnp.pad(a, ((0, 8 - rows), (0, 0)))
  dims = (((contract[0],), (contract[1],)), ((), ()))
  y = jax.lax.dot_general(a, b, dims, preferred_element_type=jnp.float32, out_sharding=out_sharding)
  return y[:rows] if few else y


def rows_of(x_BTI):
  """[B, T, I] as [B * T, I]; the batch stays split as it was."""
  return jnp.reshape(x_BTI, (-1, x_BTI.shape[-1]), out_sharding=P(ROWS, jax.typeof(x_BTI).sharding.spec[2]))


def unrows(x, like_BTI):
  """[B * T, O] as [B, T, O]."""
  B, T, _ = like_BTI.shape
  return jnp.reshape(x, (B, T, x.shape[1]), out_sharding=P(ROWS, None, jax.typeof(x).sharding.spec[1]))


def turned(x_BTI):
  """[B, T, I] as [I, B * T]. On the CPU bfloat16 goes in blocks, for XLA folds a plain transpose into the product and
  then runs it in float32 at half the speed."""

  def in_blocks(x_BTI):
    B, T, n = x_BTI.shape
    x_IBTt = jnp.moveaxis(x_BTI.reshape(B, -1, math.gcd(T, 128), n), 3, 0)
    return jnp.reshape(x_IBTt, (n, B * T), out_sharding=P(jax.typeof(x_BTI).sharding.spec[2], ROWS))

  def plainly(x_BTI):
    return rows_of(x_BTI).T

  return jax.lax.platform_dependent(x_BTI, cpu=in_blocks if x_BTI.dtype == jnp.bfloat16 else plainly, default=plainly)


def column_sums(y):
  """The sum over rows, [O], as a product: XLA's CPU backend reduces rows many times slower."""
  ones = jnp.ones((8, y.shape[0]), y.dtype, out_sharding=P(None, ROWS))
  return dot(ones, y, (1, 0), P(None, jax.typeof(y).sharding.spec[1]))[0]


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def project(x_BTI, w_IO, b_O, gathered: P, contract: int = 0, out_dtype=None):
  """`x @ w + b` over dimension `contract` of the float32 weight (1: `x @ w.T`), in x's dtype or `out_dtype`.

  The weight is stored sharded over `data` as well; `gathered` is its spec while it is multiplied: a split of
  the output stays a split of the output, a split of the summed dimension becomes an all-reduce.
  """
  return _project_forward(x_BTI, w_IO, b_O, gathered, contract, out_dtype)[0]


def _gather(w_IO, gathered: P, dtype):
  return jax.sharding.reshard(w_IO.astype(dtype), gathered)


def _project_forward(x_BTI, w_IO, b_O, gathered, contract, out_dtype):
  w = _gather(w_IO, gathered, x_BTI.dtype)
  y = dot(rows_of(x_BTI), w, (1, contract), P(ROWS, gathered[1 - contract]))
  y = y if b_O is None else y + b_O
  return unrows(y.astype(out_dtype or x_BTI.dtype), x_BTI), (x_BTI, w_IO, b_O)


def _project_backward(gathered, contract, out_dtype, saved, dy_BTO):
  x_BTI, w_IO, b_O = saved
  x, dy = rows_of(x_BTI), rows_of(dy_BTO.astype(x_BTI.dtype))
  dx = dot(dy, _gather(w_IO, gathered, x.dtype), (1, 1 - contract), P(ROWS, gathered[contract]))
  a_BTI, b = (x_BTI, dy) if contract == 0 else (dy_BTO, x)
  dw_IO = dot(turned(a_BTI.astype(x.dtype)), b, (1, 0), jax.typeof(w_IO).sharding.spec)
  db_O = None if b_O is None else column_sums(dy)
  return unrows(dx.astype(x.dtype), x_BTI), dw_IO, db_O


project.defvjp(_project_forward, _project_backward)


def normal(key, shape: tuple[int, int], spec: P, std: float, pad: tuple[int, int] | None = None):
  """A float32 matrix of N(0, std^2); `pad` = (axis, size) says which axis may be padded, with zeros from `size` on.

  That axis is drawn first: JAX fills an array in row-major order, whatever its sharding, so padding never changes
  the values that are not padding.
  """
  if pad is None:
    return std * jax.random.normal(key, shape, jnp.float32, out_sharding=spec)
  axis, size = pad
  if axis == 1:
    return normal(key, shape[::-1], P(spec[1], spec[0]), std, (0, size)).T
  index = jax.lax.broadcasted_iota(jnp.int32, shape, 0, out_sharding=spec)
  return jnp.where(index < size, normal(key, shape, spec, std), 0.0)


class Linear(nnx.Module):
  """`x @ w + b`, with w [I, O] sharded by `spec` and initialized as `normal` says."""

  def __init__(self, key, shape: tuple[int, int], spec: P, std: float, use_bias: bool, pad=None):
    self.w = nnx.Param(normal(key, shape, spec, std, pad))
    self.gathered = P(*(None if name == "data" else name for name in spec))
    self.b = nnx.Param(jnp.zeros(shape[1:], out_sharding=P(self.gathered[1]))) if use_bias else None

  def __call__(self, x_BTI):
    return checkpoint_name(
      project(x_BTI, self.w[...], None if self.b is None else self.b[...], self.gathered), "linear"
    )
