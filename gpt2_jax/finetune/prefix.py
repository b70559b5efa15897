# SPDX-License-Identifier: Apache-2.0
"""Prompt tuning and prefix tuning: virtual tokens before a row, beside a frozen model.

Prompt tuning trains their embeddings (Lester et al. 2021), prefix tuning their keys and values in
each layer (Li and Liang 2021), both as peft computes them: real tokens take the positions after
them. Packed texts share them, and each counts its positions from behind them.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P

from gpt2_jax.attention import by_heads, causal_attention
from gpt2_jax.finetune.classify import Classifier
from gpt2_jax.linear import NO_CONTEXT
from gpt2_jax.model import GPT2, dropout
from gpt2_jax.sharding import BATCH, HEADS, HIDDEN, RESIDUAL, ROWS, axis_size, unshard
from gpt2_jax.unreduced import in_each_row


class VirtualTokens(GPT2):
  """A GPT-2 with `n_virtual` virtual tokens before each row; wpe has positions for them, too."""

  def __init__(self, model: GPT2, n_virtual: int):
    self.wte = model.wte
    self.wpe = model.wpe
    self.h = model.h
    self.ln_f = model.ln_f
    n_ctx = model.wpe[...].shape[0] - n_virtual
    if n_ctx < 1:
      raise ValueError(
        f"{n_virtual} virtual tokens leave nothing of a context of {n_ctx + n_virtual}; give fewer"
      )
    self.config = dataclasses.replace(model.config, n_ctx=n_ctx)

  @property
  def n_virtual(self) -> int:
    return self.wpe[...].shape[0] - self.config.n_ctx

  def embed(self, tokens_BT, positions_BT=None, key=None, context=NO_CONTEXT):
    """Embeddings of the real tokens, at the positions after the virtual ones."""
    if positions_BT is None:
      if tokens_BT.shape[1] > self.config.n_ctx:
        raise ValueError(
          f"{tokens_BT.shape[1]} tokens exceed the context of {self.config.n_ctx} beside "
          f"{self.n_virtual} virtual tokens; give fewer"
        )
      positions_BT = jnp.zeros_like(tokens_BT) + jnp.arange(tokens_BT.shape[1])
    return super().embed(tokens_BT, positions_BT + self.n_virtual, key, context)

  def attend_beside(self, segments_BT):
    """Attention over virtual tokens and the rest, [B, P + T, C]; all may see the virtual ones."""
    if segments_BT is None:
      return super().self_attend()
    config, n_virtual = self.config, self.n_virtual

    # A virtual token is of no segment.
    segments_BT = jnp.pad(segments_BT, ((0, 0), (n_virtual, 0)), constant_values=-1)
    segments_BT = jax.sharding.reshard(segments_BT, BATCH)

    def visible(start, stop):
      own_BTS = segments_BT[:, start:stop, None] == segments_BT[:, None, :stop]
      return own_BTS | (jnp.arange(stop) < n_virtual)

    def attend(c_BTC, key=None):
      def attention_dropout(p_BHTS, start):
        return dropout(p_BHTS, config.attn_pdrop, jax.random.fold_in(key, start))

      drops = attention_dropout if key is not None and config.attn_pdrop else None

      def attention(q_BTHK, k_BTHK, v_BTHK):
        return causal_attention(q_BTHK, k_BTHK, v_BTHK, drops, visible), None

      return by_heads(attention, config.head_size)(c_BTC, key)

    return attend


class PromptTuned(VirtualTokens):
  """Virtual tokens as embeddings: one more parameter, `prompt` [P, D]."""

  def __init__(self, model: GPT2, prompt_PD):
    super().__init__(model, prompt_PD.shape[0])
    self.prompt = nnx.Param(prompt_PD)

  def embed(self, tokens_BT, positions_BT=None, key=None, context=NO_CONTEXT):
    """Embeddings of virtual and real tokens, [B, P + T, D]."""
    x_BTD = super().embed(tokens_BT, positions_BT, key, context)
    shape = (x_BTD.shape[0], *self.prompt[...].shape)
    prompt_BPD = in_each_row(unshard(self.prompt[...]), shape)
    prompt_BPD += in_each_row(unshard(self.wpe[...])[: self.n_virtual], shape)
    prompt_BPD = prompt_BPD.astype(x_BTD.dtype)
    k_prompt = None if key is None else jax.random.fold_in(key, 1)
    return jnp.concatenate([dropout(prompt_BPD, self.config.embd_pdrop, k_prompt), x_BTD], axis=1)

  def self_attend(self, segments_BT=None):
    return self.attend_beside(segments_BT)

  def hidden(self, x_BTD, key=None, attend=None, context=NO_CONTEXT, prefix_L=None):
    """As GPT2.hidden, for [B, P + T, D] of `embed`; of the real tokens, [B, T, D]."""
    x_BTD, rms_L, memory_L = super().hidden(x_BTD, key, attend, context, prefix_L)
    return x_BTD[:, self.n_virtual :], rms_L, memory_L


class PrefixTuned(VirtualTokens):
  """Virtual tokens as keys and values: one more parameter, `prefix` [L, P, H, 2 K]."""

  def __init__(self, model: GPT2, prefix_LPHK):
    super().__init__(model, prefix_LPHK.shape[1])
    self.prefix = nnx.Param(prefix_LPHK)

  def self_attend(self, segments_BT=None):
    """Attention of a row over the prefix and itself: rows of c_attn's columns are put before it.

    A virtual token's query is zero, and what it attends to is left out again.
    """
    attend_all = self.attend_beside(segments_BT)

    def attend(c_BTC, key=None, prefix=None):
      n_virtual, shape = prefix.shape[0], (c_BTC.shape[0], *prefix.shape)
      kv_BPHK = in_each_row(prefix, shape, HEADS).astype(c_BTC.dtype)
      q_BPHK = jnp.zeros_like(kv_BPHK[..., : self.config.head_size])
      c_BPHK = jnp.concatenate([q_BPHK, kv_BPHK], axis=-1)
      c_BPC = jnp.reshape(c_BPHK, (*shape[:2], -1), out_sharding=HIDDEN)
      y_BTX, memory = attend_all(jnp.concatenate([c_BPC, c_BTC], axis=1), key)
      return y_BTX[:, n_virtual:], memory

    return attend

  def hidden(self, x_BTD, key=None, attend=None, context=NO_CONTEXT, prefix_L=None):
    """As GPT2.hidden, with the layers' prefixes."""
    return super().hidden(x_BTD, key, attend, context, self.prefix[...])


def as_keys_and_values(model: VirtualTokens):
  """What a cache needs of virtual tokens: the plain model, and keys and values [L, P, H, K].

  Those of prompt tuning are what its embeddings leave behind in each layer.
  """
  with jax.set_mesh(model.mesh):
    plain = VirtualTokens(model, 0)
    if isinstance(model, PrefixTuned):
      return plain, jnp.split(model.prefix[...], 2, axis=-1)
    return plain, _keys_and_values(plain, model.prompt[...])


@jax.jit
def _keys_and_values(model: GPT2, prompt_PD):
  """Keys and values [L, P, H, K] of a row of embeddings."""
  n_virtual, spec = prompt_PD.shape[0], P(None, None, None, "model", None)

  def remember(q_BTHK, k_BTHK, v_BTHK):
    return causal_attention(q_BTHK, k_BTHK, v_BTHK), (k_BTHK, v_BTHK)

  # The same row for each part of the mesh that splits a batch; one is kept.
  x_PD = unshard(prompt_PD) + unshard(model.wpe[...])[:n_virtual]
  x_1PD = jnp.broadcast_to(x_PD.astype(model.config.dtype), (axis_size(*ROWS), *x_PD.shape))
  x_1PD = jax.sharding.reshard(x_1PD, RESIDUAL)
  _, _, memory = model.hidden(x_1PD, attend=by_heads(remember, model.config.head_size))
  return [jax.sharding.reshard(x_L1PHK, spec)[:, 0] for x_L1PHK in memory]


def check_plain(model: GPT2) -> None:
  """Raises ValueError for a classifier, and for a model with virtual tokens."""
  if isinstance(model, Classifier):
    raise ValueError("a classifier takes no virtual tokens; set --config.adapter.kind=lora")
  if isinstance(model, VirtualTokens):
    raise ValueError("the model has virtual tokens already; begin with its base")


def add_prompt(model: GPT2, tokens: int, key) -> PromptTuned:
  """The model with virtual tokens that begin as random tokens of its vocabulary, as Lester et al.
  begin them."""
  check_plain(model)
  ids_P = jax.random.randint(key, (tokens,), 0, model.config.n_vocab)
  wte_VD = unshard(model.wte[...].array)
  return PromptTuned(model, wte_VD.at[ids_P].get(out_sharding=P(None, "data")))


def add_prefix(model: GPT2, tokens: int, key) -> PrefixTuned:
  """The model with keys and values of N(0, 1) in each layer, as peft begins them; heads that are
  padding have zeros."""
  check_plain(model)
  config = model.config
  shape = (config.padded_heads, config.n_layer, tokens, 2 * config.head_size)
  spec = P("model", None, None, None)
  index = jax.lax.broadcasted_iota(jnp.int32, shape, 0, out_sharding=spec)
  prefix_HLPK = jax.random.normal(key, shape, jnp.float32, out_sharding=spec)
  prefix_HLPK = jnp.where(index < config.n_head, prefix_HLPK, 0.0)
  return PrefixTuned(model, jnp.transpose(prefix_HLPK, (1, 2, 0, 3)))
