# SPDX-License-Identifier: Apache-2.0
"""Attention weights: which tokens each head attends to. Letters as in model.py."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from gpt2_jax.attention import by_heads, causal_attention
from gpt2_jax.decoding.kv_cache import InferenceModel, check_finite
from gpt2_jax.decoding.prompts import check_prompts
from gpt2_jax.inspection.labels import token_labels
from gpt2_jax.inspection.predictions import encode_text, one_row
from gpt2_jax.kernels.chunked_attention import causal_mask, einsum
from gpt2_jax.model import GPT2
from gpt2_jax.tokenizer import Tokenizer

MAX_BYTES = 1 << 30  # of the weights: all layers of GPT-2 117M at 1,024 tokens


@dataclasses.dataclass(frozen=True, eq=False)
class AttentionWeights:
  """The attention probabilities of a text. Each query's row sums to 1, and the future is 0."""

  tokens: list[int]
  labels: list[str]  # the tokens, printable
  weights_LHTS: np.ndarray  # float32: layer, head, query, key

  def __repr__(self) -> str:
    L, H, T, _ = self.weights_LHTS.shape
    return f"AttentionWeights({L} layers, {H} heads, {T} tokens)"


def attention_weights(model: GPT2, tokenizer: Tokenizer, text: str) -> AttentionWeights:
  """The attention weights of all layers and heads on a text.

  The text is read as `complete` reads it. Raises ValueError for one that is empty, exceeds the
  context, or whose weights exceed a gigabyte.
  """
  # 1. Encode, and refuse what cannot be held.
  ids = encode_text(model, tokenizer, text)
  config = model.config
  check_prompts(InferenceModel(model, model.wte[...], []), [ids], n_new=1)
  if len(ids) > config.n_ctx:
    raise ValueError(
      f"{len(ids):,} tokens exceed the context of {config.n_ctx:,}; give a shorter text"
    )
  with jax.set_mesh(model.mesh):
    tokens_BT, _ = one_row(model, ids)
    n_bytes = 4 * config.n_layer * config.padded_heads * tokens_BT.size * tokens_BT.shape[1]
  if n_bytes > MAX_BYTES:
    raise ValueError(
      f"the attention weights of {len(ids):,} tokens take {n_bytes / 1e9:.1f} GB, and "
      f"{MAX_BYTES / 1e9:.1f} GB is the most; give a shorter text"
    )

  # 2. Compute, and cut what is padding: heads, and tokens at the end.
  with jax.set_mesh(model.mesh):
    weights_LHTS, x_TD = jax.device_get(_weights(model, tokens_BT))
  T = len(ids)
  check_finite(not np.isfinite(x_TD[:T]).all())
  return AttentionWeights(
    ids, token_labels(tokenizer, ids), weights_LHTS[:, : config.n_head, :T, :T].copy()
  )


@jax.jit
def _weights(model: GPT2, tokens_BT):
  """Attention weights of the first row, [L, H, T, S], and the model's output for it, [T, D]."""
  mask_TS = causal_mask(0, tokens_BT.shape[1])

  # A block takes its attention. This one remembers its probabilities.
  def attention(q_BTHK, k_BTHK, v_BTHK):
    scores_BHTS = einsum("bthk,bshk->bhts", q_BTHK, k_BTHK) / math.sqrt(q_BTHK.shape[-1])
    p_BHTS = jax.nn.softmax(jnp.where(mask_TS, scores_BHTS, -jnp.inf), axis=-1)
    return causal_attention(q_BTHK, k_BTHK, v_BTHK), p_BHTS

  attend = by_heads(attention, model.config.head_size)
  x_BTD, _, weights_LBHTS = model.hidden(model.embed(tokens_BT), attend=attend)
  weights_LBHTS, x_BTD = jax.sharding.reshard((weights_LBHTS, x_BTD), P())
  return weights_LBHTS[:, 0], x_BTD[0]
