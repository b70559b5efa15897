# SPDX-License-Identifier: Apache-2.0
"""Samplers: temperature, top-k, nucleus (top-p), min-p, typical-p, penalties, n-gram bans, biases.

A filter maps the logits of one row and the row's `History` to logits; minus infinity bans a token.
Filters apply in the order in which they are given: `(Temperature(2.0), TopP(0.9))` is top-p of the
heated distribution. `Greedy` and `Sample` pick a token from what the filters leave.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gpt2_jax.compat import categorical

# The largest bias or penalty: sums and quotients of a few of them stay finite in float32.
MAX_PENALTY = 1e9


class History(NamedTuple):
  """The tokens of a row so far, as filters see them.

  The prompt is `tokens_W[prompt_start:prompt_end]`, the new tokens are `tokens_W[prompt_end:end]`.
  """

  tokens_W: jax.Array
  prompt_start: jax.Array | int
  prompt_end: jax.Array | int
  end: jax.Array | int

  @classmethod
  def of(cls, prompt, new=()):
    """The history of a prompt and what was added to it."""
    return cls(jnp.asarray([*prompt, *new], jnp.int32), 0, len(prompt), len(prompt) + len(new))

  def counts(self, n_vocab: int, new_only: bool = False):
    """How often each token occurs, [V]."""
    begin = self.prompt_end if new_only else self.prompt_start
    column_W = jnp.arange(self.tokens_W.shape[0])
    inside_W = (column_W >= begin) & (column_W < self.end)

    # Columns outside the row count for the token `n_vocab`, which is out of bounds and dropped.
    token_W = jnp.where(inside_W, self.tokens_W, n_vocab)
    return jnp.zeros(n_vocab, jnp.int32).at[token_W].add(1, mode="drop")

  def repeats(self, n: int):
    """Whether the row's n newest tokens also stand right before a column of it, [W]."""
    # 1. Before a column there have to be n tokens of the row.
    column_W = jnp.arange(self.tokens_W.shape[0])
    repeats_W = (column_W >= self.prompt_start + n) & (column_W < self.end)

    # 2. They are compared one distance at a time.
    for back in range(1, n + 1):
      newest = jnp.sum(jnp.where(column_W == self.end - back, self.tokens_W, 0))
      # What comes in from the left is before the row, and does not count.
      earlier_W = jnp.pad(self.tokens_W, (back, 0))[: column_W.size]
      repeats_W &= earlier_W == newest
    return repeats_W


@dataclasses.dataclass(frozen=True)
class Temperature:
  """Divides the logits by the temperature: below 1 is surer, above 1 is wilder."""

  value: float

  def __post_init__(self):
    # Below 1e-30 logits would overflow float32.
    problem = None
    if not self.value > 0:
      problem = "not above 0"
    elif not 1e-30 <= self.value < math.inf:
      problem = "not a finite number of 1e-30 or more"
    if problem:
      raise ValueError(
        f"a temperature of {self.value} is {problem}; "
        f"greedy=True (--greedy, /set greedy true) takes the likeliest token"
      )

  def __call__(self, logits_V, history=None):
    return logits_V / self.value


@dataclasses.dataclass(frozen=True)
class TopK:
  """Top-k sampling: keeps the k likeliest tokens (Fan et al. 2018)."""

  k: int

  def __post_init__(self):
    if self.k < 1:
      raise ValueError(f"top-k of {self.k} keeps nothing; k is 1 or more")

  def __call__(self, logits_V, history=None):
    # Ties with the k-th stay, as in transformers.
    least = jax.lax.top_k(logits_V, min(self.k, logits_V.size))[0][-1]
    return jnp.where(logits_V < least, -jnp.inf, logits_V)


def _keep_mass(logits_V, order_V, mass: float):
  """Keeps the fewest tokens, taken in this order, that hold at least this probability."""
  p_V = jax.nn.softmax(logits_V)[order_V]

  # A token is kept if those before it hold less than the mass: so the first is kept in any case.
  keep_V = jnp.cumsum(p_V) - p_V < mass
  return jnp.where(jnp.zeros_like(keep_V).at[order_V].set(keep_V), logits_V, -jnp.inf)


@dataclasses.dataclass(frozen=True)
class TopP:
  """Nucleus (top-p) sampling: keeps the fewest likeliest tokens that hold at least probability p.

  Source: Holtzman et al. 2020, "The Curious Case of Neural Text Degeneration".
  """

  p: float

  def __post_init__(self):
    if not 0 < self.p <= 1:
      raise ValueError(f"top-p of {self.p} is not in (0, 1]")

  def __call__(self, logits_V, history=None):
    return _keep_mass(logits_V, jnp.argsort(-logits_V), self.p)


@dataclasses.dataclass(frozen=True)
class MinP:
  """Min-p sampling: keeps tokens at least p times as likely as the likeliest.

  Source: Nguyen et al. 2024, "Turning Up the Heat".
  """

  p: float

  def __post_init__(self):
    if not 0 < self.p <= 1:
      raise ValueError(f"min-p of {self.p} is not in (0, 1]")

  def __call__(self, logits_V, history=None):
    # p(x) < p * max p, on logits: the normalization cancels.
    return jnp.where(logits_V < logits_V.max() + math.log(self.p), -jnp.inf, logits_V)


@dataclasses.dataclass(frozen=True)
class TypicalP:
  """Locally typical sampling: keeps the fewest tokens that hold at least probability p.

  Tokens whose surprisal is nearest to the entropy come first (Meister et al. 2022).
  """

  p: float

  def __post_init__(self):
    if not 0 < self.p <= 1:
      raise ValueError(f"typical-p of {self.p} is not in (0, 1]")

  def __call__(self, logits_V, history=None):
    logp_V = jax.nn.log_softmax(logits_V)

    # 0 log 0 is 0, where a filter before this one has banned a token.
    entropy = -jnp.sum(jnp.where(logp_V > -jnp.inf, jnp.exp(logp_V) * logp_V, 0.0))
    return _keep_mass(logits_V, jnp.argsort(jnp.abs(-logp_V - entropy)), self.p)


@dataclasses.dataclass(frozen=True)
class RepetitionPenalty:
  """Repetition penalty: makes every token of the prompt and of the new tokens less likely.

  A positive logit is divided by `value`, a negative one is multiplied with it (Keskar et al. 2019;
  the case of the sign is transformers').
  """

  value: float

  def __post_init__(self):
    if not 0 < self.value <= MAX_PENALTY:
      raise ValueError(
        f"a repetition penalty of {self.value} is not in (0, 1e9]; "
        f"1 changes nothing, above 1 repeats less"
      )

  def __call__(self, logits_V, history):
    # Above 1 both forms make a logit smaller: a division would bring a negative one nearer to 0.
    penalized_V = jnp.where(logits_V < 0, logits_V * self.value, logits_V / self.value)
    return jnp.where(history.counts(logits_V.size) > 0, penalized_V, logits_V)


@dataclasses.dataclass(frozen=True)
class FrequencyPenalty:
  """Frequency penalty of OpenAI's API: takes `value` off a logit for each time its token was added.

  The prompt does not count.
  """

  value: float

  def __post_init__(self):
    if not abs(self.value) <= MAX_PENALTY:
      raise ValueError(
        f"a frequency penalty of {self.value}: at most 1e9 either way; 0 changes nothing"
      )

  def __call__(self, logits_V, history):
    return logits_V - history.counts(logits_V.size, new_only=True) * self.value


@dataclasses.dataclass(frozen=True)
class PresencePenalty:
  """Presence penalty of OpenAI's API: takes `value` off a logit once if its token was added at all.

  The prompt does not count.
  """

  value: float

  def __post_init__(self):
    if not abs(self.value) <= MAX_PENALTY:
      raise ValueError(
        f"a presence penalty of {self.value}: at most 1e9 either way; 0 changes nothing"
      )

  def __call__(self, logits_V, history):
    return logits_V - (history.counts(logits_V.size, new_only=True) > 0) * self.value


@dataclasses.dataclass(frozen=True)
class NoRepeatNgram:
  """No-repeat n-grams: bans each token that would complete an n-gram for the second time.

  The prompt counts (Paulus et al. 2018).
  """

  n: int

  def __post_init__(self):
    if self.n < 1:
      raise ValueError(f"runs of {self.n} tokens cannot repeat; n is 1 or more")

  def __call__(self, logits_V, history):
    if self.n > history.tokens_W.shape[0]:
      return logits_V

    # The tokens that follow the n - 1 newest ones are banned; others are out of bounds and dropped.
    repeats_W = history.repeats(self.n - 1)
    token_W = jnp.where(repeats_W, history.tokens_W, logits_V.size)
    banned_V = jnp.zeros(logits_V.size, bool).at[token_W].set(True, mode="drop")
    return jnp.where(banned_V, -jnp.inf, logits_V)


@dataclasses.dataclass(frozen=True)
class LogitBias:
  """Logit bias: adds to the logits of single tokens, {token: bias} or such pairs.

  A bias of minus infinity bans the token.
  """

  biases: Mapping[int, float] | tuple[tuple[int, float], ...]

  def __post_init__(self):
    biases = dict(self.biases)
    for token, bias in biases.items():
      if token < 0 or not (abs(bias) <= MAX_PENALTY or bias == -math.inf):
        raise ValueError(
          f"a bias of {bias} for token {token}: "
          f"tokens are 0 or more, a bias is within 1e9 or is -inf"
        )

    # A tuple is hashable: samplers are static arguments of jax.jit.
    object.__setattr__(self, "biases", tuple(sorted(biases.items())))

  def __call__(self, logits_V, history=None):
    # NumPy, while tracing: the biases are a constant of the program.
    bias_V = np.zeros(logits_V.size, np.float32)
    for token, bias in self.biases:
      if token >= logits_V.size:
        raise ValueError(
          f"a bias for token {token}, where the vocabulary has {logits_V.size} tokens; leave it out"
        )
      bias_V[token] = bias
    return logits_V + bias_V


@dataclasses.dataclass(frozen=True)
class MinNewTokens:
  """Minimum length: bans `eot` until there are n new tokens."""

  n: int
  eot: int

  def __post_init__(self):
    if self.n < 0 or self.eot < 0:
      raise ValueError(f"at least {self.n} new tokens before token {self.eot}: both are 0 or more")

  def __call__(self, logits_V, history):
    banned_V = (jnp.arange(logits_V.size) == self.eot) & (history.end - history.prompt_end < self.n)
    return jnp.where(banned_V, -jnp.inf, logits_V)


def as_filters(filters) -> tuple:
  """One filter, or several in any sequence, as a tuple. Raises ValueError for what is no filter."""
  filters = (filters,) if callable(filters) else tuple(filters)
  for item in filters:
    if not callable(item) or isinstance(item, Greedy | Sample):
      raise ValueError(
        f"{item!r} is no filter; give TopK(40), TopP(0.9), Temperature(0.8) or the like"
      )
  return filters


def apply_filters(filters: tuple, logits_V, history=None):
  """The logits after the filters in their order.

  Filters that ban every token leave the likeliest one.
  """
  if not filters:
    return logits_V

  # Minus infinity stays minus infinity: no filter brings back what one before it has banned.
  left_V = logits_V
  for apply in filters:
    left_V = apply(left_V, history)

  # An argmax and not a comparison with the maximum: ties must leave one token as well.
  best_V = jnp.where(jnp.arange(logits_V.size) == jnp.argmax(logits_V), 0.0, -jnp.inf)
  return jnp.where(jnp.max(left_V) > -jnp.inf, left_V, best_V)


@dataclasses.dataclass(frozen=True)
class Greedy:
  """Greedy decoding: the likeliest token after `filters`."""

  filters: tuple = ()

  def __post_init__(self):
    object.__setattr__(self, "filters", as_filters(self.filters))

  def __call__(self, key, logits_V, history=None):
    return jnp.argmax(apply_filters(self.filters, logits_V, history))


@dataclasses.dataclass(frozen=True)
class Sample:
  """Random sampling: a token drawn from the softmax of the logits after `filters`."""

  filters: tuple = ()

  def __post_init__(self):
    object.__setattr__(self, "filters", as_filters(self.filters))

  def __call__(self, key, logits_V, history=None):
    return categorical(key, apply_filters(self.filters, logits_V, history))


def make_sampler(
  *,
  greedy: bool = False,
  frequency_penalty: float | None = None,
  presence_penalty: float | None = None,
  repetition_penalty: float | None = None,
  no_repeat_ngram: int | None = None,
  temperature: float | None = None,
  top_k: int | None = None,
  top_p: float | None = None,
  min_p: float | None = None,
  typical_p: float | None = None,
  watermark: Callable | None = None,
) -> Greedy | Sample:
  """A sampler from keywords; None leaves a filter out.

  Filters apply in the order of the keywords: penalties first, then the temperature, then what is
  kept, then a watermark (watermark.py). For another order give `Sample((...))`. Raises ValueError
  for numbers that cannot be.
  """
  # In the order in which they apply.
  options = (
    (FrequencyPenalty, frequency_penalty),
    (PresencePenalty, presence_penalty),
    (RepetitionPenalty, repetition_penalty),
    (NoRepeatNgram, no_repeat_ngram),
    (Temperature, temperature),
    (TopK, top_k),
    (TopP, top_p),
    (MinP, min_p),
    (TypicalP, typical_p),
  )

  filters = tuple(make(value) for make, value in options if value is not None)
  filters += () if watermark is None else as_filters(watermark)
  return Greedy(filters) if greedy else Sample(filters)
