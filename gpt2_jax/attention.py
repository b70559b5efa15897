# SPDX-License-Identifier: Apache-2.0
"""Causal attention. Scores, softmax and sums are float32 whatever the operands are.

`self_attention` runs the platform's kernel. `causal_attention` is plain JAX in chunks of queries:
each kernel is tested against it, and CPUs, dropout and masks use it. Letters as in model.py.
"""

import functools
import math

import jax
import jax.numpy as jnp

from gpt2_jax.kernels.choose import choose_attention
from gpt2_jax.kernels.chunked_attention import (
  causal_mask,
  chunked_attention,
  chunks,
  einsum,
  segment_mask,
)
from gpt2_jax.sharding import BATCH, HEADS, HIDDEN


def split_heads(c_BTC, K: int):
  """Queries, keys and values, [B, T, H, K] each, from columns that run head by head: q, k, v of
  each."""
  B, T, C = c_BTC.shape
  heads = jnp.reshape(c_BTC, (B, T, C // (3 * K), 3 * K), out_sharding=HEADS)
  return jnp.split(heads, 3, axis=-1)


def merge_heads(y_BTHK):
  """Heads side by side, [B, T, H K]."""
  B, T, H, K = y_BTHK.shape
  return jnp.reshape(y_BTHK, (B, T, H * K), out_sharding=HIDDEN)


def by_heads(attention, K: int):
  """An `attend` for a Block from `attention(q, k, v)`, which works on [B, T, H, K] each.

  `attention` gives the heads' outputs and what it wants to remember, such as a KV cache.
  """

  def attend(c_BTC, key=None):
    y_BTHK, memory = attention(*split_heads(c_BTC, K))
    return merge_heads(y_BTHK), memory

  return attend


def self_attention(c_BTC, K: int, kernel: str = "auto", dropout=None, segments_BT=None):
  """Causal attention of heads whose q, k, v lie side by side, [B, T, 3 H K] to [B, T, H K].

  `kernel` is one of `kernels.choose.KERNELS`. "fused" (ours) and "splash" (JAX's) are for TPUs and
  are interpreted elsewhere, "cudnn" is for NVIDIA GPUs and bfloat16. `dropout` (see
  `causal_attention`) is only in "chunked", which then runs whatever is asked for. With
  `segments_BT`, the segment of each token of packed rows, a token sees its own segment only.
  """
  if dropout:
    kernel = "chunked"
  kernel = choose_attention(kernel, c_BTC.shape[1], K, c_BTC.dtype)
  if segments_BT is not None:
    segments_BT = jax.sharding.reshard(segments_BT, BATCH).astype(jnp.int32)

  # Pallas takes a second to import, so only those import it who use it.
  if kernel == "fused":
    from gpt2_jax.kernels.tpu_attention import fused_attention

    return fused_attention(c_BTC, K, segments_BT)
  q_BTHK, k_BTHK, v_BTHK = split_heads(c_BTC, K)
  if kernel == "splash":
    from gpt2_jax.kernels.tpu_attention import splash_attention

    return merge_heads(splash_attention(q_BTHK, k_BTHK, v_BTHK, segments_BT))
  if kernel == "cudnn":
    from gpt2_jax.kernels.gpu_attention import cudnn_attention

    return merge_heads(cudnn_attention(q_BTHK, k_BTHK, v_BTHK, segments_BT))
  return merge_heads(causal_attention(q_BTHK, k_BTHK, v_BTHK, dropout, segments_BT=segments_BT))


def masked_attention(q_BTHK, k_BSHK, v_BSHK, mask, dropout=None):
  """softmax(q k' / sqrt(K)) v, [B, T, H, K]; `mask` broadcasts to [B, H, T, S], False is hidden."""
  scores_BHTS = einsum("bthk,bshk->bhts", q_BTHK, k_BSHK) / math.sqrt(q_BTHK.shape[-1])
  p_BHTS = jax.nn.softmax(jnp.where(mask, scores_BHTS, -jnp.inf), axis=-1)
  if dropout:
    p_BHTS = dropout(p_BHTS)
  return einsum("bhts,bshk->bthk", p_BHTS.astype(v_BSHK.dtype), v_BSHK).astype(q_BTHK.dtype)


def causal_attention(q_BTHK, k_BTHK, v_BTHK, dropout=None, visible=None, segments_BT=None):
  """Each position attends to itself and what came before, [B, T, H, K].

  Queries go in chunks: most of what the mask would hide is never computed, and no square of scores
  is kept for the backward pass. `dropout(p_BHTS, start)` drops probabilities of the chunk whose
  first query is `start`. `visible(start, stop)` narrows the causal mask: which of the keys
  [0, stop) the queries [start, stop) may see, [B, T, S]; `segments_BT` to a token's own segment.
  """
  if dropout is None and visible is None:
    q, k, v = (jnp.swapaxes(x, 1, 2) for x in (q_BTHK, k_BTHK, v_BTHK))
    return jnp.swapaxes(chunked_attention(q, k, v, segments_BT), 1, 2)

  def attend_chunk(start, stop, q, k, v):
    mask = causal_mask(start, stop)
    if visible:
      mask = mask & visible(start, stop)[:, None]
    if segments_BT is not None:
      mask = mask & segment_mask(segments_BT, start, stop)
    drops = dropout and functools.partial(dropout, start=start)
    return masked_attention(q, k, v, mask, drops)

  outputs = []
  for start, stop in chunks(q_BTHK.shape[1]):
    chunk = jax.checkpoint(functools.partial(attend_chunk, start, stop))
    outputs.append(chunk(q_BTHK[:, start:stop], k_BTHK[:, :stop], v_BTHK[:, :stop]))
  return jnp.concatenate(outputs, axis=1)


def cached_attention(q_BTHK, k_BHSK, v_BHSK, mask_BTS, prefix=None):
  """Attention of a few queries a row, [B, T, H, K], over the slots of a KV cache that `mask_BTS`
  allows each, and over the keys and values of `prefix`, [P, H, K] each."""
  q_BHTK = jnp.swapaxes(q_BTHK, 1, 2)
  scores_BHTS = einsum("bhtk,bhsk->bhts", q_BHTK, k_BHSK) / math.sqrt(q_BTHK.shape[-1])
  scores_BHTS = jnp.where(mask_BTS[:, None], scores_BHTS, -jnp.inf)
  if prefix is not None:
    scores_BHTP = einsum("bhtk,phk->bhtp", q_BHTK, prefix[0]) / math.sqrt(q_BTHK.shape[-1])
    scores_BHTS = jnp.concatenate([scores_BHTS, scores_BHTP], axis=-1)

  S, p_BHTS = k_BHSK.shape[2], jax.nn.softmax(scores_BHTS, axis=-1).astype(v_BHSK.dtype)
  y_BHTK = einsum("bhts,bhsk->bhtk", p_BHTS[..., :S], v_BHSK)
  if prefix is not None:
    y_BHTK += einsum("bhtp,phk->bhtk", p_BHTS[..., S:], prefix[1])
  return jnp.swapaxes(y_BHTK.astype(q_BTHK.dtype), 1, 2)
