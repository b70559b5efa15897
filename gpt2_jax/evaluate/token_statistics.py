# SPDX-License-Identifier: Apache-2.0
"""Statistics of each token under a model: -log p, rank, entropy, mean and variance of log p.

Detectors of machine text and of memorized text are made of them. All come from one pass, and from
logits that stay on the mesh, a few columns of them at a time.
"""

import jax.numpy as jnp

from gpt2_jax.loss import cross_entropy_forward, is_label, softmax


def token_statistics(models, hidden, label_BC):
  """-log p of each label, its rank, and the distribution's entropy, mean and variance of log p.

  Each float32 [B, C]. With two models, mean and variance of the first one's log p are weighted with
  the second one's probabilities, as a text's tokens would be that the second had written.
  """
  # 1. The model's log p. Padding of the vocabulary has no probability, so it counts nothing.
  logits_BCV, n_vocab = models[0].head(hidden[0]), models[0].config.n_vocab
  nats_BC, (*_, lse_BC) = cross_entropy_forward(logits_BCV, label_BC, n_vocab)
  logp_BCV = logits_BCV - lse_BC[..., None]
  p_BCV = softmax(logits_BCV, lse_BC, n_vocab)
  entropy_BC = -(p_BCV * logp_BCV).sum(-1)

  # 2. The label: how many tokens are likelier.
  is_label_BCV = is_label(logits_BCV, label_BC)
  label_logit_BC1 = jnp.where(is_label_BCV, logits_BCV, 0.0).sum(-1, keepdims=True)
  is_real_V = jnp.arange(logits_BCV.shape[-1]) < n_vocab
  rank_BC = 1.0 + ((logits_BCV > label_logit_BC1) & is_real_V).sum(-1)

  # 3. Moments of log p under the reference.
  if len(models) == 2:
    reference_BCV = models[1].head(hidden[1])
    _, (*_, lse_BC) = cross_entropy_forward(reference_BCV, label_BC, n_vocab)
    p_BCV = softmax(reference_BCV, lse_BC, n_vocab)
  mean_BC = (p_BCV * logp_BCV).sum(-1)
  variance_BC = (p_BCV * jnp.square(logp_BCV - mean_BC[..., None])).sum(-1)
  return nats_BC, rank_BC, entropy_BC, mean_BC, variance_BC
