# SPDX-License-Identifier: Apache-2.0
"""Causal attention for NVIDIA GPUs: cuDNN's, in bfloat16."""

import functools

import jax
import jax.numpy as jnp

from gpt2_jax.sharding import BATCH, HEADS, padded


def cudnn_attention(q_BTHK, k_BTHK, v_BTHK, segments_BT=None):
  """softmax(q k' / sqrt(K)) v by cuDNN, on each device's own heads."""
  cudnn = functools.partial(jax.nn.dot_product_attention, is_causal=True, implementation="cudnn")

  # A mask of segments is a bias to cuDNN, one for all heads: a square of the row's length.
  def packed(q_BTHK, k_BTHK, v_BTHK, segments_BT):
    if segments_BT is None:
      return cudnn(q_BTHK, k_BTHK, v_BTHK)
    T = q_BTHK.shape[1]
    room = ((0, 0), (0, padded(T, 2) - T))  # a bias asks for even lengths; padding comes last
    q, k, v = (jnp.pad(x, (*room, (0, 0), (0, 0))) for x in (q_BTHK, k_BTHK, v_BTHK))
    segments_BT = jnp.pad(segments_BT, room)
    mask_B1TS = segments_BT[:, None, :, None] == segments_BT[:, None, None, :]
    return cudnn(q, k, v, mask=mask_B1TS)[:, :T]

  on_shards = jax.shard_map(
    packed, in_specs=(*(HEADS,) * 3, BATCH), out_specs=HEADS, check_vma=False
  )
  return on_shards(q_BTHK, k_BTHK, v_BTHK, segments_BT)
