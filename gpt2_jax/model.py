# SPDX-License-Identifier: Apache-2.0
"""GPT-2, exactly: pre-LayerNorm blocks, tanh GELU, biases everywhere, the head tied to wte.

Source: Radford et al. 2019, "Language Models are Unsupervised Multitask Learners", and its released
model code, whose parameter names these are (wte, wpe, h, ln_1, attn.c_attn, ...).

  # B batch  T time  S keys' time  D model  H heads  K per-head  F feed-forward  V vocabulary
  # L layers
"""

import functools
import math

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec as P

from gpt2_jax.attention import self_attention
from gpt2_jax.compat import bernoulli
from gpt2_jax.linear import NO_CONTEXT, Dense, Linear, embedding_lookup, normal
from gpt2_jax.own_mesh import call_on_own_mesh
from gpt2_jax.sharding import check_divides, unshard
from gpt2_jax.sizes import ModelConfig
from gpt2_jax.unreduced import in_each_row

# What the backward pass keeps, for each `remat` of a ModelConfig.
REMAT_POLICIES = {
  "none": None,
  "dots": jax.checkpoint_policies.save_only_these_names("linear", "attend"),
  "attention": jax.checkpoint_policies.save_only_these_names("attend"),
  "full": jax.checkpoint_policies.nothing_saveable,
}


def check_mesh(config: ModelConfig) -> None:
  """Raises ValueError unless the mesh in force divides the model's width.

  Heads and vocabulary are padded where it does not divide them.
  """
  check_divides(config.n_embd, "n_embd", "data", way_out="give a mesh whose data axis divides it")
  check_divides(
    4 * config.n_embd, "4 n_embd", "model", way_out="give a mesh whose model axis divides it"
  )


def name_of(path) -> str:
  """A leaf's name as OpenAI wrote it: `h.attn.c_attn.w`.

  What holds the array (an nnx.Param, a `Dense`, the base of a LoRA) is left out of the name.
  """
  names = jax.tree_util.keystr(path, simple=True, separator=".").split(".")
  return ".".join(name for name in names if name not in ("value", "array", "base"))


def dropout(x, rate: float, key):
  """Dropout: zeros with probability `rate`, and the rest scaled up; `key` None is evaluation."""
  if key is None or rate == 0.0:
    return x
  keep = bernoulli(key, 1.0 - rate, x.shape, jax.typeof(x).sharding.spec)
  return jnp.where(keep, x / (1.0 - rate), 0.0)


def split_or_none(key, n: int):
  """Splits a key into `n`; None, which turns dropout off, gives `n` times None."""
  return [None] * n if key is None else jax.random.split(key, n)


@jax.checkpoint
def layer_norm(x_BTD, g_D, b_D):
  """LayerNorm over D: mean and variance in float32, the result in x's dtype."""
  x = x_BTD.astype(jnp.float32)
  x -= x.mean(-1, keepdims=True)
  y = x * jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + 1e-5) * in_each_row(g_D, x.shape)
  return (y if b_D is None else y + in_each_row(b_D, x.shape)).astype(x_BTD.dtype)


class LayerNorm(nnx.Module):
  """(x - mean) / sqrt(var + 1e-5) * g + b over D, with float32 statistics, in x's dtype."""

  def __init__(self, D: int, use_bias: bool):
    self.g = nnx.Param(jnp.ones(D, out_sharding=P(None)))
    self.b = nnx.Param(jnp.zeros(D, out_sharding=P(None))) if use_bias else None

  def __call__(self, x_BTD):
    return layer_norm(x_BTD, self.g[...], None if self.b is None else self.b[...])


class Attention(nnx.Module):
  """Causal self-attention's two projections. The columns of c_attn run head by head, q, k, v of
  each: a split over heads is one slice."""

  def __init__(self, config: ModelConfig, key):
    D, H, K = config.n_embd, config.padded_heads, config.head_size
    k_attn, k_proj = jax.random.split(key)
    proj_std = 0.02 / math.sqrt(2 * config.n_layer)
    self.c_attn = Linear(
      k_attn, (D, 3 * H * K), P("data", "model"), 0.02, config.use_bias, pad=(1, 3 * D)
    )
    self.c_proj = Linear(
      k_proj, (H * K, D), P("model", "data"), proj_std, config.use_bias, pad=(0, D)
    )
    self.config = config

  def __call__(self, x_BTD, attend, key=None, context=NO_CONTEXT):
    """The output, [B, T, D], and what `attend` remembers.

    `attend` maps the columns of c_attn to the outputs of all heads, side by side.
    """
    k_attn, k_resid = split_or_none(key, 2)
    # The names let `remat="attention"` keep what would be computed again.
    c_BTC = checkpoint_name(self.c_attn(x_BTD, context.fold(0)), "attend")
    y_BTX, memory = attend(c_BTC, k_attn)
    y_BTD = checkpoint_name(self.c_proj(y_BTX, context.fold(1)), "attend")
    return dropout(y_BTD, self.config.resid_pdrop, k_resid), memory


@functools.partial(jax.checkpoint, static_argnums=1)
def gelu(h_BTF, kind: str):
  """GELU in float32: rounding every step of it to bfloat16 costs accuracy, and time where the
  hardware has no bfloat16."""
  y_BTF = jax.nn.gelu(h_BTF.astype(jnp.float32), approximate=kind == "tanh")
  return y_BTF.astype(h_BTF.dtype)


class Mlp(nnx.Module):
  """D -> 4 D -> D through GELU."""

  def __init__(self, config: ModelConfig, key):
    D, F = config.n_embd, 4 * config.n_embd
    k_fc, k_proj = jax.random.split(key)
    proj_std = 0.02 / math.sqrt(2 * config.n_layer)
    self.c_fc = Linear(k_fc, (D, F), P("data", "model"), 0.02, config.use_bias)
    self.c_proj = Linear(k_proj, (F, D), P("model", "data"), proj_std, config.use_bias)
    self.config = config

  def __call__(self, x_BTD, key=None, context=NO_CONTEXT):
    h_BTF = gelu(self.c_fc(x_BTD, context.fold(2)), self.config.gelu)
    return dropout(self.c_proj(h_BTF, context.fold(3)), self.config.resid_pdrop, key)


class Block(nnx.Module):
  """A pre-LayerNorm block. It takes its attention: training, prefill, decoding and tree scoring
  hand in theirs, and these equations stand once."""

  def __init__(self, config: ModelConfig, key):
    k_attn, k_mlp = jax.random.split(key)
    self.ln_1 = LayerNorm(config.n_embd, config.use_bias)
    self.attn = Attention(config, k_attn)
    self.ln_2 = LayerNorm(config.n_embd, config.use_bias)
    self.mlp = Mlp(config, k_mlp)

  def __call__(self, x_BTD, attend, key=None, context=NO_CONTEXT):
    """The residual stream after the block, and what `attend` remembers (see Attention)."""
    k_attn, k_mlp = split_or_none(key, 2)
    y_BTD, memory = self.attn(self.ln_1(x_BTD), attend, k_attn, context)
    x_BTD += y_BTD
    return x_BTD + self.mlp(self.ln_2(x_BTD), k_mlp, context), memory


class GPT2(nnx.Module):
  """The whole model; `h` is one Block whose parameters carry a leading layer axis.

  Build and train it with a mesh in force (`jax.set_mesh`), whose axes decide the padding and the
  sharding: `jax.jit(GPT2, static_argnums=0)(config, key)` makes every parameter where it will live.
  """

  def __init__(self, config: ModelConfig, key):
    k_wte, k_wpe, k_h = jax.random.split(key, 3)
    V, D = config.padded_vocab, config.n_embd
    wte_VD = normal(k_wte, (V, D), P(("model", "data"), None), 0.02, (0, config.n_vocab))
    self.wte = nnx.Param(Dense(wte_VD, outputs_are_rows=True))  # a table, and the tied head
    self.wpe = nnx.Param(normal(k_wpe, (config.n_ctx, D), P(None, "data"), 0.01))
    self.h = jax.vmap(functools.partial(Block, config))(jax.random.split(k_h, config.n_layer))
    self.ln_f = LayerNorm(D, config.use_bias)
    self.config = config

  @property
  def mesh(self) -> jax.sharding.Mesh:
    """Where its parameters live."""
    return self.wpe[...].sharding.mesh

  def embed(self, tokens_BT, positions_BT=None, key=None, context=NO_CONTEXT):
    """Token plus position embedding, [B, T, D]; positions count from 0 by default."""
    if positions_BT is None and tokens_BT.shape[1] > self.config.n_ctx:
      raise ValueError(
        f"{tokens_BT.shape[1]} tokens exceed the context of {self.config.n_ctx}; give fewer"
      )
    x_BTD = self.wte[...].lookup(tokens_BT, context)
    if positions_BT is None:
      x_BTD += in_each_row(unshard(self.wpe[...])[: tokens_BT.shape[1]], x_BTD.shape)
    else:
      x_BTD += embedding_lookup(self.wpe[...], positions_BT)
    return dropout(x_BTD.astype(self.config.dtype), self.config.embd_pdrop, key)

  def self_attend(self, segments_BT=None):
    """The attention that trains and scores, as a Block takes it; packed rows give segments."""
    config = self.config

    def attend(c_BTC, key=None):
      def attention_dropout(p_BHTS, start):
        return dropout(p_BHTS, config.attn_pdrop, jax.random.fold_in(key, start))

      drops = attention_dropout if key is not None and config.attn_pdrop else None
      y_BTX = self_attention(c_BTC, config.head_size, config.attention, drops, segments_BT)
      return y_BTX, None  # it remembers nothing

    return attend

  def hidden(self, x_BTD, key=None, attend=None, context=NO_CONTEXT, prefix_L=None):
    """Embeddings through all blocks and the last norm, [B, T, D].

    Returns with it the RMS of the residual stream after each layer, [L], and what `attend`
    (default: `self_attend()`) remembers, stacked over layers. `prefix_L`, a tree stacked over
    layers, is given to it layer by layer: `attend(c_BTC, key, prefix)`.
    """
    config, attend = self.config, attend or self.self_attend()

    def step(x_BTD, layer):
      block, block_key, index, prefix = layer
      layer_attend = attend if prefix is None else functools.partial(attend, prefix=prefix)
      x_BTD, memory = block(x_BTD, layer_attend, block_key, context.fold(index))
      rms = jnp.sqrt(jnp.square(x_BTD.astype(jnp.float32)).mean())
      return x_BTD, (rms, memory)

    if REMAT_POLICIES[config.remat]:
      step = jax.checkpoint(step, policy=REMAT_POLICIES[config.remat], prevent_cse=False)

    # One dropout key a layer, and its number for what the weights draw.
    keys_L = None if key is None else jax.random.split(key, config.n_layer)
    index_L = None if context.key is None else jnp.arange(config.n_layer)
    layers = (self.h, keys_L, index_L, prefix_L)
    x_BTD, (rms_L, memory_L) = jax.lax.scan(step, x_BTD, layers, unroll=config.unroll)
    return self.ln_f(x_BTD), rms_L, memory_L

  def head(self, x_BTD, context=NO_CONTEXT):
    """Logits over the padded vocabulary, float32 [B, T, V]; who reads them masks the padding."""
    return self.wte[...].matmul(x_BTD, None, P("model", None), context, jnp.float32)

  def __call__(self, tokens_BT, key=None):
    """Logits, float32 [B, T, V], padding of the vocabulary at minus infinity; `key` turns dropout
    on. Without a mesh in force, as in a notebook, it runs on the model's own mesh."""
    if jax.sharding.get_abstract_mesh().empty:
      return call_on_own_mesh(self, tokens_BT, key)
    k_embd, k_h = split_or_none(key, 2)
    x_BTD = self.hidden(self.embed(tokens_BT, key=k_embd), k_h)[0]
    logits_BTV = self.head(x_BTD)
    return jnp.where(jnp.arange(logits_BTV.shape[-1]) < self.config.n_vocab, logits_BTV, -jnp.inf)
