# SPDX-License-Identifier: Apache-2.0
"""How the next token is chosen from the logits: filters that compose, and the two ways to pick from what they leave.

A filter maps the logits of one row and the row's `History` to logits; minus infinity bans. They apply in the order in
which they are given, so `(Temperature(2.0), TopP(0.9))` is top-p of the heated distribution.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

MOST = 1e9  # of a bias or a penalty: sums and quotients of a few stay finite in float32


class History(NamedTuple):
  """A row so far: its prompt is `tokens_W[first:prompt_end]`, its new tokens are `tokens_W[prompt_end:end]`."""

  tokens_W: jax.Array
  first: jax.Array | int
  prompt_end: jax.Array | int
  end: jax.Array | int

  @classmethod
  def of(cls, prompt, new=()):
    """The history of a prompt and what was added to it."""
    return cls(jnp.asarray([*prompt, *new], jnp.int32), 0, len(prompt), len(prompt) + len(new))

  def counts(self, n_vocab: int, new_only: bool = False):
    """How often each token occurs, [V]."""
    column_W = jnp.arange(self.tokens_W.shape[0])
    inside_W = (column_W >= (self.prompt_end if new_only else self.first)) & (column_W < self.end)
    return jnp.zeros(n_vocab, jnp.int32).at[jnp.where(inside_W, self.tokens_W, n_vocab)].add(1, mode="drop")


@dataclasses.dataclass(frozen=True)
class Temperature:
  """Divides the logits; below 1 is surer, above 1 is wilder."""

  value: float

  def __post_init__(self):
    if not self.value > 0:
      raise ValueError(
        f"a temperature of {self.value} is not above 0; Greedy() (--greedy, /set greedy true) takes the likeliest token"
      )

  def __call__(self, logits_V, history=None):
    return logits_V / self.value


@dataclasses.dataclass(frozen=True)
class TopK:
  """Keeps the k likeliest tokens (Fan et al. 2018)."""

  k: int

  def __post_init__(self):
    if self.k < 1:
      raise ValueError(f"top-k of {self.k} keeps nothing; k is 1 or more")

  def __call__(self, logits_V, history=None):
    least = jax.lax.top_k(logits_V, min(self.k, logits_V.size))[0][-1]
    return jnp.where(logits_V < least, -jnp.inf, logits_V)


def _first_mass(logits_V, order_V, mass: float):
  """The fewest tokens, taken in this order, that hold at least this probability."""
  p_V = jax.nn.softmax(logits_V)[order_V]
  keep_V = jnp.cumsum(p_V) - p_V < mass  # probability of those before it
  return jnp.where(jnp.zeros_like(keep_V).at[order_V].set(keep_V), logits_V, -jnp.inf)


@dataclasses.dataclass(frozen=True)
class TopP:
  """Keeps the fewest likeliest tokens that hold at least probability p (Holtzman et al. 2020)."""

  p: float

  def __post_init__(self):
    if not 0 < self.p <= 1:
      raise ValueError(f"top-p of {self.p} is not in (0, 1]")

  def __call__(self, logits_V, history=None):
    return _first_mass(logits_V, jnp.argsort(-logits_V), self.p)


@dataclasses.dataclass(frozen=True)
class MinP:
  """Keeps the tokens at least p times as likely as the likeliest (Nguyen et al. 2024)."""

  p: float

  def __post_init__(self):
    if not 0 < self.p <= 1:
      raise ValueError(f"min-p of {self.p} is not in (0, 1]")

  def __call__(self, logits_V, history=None):
    return jnp.where(logits_V < logits_V.max() + math.log(self.p), -jnp.inf, logits_V)


@dataclasses.dataclass(frozen=True)
class Typical:
  """Keeps the fewest tokens that hold at least probability p, those first whose surprisal is nearest to the entropy
  (Meister et al. 2022)."""

  p: float

  def __post_init__(self):
    if not 0 < self.p <= 1:
      raise ValueError(f"typical-p of {self.p} is not in (0, 1]")

  def __call__(self, logits_V, history=None):
    logp_V = jax.nn.log_softmax(logits_V)
    entropy = -jnp.sum(jnp.where(logp_V > -jnp.inf, jnp.exp(logp_V) * logp_V, 0.0))
    return _first_mass(logits_V, jnp.argsort(jnp.abs(-logp_V - entropy)), self.p)


@dataclasses.dataclass(frozen=True)
class RepetitionPenalty:
  """Divides a positive logit by `value`, and multiplies a negative one, if its token is in the prompt or the new tokens
  (Keskar et al. 2019; the sign is transformers' repair)."""

  value: float

  def __post_init__(self):
    if not 0 < self.value <= MOST:
      raise ValueError(
        f"a repetition penalty of {self.value} is not in (0, 1e9]; 1 changes nothing, above 1 repeats less"
      )

  def __call__(self, logits_V, history):
    penalized_V = jnp.where(logits_V < 0, logits_V * self.value, logits_V / self.value)
    return jnp.where(history.counts(logits_V.size) > 0, penalized_V, logits_V)


@dataclasses.dataclass(frozen=True)
class OccurrencePenalty:
  """Takes `frequency` off a logit for each time its token occurs among the new tokens, and `presence` once if it does.

  The frequency and presence penalties of OpenAI's API. The prompt does not count.
  """

  frequency: float = 0.0
  presence: float = 0.0

  def __post_init__(self):
    if not (abs(self.frequency) <= MOST and abs(self.presence) <= MOST):
      raise ValueError(f"penalties of {self.frequency} (frequency), {self.presence} (presence): at most 1e9 either way")

  def __call__(self, logits_V, history):
    counts_V = history.counts(logits_V.size, new_only=True)
    return logits_V - counts_V * self.frequency - (counts_V > 0) * self.presence


@dataclasses.dataclass(frozen=True)
class NoRepeatNgram:
  """Bans each token that would end a run of n tokens that the prompt and the new tokens hold already (Paulus et al.
  2018)."""

  n: int

  def __post_init__(self):
    if self.n < 1:
      raise ValueError(f"runs of {self.n} tokens cannot repeat; n is 1 or more")

  def __call__(self, logits_V, history):
    tokens_W, first, _, end = history
    W = tokens_W.shape[0]
    if self.n > W:
      return logits_V
    column_W = jnp.arange(W)  # where a run would end
    repeats_W = (column_W >= first + self.n - 1) & (column_W < end)
    for back in range(1, self.n):
      newest = jnp.sum(jnp.where(column_W == end - back, tokens_W, 0))
      repeats_W &= jnp.roll(tokens_W, back) == newest
    banned_V = jnp.zeros(logits_V.size, bool).at[jnp.where(repeats_W, tokens_W, logits_V.size)].set(True, mode="drop")
    return jnp.where(banned_V, -jnp.inf, logits_V)


@dataclasses.dataclass(frozen=True)
class LogitBias:
  """Adds to the logits of single tokens: {token: bias}, or such pairs; a bias of minus infinity bans."""

  biases: Mapping[int, float] | tuple[tuple[int, float], ...]

  def __post_init__(self):
    biases = dict(self.biases)
    for token, bias in biases.items():
      if token < 0 or not (abs(bias) <= MOST or bias == -math.inf):
        raise ValueError(f"a bias of {bias} for token {token}: tokens are 0 or more, a bias is within 1e9 or is -inf")
    object.__setattr__(self, "biases", tuple(sorted(biases.items())))  # hashable: samplers are arguments of jax.jit

  def __call__(self, logits_V, history=None):
    bias_V = np.zeros(logits_V.size, np.float32)
    for token, bias in self.biases:
      if token >= logits_V.size:
        raise ValueError(f"a bias for token {token}, where the vocabulary has {logits_V.size} tokens; leave it out")
      bias_V[token] = bias
    return logits_V + bias_V


@dataclasses.dataclass(frozen=True)
class MinNew:
  """Bans `eot` until there are n new tokens."""

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
  found = (filters,) if callable(filters) else tuple(filters)
  if odd := [f for f in found if not callable(f) or isinstance(f, Greedy | Sample)]:
    raise ValueError(f"{odd[0]!r} is no filter; give TopK(40), TopP(0.9), Temperature(0.8) or the like")
  return found


def filtered(filters: tuple, logits_V, history=None):
  """The logits after the filters in their order; the likeliest token is left where they ban every one."""
  if not filters:
    return logits_V
  left_V = logits_V
  for f in filters:
    left_V = f(left_V, history)
  best_V = jnp.where(jnp.arange(logits_V.size) == jnp.argmax(logits_V), 0.0, -jnp.inf)
  return jnp.where(jnp.max(left_V) > -jnp.inf, left_V, best_V)


@dataclasses.dataclass(frozen=True)
class Greedy:
  """The likeliest token after `filters`."""

  filters: tuple = ()

  def __post_init__(self):
    object.__setattr__(self, "filters", as_filters(self.filters))

  def __call__(self, key, logits_V, history=None):
    return jnp.argmax(filtered(self.filters, logits_V, history))


@dataclasses.dataclass(frozen=True)
class Sample:
  """A token drawn from the softmax of the logits after `filters`."""

  filters: tuple = ()

  def __post_init__(self):
    object.__setattr__(self, "filters", as_filters(self.filters))

  def __call__(self, key, logits_V, history=None):
    return jax.random.categorical(key, filtered(self.filters, logits_V, history))
