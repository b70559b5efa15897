# SPDX-License-Identifier: Apache-2.0
"""The key-value cache: a forward pass over prompts that fills it, and one over a token more that reads it."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from gpt2_jax.attention import attend_cached, causal_attention
from gpt2_jax.linear import Linear
from gpt2_jax.model import GPT2, Block


class Decoder(NamedTuple):
  """A GPT-2 made ready to decode: matrices in the compute dtype, gathered over `data`, and the layers apart as well."""

  model: GPT2
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
    spec = P(None, *node.gathered)
    return jax.tree.map(lambda x: jax.sharding.reshard(x.astype(model.config.dtype), spec) if x.ndim == 3 else x, node)

  model = jax.tree.map(cast, model, is_leaf=lambda node: isinstance(node, Linear))
  return Decoder(model, [jax.tree.map(lambda x, i=i: x[i], model.h) for i in range(model.config.n_layer)])


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


def decode(decoder: Decoder, token_B, position_B, slot, seen_BS, caches):
  """The normed output [B, 1, D] for one more token a row, and the caches with it.

  Rows have positions of their own and one slot of the caches in common: writing at one place is a copy of a few bytes,
  at a place a row it would be a scatter of the whole cache.
  """
  x_B1D = decoder.model.embed(token_B[:, None], position_B[:, None])
  after = []
  for block, cache in zip(decoder.blocks, caches, strict=True):

    def attention(q, k, v, cache=cache):
      keys, values = (
        jax.lax.dynamic_update_slice_in_dim(old, jnp.swapaxes(x, 1, 2), slot, 2)
        for old, x in zip(cache, (k, v), strict=True)
      )
      return attend_cached(q, keys, values, seen_BS), (keys, values)

    x_B1D, memory = apply_block(block, x_B1D, attention)
    after.append(memory)
  return decoder.model.ln_f(x_B1D), after
