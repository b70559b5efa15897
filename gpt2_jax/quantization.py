# SPDX-License-Identifier: Apache-2.0
"""Int8 weights: a quarter of float32's memory, and of the bytes read for a token.

They are for inference, and a frozen base for what is trained beside them, such as LoRA.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from gpt2_jax.kernels.cpu import flatten_batch, unflatten_batch
from gpt2_jax.kernels.int8 import matmul_int8, quantize_rows
from gpt2_jax.linear import NO_CONTEXT, Context, Dense, embedding_lookup, matmul_forms
from gpt2_jax.model import GPT2
from gpt2_jax.sharding import BATCH, ROWS, unshard
from gpt2_jax.unreduced import gradient_spec


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Int8:
  """A frozen weight: int8 [..., O, I] and a float32 scale a row, the values being q * scale.

  It takes the place of a `Dense`, and outputs are always its rows. Gradients pass through it to x
  and the bias; it has none itself.
  """

  q_OI: jax.Array
  scale_O: jax.Array

  def __getitem__(self, index):
    return jax.tree.map(lambda x: x[index], self)

  def matmul(self, x_BTI, bias_O, gathered: P, context: Context = NO_CONTEXT, out_dtype=None):
    """`x @ (q * scale).T + bias`, see `Dense.matmul`."""
    return _matmul(x_BTI, self, bias_O, x_BTI.dtype, out_dtype or x_BTI.dtype)

  def lookup(self, ids_BT, context: Context = NO_CONTEXT):
    """Embedding lookup: rows of the table, [B, T, D], float32."""
    scale_BT = unshard(self.scale_O).at[ids_BT].get(out_sharding=BATCH)
    return embedding_lookup(self.q_OI, ids_BT) * scale_BT[..., None]


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _matmul(x_BTI, w: Int8, bias_O, x_dtype, out_dtype):
  q_OI = unshard(w.q_OI)
  out_spec = P(ROWS, jax.typeof(q_OI).sharding.spec[0])
  y_RO = matmul_int8(flatten_batch(x_BTI), q_OI, out_spec) * w.scale_O
  y_RO = y_RO if bias_O is None else y_RO + jax.sharding.reshard(bias_O, P(out_spec[1]))
  return unflatten_batch(y_RO.astype(out_dtype), x_BTI)


def _matmul_forward(x_BTI, w: Int8, bias_O, x_dtype, out_dtype):
  return _matmul(x_BTI, w, bias_O, x_dtype, out_dtype), (w, bias_O)


def _matmul_backward(x_dtype, out_dtype, saved, dy_BTO):
  """dx = dy @ (q * scale), with operands in x's dtype; nothing of x is kept for it."""
  matmul_rows, _, bias_gradient = matmul_forms()
  w, bias_O = saved
  dy_BTO = dy_BTO.astype(x_dtype)
  scaled_BTO = (dy_BTO * w.scale_O).astype(x_dtype)

  q_OI = unshard(w.q_OI)
  inputs = jax.typeof(q_OI).sharding.spec[1]
  dx_BTI = matmul_rows(scaled_BTO, q_OI.astype(x_dtype), 0, inputs).astype(x_dtype)
  db_O = None if bias_O is None else bias_gradient(dy_BTO, gradient_spec(bias_O))
  return dx_BTI, None, db_O


_matmul.defvjp(_matmul_forward, _matmul_backward)


def int8(weight: Dense) -> Int8:
  """Quantizes a weight to int8: each output by its largest value."""
  w_OI = weight.array if weight.outputs_are_rows else jnp.swapaxes(weight.array, -1, -2)
  q_OI, scale_O = quantize_rows(w_OI)
  return Int8(q_OI, unshard(scale_O))


def quantize(model: GPT2) -> GPT2:
  """The model with int8 weights: `wte` and the matrices of its layers, a scale for each output.

  It serves wherever a model is read: called, scored, made ready for inference. Position embeddings,
  norms and biases stay float32; activations keep the precision of `config.dtype`. Raises ValueError
  on a model that is quantized already.
  """
  with jax.set_mesh(model.mesh):
    return quantize_on_mesh(model)


@jax.jit
def quantize_on_mesh(model: GPT2) -> GPT2:
  """`quantize` with the model's mesh in force, also inside of `jax.jit` and `jax.eval_shape`."""

  def is_weight(node) -> bool:
    return isinstance(node, Dense | Int8)

  def replace(node):
    if isinstance(node, Int8):
      raise ValueError("the model is quantized already; give the float32 one")
    return int8(node) if isinstance(node, Dense) else node

  return jax.tree.map(replace, model, is_leaf=is_weight)
