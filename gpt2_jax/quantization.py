# SPDX-License-Identifier: Apache-2.0
"""Int8 weights for inference: a quarter of float32's memory, and of the bytes that each decoded token reads."""

import jax
import jax.numpy as jnp

from gpt2_jax.linear import int8
from gpt2_jax.model import GPT2, name_of


def quantize(model: GPT2) -> GPT2:
  """The model with an int8 `wte` and int8 matrices in its layers, a float32 scale for each output of each.

  It serves wherever a model is read: called, scored, made `ready`. Position embeddings, norms and biases stay float32;
  activations keep the precision of `config.dtype`. Raises ValueError on a model that is quantized already.
  """
  with jax.set_mesh(model.mesh):
    return _quantize(model)


@jax.jit
def _quantize(model: GPT2) -> GPT2:
  def replace(path, leaf):
    if leaf.dtype == jnp.int8:
      raise ValueError("the model is quantized already; give the float32 one")
    name = name_of(path)
    if name == "wte":
      return int8(leaf)
    return int8(jnp.swapaxes(leaf, 1, 2)) if name.endswith(".w") else leaf

  return jax.tree_util.tree_map_with_path(replace, model)
