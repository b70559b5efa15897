# SPDX-License-Identifier: Apache-2.0
"""EAR: next-token training that rewards the entropy of attention, against bias by single words.

Attanasio et al. 2022, "Entropy-based Attention Regularization Frees Unintended Bias Mitigation from
Lists": the loss less `weight` times the entropy of attention, averaged over heads and summed over
layers; 0.01 in the paper, for classifiers. Their code takes a softmax of the averaged attention
once more, over all keys; here the entropy is of the attention itself, and of the keys that a token
sees. The probabilities are computed beside the attention, by plain matmuls.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from gpt2_jax.attention import split_heads
from gpt2_jax.batch import Batch
from gpt2_jax.kernels.chunked_attention import causal_mask, chunks, einsum, segment_mask
from gpt2_jax.linear import Context
from gpt2_jax.loss import next_token_nats
from gpt2_jax.model import split_or_none

PLAIN = ("auto", "chunked")


@functools.partial(jax.tree_util.register_dataclass, data_fields=[], meta_fields=["weight"])
@dataclasses.dataclass(frozen=True)
class NextTokenEntropy:
  """The objective `NextToken` less `weight` times the entropy of attention of each token."""

  weight: float

  def __call__(self, model, batch: Batch, key=None) -> dict:
    """Sums over the batch: "nats" with the regularizer in it, "entropy_loss" alone, "tokens"."""
    # 1. As in loss.last_hidden, with an attention that remembers its entropy.
    k_embd, k_h = split_or_none(key, 2)
    k_weights = None if key is None else jax.random.fold_in(key, 2)
    context = Context(k_weights, batch.extras.get("adapter_B"))
    x_BTD = model.embed(batch.tokens_BT[:, :-1], batch.positions_BT, k_embd, context)
    attend = attend_with_entropy(model, batch.segments_BT)
    x_BTD, _, entropy_LBT = model.hidden(x_BTD, k_h, attend, context)

    # 2. The loss of each token, and what its attention takes off.
    nats_BT = next_token_nats(model, x_BTD, batch.tokens_BT[:, 1:], context)
    entropy_loss_BT = -self.weight * entropy_LBT.sum(0)

    weights_BT = jnp.ones_like(nats_BT) if batch.weights_BT is None else batch.weights_BT
    nats = ((nats_BT + entropy_loss_BT) * weights_BT).sum()
    entropy_loss = (entropy_loss_BT * weights_BT).sum()
    return {"nats": nats, "entropy_loss": entropy_loss, "tokens": weights_BT.sum()}


def attend_with_entropy(model, segments_BT=None):
  """The model's own attention, which also remembers the entropy of each query's, [B, T]."""
  attend, config = model.self_attend(segments_BT), model.config

  def attend_and_remember(c_BTC, key=None):
    q_BTHK, k_BTHK, _ = split_heads(c_BTC, config.head_size)
    entropy_BT = attention_entropy(q_BTHK, k_BTHK, config.n_head, segments_BT)
    return attend(c_BTC, key)[0], entropy_BT

  return attend_and_remember


def attention_entropy(q_BTHK, k_BTHK, n_head: int, segments_BT=None):
  """Entropy in nats of each query's causal attention, averaged over the first `n_head` heads, [B,
  T]; the heads after them are padding."""

  def entropy_of_chunk(start, stop, q_BTHK, k_BSHK):
    mask = causal_mask(start, stop)
    if segments_BT is not None:
      mask = mask & segment_mask(segments_BT, start, stop)
    scores_BHTS = einsum("bthk,bshk->bhts", q_BTHK, k_BSHK) / math.sqrt(q_BTHK.shape[-1])
    p_BHTS = jax.nn.softmax(jnp.where(mask, scores_BHTS, -jnp.inf), axis=-1)

    is_head_H11 = (jnp.arange(p_BHTS.shape[1]) < n_head)[:, None, None]
    p_BTS = jnp.where(is_head_H11, p_BHTS, 0.0).sum(1) / n_head
    # Of what is hidden p is 0, and the gradient of p log p would be infinite.
    log_BTS = jnp.log(jnp.where(p_BTS > 0, p_BTS, 1.0))
    return -(p_BTS * log_BTS).sum(-1)

  # Nothing of the square of scores is kept for the backward pass.
  entropies = []
  for start, stop in chunks(q_BTHK.shape[1]):
    chunk = jax.checkpoint(functools.partial(entropy_of_chunk, start, stop))
    entropies.append(chunk(q_BTHK[:, start:stop], k_BTHK[:, :stop]))
  return jnp.concatenate(entropies, axis=1)


def entropy_objective(config: ConfigDict) -> NextTokenEntropy:
  """The objective of a config with `attention_entropy`. Raises ValueError unless its attention is
  plain, and its loss that of a language model."""
  weight = float(config.attention_entropy)
  others = {
    "z_loss": config.z_loss,
    "classify.classes": config.classify.classes,
    "distill.teacher": config.distill.teacher,
  }
  for name, value in others.items():
    if value:
      raise ValueError(
        f"attention_entropy is {weight:g} and {name} is {str(value)[:80]}: a run has one "
        "objective; leave one of them out"
      )
  if config.model.attention not in PLAIN or config.adapter.kind in ("prompt", "prefix"):
    kind = f"model.attention={config.model.attention}, adapter.kind={config.adapter.kind or 'none'}"
    raise ValueError(
      f"attention_entropy is {weight:g}, which is of plain attention alone, and not of {kind[:120]}"
      "; set --config.model.attention=chunked, without virtual tokens"
    )
  return NextTokenEntropy(weight)
