# SPDX-License-Identifier: Apache-2.0
"""The key-value cache: a forward pass over prompts that fills it, and one over a few tokens more that reads it."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from gpt2_jax.attention import attend_cached, causal_attention
from gpt2_jax.linear import Linear, whole
from gpt2_jax.model import GPT2, Block
from gpt2_jax.sharding import RESIDUAL, ROWS, axis_size, padded

BUCKET = 32  # lengths are padded to a multiple, so that few shapes are compiled


class Decoder(NamedTuple):
  """A GPT-2 made ready to decode: gathered over `data`, its layers apart and their matrices in the compute dtype."""

  model: GPT2  # without its `h`
  blocks: list[Block]

  @property
  def mesh(self) -> jax.sharding.Mesh:
    return self.model.mesh


def ready(model: GPT2 | Decoder) -> Decoder:
  """The Decoder of a model: done once, it serves any number of calls. A Decoder is returned as it is."""
  if isinstance(model, Decoder):
    return model
  with jax.set_mesh(model.mesh):
    return _ready(model)


@jax.jit
def _ready(model: GPT2) -> Decoder:
  def cast(node):
    if not isinstance(node, Linear):
      return node
    dtype = model.config.dtype
    return jax.tree.map(lambda x: whole(x if x.dtype == jnp.int8 else x.astype(dtype)) if x.ndim == 3 else x, node)

  model = jax.tree.map(cast, model, is_leaf=lambda node: isinstance(node, Linear))
  blocks = [jax.tree.map(lambda x, i=i: x[i], model.h) for i in range(model.config.n_layer)]
  model.wte, model.h = jax.tree.map(whole, model.wte), None
  return Decoder(model, blocks)


def apply_block(block, x_BTD, attention):
  """One block; `attention` maps q, k, v to its output and to what it wants to remember."""
  y_BTHK, memory = attention(*block.attn.qkv(block.ln_1(x_BTD)))
  x_BTD += block.attn.merge(y_BTHK)
  return x_BTD + block.mlp(block.ln_2(x_BTD)), memory


def prefill(decoder: Decoder, tokens_BT, size: int):
  """The normed output at every position of the prompts and, a layer, keys and values [B, H, size, K]."""

  def attention(q, k, v):
    room = ((0, 0), (0, 0), (0, size - tokens_BT.shape[1]), (0, 0))
    return causal_attention(q, k, v), tuple(jnp.pad(jnp.swapaxes(x_BTHK, 1, 2), room) for x_BTHK in (k, v))

  x_BTD, caches = decoder.model.embed(tokens_BT), []
  for block in decoder.blocks:
    x_BTD, memory = apply_block(block, x_BTD, attention)
    caches.append(memory)
  return decoder.model.ln_f(x_BTD), caches


def in_slots(slot):
  """How `decode` writes where all rows have their slots in common, from `slot` on: a copy of a few bytes."""

  def plainly(old_BHSK, new_BHTK):
    return jax.lax.dynamic_update_slice_in_dim(old_BHSK, new_BHTK, slot, 2)

  def apart(old_BHSK, new_BHTK):
    """XLA's CPU backend would fuse the write with what reads it, and copy the whole cache for that: a condition that
    always holds keeps them apart. bfloat16 as integers, because its write would go through float32."""
    bits = jnp.uint16 if old_BHSK.dtype == jnp.bfloat16 else old_BHSK.dtype
    old, new = (jax.lax.bitcast_convert_type(x, bits) for x in (old_BHSK, new_BHTK))
    written = jax.lax.cond(slot >= 0, plainly, lambda old, new: old, old, new)
    return jax.lax.bitcast_convert_type(written, old_BHSK.dtype)

  return lambda old_BHSK, new_BHTK: jax.lax.platform_dependent(old_BHSK, new_BHTK, cpu=apart, default=plainly)


def decode(decoder: Decoder, tokens_BT, positions_BT, seen_BTS, caches, write):
  """The normed output [B, T, D] for T more tokens a row, and the caches with them.

  `write` puts keys or values [B, H, T, K] into a cache; `seen_BTS` says which of its slots each token reads, its own
  among them.
  """
  x_BTD = decoder.model.embed(tokens_BT, positions_BT)
  after = []
  for block, cache in zip(decoder.blocks, caches, strict=True):

    def attention(q, k, v, cache=cache):
      memory = tuple(write(old, jnp.swapaxes(new, 1, 2)) for old, new in zip(cache, (k, v), strict=True))
      return attend_cached(q, *memory, seen_BTS), memory

    x_BTD, memory = apply_block(block, x_BTD, attention)
    after.append(memory)
  return decoder.model.ln_f(x_BTD), after


def random_key(seed: int):
  """The key of a seed. Raises ValueError unless it is one of 32 bits: JAX would take others for one of those."""
  if not 0 <= seed < 2**32:
    raise ValueError(f"a seed of {seed} is not from 0 to {2**32 - 1}")
  return jax.random.key(seed)


def at_end(x_BTD, lengths_B):
  """What stands at each prompt's last token, [B, 1, D]."""
  return jnp.take_along_axis(x_BTD, jnp.maximum(lengths_B - 1, 0)[:, None, None], axis=1)


def logits(decoder: Decoder, x_BTD):
  """Float32 [B, T, V], gathered over `model` and without the vocabulary's padding."""
  return jax.sharding.reshard(decoder.model.head(x_BTD), RESIDUAL)[..., : decoder.model.config.n_vocab]


def check_prompts(decoder: Decoder, prompts, n_new: int, samples: int = 1) -> None:
  """Raises ValueError unless there are prompts, none of them empty, and their tokens are the model's."""
  if isinstance(prompts, str) or any(isinstance(prompt, str) or not hasattr(prompt, "__len__") for prompt in prompts):
    raise ValueError("prompts are lists of token ids; encode the texts, or call complete")
  lengths, n_vocab = [len(prompt) for prompt in prompts], decoder.model.config.n_vocab
  if not lengths or min(lengths) < 1 or n_new < 1 or samples < 1:
    raise ValueError(
      f"{len(lengths)} prompts, {samples} samples, {n_new} new tokens: give one of each at least, and no empty prompt"
    )
  low, high = min(map(min, prompts)), max(map(max, prompts))
  if low < 0 or high >= n_vocab:
    raise ValueError(f"prompts hold tokens {low} to {high}, the vocabulary {n_vocab}; is it the right tokenizer?")


def check_room(decoder: Decoder, prompts, n_new: int, way_out: str) -> None:
  """Raises ValueError unless the longest prompt and `n_new` tokens fit the context."""
  longest, n_ctx = max(map(len, prompts)), decoder.model.config.n_ctx
  if longest + n_new > n_ctx:
    raise ValueError(f"{longest} prompt and {n_new} new tokens exceed the context of {n_ctx}; {way_out}")


def place_prompts(decoder: Decoder, prompts: Sequence[Sequence[int]], n_new: int):
  """Tokens [B, T] and lengths [B] on the mesh in force, B and T rounded up; rows that only fill the mesh have length 0.

  Raises ValueError as `check_prompts` and `check_room` do.
  """
  check_prompts(decoder, prompts, n_new)
  check_room(decoder, prompts, n_new, "ask for fewer")
  n_ctx, lengths = decoder.model.config.n_ctx, [len(prompt) for prompt in prompts]
  B = padded(len(prompts), axis_size(*ROWS))
  tokens_BT = np.zeros((B, min(n_ctx, padded(max(lengths), BUCKET))), np.int32)
  for row, prompt in enumerate(prompts):
    tokens_BT[row, : len(prompt)] = prompt
  lengths_B = np.array(lengths + [0] * (B - len(prompts)), np.int32)
  return jax.device_put((tokens_BT, lengths_B), NamedSharding(jax.sharding.get_mesh(), P(ROWS)))
