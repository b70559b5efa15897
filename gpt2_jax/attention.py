# SPDX-License-Identifier: Apache-2.0
"""Causal attention. Letters as in model.py; softmax and its sums are float32 whatever the operands are."""

import functools

import jax
import jax.numpy as jnp

QUERIES = 256  # queries in one chunk; a chunk reads no key that lies after its last query


def attend(q_BTHK, k_BSHK, v_BSHK, mask, dropout=None):
  """softmax(q k' / sqrt(K)) v, [B, T, H, K], where `mask` broadcasts to [B, H, T, S]; False is hidden."""
  scale = q_BTHK.shape[-1] ** -0.5
  scores_BHTS = jnp.einsum("bthk,bshk->bhts", q_BTHK * scale, k_BSHK, preferred_element_type=jnp.float32)
  p_BHTS = jax.nn.softmax(jnp.where(mask, scores_BHTS, -jnp.inf), axis=-1)
  if dropout:
    p_BHTS = dropout(p_BHTS)
  return jnp.einsum("bhts,bshk->bthk", p_BHTS.astype(v_BSHK.dtype), v_BSHK)


def causal_attention(q_BTHK, k_BTHK, v_BTHK, dropout=None):
  """Each position attends to itself and what came before, [B, T, H, K].

  Queries go in chunks, so that the half of the square that the mask would hide is mostly never computed. `dropout`
  maps the probabilities of a chunk, and the chunk's first query, to what is left of them.
  """
  T = q_BTHK.shape[1]
  remembering_little = jax.checkpoint(attend, static_argnums=4)  # the squares are computed again, not kept
  outputs = []
  for start in range(0, T, QUERIES):
    stop = min(start + QUERIES, T)
    chunk_dropout = dropout and functools.partial(dropout, start=start)
    mask = jnp.arange(stop)[None, :] <= jnp.arange(start, stop)[:, None]
    outputs.append(remembering_little(q_BTHK[:, start:stop], k_BTHK[:, :stop], v_BTHK[:, :stop], mask, chunk_dropout))
  return outputs[0] if len(outputs) == 1 else jnp.concatenate(outputs, axis=1)
