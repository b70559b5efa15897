# SPDX-License-Identifier: Apache-2.0
"""KV cache of a TPU: the heads of a token side by side, [B, S, X], and attention over it.

The last axis of an array fills 128 lanes, so a cache whose last axis is a head of 64 takes twice
its bytes. And the vector unit would multiply a single query with its keys, for heads are batches of
a matmul then. Here all heads of a row are one matmul, in which each query is zero outside of its
own head's columns: more multiply-adds, which the matrix unit does faster than the cache is read.

  M parts of the heads, one for each device of the `model` axis  H heads of a part  X = H K columns
"""

import math

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from gpt2_jax.kernels.chunked_attention import einsum
from gpt2_jax.sharding import HEADS, ROWS, axis_size

_PARTS = P(ROWS, None, "model", None)


def attention_side_by_side(q_BTHK, k_BSX, v_BSX, mask_BTS, prefix=None):
  """`attention.cached_attention` over a cache whose heads lie side by side: [B, T, H, K].

  `mask_BTS` allows each query some of the slots. `prefix` are keys and values that every query
  sees, [P, H, K] each.
  """
  # 1. Queries of a part's heads, each zero outside of its own columns.
  B, T, n_head, K = q_BTHK.shape
  M = axis_size("model")
  H = n_head // M
  is_own_HX = jnp.arange(H)[:, None] == jnp.arange(H * K) // K
  q_BTMX = jnp.reshape(q_BTHK, (B, T, M, H * K), out_sharding=_PARTS)
  q_BTMHX = jnp.where(is_own_HX, q_BTMX[:, :, :, None], 0)

  # 2. Scores of the slots, and of the prefix behind them.
  S = k_BSX.shape[1]
  k_BSMX, v_BSMX = (
    jnp.reshape(x_BSX, (B, S, M, H * K), out_sharding=_PARTS) for x_BSX in (k_BSX, v_BSX)
  )
  scores_BMTHS = einsum("btmhx,bsmx->bmths", q_BTMHX, k_BSMX) / math.sqrt(K)
  scores_BMTHS = jnp.where(mask_BTS[:, None, :, None], scores_BMTHS, -jnp.inf)
  if prefix is not None:
    k_PMX, v_PMX = (
      jnp.reshape(x_PHK, (-1, M, H * K), out_sharding=P(None, "model", None)) for x_PHK in prefix
    )
    scores_BMTHP = einsum("btmhx,pmx->bmthp", q_BTMHX, k_PMX) / math.sqrt(K)
    scores_BMTHS = jnp.concatenate([scores_BMTHS, scores_BMTHP], axis=-1)

  # 3. Values: of each head its own columns, which are then side by side again.
  p_BMTHS = jax.nn.softmax(scores_BMTHS, axis=-1).astype(v_BSX.dtype)
  y_BTMHX = einsum("bmths,bsmx->btmhx", p_BMTHS[..., :S], v_BSMX)
  if prefix is not None:
    y_BTMHX += einsum("bmthp,pmx->btmhx", p_BMTHS[..., S:], v_PMX)
  y_BTMX = jnp.where(is_own_HX, y_BTMHX, 0).sum(3).astype(q_BTHK.dtype)
  return jnp.reshape(y_BTMX, (B, T, n_head, K), out_sharding=HEADS)
