# SPDX-License-Identifier: Apache-2.0
"""GPT-1: post-LayerNorm blocks and no final norm; everything else is GPT-2's.

Source: Radford et al. 2018, "Improving Language Understanding by Generative Pre-Training", and
openai/finetune-transformer-lm. Attention, MLP, embeddings and the tied head are those of model.py,
and so are training, decoding, adapters and heads, which take a block as it comes. Letters as there.
"""

import functools
import math

import jax
from flax import nnx
from jax.sharding import PartitionSpec as P

from gpt2_jax.linear import NO_CONTEXT, Dense, Linear, normal
from gpt2_jax.model import GPT2, Block, ModelConfig, split_or_none


class PostNormBlock(Block):
  """A post-LayerNorm block: each norm is applied to the sum of the residual stream and what joins
  it."""

  def __init__(self, config: ModelConfig, key):
    super().__init__(config, key)

    # N(0, 0.02^2) for all matrices: GPT-2's division by sqrt(2 L) came later.
    def undivided(linear: Linear) -> nnx.Param:
      return nnx.Param(jax.tree.map(lambda w: w * math.sqrt(2 * config.n_layer), linear.w[...]))

    self.attn.c_proj.w = undivided(self.attn.c_proj)
    self.mlp.c_proj.w = undivided(self.mlp.c_proj)

  def __call__(self, x_BTD, attend, key=None, context=NO_CONTEXT):
    """The residual stream after the block, and what `attend` remembers."""
    k_attn, k_mlp = split_or_none(key, 2)
    y_BTD, memory = self.attn(x_BTD, attend, k_attn, context)
    x_BTD = self.ln_1(x_BTD + y_BTD)
    return self.ln_2(x_BTD + self.mlp(x_BTD, k_mlp, context)), memory


class NoNorm(nnx.Module):
  """The identity where GPT-2 has ln_f: the last block has normed its output already."""

  def __call__(self, x_BTD):
    return x_BTD


class GPT1(GPT2):
  """The whole model, built and used as GPT2 is."""

  def __init__(self, config: ModelConfig, key):
    k_wte, k_wpe, k_h = jax.random.split(key, 3)
    V, D = config.padded_vocab, config.n_embd
    wte_VD = normal(k_wte, (V, D), P(("model", "data"), None), 0.02, (0, config.n_vocab))
    self.wte = nnx.Param(Dense(wte_VD, outputs_are_rows=True))
    self.wpe = nnx.Param(normal(k_wpe, (config.n_ctx, D), P(None, "data"), 0.02))
    build_block = functools.partial(PostNormBlock, config)
    self.h = jax.vmap(build_block)(jax.random.split(k_h, config.n_layer))
    self.ln_f = NoNorm()
    self.config = config


def new_model(config: ModelConfig, key) -> GPT2:
  """The model of a config with random weights: GPT-2, or GPT-1 where `config.family` says so."""
  return GPT1(config, key) if config.family == "gpt1" else GPT2(config, key)
