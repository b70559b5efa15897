# SPDX-License-Identifier: Apache-2.0
"""Sequence classification: a linear head on the last token, with an auxiliary language model loss.

Source: Radford et al. 2018, "Improving Language Understanding by Generative Pre-Training", section
3.2, equations 3 to 5. The head has no bias, as in the paper and in transformers'
GPT2ForSequenceClassification.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from gpt2_jax.batch import Batch
from gpt2_jax.linear import NO_CONTEXT, Linear
from gpt2_jax.loss import cross_entropy, last_hidden, next_token_nats
from gpt2_jax.model import GPT2
from gpt2_jax.sharding import BATCH, axis_size, padded

# Rows are padded to a multiple of it where labels are predicted: few lengths are compiled.
LENGTH_STEP = 32


class Classifier(GPT2):
  """A GPT-2 and a head that gives each class a logit: one more parameter, `classifier.w` [D, C]."""

  def __init__(self, model: GPT2, classes: int, key):
    self.wte = model.wte
    self.wpe = model.wpe
    self.h = model.h
    self.ln_f = model.ln_f
    self.config = model.config
    self.classifier = Linear(key, (model.config.n_embd, classes), P("data", None), 0.02, False)

  @property
  def classes(self) -> int:
    return jax.tree.leaves(self.classifier.w)[0].shape[-1]

  def label_logits(self, x_BTD, context=NO_CONTEXT):
    """Logits of the classes from the hidden state at each position, float32 [B, T, C]."""
    weight = self.classifier.w[...]
    return weight.matmul(x_BTD, None, self.classifier.gathered, context, jnp.float32)


def add_head(model: GPT2, classes: int, key) -> GPT2:
  """The model with a new head of N(0, 0.02^2); the model itself for 0 classes, or if it has it.

  Arrays of the model are shared. Call it with the model's mesh in force. Raises ValueError for one
  class.
  """
  check_classes(classes)
  if classes == 0 or isinstance(model, Classifier) and model.classes == classes:
    return model
  return Classifier(model, classes, key)


def check_classes(classes: int) -> None:
  """Raises ValueError for one class: nothing is told apart."""
  if classes == 1:
    raise ValueError(
      "classify.classes of 1 leaves nothing to tell apart; set --config.classify.classes to the "
      "number of labels, or to 0 for a language model"
    )


@functools.partial(
  jax.tree_util.register_dataclass, data_fields=[], meta_fields=["lm_weight", "classes"]
)
@dataclasses.dataclass(frozen=True)
class Classify:
  """The objective of GPT-1's fine-tuning: -log p of the label, plus `lm_weight` times the language
  model's nats a token.

  Both are means over an example, and examples weigh the same. `batch.extras["labels_BT"]` (int32)
  has an example's label where its last token is an input, and -1 everywhere else, so that packed
  rows may hold any number of examples.
  """

  classes: int
  lm_weight: float = 0.5

  def __call__(self, model: Classifier, batch: Batch, key=None) -> dict:
    """Sums over the examples: "nats", its two parts, right answers; "tokens" counts examples."""
    x_BTD, context = last_hidden(model, batch, key)

    # 1. The labels, where there are any.
    labels_BT = batch.extras["labels_BT"]
    has_label_BT = labels_BT >= 0
    logits_BTC = model.label_logits(x_BTD, context)
    nats_BT = cross_entropy(logits_BTC, jnp.maximum(labels_BT, 0), self.classes)
    label_nats = (nats_BT * has_label_BT).sum()
    correct = ((logits_BTC.argmax(-1) == labels_BT) & has_label_BT).sum()
    sums = {"nats": label_nats, "tokens": has_label_BT.sum(dtype=jnp.float32)}
    sums |= {"label_loss": label_nats, "accuracy": correct.astype(jnp.float32)}
    if self.lm_weight == 0:
      return sums

    # 2. The auxiliary loss: each token counts as one part of its example.
    nats_BT = next_token_nats(model, x_BTD, batch.tokens_BT[:, 1:], context)
    lm_nats = (nats_BT * mean_weights(batch)).sum()
    return sums | {"nats": label_nats + self.lm_weight * lm_nats, "lm_loss": lm_nats}


def mean_weights(batch: Batch):
  """Each token's weight over the sum of its example's, [B, T]: sums become means of examples.

  An example is a segment, or a row where there are no segments. It counts if it has a label.
  """
  labels_BT, weights_BT = batch.extras["labels_BT"], batch.weights_BT
  weights_BT = jnp.ones(labels_BT.shape, jnp.float32) if weights_BT is None else weights_BT
  has_label_BT = labels_BT >= 0

  if batch.segments_BT is None:
    total_BT = weights_BT.sum(1, keepdims=True)
    is_example_BT = has_label_BT.any(1, keepdims=True)
  else:
    # The comparison is fused into the sums: no array [B, T, T] exists.
    same_BTT = batch.segments_BT[:, :, None] == batch.segments_BT[:, None, :]
    total_BT = jnp.where(same_BTT, weights_BT[:, None, :], 0.0).sum(-1)
    is_example_BT = (same_BTT & has_label_BT[:, None, :]).any(-1)
  return jnp.where(is_example_BT, weights_BT / jnp.maximum(total_BT, 1e-9), 0.0)


@jax.jit
def _last_label_logits(model: Classifier, tokens_BT, last_B):
  x_BTD, _, _ = model.hidden(model.embed(tokens_BT))
  logits_BTC = model.label_logits(x_BTD)
  is_last_BT1 = (jnp.arange(tokens_BT.shape[1]) == last_B[:, None])[..., None]
  return jnp.where(is_last_BT1, logits_BTC, 0.0).sum(1)


def label_log_probs(model: Classifier, rows: list[list[int]], batch_size: int = 32) -> np.ndarray:
  """log p of each class for each row of token ids, float32 [rows, C]; see `last_label_logits`."""
  return np.asarray(jax.nn.log_softmax(last_label_logits(model, rows, batch_size)))


def last_label_logits(model: Classifier, rows: list[list[int]], batch_size: int = 32) -> np.ndarray:
  """The head's logits at the last token of each row of token ids, float32 [rows, C].

  Raises ValueError for a model without a head, an empty row or one beyond the context.
  """
  # 1. What cannot be.
  if not isinstance(model, Classifier):
    raise ValueError("the model has no head for labels; train one with --config.classify.classes=N")
  for index, row in enumerate(rows):
    if not 1 <= len(row) <= model.config.n_ctx:
      raise ValueError(
        f"row {index} has {len(row)} tokens; it takes 1 to {model.config.n_ctx}, the context"
      )

  # 2. In batches of one length: what follows the last token is not seen by it.
  parts = [np.zeros((0, model.classes), np.float32)]
  with jax.set_mesh(model.mesh):
    batch_size = padded(batch_size, axis_size("replica", "data"))
    for first in range(0, len(rows), batch_size):
      batch = rows[first : first + batch_size]
      length = min(padded(max(map(len, batch)), LENGTH_STEP), model.config.n_ctx)
      tokens_BT = np.zeros((batch_size, length), np.int32)
      last_B = np.zeros(batch_size, np.int32)
      for index, row in enumerate(batch):
        tokens_BT[index, : len(row)] = row
        last_B[index] = len(row) - 1

      placed = jax.device_put(tokens_BT, NamedSharding(model.mesh, BATCH))
      last = jax.device_put(last_B, NamedSharding(model.mesh, P(BATCH[0])))
      parts.append(np.asarray(_last_label_logits(model, placed, last))[: len(batch)])
  return np.concatenate(parts)
