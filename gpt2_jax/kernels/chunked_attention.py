# SPDX-License-Identifier: Apache-2.0
"""Causal attention in chunks of queries, in plain JAX, with its own backward pass.

A chunk reads no key that lies after its last query, and no square of scores is kept. Letters as in
model.py.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

QUERIES = 256  # queries in one chunk

einsum = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)


def chunks(T: int) -> list[tuple[int, int]]:
  """Queries [start, stop) of each chunk."""
  return [(start, min(start + QUERIES, T)) for start in range(0, T, QUERIES)]


def causal_mask(start: int, stop: int):
  """Which keys [0, stop) the queries [start, stop) see, [T, S]."""
  return jnp.arange(stop) <= jnp.arange(start, stop)[:, None]


def segment_mask(segments_BT, start: int, stop: int):
  """Which keys [0, stop) are of the segment of the queries [start, stop), [B, 1, T, S]."""
  return segments_BT[:, None, start:stop, None] == segments_BT[:, None, None, :stop]


def _scores(q_BHTK, k_BHSK, segments_BT, start: int, stop: int):
  scores_BHTS = einsum("bhtk,bhsk->bhts", q_BHTK[:, :, start:stop], k_BHSK[:, :, :stop])
  mask = causal_mask(start, stop)
  if segments_BT is not None:
    mask = mask & segment_mask(segments_BT, start, stop)
  return jnp.where(mask, scores_BHTS / math.sqrt(q_BHTK.shape[-1]), -jnp.inf)


@jax.custom_vjp
def chunked_attention(q_BHTK, k_BHTK, v_BHTK, segments_BT=None):
  """softmax(q k' / sqrt(K)) v with a causal mask, [B, H, T, K]; by segments, where rows hold
  several."""
  return _chunked_forward(q_BHTK, k_BHTK, v_BHTK, segments_BT)[0]


def _chunked_forward(q_BHTK, k_BHTK, v_BHTK, segments_BT):
  outputs, lses = [], []
  for start, stop in chunks(q_BHTK.shape[2]):
    scores_BHTS = _scores(q_BHTK, k_BHTK, segments_BT, start, stop)
    max_BHT1 = scores_BHTS.max(-1, keepdims=True)
    e_BHTS = jnp.exp(scores_BHTS - max_BHT1)
    sum_BHT1 = e_BHTS.sum(-1, keepdims=True)
    y_BHTK = einsum("bhts,bhsk->bhtk", e_BHTS.astype(v_BHTK.dtype), v_BHTK[:, :, :stop]) / sum_BHT1
    outputs.append(y_BHTK.astype(q_BHTK.dtype))
    lses.append(max_BHT1 + jnp.log(sum_BHT1))

  # The names let `remat="dots"` keep both.
  y_BHTK = checkpoint_name(jnp.concatenate(outputs, axis=2), "attend")
  lse_BHT1 = checkpoint_name(jnp.concatenate(lses, axis=2), "attend")
  return y_BHTK, (q_BHTK, k_BHTK, v_BHTK, segments_BT, y_BHTK, lse_BHT1)


def _chunked_backward(saved, dy_BHTK):
  """The probabilities again from their logsumexp; their gradient as in FlashAttention (Dao et al.
  2022), appendix B."""
  q, k, v, segments_BT, y, lse = saved
  scale = 1 / math.sqrt(q.shape[-1])
  inner_BHT1 = jnp.sum(dy_BHTK.astype(jnp.float32) * y, axis=-1, keepdims=True)

  dqs, dk, dv = [], 0.0, 0.0
  for start, stop in chunks(q.shape[2]):
    dy = dy_BHTK[:, :, start:stop]
    p_BHTS = jnp.exp(_scores(q, k, segments_BT, start, stop) - lse[:, :, start:stop])
    dp_BHTS = einsum("bhtk,bhsk->bhts", dy, v[:, :, :stop])
    ds_BHTS = (p_BHTS * (dp_BHTS - inner_BHT1[:, :, start:stop]) * scale).astype(q.dtype)

    # Keys after the chunk get no gradient from it.
    after = ((0, 0), (0, 0), (0, q.shape[2] - stop), (0, 0))
    dqs.append(einsum("bhts,bhsk->bhtk", ds_BHTS, k[:, :, :stop]))
    dk += jnp.pad(einsum("bhts,bhtk->bhsk", ds_BHTS, q[:, :, start:stop]), after)
    dv += jnp.pad(einsum("bhts,bhtk->bhsk", p_BHTS.astype(v.dtype), dy), after)
  dq = jnp.concatenate(dqs, axis=2).astype(q.dtype)
  return dq, dk.astype(k.dtype), dv.astype(v.dtype), None


chunked_attention.defvjp(_chunked_forward, _chunked_backward)
