# SPDX-License-Identifier: Apache-2.0
"""A model called without a mesh in force, as in a notebook: it runs on the mesh that holds it."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from gpt2_jax.sharding import ROWS, axis_size, padded


def call_on_own_mesh(model, tokens_BT, key=None):
  """Logits of any number of rows, float32 [B, T, V], replicated over the model's mesh.

  It is `model(tokens_BT, key)`, compiled once a shape. Raises ValueError for what is no array of
  the model's own tokens.
  """
  # 1. Lists of ids are welcome. JAX clamps indices, so another tokenizer's ids would pass unseen.
  is_traced = isinstance(tokens_BT, jax.core.Tracer)
  if not is_traced:
    tokens_BT = _checked_tokens(tokens_BT, model.config.n_vocab)
  if tokens_BT.ndim != 2 or not tokens_BT.size:
    raise ValueError(
      f"tokens of shape {tokens_BT.shape} are not [B, T]; give one row or more of token ids, "
      f"such as [tokenizer.encode(text)]"
    )

  # 2. Run, and leave out the rows that only fill the mesh.
  return _call_padded(model, tokens_BT, key)


def _checked_tokens(tokens_BT, n_vocab: int) -> jax.Array:
  """The ids as an int32 array. Raises ValueError for other types and for ids out of range."""
  try:
    tokens_BT = np.asarray(tokens_BT)
  except ValueError as error:
    raise ValueError("rows of tokens differ in length; give rows of one length") from error

  # An empty list makes an array of floats. Its shape is refused, not its type.
  if tokens_BT.size and not np.issubdtype(tokens_BT.dtype, np.integer):
    raise ValueError(
      f"tokens are {tokens_BT.dtype}, and ids are whole numbers; encode the text first"
    )
  if tokens_BT.size and (tokens_BT.min() < 0 or tokens_BT.max() >= n_vocab):
    raise ValueError(
      f"tokens {tokens_BT.min()} to {tokens_BT.max()}, and the vocabulary is {n_vocab}; "
      f"is it the right tokenizer?"
    )
  return jnp.asarray(tokens_BT, jnp.int32)


@jax.jit
def _call_padded(model, tokens_BT, key):
  # A traced array's mesh is abstract, which is what a traced function may set.
  mesh = jax.typeof(model.wpe[...]).sharding.mesh
  if mesh.empty:
    raise ValueError(
      "the model's arrays lie on no mesh; load it with load_pretrained, or build it under "
      "jax.set_mesh(gpt2_jax.make_mesh())"
    )

  with jax.sharding.use_abstract_mesh(mesh):
    B = tokens_BT.shape[0]
    more = padded(B, axis_size(*ROWS)) - B
    tokens_BT = jax.sharding.reshard(tokens_BT, P(None, None))
    tokens_BT = jax.sharding.reshard(jnp.pad(tokens_BT, ((0, more), (0, 0))), P(ROWS, None))
    return jax.sharding.reshard(model(tokens_BT, key), P(None, None, None))[:B]
