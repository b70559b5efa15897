# SPDX-License-Identifier: Apache-2.0
"""Causal attention for NVIDIA GPUs: cuDNN's, in bfloat16."""

import functools

import jax

from gpt2_jax.sharding import HEADS


def cudnn_attention(q_BTHK, k_BTHK, v_BTHK):
  """softmax(q k' / sqrt(K)) v by cuDNN, on each device's own heads."""
  cudnn = functools.partial(jax.nn.dot_product_attention, is_causal=True, implementation="cudnn")
  on_shards = jax.shard_map(cudnn, in_specs=(HEADS,) * 3, out_specs=HEADS, check_vma=False)
  return on_shards(q_BTHK, k_BTHK, v_BTHK)
