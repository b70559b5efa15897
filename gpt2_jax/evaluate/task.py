# SPDX-License-Identifier: Apache-2.0
"""Evaluation tasks: pure functions from a dataset's row to requests, and from answers to sums.

A row is a plain dict. A request says in text what a model is asked, and a scorer answers it. An
item contributes a dict of numbers, which are added up over items. A metric is a function of those
sums, so that any subset or resample of the items has one.
"""

import dataclasses
from collections.abc import Callable, Mapping

import numpy as np

from gpt2_jax.evaluate.metric import Metric
from gpt2_jax.evaluate.sources import Row, Source

# ---- requests: what a model is asked


@dataclasses.dataclass(frozen=True, slots=True)
class Loglikelihood:
  """Request for the log-likelihood of `continuation` after `context`.

  An empty context stands for `<|endoftext|>`.
  """

  context: str
  continuation: str
  last_token_only: bool = False  # scores only the continuation's last token, given the others


@dataclasses.dataclass(frozen=True, slots=True)
class RollingLoglikelihood:
  """Request for the log-likelihood of a text of any length, in sliding windows.

  The text's first token is scored after `<|endoftext|>`; without such a token it has no score.
  """

  text: str


@dataclasses.dataclass(frozen=True, slots=True)
class GenerateUntil:
  """Request for the text that the model generates after `text`.

  Generation ends after `n_new` tokens, at `<|endoftext|>`, or at a `stop` string.
  """

  text: str
  n_new: int
  stop: tuple[str, ...] = ()
  # 1 is greedy. More draws among the k most likely tokens, by the seed and the row's number.
  top_k: int = 1


@dataclasses.dataclass(frozen=True, slots=True)
class NextWords:
  """Request for likely next words.

  Each of the `n` most likely first tokens is continued greedily to the end of its word.
  """

  context: str
  n: int


@dataclasses.dataclass(frozen=True, slots=True)
class TokenStatistics:
  """Request for statistics of each token of a text: how likely it was, and what else was.

  The text's first token is context only, as in the published detectors of machine text.
  """

  text: str


Request = Loglikelihood | RollingLoglikelihood | GenerateUntil | NextWords | TokenStatistics

# ---- answers: what a scorer returns


@dataclasses.dataclass(frozen=True, slots=True)
class Likelihood:
  """The answer to Loglikelihood and RollingLoglikelihood."""

  nats: float  # -log p, summed over the scored tokens
  tokens: int  # number of scored tokens
  greedy: bool  # whether each of them was the model's first choice
  # Whether the context lost its beginning, so that all fits n_ctx. Never for a rolling request.
  truncated: bool
  # Of a rolling request, the beginning of the text that has no score: its first token, if the
  # tokenizer has no `<|endoftext|>` to predict it from. Count words and bytes without it.
  unscored: str = ""


@dataclasses.dataclass(frozen=True, slots=True)
class Generated:
  """The answer to GenerateUntil: the text without the stop string."""

  text: str
  nats: float  # -log p, summed over the text's tokens
  tokens: int
  truncated: bool


@dataclasses.dataclass(frozen=True, slots=True)
class Words:
  """The answer to NextWords: whole words without the space before them, most likely first."""

  words: tuple[str, ...]
  nats: tuple[float, ...]  # -log p of each word
  truncated: bool


@dataclasses.dataclass(frozen=True, slots=True)
class Statistics:
  """The answer to TokenStatistics: arrays with a number for each scored token, [T].

  `mean` and `variance` are of log p of all tokens of the vocabulary, weighted with the reference's
  probabilities, or with the model's own where there is no reference.
  """

  nats: np.ndarray  # -log p of the token
  rank: np.ndarray  # 1 is the likeliest; equal ones share the best rank
  entropy: np.ndarray  # of the model's distribution, in nats
  mean: np.ndarray
  variance: np.ndarray
  truncated: bool = False  # never: what exceeds the context is read in windows


Answer = Likelihood | Generated | Words | Statistics

# ---- tasks


@dataclasses.dataclass(frozen=True)
class Task:
  """A task under one protocol: its rows, its requests, and what counts as right.

  `example` writes a row with its solution, for few-shot contexts; `separator` follows each example.
  `shots` is the number of examples that the protocol itself puts before each item; 0 leaves the
  number to the sweep.

  `contiguous` says that the rows are consecutive parts of one text. They are then scored as that
  text, and are rows only so that they can be resampled. `chance` has the scores of guessing, by
  metric. `program` is the SHA-256 of the user's file that defines the task, and set by its loader.
  `score_answers` maps the answers of all rows at once to what `sums` takes: a classifier of texts
  wants batches. What it returns has `truncated`, as an answer has.
  """

  name: str
  protocol: str
  description: str  # one line: what is scored, and whose protocol it is
  source: Source
  requests: Callable[[Row], list[Request]]
  sums: Callable[[Row, list[Answer]], dict[str, float]]
  metrics: dict[str, Metric]  # tables and plots show the first
  example: Callable[[Row], str] | None = None
  separator: str = "\n\n"
  shots: int = 0
  contiguous: bool = False
  chance: Mapping[str, float] = dataclasses.field(default_factory=dict)
  program: str = ""
  score_answers: Callable[[list[Answer]], list] | None = None
