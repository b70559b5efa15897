# SPDX-License-Identifier: Apache-2.0
"""z-loss: next-token training with `weight` times the squared logsumexp of the logits beside it.

It keeps the logits from drifting, to which the softmax is blind. Source: de Brébisson and Vincent
2016; PaLM (Chowdhery et al. 2022, section 5) with a weight of 1e-4. A weight of 0 is `NextToken`.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from gpt2_jax.batch import Batch
from gpt2_jax.kernels.choose import choose_cross_entropy
from gpt2_jax.linear import NO_CONTEXT, Dense
from gpt2_jax.loss import NextToken, cross_entropy_forward, is_label, last_hidden, softmax


def next_token_objective(weight: float):
  """The objective of a language model: with a z-loss, or plain where its weight is 0."""
  return NextTokenZ(weight) if weight else NextToken()


@functools.partial(jax.tree_util.register_dataclass, data_fields=[], meta_fields=["weight"])
@dataclasses.dataclass(frozen=True)
class NextTokenZ:
  """The objective `NextToken` plus `weight` * logsumexp(logits)^2 of each token."""

  weight: float

  def __call__(self, model, batch: Batch, key=None) -> dict:
    """Sums over the batch: "nats" with the z-loss in it, "z_loss" alone, and "tokens"."""
    x_BTD, context = last_hidden(model, batch, key)
    nats_BT, lse_BT = nats_and_lse(model, x_BTD, batch.tokens_BT[:, 1:], context)
    z_BT = self.weight * jnp.square(lse_BT)

    weights_BT = jnp.ones_like(nats_BT) if batch.weights_BT is None else batch.weights_BT
    sums = {"nats": ((nats_BT + z_BT) * weights_BT).sum(), "tokens": weights_BT.sum()}
    return sums | {"z_loss": (z_BT * weights_BT).sum()}


def nats_and_lse(model, x_BTD, labels_BT, context=NO_CONTEXT):
  """`next_token_nats`, and the logsumexp of the logits: float32 [B, T] each."""
  wte, config = model.wte[...], model.config
  kernel = choose_cross_entropy(config.cross_entropy, x_BTD.dtype)
  if kernel == "plain" or not isinstance(wte, Dense):
    return cross_entropy_and_lse(model.head(x_BTD, context), labels_BT, config.n_vocab)
  from gpt2_jax.kernels.tpu_cross_entropy import fused_cross_entropy_and_lse

  return fused_cross_entropy_and_lse(x_BTD, wte.array, labels_BT, config.n_vocab)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def cross_entropy_and_lse(logits_BTV, labels_BT, n_vocab: int):
  """`cross_entropy`, and the logsumexp over the same vocabulary; both have gradients."""
  return _forward(logits_BTV, labels_BT, n_vocab)[0]


def _forward(logits_BTV, labels_BT, n_vocab):
  nats_BT, saved = cross_entropy_forward(logits_BTV, labels_BT, n_vocab)
  return (nats_BT, saved[-1]), saved


def _backward(n_vocab, saved, cotangents):
  d_nats_BT, d_lse_BT = cotangents
  logits_BTV, labels_BT, lse_BT = saved

  # The gradient of the nats is p, less 1 for the label; that of the logsumexp is p.
  p_BTV = softmax(logits_BTV, lse_BT, n_vocab)
  d_label_BTV = is_label(logits_BTV, labels_BT) * d_nats_BT[..., None]
  return p_BTV * (d_nats_BT + d_lse_BT)[..., None] - d_label_BTV, None


cross_entropy_and_lse.defvjp(_forward, _backward)
