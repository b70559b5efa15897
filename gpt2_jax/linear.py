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
from jax.sharding import PartitionSpec as P

from gpt2_jax.sharding import ROWS


def dot(a, b, contract: tuple[int, int], out_sharding: P):
  """`a` and `b`, two dimensions each, summed over one dimension of each in float32."""
  dims = (((contract[0],), (contract[1],)), ((), ()))
  return jax.lax.dot_general(a, b, dims, preferred_element_type=jnp.float32, out_sharding=out_sharding)


def rows_of(x):
  """[B, T, I] as [B * T, I]; the batch stays split as it was."""
  return x.reshape(-1, x.shape[-1])


def turned(x_BTI):
  """[B, T, I] as [I, B * T]. On the CPU in blocks, for XLA folds a plain transpose into the product and then runs it
  in float32 at half the speed."""

  def in_blocks(x_BTI):
    B, T, n = x_BTI.shape
    return jnp.moveaxis(x_BTI.reshape(B, -1, math.gcd(T, 128), n), 3, 0).reshape(n, B * T)

  return jax.lax.platform_dependent(x_BTI, cpu=in_blocks, default=lambda x: rows_of(x).T)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def project(x_BTI, w_IO, gathered: P, contract: int = 0, out_dtype=None):
  """`x @ w` over dimension `contract` of the float32 weight (1: `x @ w.T`), in x's dtype or `out_dtype`.

  The weight is stored sharded over `data` as well; `gathered` is its spec while it is multiplied: a split of
  the output stays a split of the output, a split of the summed dimension becomes an all-reduce.
  """
  return _project_forward(x_BTI, w_IO, gathered, contract, out_dtype)[0]


def _gather(w_IO, gathered: P, dtype):
  return jax.sharding.reshard(w_IO.astype(dtype), gathered)


def _project_forward(x_BTI, w_IO, gathered, contract, out_dtype):
  w = _gather(w_IO, gathered, x_BTI.dtype)
  y = dot(rows_of(x_BTI), w, (1, contract), P(ROWS, gathered[1 - contract]))
  y_BTO = y.astype(out_dtype or x_BTI.dtype).reshape(*x_BTI.shape[:2], -1)
  return y_BTO, (x_BTI, w_IO)


def _project_backward(gathered, contract, out_dtype, saved, dy_BTO):
  x_BTI, w_IO = saved
  x, dy = rows_of(x_BTI), rows_of(dy_BTO.astype(x_BTI.dtype))
  dx = dot(dy, _gather(w_IO, gathered, x.dtype), (1, 1 - contract), P(ROWS, gathered[contract]))
  a_BTI, b = (x_BTI, dy) if contract == 0 else (dy_BTO, x)
  dw_IO = dot(turned(a_BTI.astype(x.dtype)), b, (1, 0), jax.typeof(w_IO).sharding.spec)
  return dx.astype(x.dtype).reshape(x_BTI.shape), dw_IO


project.defvjp(_project_forward, _project_backward)


def normal(key, shape, spec: P, std: float, real: tuple[int, ...] | None = None):
  """Float32 N(0, std^2) of `shape`, zero beyond the `real` sizes.

  Values are drawn with the padded dimension first, so that padding never changes the real ones: JAX's
  generator fills an array in row-major order, whatever its sharding.
  """
  real = real or shape
  padded_axis = next((axis for axis, (n, r) in enumerate(zip(shape, real, strict=True)) if n != r), 0)
  front = (padded_axis, *(axis for axis in range(len(shape)) if axis != padded_axis))
  full_spec = (*spec, *[None] * (len(shape) - len(spec)))
  drawn = jax.random.normal(
    key, [shape[axis] for axis in front], jnp.float32, out_sharding=P(*(full_spec[axis] for axis in front))
  )
  values = std * jnp.transpose(drawn, [front.index(axis) for axis in range(len(shape))])
  if shape != real:
    index = jax.lax.broadcasted_iota(jnp.int32, shape, padded_axis, out_sharding=spec)
    values = jnp.where(index < real[padded_axis], values, 0.0)
  return values


class Linear(nnx.Module):
  """`x @ w + b`, with w [I, O] sharded by `spec`; `real` are the sizes without padding."""

  def __init__(self, key, shape: tuple[int, int], spec: P, std: float, use_bias: bool, real=None):
    self.w = nnx.Param(normal(key, shape, spec, std, real))
    out = P(None if spec[1] == "data" else spec[1])
    self.b = nnx.Param(jnp.zeros(shape[1:], out_sharding=out)) if use_bias else None
    self.gathered = P(*(None if name == "data" else name for name in spec))

  def __call__(self, x_BTI):
    y_BTO = project(x_BTI, self.w[...], self.gathered)
    return y_BTO if self.b is None else y_BTO + self.b[...].astype(y_BTO.dtype)
