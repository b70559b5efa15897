# SPDX-License-Identifier: Apache-2.0
"""Answers to requests: texts become tokens, tokens rows, and the rows' scores sums."""

import dataclasses
import functools
from collections.abc import Iterable, Sequence

import numpy as np

from gpt2_jax.convert.weights import progress
from gpt2_jax.decoding.cache import Decoder, ready
from gpt2_jax.decoding.samplers import Greedy, Sample, TopK
from gpt2_jax.evaluate.likelihood import Ids, Row, Scores, branches, planned_for, score, tail, windows
from gpt2_jax.evaluate.task import (
  Answer,
  Continuation,
  Generated,
  Likelihood,
  NextWords,
  Passage,
  Prompt,
  Request,
  Words,
)
from gpt2_jax.evaluate.writing import PIECES, next_words, write
from gpt2_jax.model import GPT2
from gpt2_jax.tokenizer import Tokenizer

SHARED = 0.75  # of the tokens that would be read one by one: continuations with no more share their context


@dataclasses.dataclass(frozen=True)
class Scorer:
  """Answers requests with a model on its mesh.

  `batch_size` rows go to the mesh at once, rounded up to what divides it. `stride` says how many tokens a window over a
  passage predicts after the first: n_ctx where it is None, and with 1 every token has all the context there is.
  """

  model: GPT2
  tokenizer: Tokenizer
  batch_size: int = 32
  stride: int | None = None
  seed: int = 0

  def __post_init__(self):
    n_ctx = self.model.config.n_ctx
    if self.batch_size < 1:
      raise ValueError(f"a batch of {self.batch_size} rows; give 1 or more")
    if self.stride is not None and not 1 <= self.stride <= n_ctx:
      raise ValueError(f"a stride of {self.stride} is not from 1 to the context's {n_ctx}")
    if self.tokenizer is None:
      raise ValueError("there is no tokenizer to read the requests with; give one, as of load_tokenizer")

  def answers(self, requests: Sequence[Request], joined: bool = False) -> list[Answer]:
    """The answer to each request, in their order.

    `joined` takes all passages for one text in parts. Draws depend on the seed and a request's number here. Raises
    ValueError for a request that cannot be answered, FloatingPointError where the model's logits are NaN.
    """
    kinds = {Continuation: self._continuations, Passage: self._joined if joined else self._passages}
    kinds |= {Prompt: self._prompts, NextWords: self._next_words}
    answers = {}
    for kind, answer in kinds.items():
      numbers = [i for i, request in enumerate(requests) if isinstance(request, kind)]
      if numbers:
        answers |= zip(numbers, answer([requests[i] for i in numbers], numbers), strict=True)
    return [answers[i] for i in range(len(requests))]

  def continuations(self, pairs: Sequence[tuple[Ids, Ids]], counts: Sequence[int] | None = None) -> list[Likelihood]:
    """How likely each second list of tokens is after the first; with `counts`, only that many of its last tokens.

    Contexts lose their beginning where the two exceed n_ctx + 1. Raises ValueError for a continuation that is empty
    or longer than n_ctx.
    """
    n_ctx = self.model.config.n_ctx
    for context, continuation in pairs:
      if not continuation:
        raise ValueError("a continuation has no tokens: there is nothing to score")
      if not context:
        raise ValueError("a continuation has no token before it; give a context, or a tokenizer with <|endoftext|>")
      if len(continuation) > n_ctx:
        raise ValueError(f"a continuation of {len(continuation):,} tokens exceeds the context of {n_ctx:,}; shorten it")
    counts = counts or [len(continuation) for _, continuation in pairs]
    plain, shared = self._sorted(pairs)
    scores = dict(zip(plain, self._score([_row(pairs[i], counts[i], n_ctx) for i in plain]), strict=True))
    trees = self._score([branches(pairs[group[0]][0], [pairs[i][1] for i in group]) for group in shared])
    for group, (nats_T, first_T) in zip(shared, trees, strict=True):
      cuts = np.cumsum([len(pairs[i][1]) for i in group])[:-1]
      for i, *found in zip(group, np.split(nats_T, cuts), np.split(first_T, cuts), strict=True):
        scores[i] = tuple(x_T[len(x_T) - counts[i] :] for x_T in found)
    return [_likelihood(scores[i], len(pair[0]) + len(pair[1]) > n_ctx + 1) for i, pair in enumerate(pairs)]

  def passages(self, texts: Sequence[Ids]) -> list[Likelihood]:
    """How likely each list of tokens is after `<|endoftext|>`; without one the first token is not scored."""
    return [_likelihood(found) for found in self._rolling(texts)]

  # ---- what the four kinds of requests become

  def _continuations(self, requests: Sequence[Continuation], numbers) -> list[Likelihood]:
    parts = [_parted(request.context, request.continuation) for request in requests]
    ids = self._encoded(text for context, continuation in parts for text in (context, context + continuation))
    begins = [len(ids[context]) for context, _ in parts]
    pairs = []
    for (context, continuation), begin in zip(parts, begins, strict=True):
      pairs.append((self._begun(ids[context]), ids[context + continuation][begin:]))
      if not pairs[-1][1]:
        raise ValueError(f"the continuation {continuation!r} has no tokens of its own after {context[-20:]!r}")
    counts = [1 if request.last_piece else len(pair[1]) for request, pair in zip(requests, pairs, strict=True)]
    return self.continuations(pairs, counts)

  def _passages(self, requests: Sequence[Passage], numbers) -> list[Likelihood]:
    ids = self._encoded(request.text for request in requests)
    return self.passages([ids[request.text] for request in requests])

  def _joined(self, requests: Sequence[Passage], numbers) -> list[Likelihood]:
    """Each token belongs to the passage in which it begins."""
    ids, starts = self.tokenizer.encode_with_offsets("".join(request.text for request in requests))
    [(nats_T, first_T)] = self._rolling([ids])
    ends = np.cumsum([len(request.text) for request in requests])
    owner_T = np.searchsorted(ends, starts[len(ids) - len(nats_T) :], side="right")
    cuts = np.searchsorted(owner_T, np.arange(1, len(requests)))
    return [_likelihood(found) for found in zip(np.split(nats_T, cuts), np.split(first_T, cuts), strict=True)]

  def _prompts(self, requests: Sequence[Prompt], numbers: Sequence[int]) -> list[Generated]:
    answers = {}
    for n_new, top_k in dict.fromkeys((request.n_new, request.top_k) for request in requests):
      mine = [i for i, request in enumerate(requests) if (request.n_new, request.top_k) == (n_new, top_k)]
      prompts = self._cut([requests[i].text for i in mine], n_new)
      planned = planned_for(self.model, [len(prompt) for prompt, _ in prompts], self.batch_size)
      for batch in progress(planned.batches, "writing"):
        found = write(
          self._decoder,
          self.tokenizer,
          [prompts[i][0] for i in batch.rows],
          n_new,
          [requests[mine[i]].stop for i in batch.rows],
          Greedy() if top_k == 1 else Sample((TopK(top_k),)),
          (self.seed, [numbers[mine[i]] for i in batch.rows]),
          (planned.size, batch.length),
        )
        for i, written in zip(batch.rows, found, strict=True):
          answers[mine[i]] = Generated(*written, truncated=prompts[i][1])
    return [answers[i] for i in range(len(requests))]

  def _next_words(self, requests: Sequence[NextWords], numbers) -> list[Words]:
    answers = {}
    for n in dict.fromkeys(request.n for request in requests):
      mine = [i for i, request in enumerate(requests) if request.n == n]
      contexts = self._cut([requests[i].context for i in mine], PIECES)
      planned = planned_for(self.model, [len(context) for context, _ in contexts], self.batch_size)
      for batch in progress(planned.batches, "next words"):
        found = next_words(
          self._decoder, self.tokenizer, [contexts[i][0] for i in batch.rows], n, (planned.size, batch.length)
        )
        for i, words in zip(batch.rows, found, strict=True):
          answers[mine[i]] = Words(*words, truncated=contexts[i][1])
    return [answers[i] for i in range(len(requests))]

  def _cut(self, texts: Sequence[str], n_new: int) -> list[tuple[list[int], bool]]:
    """The tokens of each text, without its beginning where that leaves no room for `n_new`, and whether it is so."""
    ids, room = self._encoded(texts), self.model.config.n_ctx - n_new
    if room < 1:
      raise ValueError(f"{n_new} new tokens leave no room for a prompt in a context of {room + n_new}; ask for fewer")
    prompts = [self._begun(ids[text]) for text in texts]
    if not all(prompts):
      raise ValueError("this tokenizer has no <|endoftext|> for an empty prompt to begin with; give some text")
    return [(prompt[-room:], len(prompt) > room) for prompt in prompts]

  # ---- tokens and batches

  def _encoded(self, texts: Iterable[str]) -> dict[str, list[int]]:
    """The tokens of each different text."""
    texts = list(dict.fromkeys(texts))
    return dict(zip(texts, self.tokenizer.encode_batch(texts), strict=True))

  def _begun(self, ids: list[int]) -> list[int]:
    """What stands before a continuation: `<|endoftext|>` where that is nothing."""
    if ids or self.tokenizer.eot is None:
      return ids
    return [self.tokenizer.eot]

  def _rolling(self, texts: Sequence[Ids]) -> list[Scores]:
    """Scores of every token, in windows that slide over each text."""
    n_ctx, begin = self.model.config.n_ctx, [] if self.tokenizer.eot is None else [self.tokenizer.eot]
    rows = [windows(np.array([*begin, *text], np.int32), n_ctx, self.stride or n_ctx) for text in texts]
    scores = iter(self._score([row for of_text in rows for row in of_text]))
    nothing = np.zeros(0, np.float32), np.zeros(0, bool)
    parts = [[nothing, *(next(scores) for _ in of_text)] for of_text in rows]
    return [tuple(map(np.concatenate, zip(*part, strict=True))) for part in parts]

  def _score(self, rows: Sequence[Row]) -> list[Scores]:
    return score(self.model, rows, self.batch_size)

  def _sorted(self, pairs: Sequence[tuple[Ids, Ids]]) -> tuple[list[int], list[list[int]]]:
    """Which pairs are scored alone, and which together: those whose common context is much of what would be read."""
    groups = {}
    for i, (context, _) in enumerate(pairs):
      groups.setdefault(tuple(context), []).append(i)
    plain, shared = [], []
    for context, group in groups.items():
      alone = sum(len(context) + len(pairs[i][1]) - 1 for i in group)
      together = alone - (len(group) - 1) * (len(context) - 1)
      if together < SHARED * alone and together <= self.model.config.n_ctx:
        shared.append(group)
      else:
        plain += group
    return plain, shared

  @functools.cached_property
  def _decoder(self) -> Decoder:
    return ready(self.model)


def _parted(context: str, continuation: str) -> tuple[str, str]:
  """Whitespace at the end of a context begins the continuation: GPT-2's pieces have their space in front.

  As lm-evaluation-harness does it (`TemplateLM._encode_pair`).
  """
  kept = context.rstrip()
  return kept, context[len(kept) :] + continuation


def _row(pair: tuple[Ids, Ids], count: int, n_ctx: int) -> Row:
  """The row of a context and its continuation, whose last `count` tokens are scored."""
  context, continuation = pair
  return tail(np.array([*context, *continuation][-n_ctx - 1 :], np.int32), count)


def _likelihood(scores: Scores, truncated: bool = False) -> Likelihood:
  nats_T, first_T = scores
  return Likelihood(float(nats_T.sum(dtype=np.float64)), len(nats_T), bool(first_T.all()), truncated)
