# SPDX-License-Identifier: Apache-2.0
"""KV cache: `prefill` fills it in a forward pass over prompts, `decode` reads it for more tokens.

A cache holds, for each layer, keys and values: S slots for the tokens of a row. A mask says which
slots a token reads, so rows of any lengths share one cache. They are [B, H, S, K], and on a TPU
[B, S, H K], for the reasons in `kernels/tpu_decoding.py`.
"""

import dataclasses
import functools
import os
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P

from gpt2_jax.attention import by_heads, cached_attention, causal_attention, merge_heads
from gpt2_jax.finetune.prefix import VirtualTokens, as_keys_and_values
from gpt2_jax.kernels.tpu_decoding import attention_side_by_side
from gpt2_jax.linear import NO_CONTEXT, Context, Dense
from gpt2_jax.model import GPT2, Block
from gpt2_jax.sharding import RESIDUAL, axis_size, platform, unshard


class InferenceModel(NamedTuple):
  """Inference model: a GPT-2 all-gathered over `data`, in the compute dtype, a block a layer.

  Layers are a list: a scan over stacked ones would slice each matrix out of its stack, for every
  token again. Embeddings are the model's own arrays.
  """

  model: GPT2  # without its stacked blocks `h`
  head: Dense  # `wte` in the compute dtype; `model.wte` itself where it needs no cast
  blocks: list[Block]
  prefixes: Sequence = ()  # for each block the keys and values that every token sees, or None

  @property
  def mesh(self) -> jax.sharding.Mesh:
    return self.model.mesh


def for_inference(model: GPT2 | InferenceModel, donate: bool = False) -> InferenceModel:
  """Prepares a model for inference; done once, the result serves any number of calls.

  An InferenceModel is returned as it is. Matrices and the head are cast here, once, so that no call
  does it again; embeddings stay float32. `donate` gives the model's memory away: its layers are
  freed as they are prepared, and nobody may use it afterwards.
  """
  if isinstance(model, InferenceModel):
    return model
  if isinstance(model, VirtualTokens) and model.n_virtual:
    plain, prefix_L = as_keys_and_values(model)
    return with_prefix(for_inference(plain, donate), prefix_L)
  with jax.set_mesh(model.mesh):
    return for_inference_on_mesh(model, donate)


def for_inference_on_mesh(model: GPT2, donate: bool = False) -> InferenceModel:
  """`for_inference` with the model's mesh in force, also inside of `jax.eval_shape`."""
  dtype = model.config.dtype
  blocks = _donated_layers(model.h, dtype) if donate else _layers(model.h, dtype)

  # 1. A copy of the module with the same arrays. What stays as it is does not go through `jax.jit`,
  #    which would copy it.
  model = jax.tree.unflatten(jax.tree.structure(model), jax.tree.leaves(model))
  model.h = None
  if axis_size("data") > 1:
    model.wte = jax.jit(lambda wte: jax.tree.map(unshard, wte))(model.wte)

  # 2. The head multiplies in the compute dtype; a lookup adds in float32.
  head = model.wte[...]
  if any(x.ndim > 1 and x.dtype not in (dtype, jnp.int8) for x in jax.tree.leaves(head)):
    head = _cast_matrices(head, dtype, 2)
  return InferenceModel(model, head, blocks, [None] * len(blocks))


@functools.partial(jax.jit, static_argnames=("dtype", "ndim"))
def _cast_matrices(tree, dtype: str, ndim: int):
  """Matrices, arrays of `ndim` axes or more, in the compute dtype and all-gathered over `data`.

  int8 stays int8; biases, LayerNorms and scales stay float32.
  """

  def cast(x):
    if x.ndim < ndim:
      return x
    return unshard(x if x.dtype == jnp.int8 else x.astype(dtype))

  return jax.tree.map(cast, tree)


@functools.partial(jax.jit, static_argnames="dtype")
def _layers(stacked, dtype: str) -> list:
  """The tree of each layer, from one whose arrays are stacked over layers."""
  stacked = _cast_matrices(stacked, dtype, 3)
  n_layer = jax.tree.leaves(stacked)[0].shape[0]
  return [jax.tree.map(lambda x, i=i: x[i], stacked) for i in range(n_layer)]


def _donated_layers(stacked, dtype: str) -> list:
  """`_layers`, one array at a time, which is freed then: no second copy of the model exists."""
  arrays, structure = jax.tree.flatten(stacked)
  layers = []
  for stacked_array in arrays:
    layers.append(jax.block_until_ready(_layers(stacked_array, dtype)))
    stacked_array.delete()
  return [jax.tree.unflatten(structure, layer) for layer in zip(*layers, strict=True)]


def with_prefix(decoder: InferenceModel, prefix_L) -> InferenceModel:
  """The model with a prefix in front of every text: keys and values [L, P, H, K] for its P places.

  They are what P tokens would have left in the cache: texts begin at position P, and the context
  has room for P tokens less. Raises ValueError where none is left.
  """
  size, n_ctx = prefix_L[0].shape[1], decoder.model.config.n_ctx
  if size >= n_ctx:
    raise ValueError(
      f"a prefix of {size} leaves nothing of a context of {n_ctx}; give a shorter one"
    )
  with jax.set_mesh(decoder.mesh):
    return _with_prefix(decoder, prefix_L)


@jax.jit
def _with_prefix(decoder: InferenceModel, prefix_L) -> InferenceModel:
  config = decoder.model.config
  spec = P(None, "model", None)

  # 1. The keys and values of each layer, in the compute dtype.
  prefixes = []
  for layer in range(len(decoder.blocks)):
    kv_PHK = [jax.sharding.reshard(x[layer].astype(config.dtype), spec) for x in prefix_L]
    prefixes.append(tuple(kv_PHK))

  # 2. The first positions are the prefix's own.
  size = prefix_L[0].shape[1]
  model = jax.tree.unflatten(jax.tree.structure(decoder.model), jax.tree.leaves(decoder.model))
  model.wpe = nnx.Param(model.wpe[size:])
  model.config = dataclasses.replace(config, n_ctx=config.n_ctx - size)
  return decoder._replace(model=model, prefixes=prefixes)


def slots_axis() -> int:
  """The axis of a cache's slots on the mesh in force."""
  return 1 if platform() == "tpu" else 2


def count_slots(caches) -> int:
  """The slots of each row."""
  return caches[0][0].shape[slots_axis()]


def as_cached(x_BTHK):
  """Keys or values of T tokens in the form of a cache with T slots."""
  return merge_heads(x_BTHK) if slots_axis() == 1 else jnp.swapaxes(x_BTHK, 1, 2)


def _in_front(x_PHK, y_BTHK):
  """The same places in front of each row, [B, P + T, H, K]."""
  shape = (y_BTHK.shape[0], *x_PHK.shape)
  spec = jax.typeof(y_BTHK).sharding.spec
  x_BPHK = jax.sharding.reshard(jnp.broadcast_to(x_PHK, shape), spec)
  return jnp.concatenate([x_BPHK, y_BTHK], axis=1)


def _with_slots(cache, size: int):
  """A cache with zeros in more slots, `size` in all."""
  room = [(0, 0)] * cache.ndim
  room[slots_axis()] = (0, size - cache.shape[slots_axis()])
  return jnp.pad(cache, room)


def prefill(decoder: InferenceModel, tokens_BT, size: int, context: Context = NO_CONTEXT):
  """Prefills the KV cache: the forward pass over prompts that fills it.

  Returns the normed output at every position, and for each layer keys and values of `size` slots.
  `context` has the adapter of each row, if the model has a bank of them.
  """
  x_BTD, caches = decoder.model.embed(tokens_BT, context=context), []
  for block, prefix in zip(decoder.blocks, decoder.prefixes, strict=True):

    def attention(q, k, v, prefix=prefix):
      memory = tuple(_with_slots(as_cached(x_BTHK), size) for x_BTHK in (k, v))
      if prefix is None:
        return causal_attention(q, k, v), memory

      # The prefix goes first, with queries that nobody reads.
      n_prefix = prefix[0].shape[0]
      q = jnp.pad(q, ((0, 0), (n_prefix, 0), (0, 0), (0, 0)))
      k, v = (_in_front(*pair) for pair in zip(prefix, (k, v), strict=True))
      return causal_attention(q, k, v)[:, n_prefix:], memory

    attend = by_heads(attention, decoder.model.config.head_size)
    x_BTD, memory = block(x_BTD, attend, context=context)
    caches.append(memory)
  return decoder.model.ln_f(x_BTD), caches


def cache_write(slot):
  """Writes keys or values into a KV cache from `slot` on, the same in every row.

  A function (cache, new) -> cache for `decode`, in place of old contents: it copies a few bytes.
  """

  def update_slice(old, new):
    return jax.lax.dynamic_update_slice_in_dim(old, new, slot, slots_axis())

  # XLA's CPU backend would fuse the write with what reads it, and copy the whole cache for that. A
  # condition that always holds keeps them apart. bfloat16 goes as integers, because its write would
  # go through float32.
  def update_slice_unfused(old, new):
    bits = jnp.uint16 if old.dtype == jnp.bfloat16 else old.dtype
    old_bits = jax.lax.bitcast_convert_type(old, bits)
    new_bits = jax.lax.bitcast_convert_type(new, bits)
    written = jax.lax.cond(slot >= 0, update_slice, lambda old, new: old, old_bits, new_bits)
    return jax.lax.bitcast_convert_type(written, old.dtype)

  return lambda old, new: jax.lax.platform_dependent(
    old, new, cpu=update_slice_unfused, default=update_slice
  )


def decode(
  decoder: InferenceModel,
  tokens_BT,
  positions_BT,
  mask_BTS,
  caches,
  write,
  context: Context = NO_CONTEXT,
):
  """Decoding: the normed output [B, T, D] for T more tokens a row, and the caches with them.

  `write(cache, new)` puts keys or values of T slots into a cache. `mask_BTS` says which of its
  slots each token reads, its own among them.
  """
  x_BTD = decoder.model.embed(tokens_BT, positions_BT, context=context)
  after = []
  for block, cache, prefix in zip(decoder.blocks, caches, decoder.prefixes, strict=True):

    def attention(q, k, v, cache=cache, prefix=prefix):
      memory = tuple(write(old, as_cached(new)) for old, new in zip(cache, (k, v), strict=True))
      attention_over = attention_side_by_side if slots_axis() == 1 else cached_attention
      return attention_over(q, *memory, mask_BTS, prefix), memory

    attend = by_heads(attention, decoder.model.config.head_size)
    x_BTD, memory = block(x_BTD, attend, context=context)
    after.append(memory)
  return decoder.model.ln_f(x_BTD), after


def check_seed(seed: int) -> None:
  """Raises ValueError unless the seed has 32 bits or fewer: JAX would drop the others."""
  if not 0 <= seed < 2**32:
    raise ValueError(f"a seed of {str(seed)[:80]} is not from 0 to {2**32 - 1}")


def random_key(seed: int):
  """The random key of a seed. Raises ValueError as `check_seed` does."""
  check_seed(seed)
  return jax.random.key(seed)


def check_memory(decoder: InferenceModel, rows: int, slots: int) -> None:
  """Raises ValueError if so many rows of so many slots cannot be held, before anything is made.

  It is an estimate from below: keys and values, the widest activations of a prefill, and what a
  sampler makes of the logits. Elsewhere the kernel would end the process without a word.
  """
  config = decoder.model.config
  item = jnp.dtype(config.dtype).itemsize
  cache = 2 * config.n_layer * config.n_embd * item * slots
  activations = 8 * config.n_embd * item * slots // 2  # half of the slots hold prompts, or more
  sampling = 4 * 4 * config.n_vocab
  needed = rows * (cache + activations + sampling)

  # Only some backends say what they have; what is over the host's memory is over the device's, too.
  devices = decoder.mesh.devices.flatten()
  stats = devices[0].memory_stats() or {}
  host = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
  available = stats["bytes_limit"] * len(devices) if "bytes_limit" in stats else host
  if needed > available:
    raise ValueError(
      f"{rows:,} texts of {slots:,} tokens need {needed / 1e9:,.1f} GB or more, most of it for "
      f"the KV cache, and there are {available / 1e9:,.1f} GB; ask for fewer samples or prompts, "
      f"or for shorter texts"
    )


def last_token(x_BTD, lengths_B):
  """The entry at each prompt's last token, [B, 1, D]; rows of length 0 give their first."""
  return jnp.take_along_axis(x_BTD, jnp.maximum(lengths_B - 1, 0)[:, None, None], axis=1)


def logits(decoder: InferenceModel, x_BTD, context: Context = NO_CONTEXT):
  """The logits [B, T, V], float32, all-gathered over `model`, without the vocabulary's padding."""
  logits_BTV = decoder.head.matmul(x_BTD, None, P("model", None), context, jnp.float32)
  logits_BTV = jax.sharding.reshard(logits_BTV, RESIDUAL)
  return logits_BTV[..., : decoder.model.config.n_vocab]


def not_finite(logits_BTV):
  """Whether a logit is NaN or infinite, [B, T]: no finite weights make one."""
  return ~jnp.all(jnp.isfinite(logits_BTV), axis=-1)


def check_finite(has_nonfinite, whose: str = "the model") -> None:
  """Raises FloatingPointError if logits were NaN or infinite, so that nothing is made of them."""
  if has_nonfinite:
    raise FloatingPointError(f"{whose}'s logits are not numbers (NaN or Inf); are its weights?")
