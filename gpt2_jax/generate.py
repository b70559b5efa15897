# SPDX-License-Identifier: Apache-2.0
"""Sampling: one prefill over the prompts, then one token at a time from a key-value cache, in one jitted loop.

Prompts of a batch may have any lengths: each row has its own positions, its own part of the cache and its own random
numbers, so a row's tokens do not depend on its company.
"""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from gpt2_jax.attention import attend_cached, causal_attention
from gpt2_jax.linear import Linear
from gpt2_jax.model import GPT2
from gpt2_jax.sharding import BATCH, ROWS, axis_size, padded

BUCKET = 32  # prompts are padded to a multiple, so that few shapes are compiled


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


def generate(model: GPT2, prompts: Sequence[Sequence[int]], n_new: int, sampler=None, seed: int = 0, eot=None):
  """Continues each prompt by at most `n_new` tokens; lists of the new tokens, `eot` ending a row (and left out).

  Raises ValueError on an empty prompt and on one that leaves no room in the context for `n_new`.
  """
  n_ctx = model.config.n_ctx
  lengths = [len(prompt) for prompt in prompts]
  if not lengths or min(lengths) < 1 or n_new < 1:
    raise ValueError(f"{len(prompts)} prompts and {n_new} new tokens: give one of each at least, and no empty prompt")
  if max(lengths) + n_new > n_ctx:
    raise ValueError(f"{max(lengths)} prompt and {n_new} new tokens exceed the context of {n_ctx}; ask for fewer")
  rows = padded(len(prompts), axis_size(*ROWS))
  tokens_BT = np.zeros((rows, min(n_ctx, padded(max(lengths), BUCKET))), np.int32)
  for row, prompt in enumerate(prompts):
    tokens_BT[row, : len(prompt)] = prompt
  lengths_B = np.array(lengths + [0] * (rows - len(prompts)), np.int32)
  place = functools.partial(jax.device_put, device=jax.sharding.NamedSharding(jax.sharding.get_mesh(), P(ROWS)))
  keys_B = jax.random.split(jax.random.key(seed), rows)
  ends = -1 if eot is None else eot
  new_BN, counts_B = jax.device_get(
    _generate(model, place(tokens_BT), place(lengths_B), place(keys_B), n_new, sampler or Greedy(), ends)
  )
  return [row[:count].tolist() for row, count in zip(new_BN, counts_B, strict=True)][: len(prompts)]


@functools.partial(jax.jit, static_argnames=("n_new", "sampler"))
def _generate(model: GPT2, tokens_BT, lengths_B, keys_B, n_new: int, sampler, eot):
  """The new tokens [B, n_new], and how many of them come before `eot`, [B]."""
  model = ready(model)
  blocks = [jax.tree.map(lambda x, layer=layer: x[layer], model.h) for layer in range(model.config.n_layer)]
  B, T = tokens_BT.shape
  slots_S = jnp.arange(T + n_new)
  x_BTD, caches = prefill(model, tokens_BT, T + n_new)
  last_B1D = jnp.take_along_axis(x_BTD, jnp.maximum(lengths_B - 1, 0)[:, None, None], axis=1)

  def pick(x_B1D, n):
    logits_BV = jax.sharding.reshard(model.head(x_B1D)[:, 0], BATCH)[:, : model.config.n_vocab]
    return jax.vmap(sampler)(jax.vmap(jax.random.fold_in, (0, None))(keys_B, n), logits_BV).astype(jnp.int32)

  def step(carry):
    n, token_B, new_BN, counts_B, done_B, caches = carry
    done_B |= token_B == eot
    new_BN = jax.lax.dynamic_update_slice_in_dim(new_BN, token_B[:, None], n, 1)
    counts_B += ~done_B
    seen_BS = (slots_S < lengths_B[:, None]) | ((slots_S >= T) & (slots_S <= T + n))  # all but the prompts' padding
    x_B1D, caches = decode(model, blocks, token_B, lengths_B + n, T + n, seen_BS, caches)
    return n + 1, pick(x_B1D, n + 1), new_BN, counts_B, done_B, caches

  new_BN = jnp.zeros((B, n_new), jnp.int32, out_sharding=BATCH)
  counts_B = jnp.zeros_like(lengths_B)
  carry = (0, pick(last_B1D, 0), new_BN, counts_B, lengths_B == 0, caches)  # rows that only fill the mesh are done
  carry = jax.lax.while_loop(lambda c: (c[0] < n_new) & ~jnp.all(c[4]), step, carry)
  return carry[2], carry[3]


def ready(model: GPT2) -> GPT2:
  """The model with its matrices in the compute dtype and gathered over `data`, once for all steps.

  Each call of `generate` does this; a model that came from here has nothing left to be done.
  """

  def cast(node):
    if not isinstance(node, Linear):
      return node
    spec = P(None, *node.gathered)
    return jax.tree.map(lambda x: jax.sharding.reshard(x.astype(model.config.dtype), spec) if x.ndim == 3 else x, node)

  return jax.tree.map(cast, model, is_leaf=lambda node: isinstance(node, Linear))


def apply_block(block, x_BTD, attention):
  """One block; `attention` maps q, k, v to its output and to what it wants to remember."""
  y_BTHK, memory = attention(*block.attn.qkv(block.ln_1(x_BTD)))
  x_BTD += block.attn.merge(y_BTHK)
  return x_BTD + block.mlp(block.ln_2(x_BTD)), memory


def prefill(model: GPT2, tokens_BT, size: int):
  """The normed output at every position of the prompts and, a layer, keys and values [B, H, size, K]."""

  def attention(q, k, v):
    room = ((0, 0), (0, 0), (0, size - tokens_BT.shape[1]), (0, 0))
    return causal_attention(q, k, v), tuple(jnp.pad(jnp.swapaxes(x_BTHK, 1, 2), room) for x_BTHK in (k, v))

  x_BTD, memory = jax.lax.scan(lambda x, block: apply_block(block, x, attention), model.embed(tokens_BT), model.h)
  caches = [jax.tree.map(lambda x, layer=layer: x[layer], memory) for layer in range(model.config.n_layer)]
  return model.ln_f(x_BTD), caches


def decode(model: GPT2, blocks, token_B, position_B, slot, seen_BS, caches):
  """The normed output [B, 1, D] for one more token a row, and the caches with it.

  Rows have positions of their own and one slot of the caches in common: writing at one place is a copy of a few bytes,
  at a place a row it would be a scatter of the whole cache.
  """
  x_B1D = model.embed(token_B[:, None], position_B[:, None])
  after = []
  for block, cache in zip(blocks, caches, strict=True):

    def attention(q, k, v, cache=cache):
      keys, values = (
        jax.lax.dynamic_update_slice_in_dim(old, jnp.swapaxes(x, 1, 2), slot, 2)
        for old, x in zip(cache, (k, v), strict=True)
      )
      return attend_cached(q, keys, values, seen_BS), (keys, values)

    x_B1D, memory = apply_block(block, x_B1D, attention)
    after.append(memory)
  return model.ln_f(x_B1D), after
