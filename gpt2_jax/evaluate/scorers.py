# SPDX-License-Identifier: Apache-2.0
"""Scorer of lm_eval's request types: log-likelihood, rolling log-likelihood, generate-until.

Texts become tokens, tokens become rows, and the scores of rows become sums.
"""

import dataclasses
import functools
from collections.abc import Callable, Hashable, Iterable, Sequence

import numpy as np

from gpt2_jax.decoding.kv_cache import InferenceModel, for_inference
from gpt2_jax.decoding.samplers import Greedy, Sample, TopK
from gpt2_jax.evaluate.batching import BatchPlan
from gpt2_jax.evaluate.encoding import encode_texts, encode_with_starts
from gpt2_jax.evaluate.generation import MAX_WORD_TOKENS, next_words, write
from gpt2_jax.evaluate.loglikelihood import (
  Ids,
  ScoredRow,
  Scores,
  nats_and_first_choice,
  plan_on_mesh,
  score_last,
  score_rows,
  sliding_windows,
  tree_row,
)
from gpt2_jax.evaluate.task import (
  Answer,
  Generated,
  GenerateUntil,
  Likelihood,
  Loglikelihood,
  NextWords,
  Request,
  RollingLoglikelihood,
  Statistics,
  TokenStatistics,
  Words,
)
from gpt2_jax.evaluate.token_statistics import token_statistics
from gpt2_jax.files import progress
from gpt2_jax.finetune.prefix import VirtualTokens
from gpt2_jax.model import GPT2, ModelConfig
from gpt2_jax.tokenizer import Tokenizer

# Continuations of one context share it in one row (tree attention) where that leaves less than this
# share of the tokens to be read.
SHARED_PREFIX_BELOW = 0.75
NO_SCORES = np.zeros(0, np.float32)


@dataclasses.dataclass(frozen=True)
class Scorer:
  """Answers requests with a model on its mesh.

  `batch_size` rows go to the mesh at once, rounded up to what divides it. `stride` is the number of
  tokens that a sliding window predicts after the first window. None means n_ctx; with 1 every token
  has all the context there is. `reference` is a second model with the same tokens, for statistics
  of one model's log p under another.
  """

  model: GPT2
  tokenizer: Tokenizer
  batch_size: int = 32
  stride: int | None = None
  seed: int = 0
  reference: GPT2 | None = None

  def __post_init__(self):
    n_ctx = self.model.config.n_ctx
    if self.reference is not None:
      _check_reference(self.model.config, self.reference.config)
    if self.batch_size < 1:
      raise ValueError(f"a batch of {self.batch_size} rows; give 1 or more")
    if self.stride is not None and not 1 <= self.stride <= n_ctx:
      raise ValueError(f"a stride of {self.stride} is not from 1 to the context's {n_ctx}")
    if self.tokenizer is None:
      raise ValueError(
        "there is no tokenizer to read the requests with; give one, as of load_tokenizer"
      )

  def answers(self, requests: Sequence[Request], contiguous: bool = False) -> list[Answer]:
    """The answer to each request, in their order.

    `contiguous` takes the texts of all RollingLoglikelihood requests for one text in parts. Draws
    depend on the seed and on the number of a request in `requests`. Raises ValueError for a request
    that cannot be answered, FloatingPointError where the model's logits are not finite.
    """
    rolling = self._contiguous_loglikelihoods if contiguous else self._rolling_loglikelihoods
    methods = {
      Loglikelihood: self._loglikelihoods,
      RollingLoglikelihood: rolling,
      GenerateUntil: self._generate_until,
      NextWords: self._next_words,
      TokenStatistics: self._token_statistics,
    }

    # All requests of one type go together, so that batches are full.
    numbers_by_type = _grouped(requests, type)
    answers = {}
    for request_type, method in methods.items():
      numbers = numbers_by_type.get(request_type, [])
      if numbers:
        of_type = [requests[i] for i in numbers]
        answers.update(zip(numbers, method(of_type, numbers), strict=True))
    return [answers[i] for i in range(len(requests))]

  # ---- log-likelihood of tokens

  def loglikelihoods(
    self, pairs: Sequence[tuple[Ids, Ids]], counts: Sequence[int] | None = None
  ) -> list[Likelihood]:
    """Log-likelihood of each continuation after its context, both as tokens.

    With `counts`, only that many of its last tokens are scored. Contexts lose their beginning where
    the two exceed n_ctx + 1. Raises ValueError for a continuation that is empty or longer than
    n_ctx.
    """
    n_ctx = self.model.config.n_ctx
    for context, continuation in pairs:
      _check_pair(context, continuation, n_ctx)
    counts = counts or [len(continuation) for _, continuation in pairs]
    alone, groups = self._group_by_context(pairs)
    scores = {}

    # 1. Pairs with a row of their own.
    rows = [_pair_row(pairs[i], counts[i], n_ctx) for i in alone]
    scores.update(zip(alone, self._score(rows), strict=True))

    # 2. Continuations that share the row of their context. There all their tokens are scored, and
    #    those beyond `counts` are dropped.
    trees = []
    for group in groups:
      context, _ = pairs[group[0]]
      trees.append(tree_row(context, [pairs[i][1] for i in group]))
    for group, (nats_T, first_T) in zip(groups, self._score(trees), strict=True):
      end = 0
      for i in group:
        end += len(pairs[i][1])
        begin = end - counts[i]
        scores[i] = (nats_T[begin:end], first_T[begin:end])

    # 3. Sum.
    likelihoods = []
    for i, (context, continuation) in enumerate(pairs):
      truncated = len(context) + len(continuation) > n_ctx + 1
      likelihoods.append(_likelihood(scores[i], truncated))
    return likelihoods

  def rolling_loglikelihoods(self, texts: Sequence[Ids]) -> list[Likelihood]:
    """Rolling log-likelihood of each list of tokens, the first after `<|endoftext|>`.

    If the tokenizer has no such token, the first token is not scored.
    """
    return list(map(_likelihood, self._score_windows(texts, self._eot())))

  # ---- the types of requests

  def _loglikelihoods(self, requests: Sequence[Loglikelihood], numbers) -> list[Likelihood]:
    """Log-likelihood requests: tokenizes context and continuation together, and cuts."""
    # 1. Encode each context, and each context with its continuation.
    parts = [_move_whitespace(request.context, request.continuation) for request in requests]
    texts = []
    for context, continuation in parts:
      texts += [context, context + continuation]
    ids = self._encode_distinct(texts)

    # 2. As many tokens as the context has alone are the context's; the others are scored. So a
    #    token across the border counts as context, as in lm-evaluation-harness.
    pairs = []
    counts = []
    for request, (context, continuation) in zip(requests, parts, strict=True):
      continuation_ids = ids[context + continuation][len(ids[context]) :]
      if not continuation_ids:
        raise ValueError(
          f"the continuation {continuation!r} has no tokens of its own after {context[-20:]!r}"
        )
      pairs.append((self._nonempty(ids[context]), continuation_ids))
      counts.append(1 if request.last_token_only else len(continuation_ids))
    return self.loglikelihoods(pairs, counts)

  def _rolling_loglikelihoods(
    self, requests: Sequence[RollingLoglikelihood], numbers
  ) -> list[Likelihood]:
    texts = [request.text for request in requests]
    if self.tokenizer.eot is not None:
      return self.rolling_loglikelihoods(encode_texts(self.tokenizer, texts))

    # Without `<|endoftext|>` each text's first token has no score.
    ids, unscored = [], []
    for text in texts:
      ids_of_text, starts = encode_with_starts(self.tokenizer, text)
      ids.append(ids_of_text)
      unscored.append(text[: _first_token_end(starts, text)])
    scores = self.rolling_loglikelihoods(ids)
    pairs = zip(scores, unscored, strict=True)
    return [dataclasses.replace(likelihood, unscored=text) for likelihood, text in pairs]

  def _contiguous_loglikelihoods(
    self, requests: Sequence[RollingLoglikelihood], numbers
  ) -> list[Likelihood]:
    """Rolling log-likelihood of one text in parts: a token belongs to the part it begins in."""
    # 1. Score the parts as one text. Without `<|endoftext|>` its first token has no score.
    texts = [request.text for request in requests]
    whole = "".join(texts)
    ids, starts = encode_with_starts(self.tokenizer, whole)
    first_end = 0 if self.tokenizer.eot is not None else _first_token_end(starts, whole)
    [(nats_T, first_T)] = self._score_windows([ids], self._eot())
    scored_starts = starts[len(ids) - len(nats_T) :]

    # 2. Cut the scores where the parts end.
    ends = np.cumsum([len(text) for text in texts])
    part_T = np.searchsorted(ends, scored_starts, side="right")
    cuts = np.searchsorted(part_T, np.arange(1, len(requests)))
    parts = zip(np.split(nats_T, cuts), np.split(first_T, cuts), strict=True)

    # 3. The token without a score may reach over several parts.
    likelihoods = []
    for text, end, scores in zip(texts, ends, parts, strict=True):
      in_part = max(0, first_end - (int(end) - len(text)))
      likelihoods.append(dataclasses.replace(_likelihood(scores), unscored=text[:in_part]))
    return likelihoods

  def _generate_until(
    self, requests: Sequence[GenerateUntil], numbers: Sequence[int]
  ) -> list[Generated]:
    """Generate-until requests: texts up to a stop string, greedy or with top-k sampling."""
    answers = {}
    # One sampler and one number of new tokens to a batch: both are compiled in.
    groups = _grouped(requests, lambda request: (request.n_new, request.top_k))
    for (n_new, top_k), group in groups.items():
      # 1. Truncate, and plan batches of similar lengths.
      sampler = Greedy() if top_k == 1 else Sample((TopK(top_k),))
      prompts = self._truncated([requests[i].text for i in group], n_new)
      plan = self._plan(prompts)

      # 2. Generate. A draw depends on the seed and the request's number, never on its batch.
      for batch in progress(plan.batches, "writing"):
        in_batch = [group[row] for row in batch.rows]
        generated = write(
          self._inference_model,
          self.tokenizer,
          [prompts[row][0] for row in batch.rows],
          n_new,
          [requests[i].stop for i in in_batch],
          sampler,
          (self.seed, [numbers[i] for i in in_batch]),
          (plan.size, batch.length),
        )
        for i, row, answer in zip(in_batch, batch.rows, generated, strict=True):
          answers[i] = Generated(*answer, truncated=prompts[row][1])
    return _in_order(answers)

  def _next_words(self, requests: Sequence[NextWords], numbers) -> list[Words]:
    """Next-word requests: the likeliest whole words after each context."""
    answers = {}
    for n, group in _grouped(requests, lambda request: request.n).items():
      contexts = self._truncated([requests[i].context for i in group], MAX_WORD_TOKENS)
      plan = self._plan(contexts)

      for batch in progress(plan.batches, "next words"):
        words = next_words(
          self._inference_model,
          self.tokenizer,
          [contexts[row][0] for row in batch.rows],
          n,
          (plan.size, batch.length),
        )
        for row, answer in zip(batch.rows, words, strict=True):
          answers[group[row]] = Words(*answer, truncated=contexts[row][1])
    return _in_order(answers)

  def _token_statistics(self, requests: Sequence[TokenStatistics], numbers) -> list[Statistics]:
    texts = encode_texts(self.tokenizer, [request.text for request in requests])
    for number, ids in zip(numbers, texts, strict=True):
      if len(ids) < 2:
        raise ValueError(
          f"text {number:,} has {len(ids)} tokens, and the first is context only: give a longer one"
        )
    scores = self._score_windows(texts, begin=(), measure=token_statistics)
    return [Statistics(*arrays) for arrays in scores]

  # ---- tokens and batches

  def _encode_distinct(self, texts: Iterable[str]) -> dict[str, list[int]]:
    """The tokens of each text; equal texts are encoded once."""
    texts = list(dict.fromkeys(texts))
    arrays = encode_texts(self.tokenizer, texts)
    return {text: ids.tolist() for text, ids in zip(texts, arrays, strict=True)}

  def _nonempty(self, ids: list[int]) -> list[int]:
    """The tokens of a context: `<|endoftext|>` for an empty one, if the tokenizer has it."""
    if ids or self.tokenizer.eot is None:
      return ids
    return [self.tokenizer.eot]

  def _truncated(self, texts: Sequence[str], n_new: int) -> list[tuple[list[int], bool]]:
    """Left-truncates prompts so that `n_new` tokens fit: the tokens, and whether some were cut."""
    n_ctx = self.model.config.n_ctx
    room = n_ctx - n_new
    if room < 1:
      raise ValueError(
        f"{n_new} new tokens leave no room for a prompt in a context of {n_ctx}; ask for fewer"
      )

    # A prompt that is still empty has no token to predict the first one from.
    ids = self._encode_distinct(texts)
    prompts = [self._nonempty(ids[text]) for text in texts]
    if not all(prompts):
      raise ValueError(
        "this tokenizer has no <|endoftext|> for an empty prompt to begin with; give some text"
      )
    return [(prompt[-room:], len(prompt) > room) for prompt in prompts]

  def _plan(self, prompts: Sequence[tuple[list[int], bool]]) -> BatchPlan:
    lengths = [len(ids) for ids, _ in prompts]
    return plan_on_mesh(self.model, lengths, self.batch_size)

  def _eot(self) -> Ids:
    """What is read before a text: `<|endoftext|>`, if the tokenizer has it."""
    return () if self.tokenizer.eot is None else (self.tokenizer.eot,)

  def _score_windows(
    self, texts: Sequence[Ids], begin: Ids, measure: Callable = nats_and_first_choice
  ) -> list[Scores]:
    """Scores of every token of each text after `begin`, in sliding windows."""
    n_ctx = self.model.config.n_ctx

    # 1. The windows of all texts in one list, so that batches are full.
    rows = []
    n_windows = []
    for text in texts:
      tokens = np.concatenate([np.array(begin, np.int32), np.asarray(text, np.int32)])
      windows = sliding_windows(tokens, n_ctx, self.stride or n_ctx)
      rows += windows
      n_windows.append(len(windows))
    reference = None if measure is nats_and_first_choice else self.reference
    scores = iter(score_rows(self.model, rows, self.batch_size, measure, reference))

    # 2. Concatenate the scores of each text. One without tokens has no window and no scores.
    of_texts = []
    for n in n_windows:
      windows = [next(scores) for _ in range(n)]
      columns = zip(*windows, strict=True) if windows else [(NO_SCORES,), (NO_SCORES > 0,)]
      of_texts.append(tuple(map(np.concatenate, columns)))
    return of_texts

  def _score(self, rows: Sequence[ScoredRow]) -> list[Scores]:
    return score_rows(self.model, rows, self.batch_size)

  def _group_by_context(
    self, pairs: Sequence[tuple[Ids, Ids]]
  ) -> tuple[list[int], list[list[int]]]:
    """Shared prefixes: which pairs are scored alone, and which share the row of their context.

    They share it where the context is much of what would be read, and all fits n_ctx. A model with
    virtual tokens shares none: its attention is its own.
    """
    if isinstance(self.model, VirtualTokens):
      return list(range(len(pairs))), []
    alone = []
    shared = []
    for context, group in _grouped(pairs, lambda pair: tuple(pair[0])).items():
      # The last token of a context is repeated at the beginning of each branch.
      tokens_apart = sum(len(context) + len(pairs[i][1]) - 1 for i in group)
      tokens_together = tokens_apart - (len(group) - 1) * (len(context) - 1)

      saves_enough = tokens_together < SHARED_PREFIX_BELOW * tokens_apart
      if saves_enough and tokens_together <= self.model.config.n_ctx:
        shared.append(group)
      else:
        alone += group
    return alone, shared

  @functools.cached_property
  def _inference_model(self) -> InferenceModel:
    return for_inference(self.model)


def _check_reference(config: ModelConfig, reference: ModelConfig) -> None:
  """Raises ValueError unless both models read the same tokens in windows of the same length."""
  for name in ("n_vocab", "n_ctx"):
    ours, theirs = getattr(config, name), getattr(reference, name)
    if ours != theirs:
      raise ValueError(
        f"the model has {name} of {ours:,} and the reference {theirs:,}; both read the same tokens "
        f"in the same windows, so take two models of one family"
      )


def _first_token_end(starts: np.ndarray, text: str) -> int:
  """The character at which a text's second token begins; its end if there is none."""
  return int(starts[1]) if len(starts) > 1 else len(text)


def _check_pair(context: Ids, continuation: Ids, n_ctx: int) -> None:
  if not continuation:
    raise ValueError("a continuation has no tokens: there is nothing to score")
  if not context:
    raise ValueError(
      "a continuation has no token before it; give a context, or a tokenizer with <|endoftext|>"
    )
  if len(continuation) > n_ctx:
    raise ValueError(
      f"a continuation of {len(continuation):,} tokens exceeds the context of {n_ctx:,}; shorten it"
    )


def _move_whitespace(context: str, continuation: str) -> tuple[str, str]:
  """Moves trailing whitespace of the context to the continuation: GPT-2's tokens begin with it.

  As lm-evaluation-harness does it (`TemplateLM._encode_pair`).
  """
  stripped = context.rstrip()
  return stripped, context[len(stripped) :] + continuation


def _pair_row(pair: tuple[Ids, Ids], count: int, n_ctx: int) -> ScoredRow:
  """The row of a context and its continuation, whose last `count` tokens are scored."""
  context, continuation = pair
  tokens = [*context, *continuation][-n_ctx - 1 :]
  return score_last(np.array(tokens, np.int32), count)


def _likelihood(scores: Scores, truncated: bool = False) -> Likelihood:
  """Sums the log-likelihood of a continuation over its tokens; nats are -log p."""
  nats_T, first_T = scores
  nats = float(nats_T.sum(dtype=np.float64))
  return Likelihood(nats, len(nats_T), bool(first_T.all()), truncated)


def _grouped(items: Sequence, key: Callable) -> dict[Hashable, list[int]]:
  """The numbers of the items of each key; keys in the order in which they first occur."""
  groups = {}
  for i, item in enumerate(items):
    groups.setdefault(key(item), []).append(i)
  return groups


def _in_order(answers: dict[int, Answer]) -> list[Answer]:
  return [answers[i] for i in range(len(answers))]
