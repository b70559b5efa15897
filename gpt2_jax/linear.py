# SPDX-License-Identifier: Apache-2.0
"""The matrix product: float32 master weights, operands in the compute dtype, sums in float32.

One function owns how a product is written down, because the form decides the speed: XLA's CPU backend wants
two dimensions and float32 sums forward and backward (bfloat16 runs at a quarter of its speed otherwise), and
FSDP wants the weight cast before it is gathered and its gradient scattered where it is summed.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec as P

from gpt2_jax.sharding import BATCH, RESIDUAL, ROWS, axis_size, platform

TINY = jnp.finfo(jnp.float32).tiny  # a scale for rows of zeros


def dot(a, b, contract: tuple[int, int], out_sharding: P):
  """`a` and the matrix `b`, summed over one dimension of each in float32."""
  one = a.ndim == 2 and a.shape[0] == 1 and contract[0] == 1 and a.dtype == jnp.bfloat16 and axis_size(*ROWS) == 1
  if one:  # decoding one row: XLA's CPU backend has bfloat16 kernels for two or more, and would convert the weight
    a = jnp.pad(a, ((0, 1), (0, 0)))
  dims = (((contract[0],), (contract[1],)), ((), ()))
  y = jax.lax.dot_general(a, b, dims, preferred_element_type=jnp.float32, out_sharding=out_sharding)
  return y[:1] if one else y


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Int8:
  """A weight to infer with: int8 [..., O, I] and a float32 scale a row, the values being q * scale; outputs are rows.

  It takes the place of a float32 matrix [..., I, O], or of the table [V, D] as it is.
  """

  q_OI: jax.Array
  scale_O: jax.Array

  def __getitem__(self, index):
    return jax.tree.map(lambda x: x[index], self)  # a Param is read as `w[...]`


def int8(w_OI) -> Int8:
  """Symmetric, each row by its largest value: |w - q * scale| <= scale / 2. A row of zeros stays zeros."""
  scale_O = jnp.maximum(jnp.abs(w_OI).max(-1) / 127, TINY)
  return Int8(jnp.round(w_OI / scale_O[..., None]).astype(jnp.int8), whole(scale_O))


def whole(x):
  """`x` gathered over `data`: as it is read, not as it is stored."""
  without = {"data": None, ("model", "data"): "model"}
  return jax.sharding.reshard(x, P(*(without.get(name, name) for name in jax.typeof(x).sharding.spec)))


def take(table_VD, ids_BT):
  """Rows of a table that may be split over `model`, [B, T, D]."""
  if isinstance(table_VD, Int8):
    scale_BT = whole(table_VD.scale_O).at[ids_BT].get(out_sharding=BATCH)
    return take(table_VD.q_OI, ids_BT) * scale_BT[..., None]
  return whole(table_VD).at[ids_BT].get(out_sharding=RESIDUAL)


def digits(x_RI, n: int):
  """Each row as `n` int8 digits of base 254, [n * R, I], the first ones first, and their unit [R, 1].

  What they leave out is at most (1 / 2) / (127 * 254^(n - 1)) of the row's largest value, and float32's rounding.
  """
  x_RI = x_RI.astype(jnp.float32)
  unit_R1 = jnp.maximum(jnp.abs(x_RI).max(1, keepdims=True) / 127, TINY)
  rest_RI, found = x_RI / unit_R1, []
  for _ in range(n):
    found.append(jnp.round(rest_RI))
    rest_RI = (rest_RI - found[-1]) * 254
  return jnp.concatenate(found).astype(jnp.int8), unit_R1


def dot_int8(x_RI, q_OI, out_sharding: P):
  """`x @ q.T` in float32, with `x` as precise as its dtype: what is quantized is the weight.

  Accelerators convert int8 as they read it. XLA's CPU backend writes a converted copy first, which costs more than a
  few rows do; but it has a kernel for int8 by int8, so few rows are multiplied digit by digit.
  """
  n = 2 if x_RI.dtype == jnp.bfloat16 else 3
  rows = x_RI.shape[0]

  def converted(x_RI, q_OI):
    return dot(x_RI, q_OI.astype(x_RI.dtype), (1, 1), out_sharding)

  def as_it_is_read(x_RI, q_OI):
    # Without the barrier XLA would convert once before a loop, and then read two or four times the bytes in it.
    return converted(*jax.lax.optimization_barrier((x_RI, q_OI)))

  def by_digits(x_RI, q_OI):
    digits_NI, unit_R1 = digits(x_RI, n)
    dims = (((1,), (1,)), ((), ()))
    y_NO = jax.lax.dot_general(digits_NI, q_OI, dims, preferred_element_type=jnp.int32, out_sharding=out_sharding)
    y_RO, *lower = [y_NO[rows * i : rows * (i + 1)].astype(jnp.float32) / 254**i for i in range(n)]
    return sum(lower, y_RO) * unit_R1

  few = rows * n <= 32 and axis_size(*ROWS) == 1  # up to 10 of float32; at 32 a copy is as fast
  return jax.lax.platform_dependent(x_RI, q_OI, cpu=by_digits if few else converted, default=as_it_is_read)


def flat_rows(x_BTI):
  """[B, T, I] as [B * T, I]; the batch stays split as it was."""
  return jnp.reshape(x_BTI, (-1, x_BTI.shape[-1]), out_sharding=P(ROWS, jax.typeof(x_BTI).sharding.spec[2]))


def rows_of(x_BTI):
  """As products want it: flat rows on the CPU, for XLA's backend there wants two dimensions; elsewhere as it is."""
  return flat_rows(x_BTI) if platform() == "cpu" else x_BTI


def unrows(x, like_BTI):
  """What `rows_of` or `flat_rows` made, as [B, T, O] again."""
  if x.ndim == 3:
    return x
  B, T, _ = like_BTI.shape
  return jnp.reshape(x, (B, T, x.shape[1]), out_sharding=P(ROWS, None, jax.typeof(x).sharding.spec[1]))


def row_spec(x, last) -> P:
  """The spec of rows like those of `x`, their entries split over `last`."""
  return P(ROWS, *(None,) * (x.ndim - 2), last)


def outer_sum(a_BTI, b_BTO, out_sharding: P):
  """The sum of the outer products of rows, [I, O], in float32."""
  if platform() != "cpu":
    dims = (((0, 1), (0, 1)), ((), ()))
    return jax.lax.dot_general(a_BTI, b_BTO, dims, preferred_element_type=jnp.float32, out_sharding=out_sharding)
  return dot(turned(a_BTI), rows_of(b_BTO), (1, 0), out_sharding)


def turned(x_BTI):
  """[B, T, I] as [I, B * T]. bfloat16 goes in blocks, for XLA folds a plain transpose into the product on the CPU and
  then runs it in float32 at half the speed."""
  if x_BTI.dtype != jnp.bfloat16:
    return rows_of(x_BTI).T
  B, T, n = x_BTI.shape
  x_IBTt = jnp.moveaxis(x_BTI.reshape(B, -1, math.gcd(T, 128), n), 3, 0)
  return jnp.reshape(x_IBTt, (n, B * T), out_sharding=P(jax.typeof(x_BTI).sharding.spec[2], ROWS))


def column_sums(y_BTO):
  """The sum over rows, [O], as a product: XLA's CPU backend reduces rows many times slower."""
  y = rows_of(y_BTO)
  if y.ndim == 3:
    return y.sum((0, 1), dtype=jnp.float32)
  ones = jnp.ones((8, y.shape[0]), y.dtype, out_sharding=P(None, ROWS))
  return dot(ones, y, (1, 0), P(None, jax.typeof(y).sharding.spec[1]))[0]


def project(x_BTI, w_IO, b_O, gathered: P, contract: int = 0, out_dtype=None):
  """`x @ w + b` over dimension `contract` of the float32 weight (1: `x @ w.T`), in x's dtype or `out_dtype`.

  The weight is stored sharded over `data` as well; `gathered` is its spec while it is multiplied: a split of
  the output stays a split of the output, a split of the summed dimension becomes an all-reduce. An Int8 weight
  stands for the float32 one and has no gradient: TypeError.
  """
  if isinstance(w_IO, Int8):
    return _project_int8(x_BTI, w_IO, b_O, out_dtype)
  return _project(x_BTI, w_IO, b_O, gathered, contract, out_dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _project_int8(x_BTI, w: Int8, b_O, out_dtype):
  q_OI = whole(w.q_OI)
  y = dot_int8(flat_rows(x_BTI), q_OI, P(ROWS, jax.typeof(q_OI).sharding.spec[0])) * w.scale_O
  y = y if b_O is None else y + b_O
  return unrows(y.astype(out_dtype or x_BTI.dtype), x_BTI)


def _int8_forward(x_BTI, w: Int8, b_O, out_dtype):
  raise TypeError("an int8 model has no gradient; train the float32 model and quantize what comes out")


_project_int8.defvjp(_int8_forward, _int8_forward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def _project(x_BTI, w_IO, b_O, gathered: P, contract: int, out_dtype):
  return _project_forward(x_BTI, w_IO, b_O, gathered, contract, out_dtype)[0]


def _gather(w_IO, gathered: P, dtype):
  return jax.sharding.reshard(w_IO.astype(dtype), gathered)


def _project_forward(x_BTI, w_IO, b_O, gathered, contract, out_dtype):
  w = _gather(w_IO, gathered, x_BTI.dtype)
  x = rows_of(x_BTI)
  y = dot(x, w, (x.ndim - 1, contract), row_spec(x, gathered[1 - contract]))
  y = y if b_O is None else y + b_O
  return unrows(y.astype(out_dtype or x_BTI.dtype), x_BTI), (x_BTI, w_IO, b_O)


def _project_backward(gathered, contract, out_dtype, saved, dy_BTO):
  x_BTI, w_IO, b_O = saved
  dy_BTO = dy_BTO.astype(x_BTI.dtype)
  dy = rows_of(dy_BTO)
  dx = dot(dy, _gather(w_IO, gathered, dy.dtype), (dy.ndim - 1, 1 - contract), row_spec(dy, gathered[contract]))
  a_BTI, b_BTO = (x_BTI, dy_BTO) if contract == 0 else (dy_BTO, x_BTI)
  dw_IO = outer_sum(a_BTI, b_BTO, jax.typeof(w_IO).sharding.spec)
  db_O = None if b_O is None else column_sums(dy_BTO)
  return unrows(dx.astype(dy.dtype), x_BTI), dw_IO, db_O


_project.defvjp(_project_forward, _project_backward)


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
