# SPDX-License-Identifier: Apache-2.0
"""Matmul with mixed precision: float32 master weights, operands in x's dtype, sums in float32.

A weight multiplies. `Dense` holds one float32 matrix, and `quantization.Int8` is another weight; a
third would be a file of its own. A weight is a pytree dataclass with these methods:

  matmul(x_BTI, bias_O, gathered, context, out_dtype) -> [B, T, O]
  lookup(ids_BT, context) -> [B, T, D]
  __getitem__(index) -> the weight with each array indexed, since a Param is read as `w[...]`

FSDP decides how the product is written: the weight is cast before it is all-gathered, and its
gradient is reduce-scattered where it is summed.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec as P

from gpt2_jax.kernels import cpu
from gpt2_jax.sharding import RESIDUAL, ROWS, platform, unshard
from gpt2_jax.unreduced import gradient_spec, last_split, sum_over_rows


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Context:
  """What some weights need besides x: a key for their dropout, an adapter's number for each row."""

  key: jax.Array | None = None
  adapter_B: jax.Array | None = None

  def fold(self, n) -> "Context":
    """The context of the n-th layer, or of the n-th weight in it: each draws by its own key."""
    if self.key is None:
      return self
    return dataclasses.replace(self, key=jax.random.fold_in(self.key, n))


NO_CONTEXT = Context()
# Whatever the operands are, the sums are float32.
dot_float32 = functools.partial(jax.lax.dot_general, preferred_element_type=jnp.float32)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Dense:
  """A float32 weight: a matrix [I, O], or with `outputs_are_rows` a table [O, I] like wte."""

  array: jax.Array
  outputs_are_rows: bool = dataclasses.field(default=False, metadata={"static": True})

  def __getitem__(self, index):
    return jax.tree.map(lambda x: x[index], self)

  def matmul(self, x_BTI, bias_O, gathered: P, context: Context = NO_CONTEXT, out_dtype=None):
    """`x @ w + bias` in x's dtype or `out_dtype`; `gathered` is the spec while it is multiplied."""
    contract = 1 if self.outputs_are_rows else 0
    return matmul(x_BTI, self.array, bias_O, gathered, contract, out_dtype)

  def lookup(self, ids_BT, context: Context = NO_CONTEXT):
    """Embedding lookup: rows of the table, [B, T, D]."""
    return embedding_lookup(self.array, ids_BT)


def embedding_lookup(table_VD, ids_BT):
  """Rows of a table that may be split over `model`, [B, T, D]."""
  return unshard(table_VD).at[ids_BT].get(out_sharding=RESIDUAL)


def matmul_rows(x_BTI, w, contract: int, last):
  """Matmul over the last axis of x and axis `contract` of w; the outputs are split over `last`."""
  dims = (((2,), (contract,)), ((), ()))
  return dot_float32(x_BTI, w, dims, out_sharding=P(ROWS, None, last))


def weight_gradient(a_BTI, b_BTO, spec: P):
  """The sum over rows of their outer products, [I, O], in float32, laid out by `spec`."""
  dims = (((0, 1), (0, 1)), ((), ()))
  contract = functools.partial(dot_float32, a_BTI, b_BTO, dims)
  return sum_over_rows(contract, spec, (last_split(a_BTI), last_split(b_BTO)))


def bias_gradient(y_BTO, spec: P):
  """The sum over rows, [O], in float32, laid out by `spec`."""
  if not spec.unreduced:
    return y_BTO.sum((0, 1), dtype=jnp.float32)
  return jax.lax.reduce_sum(y_BTO.astype(jnp.float32), (0, 1), out_sharding=spec)


def matmul_forms():
  """(matmul_rows, weight_gradient, bias_gradient) as the platform in force wants them written."""
  if platform() == "cpu":
    return cpu.matmul_rows_flat, cpu.weight_gradient_flat, cpu.bias_gradient_as_matmul
  return matmul_rows, weight_gradient, bias_gradient


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def matmul(x_BTI, w_IO, b_O, gathered: P, contract: int = 0, out_dtype=None):
  """`x @ w + b` over dimension `contract` of the float32 weight (1: `x @ w.T`).

  The weight is stored sharded over `data` as well; `gathered` is its spec while it is multiplied:
  a split of the output stays a split of the output, a split of the summed dimension becomes an
  all-reduce. Returns x's dtype, or `out_dtype`.
  """
  return _matmul_forward(x_BTI, w_IO, b_O, gathered, contract, out_dtype)[0]


def _all_gather(w_IO, gathered: P, dtype):
  """Casts a weight, then all-gathers it: half the bytes on the wire in bfloat16."""
  return jax.sharding.reshard(w_IO.astype(dtype), gathered)


def _matmul_forward(x_BTI, w_IO, b_O, gathered, contract, out_dtype):
  matmul_rows, _, _ = matmul_forms()
  w = _all_gather(w_IO, gathered, x_BTI.dtype)
  y_BTO = matmul_rows(x_BTI, w, contract, gathered[1 - contract])
  y_BTO = y_BTO if b_O is None else y_BTO + jax.sharding.reshard(b_O, P(gathered[1 - contract]))
  return y_BTO.astype(out_dtype or x_BTI.dtype), (x_BTI, w_IO, b_O)


def _matmul_backward(gathered, contract, out_dtype, saved, dy_BTO):
  matmul_rows, weight_gradient, bias_gradient = matmul_forms()
  x_BTI, w_IO, b_O = saved
  dy_BTO = dy_BTO.astype(x_BTI.dtype)

  # The weight is gathered again: keeping it from the forward pass would keep the whole model.
  w = _all_gather(w_IO, gathered, dy_BTO.dtype)
  dx_BTI = matmul_rows(dy_BTO, w, 1 - contract, gathered[contract]).astype(dy_BTO.dtype)

  # The spec of the stored weight makes the sum over the batch a reduce-scatter.
  a_BTI, b_BTO = (x_BTI, dy_BTO) if contract == 0 else (dy_BTO, x_BTI)
  dw_IO = weight_gradient(a_BTI, b_BTO, gradient_spec(w_IO))
  db_O = None if b_O is None else bias_gradient(dy_BTO, gradient_spec(b_O))
  return dx_BTI, dw_IO, db_O


matmul.defvjp(_matmul_forward, _matmul_backward)


def normal(key, shape: tuple[int, int], spec: P, std: float, pad: tuple[int, int] | None = None):
  """A float32 matrix of N(0, std^2), with zeros as padding.

  `pad` = (axis, size) says which axis may be padded: it holds zeros from `size` on. That axis is
  drawn first: JAX fills an array in row-major order, whatever its sharding, so padding never
  changes the values that are not padding.
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
    self.w = nnx.Param(Dense(normal(key, shape, spec, std, pad)))
    self.gathered = P(*(None if name == "data" else name for name in spec))
    bias_spec = P(self.gathered[1])
    self.b = nnx.Param(jnp.zeros(shape[1:], out_sharding=bias_spec)) if use_bias else None

  def __call__(self, x_BTI, context: Context = NO_CONTEXT):
    bias_O = None if self.b is None else self.b[...]
    y_BTO = self.w[...].matmul(x_BTI, bias_O, self.gathered, context)
    return checkpoint_name(y_BTO, "linear")  # a name for `remat="dots"`
