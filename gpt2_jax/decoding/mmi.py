# SPDX-License-Identifier: Apache-2.0
"""MMI reranking of a chat's answers: a backward model says how well each brings back what was said.

Sources: Li et al. 2016, "A Diversity-Promoting Objective Function for Neural Conversation Models",
section 4.5.2 (MMI-bidi), whose score of an answer T to a source S is

  (1 - weight) * log p(T | S) + weight * log p(S | T)

and Zhang et al. 2020, "DialoGPT", which draws 16 answers by top-k sampling (k = 10) and takes the
one with the least loss of the backward model: a weight of 1. Log-probabilities are sums over
tokens, in nats, with the markers that end the turns.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gpt2_jax.data.templates import ExampleEncoder, Message, Template, write_prompt
from gpt2_jax.decoding.generation_config import Generation
from gpt2_jax.decoding.kv_cache import InferenceModel, check_finite, for_inference, logits, prefill
from gpt2_jax.decoding.prompts import BUCKET, pad_prompts, shard_rows
from gpt2_jax.decoding.stream import complete
from gpt2_jax.loss import cross_entropy
from gpt2_jax.model import GPT2
from gpt2_jax.sharding import ROWS, axis_size, padded
from gpt2_jax.tokenizer import Tokenizer

# Rows of one call: their logits are held at once.
ROWS_AT_ONCE = 4


class RankedAnswer(NamedTuple):
  """An answer T to a source S, with its log-probabilities; `forward` is None for a weight of 1."""

  text: str
  forward: float | None  # log p(T | S)
  backward: float  # log p(S | T)
  score: float


def rerank(
  model: GPT2 | InferenceModel,
  reverse: GPT2 | InferenceModel,
  tokenizer: Tokenizer,
  template: Template,
  messages: Sequence[Message],
  generation: Generation,
  weight: float = 1.0,
) -> list[RankedAnswer]:
  """Draws `generation.samples` answers to the messages, and ranks them: the best comes first.

  Equal answers are one, and an answer without a text counts only if there is no other. `reverse`
  was trained by `template.backward()`. Raises ValueError for a weight that is not in [0, 1].
  """
  if not 0 <= weight <= 1:
    raise ValueError(f"a weight of {weight} is not in [0, 1]; 1 ranks by the backward model alone")
  model, reverse = for_inference(model), for_inference(reverse)

  prompt = write_prompt(template, tokenizer, messages)
  texts = complete(model, tokenizer, [prompt], generation=generation)
  texts = list(dict.fromkeys(texts))
  texts = [text for text in texts if text.strip()] or texts[:1]
  return rank_answers(model, reverse, tokenizer, template, messages, texts, weight)


def rank_answers(
  model: InferenceModel,
  reverse: InferenceModel,
  tokenizer: Tokenizer,
  template: Template,
  messages: Sequence[Message],
  texts: Sequence[str],
  weight: float = 1.0,
) -> list[RankedAnswer]:
  """Ranks answers to the messages by the score of this module's docstring."""
  answers = [Message(template.response, text) for text in texts]

  # 1. log p(S | T): turns from the last to the first. All answers are scored by the same tokens of
  #    the source, as many as there is room for behind the longest answer.
  rows = []
  encoder = ExampleEncoder(template.backward(), tokenizer)
  for answer in answers:
    encoded = encoder.encode(encoder.template.ordered([*messages, answer]))
    start = int(np.argmax(encoded.is_scored))
    rows.append((encoded.ids[:start].tolist(), encoded.ids[start:].tolist()))
  backward = log_probs(reverse, rows)

  # 2. log p(T | S), where it counts.
  forward = [None] * len(texts)
  if weight < 1:
    rows = []
    encoder = ExampleEncoder(template, tokenizer)
    for answer in answers:
      encoded = encoder.encode((*messages, answer))
      start = encoded.last_response
      rows.append((encoded.ids[:start].tolist(), encoded.ids[start:].tolist()))
    forward = log_probs(model, rows)

  # 3. The score.
  ranked = []
  for text, of_answer, of_source in zip(texts, forward, backward, strict=True):
    score = weight * of_source
    if of_answer is not None:
      score += (1 - weight) * of_answer
    ranked.append(RankedAnswer(text, of_answer, of_source, score))
  return sorted(ranked, key=lambda answer: -answer.score)


def log_probs(
  model: InferenceModel, rows: Sequence[tuple[Sequence[int], Sequence[int]]]
) -> list[float]:
  """log p of each row's continuation after its context, in nats; rows are (context, continuation).

  What the model has no room for is left out: the front of contexts, of which half of the model's
  context stays at least, and then the end of all continuations, at one length.
  """
  # 1. Cut. One token more than the context is read: the last is only predicted.
  n_ctx = model.model.config.n_ctx
  longest = max(len(continuation) for _, continuation in rows)
  kept = max(1, n_ctx // 2, n_ctx + 1 - longest)
  contexts = [list(context)[-kept:] for context, _ in rows]
  room = n_ctx + 1 - max(map(len, contexts))
  cut = [
    (context, list(continuation)[:room])
    for context, (_, continuation) in zip(contexts, rows, strict=True)
  ]

  # 2. A few rows at a time, of one shape.
  totals = []
  with jax.set_mesh(model.mesh):
    size = padded(min(ROWS_AT_ONCE, len(cut)), axis_size(*ROWS))
    longest = max(len(context) + len(continuation) for context, continuation in cut)
    T = min(n_ctx, padded(longest - 1, BUCKET))
    for first in range(0, len(cut), size):
      batch = cut[first : first + size]
      tokens_BT, _ = pad_prompts([[*c, *t] for c, t in batch], (size, T + 1))
      is_scored_BT = np.zeros((size, T), bool)
      for row, (context, continuation) in enumerate(batch):
        begin = len(context) - 1
        is_scored_BT[row, begin : begin + len(continuation)] = True
      placed = shard_rows(model, tokens_BT, is_scored_BT)
      totals += np.asarray(_log_probs(model, *placed))[: len(batch)].tolist()
  check_finite(not np.isfinite(totals).all())
  return totals


@jax.jit
def _log_probs(model: InferenceModel, tokens_BT, is_scored_BT):
  """log p of the scored tokens of each row, float32 [B]."""
  T = is_scored_BT.shape[1]
  x_BTD, _ = prefill(model, tokens_BT[:, :-1], T)
  nats_BT = cross_entropy(logits(model, x_BTD), tokens_BT[:, 1:], model.model.config.n_vocab)
  return -jnp.where(is_scored_BT, nats_BT, 0.0).sum(1)
