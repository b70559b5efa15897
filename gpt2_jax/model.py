# SPDX-License-Identifier: Apache-2.0
"""GPT-2, exactly: pre-LayerNorm blocks, tanh GELU, biases everywhere, the head tied to the embedding.

Source: Radford et al. 2019, "Language Models are Unsupervised Multitask Learners", and its released model
code, whose parameter names these are (wte, wpe, h, ln_1, attn.c_attn, ...).

  # B batch  T time  S keys' time  D model  H heads  K per-head  F feed-forward  V vocabulary  L layer
"""

import dataclasses
import difflib
import functools
import math

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P

from gpt2_jax.attention import KERNELS, merge_heads, self_attention, split_heads
from gpt2_jax.linear import Linear, normal, project, take, whole
from gpt2_jax.sharding import axis_size, check_divides, padded

GELU = ("tanh", "erf")
DTYPES = ("float32", "bfloat16")
REMAT = {
  "none": None,
  "dots": jax.checkpoint_policies.save_only_these_names("linear", "attend"),
  "full": jax.checkpoint_policies.nothing_saveable,
}


@dataclasses.dataclass(frozen=True)
class ModelConfig:
  """What a GPT-2 is (OpenAI's hparams first), then how it is computed. Raises ValueError on what cannot be."""

  n_vocab: int = 50257
  n_ctx: int = 1024
  n_embd: int = 768
  n_head: int = 12
  n_layer: int = 12
  use_bias: bool = True  # False: as nanoGPT trains, no bias in Linear or LayerNorm
  gelu: str = "tanh"  # "erf" for nanoGPT's checkpoints
  embd_pdrop: float = 0.0
  attn_pdrop: float = 0.0
  resid_pdrop: float = 0.0
  dtype: str = "bfloat16"  # of activations and matmul operands; parameters, norms, softmax, loss are float32
  pad_heads: bool = False  # zero heads up to a multiple of the mesh's model axis (attention dropout draws for them too)
  attention: str = "auto"  # the kernel that trains and scores, see attention.self_attention
  remat: str = "none"  # what the backward pass recomputes: "none", "dots" (all but matmuls), "full"
  unroll: int = 1  # layers a step of the scan; n_layer is a Python loop

  def __post_init__(self):
    if self.n_embd % self.n_head:
      raise ValueError(f"n_embd of {self.n_embd} does not divide by n_head of {self.n_head}")
    for name, allowed in (("gelu", GELU), ("remat", REMAT), ("attention", KERNELS), ("dtype", DTYPES)):
      if getattr(self, name) not in allowed:
        raise ValueError(f"{name} is {getattr(self, name)!r}; it is one of {', '.join(allowed)}")
    for name in ("embd_pdrop", "attn_pdrop", "resid_pdrop"):
      if not 0 <= getattr(self, name) < 1:
        raise ValueError(f"{name} is {getattr(self, name)}; a dropout rate is at least 0 and below 1")

  @property
  def padded_heads(self) -> int:
    """Heads held, on the mesh in force. Raises ValueError if they would need padding that was not asked for."""
    n = axis_size("model")
    if self.n_head % n and not self.pad_heads:
      raise ValueError(f"{self.n_head} heads do not divide the model axis of {n}; set --config.model.pad_heads=True")
    return padded(self.n_head, n)

  @property
  def padded_vocab(self) -> int:
    """Rows of wte held, on the mesh in force: a multiple of 128 (50,257 -> 50,304) and of the axes that split them."""
    return padded(self.n_vocab, math.lcm(128, axis_size("model", "data")))


SIZES = {
  "117M": ModelConfig(n_embd=768, n_head=12, n_layer=12),
  "345M": ModelConfig(n_embd=1024, n_head=16, n_layer=24),
  "762M": ModelConfig(n_embd=1280, n_head=20, n_layer=36),
  "1542M": ModelConfig(n_embd=1600, n_head=25, n_layer=48),
  "distilgpt2": ModelConfig(n_embd=768, n_head=12, n_layer=6),
}
ALIASES = {"117M": ("gpt2", "124M"), "345M": ("gpt2-medium", "355M"), "762M": ("gpt2-large", "774M")}
ALIASES["1542M"] = ("gpt2-xl", "1558M", "1.5B")


def model_config(size: str) -> ModelConfig:
  """The ModelConfig of a published size, by the paper's name or today's. Raises ValueError on another."""
  names = {alias: name for name, aliases in ALIASES.items() for alias in aliases} | {name: name for name in SIZES}
  if size not in names:
    near = difflib.get_close_matches(size, names, 1, cutoff=0)[0]
    raise ValueError(f"unknown size {size!r}; did you mean {near!r}? Sizes are {', '.join(names)}")
  return SIZES[names[size]]


def check_mesh(config: ModelConfig) -> None:
  """Raises ValueError unless the mesh in force divides the model; heads and vocabulary are padded where it does not."""
  check_divides(config.n_embd, "n_embd", "data", way_out="give a mesh whose data axis divides it")
  check_divides(4 * config.n_embd, "4 n_embd", "model", way_out="give a mesh whose model axis divides it")


def name_of(path) -> str:
  """A leaf's name as OpenAI wrote it: `h.attn.c_attn.w`."""
  return jax.tree_util.keystr(path, simple=True, separator=".").removesuffix(".value")


def drop(x, rate: float, key):
  """Dropout; `key` None is evaluation."""
  if key is None or rate == 0.0:
    return x
  keep = jax.random.bernoulli(key, 1.0 - rate, x.shape, out_sharding=jax.typeof(x).sharding.spec)
  return jnp.where(keep, x / (1.0 - rate), 0.0)


def split(key, n: int):
  """`n` keys, or `n` times None."""
  return [None] * n if key is None else jax.random.split(key, n)


@jax.checkpoint
def layer_norm(x_BTD, g_D, b_D):
  x = x_BTD.astype(jnp.float32)
  x -= x.mean(-1, keepdims=True)
  y = x * jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + 1e-5) * g_D
  return (y if b_D is None else y + b_D).astype(x_BTD.dtype)


class LayerNorm(nnx.Module):
  """(x - mean) / sqrt(var + 1e-5) * g + b over D, with float32 statistics, in x's dtype."""

  def __init__(self, D: int, use_bias: bool):
    self.g = nnx.Param(jnp.ones(D, out_sharding=P(None)))
    self.b = nnx.Param(jnp.zeros(D, out_sharding=P(None))) if use_bias else None

  def __call__(self, x_BTD):
    return layer_norm(x_BTD, self.g[...], None if self.b is None else self.b[...])


class Attention(nnx.Module):
  """Causal self-attention. The columns of c_attn run head by head, q, k, v of each: a split by heads is one slice."""

  def __init__(self, config: ModelConfig, key):
    D, H, K = config.n_embd, config.padded_heads, config.n_embd // config.n_head
    self.head_size = K
    k_attn, k_proj = jax.random.split(key)
    proj_std = 0.02 / math.sqrt(2 * config.n_layer)
    self.c_attn = Linear(k_attn, (D, 3 * H * K), P("data", "model"), 0.02, config.use_bias, pad=(1, 3 * D))
    self.c_proj = Linear(k_proj, (H * K, D), P("model", "data"), proj_std, config.use_bias, pad=(0, D))
    self.config = config

  def qkv(self, x_BTD):
    """Queries, keys and values, [B, T, H, K] each."""
    return split_heads(self.c_attn(x_BTD), self.head_size)

  def merge(self, y_BTHK):
    """Heads back into the residual stream, [B, T, D]."""
    return self.c_proj(merge_heads(y_BTHK))

  def __call__(self, x_BTD, key=None):
    k_attn, k_resid = split(key, 2)

    def dropout(p_BHTS, start):
      return drop(p_BHTS, self.config.attn_pdrop, jax.random.fold_in(k_attn, start))

    y_BTX = self_attention(
      self.c_attn(x_BTD),
      self.head_size,
      self.config.attention,
      dropout if key is not None and self.config.attn_pdrop else None,
    )
    return drop(self.c_proj(y_BTX), self.config.resid_pdrop, k_resid)


@functools.partial(jax.checkpoint, static_argnums=1)
def gelu(h_BTF, kind: str):
  """In float32: rounding every step of it to bfloat16 costs accuracy, and time where the hardware has no bfloat16."""
  return jax.nn.gelu(h_BTF.astype(jnp.float32), approximate=kind == "tanh").astype(h_BTF.dtype)


class Mlp(nnx.Module):
  """D -> 4 D -> D through GELU."""

  def __init__(self, config: ModelConfig, key):
    D, F = config.n_embd, 4 * config.n_embd
    k_fc, k_proj = jax.random.split(key)
    proj_std = 0.02 / math.sqrt(2 * config.n_layer)
    self.c_fc = Linear(k_fc, (D, F), P("data", "model"), 0.02, config.use_bias)
    self.c_proj = Linear(k_proj, (F, D), P("model", "data"), proj_std, config.use_bias)
    self.config = config

  def __call__(self, x_BTD, key=None):
    return drop(self.c_proj(gelu(self.c_fc(x_BTD), self.config.gelu)), self.config.resid_pdrop, key)


class Block(nnx.Module):
  def __init__(self, config: ModelConfig, key):
    k_attn, k_mlp = jax.random.split(key)
    self.ln_1 = LayerNorm(config.n_embd, config.use_bias)
    self.attn = Attention(config, k_attn)
    self.ln_2 = LayerNorm(config.n_embd, config.use_bias)
    self.mlp = Mlp(config, k_mlp)

  def __call__(self, x_BTD, key=None):
    k_attn, k_mlp = split(key, 2)
    x_BTD += self.attn(self.ln_1(x_BTD), k_attn)
    return x_BTD + self.mlp(self.ln_2(x_BTD), k_mlp)


class GPT2(nnx.Module):
  """The whole model; `h` is one Block whose parameters carry a leading layer axis.

  Build and call it with a mesh in force (`jax.set_mesh`), whose axes decide the padding and the sharding:
  `jax.jit(GPT2, static_argnums=0)(config, key)` makes every parameter where it will live.
  """

  def __init__(self, config: ModelConfig, key):
    k_wte, k_wpe, k_h = jax.random.split(key, 3)
    V, D = config.padded_vocab, config.n_embd
    self.wte = nnx.Param(normal(k_wte, (V, D), P(("model", "data"), None), 0.02, (0, config.n_vocab)))
    self.wpe = nnx.Param(normal(k_wpe, (config.n_ctx, D), P(None, "data"), 0.01))
    self.h = jax.vmap(functools.partial(Block, config))(jax.random.split(k_h, config.n_layer))
    self.ln_f = LayerNorm(D, config.use_bias)
    self.config = config

  @property
  def mesh(self) -> jax.sharding.Mesh:
    """Where its parameters live."""
    return self.wpe[...].sharding.mesh

  def embed(self, tokens_BT, positions_BT=None, key=None):
    """Token plus position, [B, T, D]; positions count from 0 where none are given."""
    x_BTD = take(self.wte[...], tokens_BT)
    if positions_BT is None:
      x_BTD += whole(self.wpe[...])[: tokens_BT.shape[1]]
    else:
      x_BTD += take(self.wpe[...], positions_BT)
    return drop(x_BTD.astype(self.config.dtype), self.config.embd_pdrop, key)

  def hidden(self, tokens_BT, key=None):
    """The normed output of the last block, [B, T, D], and the RMS of the residual stream after each layer, [L]."""
    config = self.config
    if tokens_BT.shape[1] > config.n_ctx:
      raise ValueError(f"{tokens_BT.shape[1]} tokens exceed the context of {config.n_ctx}; give fewer")
    k_embd, k_h = split(key, 2)

    def step(x_BTD, layer):
      block, k = layer
      x_BTD = block(x_BTD, k)
      return x_BTD, jnp.sqrt(jnp.square(x_BTD.astype(jnp.float32)).mean())

    if REMAT[config.remat]:
      step = jax.checkpoint(step, policy=REMAT[config.remat], prevent_cse=False)
    keys = None if k_h is None else jax.random.split(k_h, config.n_layer)
    x_BTD, rms_L = jax.lax.scan(step, self.embed(tokens_BT, key=k_embd), (self.h, keys), unroll=config.unroll)
    return self.ln_f(x_BTD), rms_L

  def head(self, x_BTD):
    """Logits over the padded vocabulary, float32 [B, T, V]: what `loss.cross_entropy` takes."""
    return project(x_BTD, self.wte[...], None, P("model", None), 1, jnp.float32)

  def __call__(self, tokens_BT, key=None):
    """Logits, float32 [B, T, V], padding of the vocabulary at minus infinity; `key` turns dropout on."""
    logits_BTV = self.head(self.hidden(tokens_BT, key)[0])
    return jnp.where(jnp.arange(logits_BTV.shape[-1]) < self.config.n_vocab, logits_BTV, -jnp.inf)
