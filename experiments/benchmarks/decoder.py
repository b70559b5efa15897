# SPDX-License-Identifier: Apache-2.0
"""A decoder of the shapes that others have published step times of: RoPE, gated MLP, FSDP, and
tensor parallelism.

It is no model of this project: `experiments/calibrate.py` compiles its training step for a TPU, to
compare the estimate with what was measured there.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import optax
from jax.experimental.pallas.ops.tpu.splash_attention import (
  splash_attention_kernel as kernel,
)
from jax.experimental.pallas.ops.tpu.splash_attention import (
  splash_attention_mask as mask,
)
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

BLOCK = 1024  # of attention, queries and keys
RESIDUAL = P("data", None, "model")  # [B, T, D]; MaxText splits D, too
# What the backward pass keeps of a layer; MaxText's names.
REMAT = {
  "full": jax.checkpoint_policies.nothing_saveable,
  "minimal": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


@dataclasses.dataclass(frozen=True)
class Decoder:
  """The shape of a decoder and of a batch of a chip; letters as in gpt2_jax/model.py."""

  layers: int
  width: int
  heads: int
  kv_heads: int
  head: int
  mlp: int
  vocabulary: int
  context: int
  rows: int  # a chip and microbatch
  microbatches: int = 1
  remat: str = ""  # a key of REMAT, and the layers are a loop; empty keeps all
  tensor: int = 1  # chips that share the heads, the MLP and the vocabulary (Megatron)
  dtype: str = "float32"  # of parameters and moments
  logit_chunks: int = 1  # the head in parts of the vocabulary, so that no logits are kept
  softcap: float = 0.0  # of logits, and whether queries and keys are normalized

  @property
  def parameters(self) -> int:
    """Parameters, the embedding and the head apart."""
    attention = 2 * self.width * self.head * (self.heads + self.kv_heads)
    layer = attention + 3 * self.width * self.mlp
    return self.layers * layer + 2 * self.vocabulary * self.width

  def shapes(self) -> dict[str, tuple[int, ...]]:
    """Shapes of all parameters, the layers stacked."""
    L, D, F, V = self.layers, self.width, self.mlp, self.vocabulary
    queries, keys = self.heads * self.head, self.kv_heads * self.head
    return {
      "embedding": (V, D),
      "head": (D, V),
      "layers/q": (L, D, queries),
      "layers/k": (L, D, keys),
      "layers/v": (L, D, keys),
      "layers/out": (L, queries, D),
      "layers/gate": (L, D, F),
      "layers/up": (L, D, F),
      "layers/down": (L, F, D),
    }


def lower_step(shape: Decoder, mesh: Mesh, options: dict | None = None) -> jax.stages.Lowered:
  """The training step, lowered for a mesh: AdamW, rows and parameters split over `data`.

  `options` are the compiler's.
  """
  # 1. Shapes with shardings: D is split over `data` (FSDP), the other axis over `model`.
  parameters = {}
  for name, dimensions in shape.shapes().items():
    # The axis of D is the last one of what writes into the residual stream.
    writes = name in ("embedding", "layers/out", "layers/down")
    spec = [None] * len(dimensions)
    spec[-2:] = ("model", "data") if writes else ("data", "model")
    sharding = NamedSharding(mesh, P(*spec))
    parameters[name] = jax.ShapeDtypeStruct(dimensions, shape.dtype, sharding=sharding)
  optimizer = optax.adamw(1e-4, b1=0.9, b2=0.95, weight_decay=0.1)
  state = jax.eval_shape(optimizer.init, parameters)
  replicated = NamedSharding(mesh, P())
  moments = optax.tree_utils.tree_map_params(
    optimizer,
    lambda leaf, parameter: jax.ShapeDtypeStruct(
      leaf.shape, leaf.dtype, sharding=parameter.sharding
    ),
    state,
    parameters,
    transform_non_params=lambda leaf: jax.ShapeDtypeStruct(
      leaf.shape, leaf.dtype, sharding=replicated
    ),
  )
  tokens_MBT = jax.ShapeDtypeStruct(
    (shape.microbatches, shape.rows * mesh.size, shape.context),
    jnp.int32,
    sharding=NamedSharding(mesh, P(None, "data", None)),
  )

  # 2. The step: gradients of all microbatches, and one update.
  def step(parameters, moments, tokens_MBT, targets_MBT):
    def add_gradients(total, tokens):
      loss, gradients = jax.value_and_grad(_loss, argnums=1)(shape, parameters, *tokens, mesh)
      return jax.tree.map(jnp.add, total, gradients), loss

    zeros = jax.tree.map(jnp.zeros_like, parameters)
    gradients, losses = jax.lax.scan(add_gradients, zeros, (tokens_MBT, targets_MBT))
    updates, moments = optimizer.update(gradients, moments, parameters)
    return losses.mean(), optax.apply_updates(parameters, updates), moments

  step = jax.jit(step, donate_argnums=(0, 1), compiler_options=options)
  return step.lower(parameters, moments, tokens_MBT, tokens_MBT)


def _loss(shape: Decoder, parameters: dict, tokens_BT, targets_BT, mesh: Mesh):
  """Mean nats of the targets."""
  rows = NamedSharding(mesh, RESIDUAL)
  layers, rest = {}, {}
  for name, parameter in parameters.items():
    group = layers if name.startswith("layers/") else rest
    group[name.removeprefix("layers/")] = parameter
  x_BTD = rest["embedding"].astype(jnp.bfloat16)[tokens_BT]
  x_BTD = jax.lax.with_sharding_constraint(x_BTD, rows)

  layer = functools.partial(_layer, shape, mesh=mesh)
  if shape.remat:
    layer = jax.checkpoint(layer, policy=REMAT[shape.remat])
    x_BTD, _ = jax.lax.scan(lambda x, weights: (layer(x, weights), None), x_BTD, layers)
  else:
    for number in range(shape.layers):
      x_BTD = layer(x_BTD, {name: stack[number] for name, stack in layers.items()})
  return _nats(shape, _rms_norm(x_BTD), rest["head"].astype(jnp.bfloat16), targets_BT)


def _nats(shape: Decoder, x_BTD, head_DV, targets_BT):
  """Cross-entropy, the vocabulary in chunks."""
  log_sum_BT = jnp.full(targets_BT.shape, -jnp.inf, jnp.float32)
  target_BT = jnp.zeros(targets_BT.shape, jnp.float32)
  size = shape.vocabulary // shape.logit_chunks
  for begin in range(0, shape.vocabulary, size):
    logits_BTC = x_BTD @ head_DV[:, begin : begin + size]
    if shape.softcap:
      logits_BTC = shape.softcap * jnp.tanh(logits_BTC / shape.softcap)
    log_sum_BT = jnp.logaddexp(log_sum_BT, jax.nn.logsumexp(logits_BTC.astype(jnp.float32), -1))
    place_BT = targets_BT - begin
    is_here_BT = (place_BT >= 0) & (place_BT < size)
    index_BT1 = jnp.where(is_here_BT, place_BT, 0)[..., None]
    found_BT = jnp.take_along_axis(logits_BTC, index_BT1, -1)[..., 0]
    target_BT += jnp.where(is_here_BT, found_BT.astype(jnp.float32), 0.0)
  return (log_sum_BT - target_BT).mean()


def _layer(shape: Decoder, x_BTD, weights: dict, mesh: Mesh):
  """Attention and a gated MLP, each after a norm."""
  weights = {name: weight.astype(jnp.bfloat16) for name, weight in weights.items()}
  h_BTD = _rms_norm(x_BTD)
  heads = {"q": shape.heads, "k": shape.kv_heads, "v": shape.kv_heads}
  columns = {}
  for name, n in heads.items():
    columns[name] = (h_BTD @ weights[name]).reshape(*h_BTD.shape[:2], n, -1).swapaxes(1, 2)
  for name in ("q", "k"):
    columns[name] = _rope(columns[name])
    if shape.softcap:
      columns[name] = _rms_norm(columns[name])
  y_BHTC = _attend(shape, mesh, **columns)
  x_BTD += y_BHTC.swapaxes(1, 2).reshape(*h_BTD.shape[:2], -1) @ weights["out"]

  h_BTD = _rms_norm(x_BTD)
  gated_BTF = jax.nn.silu(h_BTD @ weights["gate"]) * (h_BTD @ weights["up"])
  x_BTD += gated_BTF @ weights["down"]
  return jax.lax.with_sharding_constraint(x_BTD, NamedSharding(mesh, RESIDUAL))


def _attend(shape: Decoder, mesh: Mesh, q, k, v):
  """Causal attention by splash, JAX's kernel for TPUs, on the rows of each chip."""
  names = ("block_q", "block_kv", "block_q_dkv", "block_kv_dkv", "block_q_dq", "block_kv_dq")
  sizes = kernel.BlockSizes(**dict.fromkeys(names, min(BLOCK, shape.context)))
  heads = shape.heads // shape.tensor
  causal = mask.MultiHeadMask([mask.CausalMask((shape.context,) * 2)] * heads)
  make = kernel.make_splash_mqa if shape.kv_heads == 1 else kernel.make_splash_mha
  attend = make(mask=causal, head_shards=1, q_seq_shards=1, block_sizes=sizes)

  def on_chip(q, k, v):
    if shape.kv_heads == 1:
      k, v = k[:, 0], v[:, 0]
    return jax.vmap(attend)(q / shape.head**0.5, k, v)

  rows, heads = P("data"), P("data", "model")
  columns = rows if shape.kv_heads == 1 else heads
  return jax.shard_map(
    on_chip, mesh=mesh, in_specs=(heads, columns, columns), out_specs=heads, check_vma=False
  )(q, k, v)


def _rms_norm(x):
  """RMSNorm without a gain."""
  return x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-6)


def _rope(x_BHTC):
  """Rotary positions."""
  T, C = x_BHTC.shape[-2:]
  angles_TC = jnp.arange(T)[:, None] / 10_000 ** (jnp.arange(0, C, 2) / C)
  cos, sin = (f(angles_TC).astype(x_BHTC.dtype) for f in (jnp.cos, jnp.sin))
  a, b = jnp.split(x_BHTC, 2, -1)
  return jnp.concatenate([a * cos + b * sin, b * cos - a * sin], -1)
