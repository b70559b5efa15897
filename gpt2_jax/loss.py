# SPDX-License-Identifier: Apache-2.0
"""Cross-entropy over a vocabulary that may be padded and may be split over devices."""

import functools

import jax
import jax.numpy as jnp

from gpt2_jax.sharding import AXES, BATCH, axis_size


def _tokens(logits_BTV):
  """The token of each logit, split like them: a plain range would be whole on every device, and masks with it."""
  return jax.lax.broadcasted_iota(jnp.int32, logits_BTV.shape, 2, out_sharding=jax.typeof(logits_BTV).sharding.spec)


def _real(logits_BTV, n_vocab: int):
  """Logits with the padding of the vocabulary at minus infinity."""
  return jnp.where(_tokens(logits_BTV) < n_vocab, logits_BTV, -jnp.inf)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def cross_entropy(logits_BTV, labels_BT, n_vocab: int):
  """-log p(label), in nats, float32 [B, T].

  The backward pass rebuilds the softmax from the logits and their logsumexp, so that no second array of the logits'
  size is kept.
  """
  return _forward(logits_BTV, labels_BT, n_vocab)[0]


def _forward(logits_BTV, labels_BT, n_vocab):
  lse_BT = jax.nn.logsumexp(_real(logits_BTV, n_vocab), axis=-1)
  return lse_BT - _of_label(logits_BTV, labels_BT), (logits_BTV, labels_BT, lse_BT)


def _of_label(logits_BTV, labels_BT):
  """The label's logit, [B, T]: a gather on one device; a masked sum where the batch or the vocabulary is split."""
  if axis_size(*AXES) == 1:
    row_B1, time_T = jnp.arange(labels_BT.shape[0])[:, None], jnp.arange(labels_BT.shape[1])
    return logits_BTV.at[row_B1, time_T, labels_BT].get(out_sharding=BATCH)
  is_label = _tokens(logits_BTV) == labels_BT[..., None]
  return jnp.sum(jnp.where(is_label, logits_BTV, 0.0), axis=-1)


def _backward(n_vocab, saved, d_BT):
  logits_BTV, labels_BT, lse_BT = saved
  p_BTV = jnp.exp(_real(logits_BTV, n_vocab) - lse_BT[..., None])
  is_label = _tokens(logits_BTV) == labels_BT[..., None]
  return (p_BTV - is_label) * d_BT[..., None], None


cross_entropy.defvjp(_forward, _backward)
