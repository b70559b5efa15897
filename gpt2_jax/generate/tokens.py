# SPDX-License-Identifier: Apache-2.0
"""Sampling: one prefill over the prompts, then one token at a time from a key-value cache, in one jitted loop.

Prompts of a batch may have any lengths: each row has its own positions, its own part of the cache and its own random
numbers, so a row's tokens do not depend on its company.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from gpt2_jax.generate.cache import Decoder, decode, prefill, ready
from gpt2_jax.generate.samplers import Greedy
from gpt2_jax.model import GPT2
from gpt2_jax.sharding import BATCH, ROWS, axis_size, padded

BUCKET = 32  # prompts are padded to a multiple, so that few shapes are compiled


def generate(
  model: GPT2 | Decoder, prompts: Sequence[Sequence[int]], n_new: int, sampler=None, seed: int = 0, eot=None
):
  """Continues each prompt by at most `n_new` tokens; lists of the new tokens, `eot` ending a row (and left out).

  Raises ValueError on an empty prompt and on one that leaves no room in the context for `n_new`.
  """
  decoder = ready(model)
  n_ctx = decoder.model.config.n_ctx
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
    _generate(decoder, place(tokens_BT), place(lengths_B), place(keys_B), n_new, sampler or Greedy(), ends)
  )
  return [row[:count].tolist() for row, count in zip(new_BN, counts_B, strict=True)][: len(prompts)]


@functools.partial(jax.jit, static_argnames=("n_new", "sampler"))
def _generate(decoder: Decoder, tokens_BT, lengths_B, keys_B, n_new: int, sampler, eot):
  """The new tokens [B, n_new], and how many of them come before `eot`, [B]."""
  model = decoder.model
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
    x_B1D, caches = decode(decoder, token_B, lengths_B + n, T + n, seen_BS, caches)
    return n + 1, pick(x_B1D, n + 1), new_BN, counts_B, done_B, caches

  new_BN = jnp.zeros((B, n_new), jnp.int32, out_sharding=BATCH)
  counts_B = jnp.zeros_like(lengths_B)
  carry = (0, pick(last_B1D, 0), new_BN, counts_B, lengths_B == 0, caches)  # rows that only fill the mesh are done
  carry = jax.lax.while_loop(lambda c: (c[0] < n_new) & ~jnp.all(c[4]), step, carry)
  return carry[2], carry[3]
