# SPDX-License-Identifier: Apache-2.0
"""Classification of several texts at once: similarity of two, and the choice among some.

Source: Radford et al. 2018, "Improving Language Understanding by Generative Pre-Training", figure
1. An example holds its texts one after the other, and each ends with the token that ends the last
one (`_classify_`). A text sees none of the others, and counts its positions from 0. What is
classified is the hidden state at each text's end:

  similarity  both orders of two texts; their hidden states are added, and the head has a logit for
              each class
  choice      a text for each answer; the head has one logit, and the answers are the classes
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gpt2_jax.batch import Batch
from gpt2_jax.finetune.classify import Classifier, last_label_logits, mean_weights
from gpt2_jax.loss import cross_entropy, last_hidden, next_token_nats

SEVERAL = ("similarity", "choice")


class Texts(NamedTuple):
  """The texts of each example of a batch."""

  batch: Batch  # each text in a segment of its own
  same_BTT: jax.Array  # whether two positions are of one example
  is_end_BT: jax.Array  # whether a text ends here
  has_label_BT: jax.Array  # whether an example ends here


@functools.partial(
  jax.tree_util.register_dataclass, data_fields=[], meta_fields=["form", "classes", "lm_weight"]
)
@dataclasses.dataclass(frozen=True)
class ClassifySeveral:
  """-log p of an example's label, plus `lm_weight` times the mean over its texts of the language
  model's nats a token. `form` is "similarity" or "choice"."""

  form: str
  classes: int
  lm_weight: float = 0.5

  def __call__(self, model: Classifier, batch: Batch, key=None) -> dict:
    """Sums over the examples, as of `Classify`."""
    # 1. A segment for each text, and the head's logits at the ends of texts.
    texts = split_texts(batch)
    x_BTD, context = last_hidden(model, texts.batch, key)
    logits_BTC = model.label_logits(x_BTD, context)

    # 2. The logits of all classes where an example ends.
    if self.form == "choice":
      logits_BTC = _choices(texts, logits_BTC[..., 0], self.classes)
    else:
      # The head has no bias: the sum of the logits is the logit of the sum.
      is_end_BTT = texts.same_BTT & texts.is_end_BT[:, None, :]
      logits_BTC = jnp.einsum("bts,bsc->btc", is_end_BTT.astype(jnp.float32), logits_BTC)

    # 3. The label.
    labels_BT = batch.extras["labels_BT"]
    nats_BT = cross_entropy(logits_BTC, jnp.maximum(labels_BT, 0), self.classes)
    label_nats = jnp.where(texts.has_label_BT, nats_BT, 0.0).sum()
    correct = ((logits_BTC.argmax(-1) == labels_BT) & texts.has_label_BT).sum()
    sums = {"nats": label_nats, "tokens": texts.has_label_BT.sum(dtype=jnp.float32)}
    sums |= {"label_loss": label_nats, "accuracy": correct.astype(jnp.float32)}
    if self.lm_weight == 0:
      return sums

    # 4. The auxiliary loss: the mean of each text, and of an example's texts.
    n_texts_BT = (texts.same_BTT & texts.is_end_BT[:, None, :]).sum(-1)
    nats_BT = next_token_nats(model, x_BTD, batch.tokens_BT[:, 1:], context)
    lm_nats = (nats_BT * mean_weights(texts.batch) / jnp.maximum(n_texts_BT, 1)).sum()
    return sums | {"nats": label_nats + self.lm_weight * lm_nats, "lm_loss": lm_nats}


def split_texts(batch: Batch) -> Texts:
  """Finds the texts of each example, and gives each a segment and positions of its own."""
  tokens_BT, labels_BT = batch.tokens_BT[:, :-1], batch.extras["labels_BT"]
  segments_BT = batch.segments_BT
  if segments_BT is None:
    segments_BT = jnp.zeros_like(tokens_BT)
  has_label_BT = labels_BT >= 0

  # 1. A text ends at the token with which its example ends; what has no label has no texts.
  same_BTT = segments_BT[:, :, None] == segments_BT[:, None, :]
  end_token_BT = jnp.where(same_BTT & has_label_BT[:, None, :], tokens_BT[:, None, :], -1).max(-1)
  is_end_BT = tokens_BT == end_token_BT

  # 2. A text begins with its example, and after another text.
  before_BT = jnp.pad(segments_BT, ((0, 0), (1, 0)), constant_values=-2)[:, :-1]
  is_after_end_BT = jnp.pad(is_end_BT, ((0, 0), (1, 0)))[:, :-1]
  is_start_BT = (segments_BT != before_BT) | is_after_end_BT
  time_BT = jnp.arange(tokens_BT.shape[1]) + jnp.zeros_like(tokens_BT)
  first_BT = jax.lax.cummax(jnp.where(is_start_BT, time_BT, 0), axis=1)

  # 3. Nothing is predicted from the end of a text: the next one is another's beginning. A mean is
  #    that of a text, so every text has a label.
  weights_BT = batch.weights_BT
  if weights_BT is None:
    weights_BT = jnp.ones(tokens_BT.shape, jnp.float32)
  split = dataclasses.replace(
    batch,
    weights_BT=jnp.where(is_end_BT, 0.0, weights_BT),
    segments_BT=jnp.cumsum(is_start_BT, axis=1, dtype=jnp.int32),
    positions_BT=time_BT - first_BT,
    extras=batch.extras | {"labels_BT": jnp.where(is_end_BT, 0, -1)},
  )
  return Texts(split, same_BTT, is_end_BT, has_label_BT)


def _choices(texts: Texts, logits_BT, classes: int):
  """The logits of an example's answers, in their order, at each of its positions [B, T, C].

  An example may have fewer answers than there are classes: what it lacks is never chosen.
  """
  earlier_TT = jnp.tril(jnp.ones(2 * logits_BT.shape[1:], bool))
  number_BT = (texts.same_BTT & texts.is_end_BT[:, None, :] & earlier_TT).sum(-1) - 1
  is_answer_BTC = (number_BT[..., None] == jnp.arange(classes)) & texts.is_end_BT[..., None]
  logits_BTC = jnp.where(is_answer_BTC, logits_BT[..., None], 0.0)

  same_BTT = texts.same_BTT.astype(jnp.float32)
  gathered_BTC = jnp.einsum("bts,bsc->btc", same_BTT, logits_BTC)
  n_answers_BTC = jnp.einsum("bts,bsc->btc", same_BTT, is_answer_BTC.astype(jnp.float32))
  return jnp.where(n_answers_BTC > 0, gathered_BTC, -1e9)


def several_log_probs(
  model: Classifier, examples: list[list[list[int]]], form: str, batch_size: int = 32
) -> list[np.ndarray]:
  """log p of each class for each example, given as the token ids of its texts.

  Raises ValueError for a model without a head, and for a text that is empty or beyond the context.
  """
  logits_NC = last_label_logits(model, [row for rows in examples for row in rows], batch_size)
  log_probs, first = [], 0
  for rows in examples:
    of_example = logits_NC[first : first + len(rows)]
    first += len(rows)
    logits_C = of_example[:, 0] if form == "choice" else of_example.sum(0)
    log_probs.append(np.asarray(jax.nn.log_softmax(logits_C)))
  return log_probs
