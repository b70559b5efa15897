# SPDX-License-Identifier: Apache-2.0
"""LoRA: a low-rank matrix beside each frozen one, y = x @ w + scale * (x @ a) @ b.

Source: Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models"; the scale of rsLoRA is
Kalajdzievski's 2023. Letters as in model.py, R the rank, N the adapters of a bank.
"""

import dataclasses
import difflib
import math

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P

from gpt2_jax.linear import NO_CONTEXT, Context, Dense, Linear, matmul
from gpt2_jax.model import GPT2, Block, dropout
from gpt2_jax.quantization import Int8
from gpt2_jax.sharding import RESIDUAL, ROWS

MATRICES = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")  # of a layer, in its order


@dataclasses.dataclass(frozen=True)
class LoraSettings:
  """What LoRA is added where. Raises ValueError on what cannot be, with the rule."""

  rank: int = 8
  alpha: float = 16.0
  rslora: bool = False
  targets: tuple[str, ...] = ("c_attn",)
  dropout: float = 0.0

  def __post_init__(self):
    if self.rank < 1:
      raise ValueError(f"a LoRA rank of {self.rank} trains nothing; it is 1 or more")
    if not 0 < self.alpha < math.inf:
      raise ValueError(f"a LoRA alpha of {self.alpha} is not above 0")
    if not 0 <= self.dropout < 1:
      raise ValueError(f"a LoRA dropout of {self.dropout} is not at least 0 and below 1")
    target_matrices(self.targets)

  @property
  def scale(self) -> float:
    return scale_of(self.rank, self.alpha, self.rslora)


def scale_of(rank: int, alpha: float, rslora: bool) -> float:
  """alpha / rank, or of rsLoRA alpha / sqrt(rank)."""
  return alpha / (math.sqrt(rank) if rslora else rank)


def target_matrices(targets: tuple[str, ...]) -> tuple[str, ...]:
  """The matrices of a layer that LoRA's targets name; c_proj is attention's and the MLP's.

  Raises ValueError for a target that is none, with the nearest names.
  """
  names = [name for matrix in MATRICES for name in (matrix.partition(".")[2], matrix)]
  matrices = set()
  for target in targets:
    if target not in names:
      near = difflib.get_close_matches(target, dict.fromkeys(names), 2, cutoff=0)
      raise ValueError(
        f"LoRA has no target {target[:80]!r}; the nearest are {' and '.join(near)}, and all are "
        f"{', '.join(dict.fromkeys(names))}"
      )
    matrices |= {matrix for matrix in MATRICES if f".{matrix}".endswith(f".{target}")}
  if not matrices:
    raise ValueError("LoRA has no targets; give one or more, such as c_attn")
  return tuple(matrix for matrix in MATRICES if matrix in matrices)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LoRA:
  """A frozen weight with a low-rank one beside it; layers in front, as every weight of `h` has.

  In a bank of adapters, `lora_a` and `lora_b` have another axis N before their last two, and
  `context.adapter_B` says which one each row of a batch goes through.
  """

  base: Dense | Int8
  lora_a: jax.Array  # [..., I, R]; zero from a layer's own rank on
  lora_b: jax.Array  # [..., R, O]
  scale: jax.Array  # [...]; zero in a layer without an adapter
  dropout: float = dataclasses.field(default=0.0, metadata={"static": True})
  # What a file says of it: the rank of each layer, 0 where there is none; empty of a bank.
  ranks: tuple[int, ...] = dataclasses.field(default=(), metadata={"static": True})
  rslora: bool = dataclasses.field(default=False, metadata={"static": True})

  def __getitem__(self, index):
    return jax.tree.map(lambda x: x[index], self)

  def matmul(self, x_BTI, bias_O, gathered: P, context: Context = NO_CONTEXT, out_dtype=None):
    """The base's product and the adapter's, see `Dense.matmul`; dropout is on the adapter's x."""
    y_BTO = self.base.matmul(x_BTI, bias_O, gathered, context, out_dtype)
    x_BTI = dropout(x_BTI, self.dropout, context.key)
    multiply = self._multiply if self.lora_a.ndim == 2 else self._multiply_by_row
    return (y_BTO + multiply(x_BTI, gathered, context.adapter_B)).astype(y_BTO.dtype)

  def _multiply(self, x_BTI, gathered: P, adapter_B):
    """scale * (x @ a) @ b, float32: scaled where it is narrow."""
    u_BTR = matmul(x_BTI, self.lora_a, None, P(gathered[0], None), 0, jnp.float32) * self.scale
    u_BTR = u_BTR.astype(x_BTI.dtype)
    return matmul(u_BTR, self.lora_b, None, P(None, gathered[1]), 0, jnp.float32)

  def _multiply_by_row(self, x_BTI, gathered: P, adapter_B):
    """The same with an adapter for each row: only the matrices of the batch's rows are read."""
    if adapter_B is None:
      raise ValueError(
        f"the model has a bank of {self.lora_a.shape[0]} adapters; give the number of one for each "
        f"row (adapters=)"
      )
    dtype, f32 = x_BTI.dtype, jnp.float32
    a_NIR = jax.sharding.reshard(self.lora_a.astype(dtype), P(None, gathered[0], None))
    b_NRO = jax.sharding.reshard(self.lora_b.astype(dtype), P(None, None, gathered[1]))
    a_BIR = a_NIR.at[adapter_B].get(out_sharding=P(ROWS, gathered[0], None))
    b_BRO = b_NRO.at[adapter_B].get(out_sharding=P(ROWS, None, gathered[1]))
    scale_B = self.scale.at[adapter_B].get(out_sharding=P(ROWS))

    rows = (((2,), (1,)), ((0,), (0,)))
    u_BTR = jax.lax.dot_general(
      x_BTI, a_BIR, rows, preferred_element_type=f32, out_sharding=RESIDUAL
    )
    u_BTR = (u_BTR * scale_B[:, None, None]).astype(dtype)
    return jax.lax.dot_general(
      u_BTR, b_BRO, rows, preferred_element_type=f32, out_sharding=P(ROWS, None, gathered[1])
    )


def block_linears(h: Block) -> dict[str, Linear]:
  """The Linears of the stacked layers by name: `attn.c_attn` and so on."""
  linears = (h.attn.c_attn, h.attn.c_proj, h.mlp.c_fc, h.mlp.c_proj)
  return dict(zip(MATRICES, linears, strict=True))


def copied(model: GPT2) -> GPT2:
  """The model with the same arrays, in which weights may be put without changing the other."""
  return jax.tree.unflatten(jax.tree.structure(model), jax.tree.leaves(model))


def matrix_layout(base: Dense | Int8) -> tuple[tuple[int, int], tuple]:
  """Shape (I, O) and spec of a stacked weight's matrices, padded as they are held."""
  array = base.q_OI if isinstance(base, Int8) else base.array
  (_, I, O), (_, in_axis, out_axis) = array.shape, jax.typeof(array).sharding.spec  # noqa: E741
  if isinstance(base, Int8):
    return (O, I), (out_axis, in_axis)
  return (I, O), (in_axis, out_axis)


def add_lora(model: GPT2, settings: LoraSettings, key) -> GPT2:
  """The model with LoRA on its targets: a drawn as peft draws it, b zero, so that nothing changes.

  The model's mesh is in force. It runs under `jax.jit` and `jax.eval_shape` as well. Raises
  ValueError on a model that has LoRA.
  """
  targets = target_matrices(settings.targets)
  model = copied(model)
  for index, (name, linear) in enumerate(block_linears(model.h).items()):
    weight = linear.w[...]
    if isinstance(weight, LoRA):
      raise ValueError("the model has a LoRA adapter already; merge it first")
    if name in targets:
      inputs = (4 if name == "mlp.c_proj" else 1) * model.config.n_embd
      linear.w = nnx.Param(_beside(weight, settings, inputs, jax.random.fold_in(key, index)))
  return model


def _beside(base: Dense | Int8, settings: LoraSettings, inputs: int, key) -> LoRA:
  """A weight with a new adapter beside it; of the inputs, those from `inputs` on are padding."""
  (I, O), (in_axis, out_axis) = matrix_layout(base)  # noqa: E741
  layers, R = jax.tree.leaves(base)[0].shape[0], settings.rank

  # torch's kaiming_uniform_(a=sqrt(5)): the interval is 1 / sqrt(inputs) wide to each side. Padding
  # is at the end of the axis that is drawn first, so it changes no other value.
  def draw(layer_key):
    bound, spec = 1 / math.sqrt(inputs), P(in_axis, None)
    a_IR = jax.random.uniform(layer_key, (I, R), jnp.float32, -bound, bound, out_sharding=spec)
    index = jax.lax.broadcasted_iota(jnp.int32, (I, R), 0, out_sharding=spec)
    return jnp.where(index < inputs, a_IR, 0.0)

  a_LIR = jax.vmap(draw)(jax.random.split(key, layers))
  b_LRO = jnp.zeros((layers, R, O), out_sharding=P(None, None, out_axis))
  scale_L = settings.scale * jnp.ones(layers, out_sharding=P(None))
  return LoRA(base, a_LIR, b_LRO, scale_L, settings.dropout, (R,) * layers, rslora=settings.rslora)


def has_lora(model: GPT2) -> bool:
  """Whether the model has a LoRA adapter, or a bank of them."""
  return any(isinstance(linear.w[...], LoRA) for linear in block_linears(model.h).values())


def merge_lora(model: GPT2) -> GPT2:
  """The plain model that computes the same: w + scale * a @ b in place of each adapted matrix.

  Raises ValueError for an int8 base, which would be rounded anew, and for a bank of adapters.
  """
  model = copied(model)
  for linear in block_linears(model.h).values():
    weight = linear.w[...]
    if isinstance(weight, LoRA):
      if isinstance(weight.base, Int8):
        raise ValueError("an adapter over int8 is not merged; load the model without quantize")
      if weight.lora_a.ndim != 3:
        raise ValueError("a bank of adapters is not merged; load the model with one of them")
      with jax.set_mesh(model.mesh):
        linear.w = nnx.Param(_merged(weight))
  return model


@jax.jit
def _merged(weight: LoRA) -> Dense:
  spec = jax.typeof(weight.base.array).sharding.spec
  a_LIR = weight.lora_a * weight.scale[:, None, None]
  layers = (((2,), (1,)), ((0,), (0,)))
  update_LIO = jax.lax.dot_general(
    a_LIR, weight.lora_b, layers, precision="highest", out_sharding=spec
  )
  return Dense(weight.base.array + update_LIO)
