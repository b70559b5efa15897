# SPDX-License-Identifier: Apache-2.0
"""Cross-entropy over a vocabulary that may be padded and may be split over devices."""

import functools

import jax
import jax.numpy as jnp


def _real(logits_BTV, n_vocab: int):
  """Logits with the padding of the vocabulary at minus infinity."""
  return jnp.where(jnp.arange(logits_BTV.shape[-1]) < n_vocab, logits_BTV, -jnp.inf)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def cross_entropy(logits_BTV, labels_BT, n_vocab: int):
  """-log p(label), in nats, float32 [B, T].

  The label's logit is a masked sum, not a gather, so the vocabulary may be sharded; the backward pass rebuilds
  the softmax from the logits and their logsumexp, so that no second array of the logits' size is kept.
  """
  return _forward(logits_BTV, labels_BT, n_vocab)[0]


def _forward(logits_BTV, labels_BT, n_vocab):
  lse_BT = jax.nn.logsumexp(_real(logits_BTV, n_vocab), axis=-1)
  is_label = jnp.arange(logits_BTV.shape[-1]) == labels_BT[..., None]
  nats_BT = lse_BT - jnp.sum(jnp.where(is_label, logits_BTV, 0.0), axis=-1)
  return nats_BT, (logits_BTV, labels_BT, lse_BT)


def _backward(n_vocab, saved, d_BT):
  logits_BTV, labels_BT, lse_BT = saved
  p_BTV = jnp.exp(_real(logits_BTV, n_vocab) - lse_BT[..., None])
  is_label = jnp.arange(logits_BTV.shape[-1]) == labels_BT[..., None]
  return (p_BTV - is_label) * d_BT[..., None], None


cross_entropy.defvjp(_forward, _backward)
