# SPDX-License-Identifier: Apache-2.0
"""Cross-entropy loss, and the objective of training: a value that maps a batch to sums.

An objective is `objective(model, batch, key) -> {"nats": ..., "tokens": ..., ...}`: sums over the
batch, so that microbatches, batches and hosts add up, and the division comes last. It is a
registered pytree and an argument of the jitted step: a teacher's weights would be its leaves.
Every sum but "tokens" is reported per token, under its name.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from gpt2_jax.batch import Batch
from gpt2_jax.kernels.choose import choose_cross_entropy
from gpt2_jax.linear import NO_CONTEXT, Context, Dense
from gpt2_jax.model import split_or_none
from gpt2_jax.sharding import AXES, BATCH, axis_size


def last_hidden(model, batch: Batch, key=None):
  """The hidden states that predict, [B, T, D], and the context of the weights after them."""
  k_embd, k_h = split_or_none(key, 2)
  k_weights = None if key is None else jax.random.fold_in(key, 2)
  context = Context(k_weights, batch.extras.get("adapter_B"))
  x_BTD = model.embed(batch.tokens_BT[:, :-1], batch.positions_BT, k_embd, context)
  x_BTD = model.hidden(x_BTD, k_h, model.self_attend(batch.segments_BT), context)[0]
  return x_BTD, context


@functools.partial(jax.tree_util.register_dataclass, data_fields=[], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class NextToken:
  """The language model's objective: -log p of each token after those before it."""

  def __call__(self, model, batch: Batch, key=None) -> dict:
    """Sums over the batch: "nats" times the loss mask `batch.weights_BT`, and "tokens", its sum."""
    x_BTD, context = last_hidden(model, batch, key)
    labels_BT = batch.tokens_BT[:, 1:]
    nats_BT = next_token_nats(model, x_BTD, labels_BT, context)

    # Loss mask: weights of one, if none are given. The barrier hides that they are, and where nats
    # come from: the sums are the same program, so the same bits, with weights, in a scan, or alone.
    weights_BT = jnp.ones_like(nats_BT) if batch.weights_BT is None else batch.weights_BT
    nats_BT, weights_BT = jax.lax.optimization_barrier((nats_BT, weights_BT))
    return {"nats": (nats_BT * weights_BT).sum(), "tokens": weights_BT.sum()}


def mean_loss(objective, model, batch: Batch, key=None):
  """Nats a token, and the sums: the objective with the division done."""
  sums = objective(model, batch, key)
  return per_token(sums["nats"], sums), sums


def per_token(total, sums: dict):
  """A sum over the tokens; 0 where no token has a weight, as in a batch of prompts alone."""
  return total / jnp.maximum(sums["tokens"], 1e-9)


def next_token_nats(model, x_BTD, labels_BT, context=NO_CONTEXT):
  """-log p of each label, float32 [B, T], from the last hidden states: head and cross-entropy."""
  wte, config = model.wte[...], model.config
  kernel = choose_cross_entropy(config.cross_entropy, x_BTD.dtype)
  if kernel == "plain" or not isinstance(wte, Dense):  # an adapter or int8 has its own matmul
    return cross_entropy(model.head(x_BTD, context), labels_BT, config.n_vocab)
  from gpt2_jax.kernels.tpu_cross_entropy import fused_cross_entropy

  return fused_cross_entropy(x_BTD, wte.array, labels_BT, config.n_vocab)


def _tokens(logits_BTV):
  """The token of each logit, split over the mesh like them.

  A plain range would be whole on every device, and masks with it.
  """
  spec = jax.typeof(logits_BTV).sharding.spec
  return jax.lax.broadcasted_iota(jnp.int32, logits_BTV.shape, 2, out_sharding=spec)


def _mask_padding(logits_BTV, n_vocab: int):
  """Logits with the padding of the vocabulary at minus infinity."""
  return jnp.where(_tokens(logits_BTV) < n_vocab, logits_BTV, -jnp.inf)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def cross_entropy(logits_BTV, labels_BT, n_vocab: int):
  """-log p(label), in nats, float32 [B, T], over a vocabulary that may be padded and split.

  The backward pass rebuilds the softmax from the logits and their logsumexp, so that no second
  array of the logits' size is kept.
  """
  return cross_entropy_forward(logits_BTV, labels_BT, n_vocab)[0]


def cross_entropy_forward(logits_BTV, labels_BT, n_vocab: int):
  """The nats, and what the backward pass needs: logits, labels, and the logsumexp, [B, T]."""
  lse_BT = jax.nn.logsumexp(_mask_padding(logits_BTV, n_vocab), axis=-1)
  return lse_BT - _label_logit(logits_BTV, labels_BT), (logits_BTV, labels_BT, lse_BT)


def _label_logit(logits_BTV, labels_BT):
  """The label's logit, [B, T]: a gather on one device; a masked sum where the batch or the
  vocabulary is split."""
  if axis_size(*AXES) == 1:
    row_B1, time_T = jnp.arange(labels_BT.shape[0])[:, None], jnp.arange(labels_BT.shape[1])
    return logits_BTV.at[row_B1, time_T, labels_BT].get(out_sharding=BATCH)
  return jnp.sum(jnp.where(is_label(logits_BTV, labels_BT), logits_BTV, 0.0), axis=-1)


def is_label(logits_BTV, labels_BT):
  """Whether a logit is that of the label, [B, T, V]."""
  return _tokens(logits_BTV) == labels_BT[..., None]


def softmax(logits_BTV, lse_BT, n_vocab: int):
  """Probabilities from the logits and their logsumexp; zero for the padding of the vocabulary."""
  return jnp.exp(_mask_padding(logits_BTV, n_vocab) - lse_BT[..., None])


def _cross_entropy_backward(n_vocab, saved, d_BT):
  logits_BTV, labels_BT, lse_BT = saved
  p_BTV = softmax(logits_BTV, lse_BT, n_vocab)
  return (p_BTV - is_label(logits_BTV, labels_BT)) * d_BT[..., None], None


cross_entropy.defvjp(cross_entropy_forward, _cross_entropy_backward)
