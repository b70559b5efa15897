# SPDX-License-Identifier: Apache-2.0
"""What a task is: pure functions from a row of a dataset to requests, and from their answers to sums.

A row is a plain dict. A request says what a model is asked, in text; the scorers answer it. What an item contributes
is a dict of numbers that are added up over items; a metric is a function of those sums, so that any subset or resample
of the items has one.
"""

import dataclasses
from collections.abc import Callable

from gpt2_jax.evaluate.metric import Metric
from gpt2_jax.evaluate.sources import Row, Source


@dataclasses.dataclass(frozen=True, slots=True)
class Continuation:
  """How likely is `continuation` after `context`? An empty context stands for `<|endoftext|>`."""

  context: str
  continuation: str
  last_piece: bool = False  # only the continuation's last token is scored


@dataclasses.dataclass(frozen=True, slots=True)
class Passage:
  """How likely is a text of any length, its first token after `<|endoftext|>`, in windows that slide?"""

  text: str


@dataclasses.dataclass(frozen=True, slots=True)
class Prompt:
  """What does the model write after `text`? At most `n_new` tokens, up to `<|endoftext|>` or a `stop` string."""

  text: str
  n_new: int
  stop: tuple[str, ...] = ()
  top_k: int = 1  # 1 is greedy; otherwise a draw among the k most likely, by the row's number and the seed


@dataclasses.dataclass(frozen=True, slots=True)
class NextWords:
  """Which are likely next words: the `n` most likely first pieces, each finished greedily up to the word's end."""

  context: str
  n: int


Request = Continuation | Passage | Prompt | NextWords


@dataclasses.dataclass(frozen=True, slots=True)
class Likelihood:
  """The answer to Continuation and Passage."""

  nats: float  # -log p of the scored tokens, together
  tokens: int  # how many
  greedy: bool  # whether each of them was the model's first choice
  truncated: bool  # whether the context lost its beginning, so that all fits n_ctx (a Passage never does)


@dataclasses.dataclass(frozen=True, slots=True)
class Generated:
  """The answer to Prompt: the text without the stop string; `nats` are those of its tokens, `tokens` of them."""

  text: str
  nats: float
  tokens: int
  truncated: bool


@dataclasses.dataclass(frozen=True, slots=True)
class Words:
  """The answer to NextWords: whole words without the space before them, and -log p of each, least first."""

  words: tuple[str, ...]
  nats: tuple[float, ...]
  truncated: bool


Answer = Likelihood | Generated | Words


@dataclasses.dataclass(frozen=True)
class Task:
  """A task under one protocol: where its rows come from, what is asked, and what counts.

  `example` writes a row out solved, for few-shot contexts; examples and the item itself are joined by `separator`.
  `joined` says that the rows' passages are one text, in their order, of which each row is a part.
  """

  name: str
  protocol: str
  about: str  # one line: what is scored, and whose protocol it is
  source: Source
  requests: Callable[[Row], list[Request]]
  sums: Callable[[Row, list[Answer]], dict[str, float]]
  metrics: dict[str, Metric]  # the first is the one that tables and plots show
  example: Callable[[Row], str] | None = None
  separator: str = "\n\n"
  joined: bool = False
