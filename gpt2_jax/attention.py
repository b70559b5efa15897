# SPDX-License-Identifier: Apache-2.0
"""Causal attention. Letters as in model.py; scores, softmax and sums are float32 whatever the operands are.

`self_attention` chooses the kernel of the platform; `causal_attention`, plain JAX in chunks of queries, is what each of
them is tested against, and what CPUs and dropout use.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel, splash_attention_mask

from gpt2_jax.fused_attention import fused_attention, suits
from gpt2_jax.sharding import HEADS, HIDDEN, padded, platform

QUERIES = 256  # queries in one chunk; a chunk reads no key that lies after its last query

einsum = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)


KERNELS = ("auto", "chunked", "fused", "splash", "cudnn")


def split_heads(c_BTC, K: int):
  """Queries, keys and values, [B, T, H, K] each, from columns that run head by head, q, k, v of each."""
  B, T, C = c_BTC.shape
  return jnp.split(jnp.reshape(c_BTC, (B, T, C // (3 * K), 3 * K), out_sharding=HEADS), 3, axis=-1)


def merge_heads(y_BTHK):
  """Heads side by side, [B, T, H K]."""
  B, T, H, K = y_BTHK.shape
  return jnp.reshape(y_BTHK, (B, T, H * K), out_sharding=HIDDEN)


def self_attention(c_BTC, K: int, kernel: str = "auto", dropout=None):
  """Causal attention of the heads whose q, k, v lie side by side in [B, T, 3 H K]; [B, T, H K]. One of `KERNELS`:

  "fused" (ours) and "splash" (JAX's) are for TPUs and are interpreted elsewhere, "cudnn" is for NVIDIA GPUs and
  bfloat16. "auto" takes the fastest of the platform, by the TPU compiler's own count of instructions; on GPUs that
  choice was not measured. Dropout is only in "chunked", whatever is asked for.
  """
  if kernel == "auto":
    tpu = "fused" if suits(c_BTC.shape[1], K) else "splash"
    kernel = {"tpu": tpu, "gpu": "cudnn" if c_BTC.dtype == jnp.bfloat16 else "chunked"}.get(platform(), "chunked")
  if kernel == "fused" and not dropout:
    return fused_attention(c_BTC, K)
  q_BTHK, k_BTHK, v_BTHK = split_heads(c_BTC, K)
  if kernel == "splash" and not dropout:
    return merge_heads(_splash(q_BTHK, k_BTHK, v_BTHK))
  if kernel == "cudnn" and not dropout:
    if platform() != "gpu":
      raise ValueError(f"attention is cudnn and the devices are {platform()}s; set --config.model.attention=auto")
    cudnn = functools.partial(jax.nn.dot_product_attention, is_causal=True, implementation="cudnn")
    return merge_heads(
      jax.shard_map(cudnn, in_specs=(HEADS,) * 3, out_specs=HEADS, check_vma=False)(q_BTHK, k_BTHK, v_BTHK)
    )
  return merge_heads(causal_attention(q_BTHK, k_BTHK, v_BTHK, dropout))


def _splash(q_BTHK, k_BTHK, v_BTHK):
  """JAX's own kernel, in blocks of up to 1,024 with one backward pass: the fastest of its forms at 1,024 tokens."""
  T, K = q_BTHK.shape[1], q_BTHK.shape[3]
  block = min(padded(T, 128), 1024)
  length = padded(T, block)
  sizes = splash_attention_kernel.BlockSizes(
    block_q=block, block_kv=block, block_q_dkv=block, block_kv_dkv=block, use_fused_bwd_kernel=True
  )

  def local(q_BTHK, k_BTHK, v_BTHK):
    mask = splash_attention_mask.CausalMask((length, length))
    attend_HTK = splash_attention_kernel.make_splash_mha(
      splash_attention_mask.MultiHeadMask([mask] * q_BTHK.shape[2]),
      block_sizes=sizes,
      head_shards=1,
      q_seq_shards=1,
      residual_checkpoint_name="attend",
      interpret=platform() != "tpu",
    )
    room = ((0, 0), (0, 0), (0, length - T), (0, 0))  # after the last query: nobody sees it
    q, k, v = (jnp.pad(jnp.swapaxes(x, 1, 2), room) for x in (q_BTHK / math.sqrt(K), k_BTHK, v_BTHK))
    return jnp.swapaxes(jax.vmap(attend_HTK)(q, k, v)[:, :, :T], 1, 2)

  return jax.shard_map(local, in_specs=(HEADS,) * 3, out_specs=HEADS, check_vma=False)(q_BTHK, k_BTHK, v_BTHK)


def attend(q_BTHK, k_BSHK, v_BSHK, mask, dropout=None):
  """softmax(q k' / sqrt(K)) v, [B, T, H, K], where `mask` broadcasts to [B, H, T, S]; False is hidden."""
  scores_BHTS = einsum("bthk,bshk->bhts", q_BTHK, k_BSHK) / math.sqrt(q_BTHK.shape[-1])
  p_BHTS = jax.nn.softmax(jnp.where(mask, scores_BHTS, -jnp.inf), axis=-1)
  if dropout:
    p_BHTS = dropout(p_BHTS)
  return einsum("bhts,bshk->bthk", p_BHTS.astype(v_BSHK.dtype), v_BSHK).astype(q_BTHK.dtype)


def causal_attention(q_BTHK, k_BTHK, v_BTHK, dropout=None):
  """Each position attends to itself and what came before, [B, T, H, K].

  Queries go in chunks, so that the half of the square that the mask would hide is mostly never computed, and no square
  is kept for the backward pass. `dropout` maps the probabilities of a chunk, and the chunk's first query, to what is
  left of them.
  """
  if dropout is None:
    q, k, v = (jnp.swapaxes(x, 1, 2) for x in (q_BTHK, k_BTHK, v_BTHK))
    return jnp.swapaxes(_causal(q, k, v), 1, 2)
  outputs = []
  for start, stop in _chunks(q_BTHK.shape[1]):
    chunk = jax.checkpoint(functools.partial(attend, dropout=functools.partial(dropout, start=start)))
    outputs.append(chunk(q_BTHK[:, start:stop], k_BTHK[:, :stop], v_BTHK[:, :stop], _mask(start, stop)))
  return jnp.concatenate(outputs, axis=1)


def attend_cached(q_BTHK, k_BHSK, v_BHSK, seen_BTS):
  """Attention of a few queries a row, [B, T, H, K], over the slots of a cache that `seen_BTS` allows each."""
  scores_BHTS = einsum("bhtk,bhsk->bhts", jnp.swapaxes(q_BTHK, 1, 2), k_BHSK) / math.sqrt(q_BTHK.shape[-1])
  p_BHTS = jax.nn.softmax(jnp.where(seen_BTS[:, None], scores_BHTS, -jnp.inf), axis=-1)
  return jnp.swapaxes(einsum("bhts,bhsk->bhtk", p_BHTS.astype(v_BHSK.dtype), v_BHSK).astype(q_BTHK.dtype), 1, 2)


def _chunks(T: int):
  return [(start, min(start + QUERIES, T)) for start in range(0, T, QUERIES)]


def _mask(start: int, stop: int):
  return jnp.arange(stop) <= jnp.arange(start, stop)[:, None]


def _scores(q_BHTK, k_BHSK, start: int, stop: int):
  scores_BHTS = einsum("bhtk,bhsk->bhts", q_BHTK[:, :, start:stop], k_BHSK[:, :, :stop])
  return jnp.where(_mask(start, stop), scores_BHTS / math.sqrt(q_BHTK.shape[-1]), -jnp.inf)


@jax.custom_vjp
def _causal(q_BHTK, k_BHTK, v_BHTK):
  return _causal_forward(q_BHTK, k_BHTK, v_BHTK)[0]


def _causal_forward(q_BHTK, k_BHTK, v_BHTK):
  outputs, lses = [], []
  for start, stop in _chunks(q_BHTK.shape[2]):
    scores_BHTS = _scores(q_BHTK, k_BHTK, start, stop)
    max_BHT1 = scores_BHTS.max(-1, keepdims=True)
    e_BHTS = jnp.exp(scores_BHTS - max_BHT1)
    sum_BHT1 = e_BHTS.sum(-1, keepdims=True)
    y_BHTK = einsum("bhts,bhsk->bhtk", e_BHTS.astype(v_BHTK.dtype), v_BHTK[:, :, :stop]) / sum_BHT1
    outputs.append(y_BHTK.astype(q_BHTK.dtype))
    lses.append(max_BHT1 + jnp.log(sum_BHT1))
  y_BHTK, lse_BHT1 = (checkpoint_name(jnp.concatenate(x, axis=2), "attend") for x in (outputs, lses))
  return y_BHTK, (q_BHTK, k_BHTK, v_BHTK, y_BHTK, lse_BHT1)


def _causal_backward(saved, dy_BHTK):
  """The probabilities again from their logsumexp; their gradient as in FlashAttention (Dao et al. 2022), appendix B."""
  q, k, v, y, lse = saved
  scale = 1 / math.sqrt(q.shape[-1])
  inner_BHT1 = jnp.sum(dy_BHTK.astype(jnp.float32) * y, axis=-1, keepdims=True)
  dqs, dk, dv = [], 0.0, 0.0
  for start, stop in _chunks(q.shape[2]):
    dy = dy_BHTK[:, :, start:stop]
    p_BHTS = jnp.exp(_scores(q, k, start, stop) - lse[:, :, start:stop])
    dp_BHTS = einsum("bhtk,bhsk->bhts", dy, v[:, :, :stop])
    ds_BHTS = (p_BHTS * (dp_BHTS - inner_BHT1[:, :, start:stop]) * scale).astype(q.dtype)
    after = ((0, 0), (0, 0), (0, q.shape[2] - stop), (0, 0))
    dqs.append(einsum("bhts,bhsk->bhtk", ds_BHTS, k[:, :, :stop]))
    dk += jnp.pad(einsum("bhts,bhtk->bhsk", ds_BHTS, q[:, :, start:stop]), after)
    dv += jnp.pad(einsum("bhts,bhtk->bhsk", p_BHTS.astype(v.dtype), dy), after)
  return jnp.concatenate(dqs, axis=2).astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype)


_causal.defvjp(_causal_forward, _causal_backward)
