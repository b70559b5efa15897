# SPDX-License-Identifier: Apache-2.0
"""How the next token is chosen from the logits: filters that compose, and the two ways to pick from what they leave."""

import dataclasses
import functools

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class Temperature:
  """Divides the logits; below 1 is surer, above 1 is wilder."""

  value: float

  def __post_init__(self):
    if not self.value > 0:
      raise ValueError(f"a temperature of {self.value} is not above 0; use greedy decoding for the likeliest token")

  def __call__(self, logits_V):
    return logits_V / self.value


@dataclasses.dataclass(frozen=True)
class TopK:
  """Keeps the k likeliest tokens."""

  k: int

  def __post_init__(self):
    if self.k < 1:
      raise ValueError(f"top-k of {self.k} keeps nothing; k is 1 or more")

  def __call__(self, logits_V):
    least = jax.lax.top_k(logits_V, min(self.k, logits_V.size))[0][-1]
    return jnp.where(logits_V < least, -jnp.inf, logits_V)


@dataclasses.dataclass(frozen=True)
class TopP:
  """Keeps the fewest likeliest tokens that hold at least probability p (Holtzman et al. 2020)."""

  p: float

  def __post_init__(self):
    if not 0 < self.p <= 1:
      raise ValueError(f"top-p of {self.p} is not in (0, 1]")

  def __call__(self, logits_V):
    order = jnp.argsort(-logits_V)
    p_V = jax.nn.softmax(logits_V)[order]
    keep_V = jnp.cumsum(p_V) - p_V < self.p  # probability of those before it
    return jnp.where(jnp.zeros_like(keep_V).at[order].set(keep_V), logits_V, -jnp.inf)


@dataclasses.dataclass(frozen=True)
class Greedy:
  """The likeliest token."""

  def __call__(self, key, logits_V):
    return jnp.argmax(logits_V)


@dataclasses.dataclass(frozen=True)
class Sample:
  """A token drawn from the softmax of the logits, after `filters` in their order."""

  filters: tuple = ()

  def __call__(self, key, logits_V):
    return jax.random.categorical(key, functools.reduce(lambda logits, f: f(logits), self.filters, logits_V))
