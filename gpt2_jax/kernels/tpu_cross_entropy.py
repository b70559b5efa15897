# SPDX-License-Identifier: Apache-2.0
"""Head and cross-entropy for TPUs in a Pallas kernel: float32 logits stay in VMEM.

The kernel multiplies a block of the vocabulary with a block of rows, and carries the logsumexp
along. For the backward pass it stores e = exp(z - m) in the dtype of the operands, where m is the
largest of a few logits z of a row. The softmax is then e * exp(m - lse). That has the relative
error of the operand which the gradient of the logits is rounded to anyway, and nothing is
multiplied again. A second kernel writes the gradient of the logits over e while it multiplies it
with the table. Its other product, the gradient of the table, is a matmul of XLA's.

Logits stand as [vocabulary, rows]: maxima and sums run along sublanes, and what belongs to a row of
the batch is a row of lanes.

  # R rows of the batch (B T)  G groups of logits that share a maximum  others as in model.py
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import PartitionSpec as P

from gpt2_jax.sharding import BATCH, RESIDUAL, ROWS, platform
from gpt2_jax.unreduced import gradient_spec, sum_over_rows

VMEM = 15 * 2**20  # bytes that a kernel gets unasked, and on v4 all there are; less some room
MASKED = -1e30  # the logit of padding: finite, so that a group of padding alone has no NaN

GATHERED = P("model", None)  # wte while it is multiplied
BY_VOCABULARY = P("model", ROWS)  # [V, R]

matmul_f32 = functools.partial(jax.lax.dot_general, preferred_element_type=jnp.float32)


@dataclasses.dataclass(frozen=True)
class Blocks:
  """What a program computes: `rows` of the batch times `vocabulary`, `columns` rows at once."""

  rows: int = 1024
  vocabulary: int = 1024
  columns: int = 256

  def group(self, V: int) -> int:
    """Logits that share a maximum: they divide V, and the maxima of a block fill whole tiles."""
    return math.gcd(self.vocabulary // 8, V)

  def fitted(self, D: int, itemsize: int) -> "Blocks":
    """These, or smaller ones with which both kernels fit into VMEM."""
    blocks = self
    while blocks._nbytes(D, itemsize) > VMEM and blocks.vocabulary > 128:
      # Fewer rows mean that the table is read more often; fewer tokens mean more steps.
      name = "rows" if blocks.rows >= blocks.vocabulary else "vocabulary"
      blocks = dataclasses.replace(blocks, **{name: getattr(blocks, name) // 2})
    return blocks

  def _nbytes(self, D: int, itemsize: int) -> int:
    """VMEM of operands and results, two buffers of each, and of what is computed."""
    x, w, e = self.rows * D, self.vocabulary * D, self.rows * self.vocabulary
    forward = 2 * (x + w + e) * itemsize + 3 * 4 * self.vocabulary * self.columns
    backward = 2 * (w + 2 * e) * itemsize + 3 * 4 * x
    return max(forward, backward)


def fused_cross_entropy(x_BTD, wte_VD, labels_BT, n_vocab: int, blocks: Blocks = Blocks()):
  """-log p(label) under the logits `x @ wte.T`, in nats, float32 [B, T].

  The vocabulary may be padded, and split over `model`. Sums are float32, operands of x's dtype.
  """
  return _fused(x_BTD, wte_VD, jax.sharding.reshard(labels_BT, BATCH), n_vocab, blocks)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _fused(x_BTD, wte_VD, labels_BT, n_vocab: int, blocks: Blocks):
  nats_BT, _ = _nats(x_BTD, wte_VD, labels_BT, n_vocab, blocks, keeps=False)
  return nats_BT


def _fused_forward(x_BTD, wte_VD, labels_BT, n_vocab, blocks):
  nats_BT, kept = _nats(x_BTD, wte_VD, labels_BT, n_vocab, blocks, keeps=True)
  return nats_BT, (x_BTD, wte_VD, labels_BT, nats_BT, *kept)


def _fused_backward(n_vocab, blocks, saved, d_BT, d_lse_BT=None):
  x_BTD, wte_VD, labels_BT, nats_BT, lse_BT, e_VR, max_GR = saved

  # 1. The gradient of the logits is p, and p - 1 of the label, times that of the nats. The label's
  #    own comes from the nats: where its p is near 1, what is left of p - 1 is not lost.
  d_R, lse_R, nats_R, labels_R = (_flat(a) for a in (d_BT, lse_BT, nats_BT, labels_BT))
  all_R = d_R if d_lse_BT is None else d_R + _flat(d_lse_BT)
  scale_GR = jnp.exp(max_GR - lse_R) * all_R
  label_R = jnp.expm1(-nats_R) * d_R

  # The gradient of the logsumexp is p, that of the label too.
  if d_lse_BT is not None:
    label_R += jnp.exp(-nats_R) * _flat(d_lse_BT)

  # 2. The gradients of x and, in the place of e, of the logits.
  on_shards = jax.shard_map(
    functools.partial(_backward_on_shard, blocks),
    in_specs=(BY_VOCABULARY, BY_VOCABULARY, P(ROWS), P(ROWS), GATHERED),
    out_specs=(P(ROWS, None), BY_VOCABULARY),
    check_vma=False,
  )
  w_VD = _all_gather(wte_VD, x_BTD.dtype)
  dx_RD, dz_VR = on_shards(e_VR, scale_GR, label_R, labels_R, w_VD)
  dx_BTD = jnp.reshape(dx_RD, x_BTD.shape, out_sharding=RESIDUAL)

  # 3. That of the table.
  x_RD = jnp.reshape(x_BTD, dx_RD.shape, out_sharding=P(ROWS, None))
  contract = functools.partial(matmul_f32, dz_VR, x_RD, (((1,), (0,)), ((), ())))
  dw_VD = sum_over_rows(contract, gradient_spec(wte_VD), ("model", None))
  return dx_BTD, dw_VD.astype(wte_VD.dtype), None


_fused.defvjp(_fused_forward, _fused_backward)


def fused_cross_entropy_and_lse(x_BTD, wte_VD, labels_BT, n_vocab: int, blocks: Blocks = Blocks()):
  """`fused_cross_entropy`, and the logsumexp of the logits; both have gradients."""
  return _fused_and_lse(x_BTD, wte_VD, jax.sharding.reshard(labels_BT, BATCH), n_vocab, blocks)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _fused_and_lse(x_BTD, wte_VD, labels_BT, n_vocab: int, blocks: Blocks):
  nats_BT, (lse_BT,) = _nats(x_BTD, wte_VD, labels_BT, n_vocab, blocks, keeps=False)
  return nats_BT, lse_BT


def _fused_and_lse_forward(x_BTD, wte_VD, labels_BT, n_vocab, blocks):
  nats_BT, saved = _fused_forward(x_BTD, wte_VD, labels_BT, n_vocab, blocks)
  return (nats_BT, saved[4]), saved


def _fused_and_lse_backward(n_vocab, blocks, saved, cotangents):
  return _fused_backward(n_vocab, blocks, saved, *cotangents)


_fused_and_lse.defvjp(_fused_and_lse_forward, _fused_and_lse_backward)


def _all_gather(wte_VD, dtype):
  """Casts the table, then all-gathers it over `data`."""
  return jax.sharding.reshard(wte_VD.astype(dtype), GATHERED)


def _flat(x_BT):
  """[B, T] as [R], split over the mesh as it was."""
  return jnp.reshape(x_BT, (-1,), out_sharding=P(ROWS))


def _nats(x_BTD, wte_VD, labels_BT, n_vocab: int, blocks: Blocks, keeps: bool):
  """The nats and the logsumexp, and if `keeps` what the backward pass needs: e and its maxima."""
  out_specs = (BATCH, BATCH, *(BY_VOCABULARY,) * (2 * keeps))
  on_shards = jax.shard_map(
    functools.partial(_forward_on_shard, n_vocab, blocks, keeps),
    in_specs=(RESIDUAL, GATHERED, BATCH),
    out_specs=out_specs,
    check_vma=False,
  )
  nats_BT, *kept = on_shards(x_BTD, _all_gather(wte_VD, x_BTD.dtype), labels_BT)
  return nats_BT, kept


def _forward_on_shard(n_vocab: int, blocks: Blocks, keeps: bool, x_BTD, w_VD, labels_BT):
  """A device's rows and its part of the vocabulary."""
  # 1. Tokens count from the first of this part: labels of other parts are outside of it.
  (B, T, D), V = x_BTD.shape, w_VD.shape[0]
  first = jax.lax.axis_index("model") * V
  labels_1R = labels_BT.reshape(1, B * T) - first
  labels_1R = jnp.where(labels_1R < V, labels_1R, -1)  # in no block, and not beyond the last one
  end = jnp.clip(n_vocab - first, 0, V).reshape(1)
  lse_1R, label_1R, *kept = _forward_call(
    x_BTD.reshape(B * T, D), w_VD, labels_1R, end, blocks, keeps
  )

  # 2. All parts together.
  top_1R = jax.lax.pmax(lse_1R, "model")
  lse_1R = top_1R + jnp.log(jax.lax.psum(jnp.exp(lse_1R - top_1R), "model"))
  label_1R = jax.lax.psum(label_1R, "model")
  return (lse_1R - label_1R).reshape(B, T), lse_1R.reshape(B, T), *kept


def _forward_call(x_RD, w_VD, labels_1R, end, blocks: Blocks, keeps: bool):
  """Runs the kernel: the logsumexp and the label's logit, [1, R], and e [V, R], its maxima [G, R].

  Blocks that reach beyond the vocabulary or the rows compute what is masked, or never written.
  """
  (R, D), V, itemsize = x_RD.shape, w_VD.shape[0], x_RD.dtype.itemsize
  blocks = blocks.fitted(D, itemsize)
  rows, block, group = min(blocks.rows, R), min(blocks.vocabulary, V), blocks.group(V)
  grid = pl.cdiv(R, rows), pl.cdiv(V, block)

  of_rows = pl.BlockSpec((1, rows), lambda i, j: (0, i))
  statistics = jax.ShapeDtypeStruct((1, R), jnp.float32)
  out_specs, out_shape = [of_rows] * 2, [statistics] * 2
  if keeps:
    out_specs += [
      pl.BlockSpec((block, rows), lambda i, j: (j, i)),
      pl.BlockSpec((block // group, rows), lambda i, j: (j, i)),
    ]
    out_shape += [
      jax.ShapeDtypeStruct((V, R), x_RD.dtype),
      jax.ShapeDtypeStruct((V // group, R), jnp.float32),
    ]

  moved = (R * D + grid[0] * V * D + keeps * V * R) * itemsize
  return pl.pallas_call(
    functools.partial(_forward_kernel, blocks.columns, group),
    grid=grid,
    in_specs=[
      pl.BlockSpec(memory_space=pltpu.SMEM),
      pl.BlockSpec((rows, D), lambda i, j: (i, 0)),
      pl.BlockSpec((block, D), lambda i, j: (j, 0)),
      of_rows,
    ],
    out_specs=out_specs,
    out_shape=out_shape,
    scratch_shapes=[pltpu.VMEM((1, rows), jnp.float32)] * 3,
    # Row blocks are independent, and v4 and v5p have two cores to run them on.
    compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
    cost_estimate=pl.CostEstimate(flops=2 * R * V * D, transcendentals=R * V, bytes_accessed=moved),
    interpret=platform() != "tpu",
    name="cross_entropy_forward",
  )(end, x_RD, w_VD, labels_1R)


def _forward_kernel(columns: int, group: int, end_ref, x_ref, w_ref, labels_ref, *rest):
  """A block of rows and one of the vocabulary; `end` is the first token that is padding."""
  lse_ref, label_ref, *kept, running_max, running_sum, running_label = rest
  e_ref, max_ref = kept or (None, None)
  rows, block = x_ref.shape[0], w_ref.shape[0]
  first = pl.program_id(1) * block

  @pl.when(first == 0)
  def _():
    running_max[...] = jnp.full_like(running_max, MASKED)
    running_sum[...] = jnp.zeros_like(running_sum)
    running_label[...] = jnp.zeros_like(running_label)

  for start in range(0, rows, columns):
    # 1. Logits. The label's is found before padding is masked.
    here = slice(start, min(start + columns, rows))
    z_VR = matmul_f32(w_ref[...], x_ref[here], (((1,), (1,)), ((), ())))
    token_VR = jax.lax.broadcasted_iota(jnp.int32, z_VR.shape, 0)
    label_VR = jnp.where(token_VR == labels_ref[:, here] - first, z_VR, 0.0)
    running_label[:, here] += label_VR.sum(0, keepdims=True)
    z_VR = jnp.where(token_VR < end_ref[0] - first, z_VR, MASKED)

    # 2. Group by group, exp(z - m) and its sum.
    maxima, sums = [], []
    for g in range(block // group):
      tokens = slice(g * group, (g + 1) * group)
      max_1R = z_VR[tokens].max(0, keepdims=True)
      e_gR = jnp.exp(z_VR[tokens] - max_1R)
      maxima.append(max_1R)
      sums.append(e_gR.sum(0, keepdims=True))
      if kept:
        e_ref[tokens, here] = e_gR.astype(e_ref.dtype)
        max_ref[g : g + 1, here] = max_1R

    # 3. Into the sums of the blocks before, under the larger maximum.
    old_1R = running_max[:, here]
    new_1R = functools.reduce(jnp.maximum, maxima, old_1R)
    sum_1R = running_sum[:, here] * jnp.exp(old_1R - new_1R)
    for max_1R, group_sum_1R in zip(maxima, sums, strict=True):
      sum_1R += group_sum_1R * jnp.exp(max_1R - new_1R)
    running_max[:, here], running_sum[:, here] = new_1R, sum_1R

  @pl.when(pl.program_id(1) == pl.num_programs(1) - 1)
  def _():
    lse_ref[...] = running_max[...] + jnp.log(running_sum[...])
    label_ref[...] = running_label[...]


def _backward_on_shard(blocks: Blocks, e_VR, scale_GR, label_R, labels_R, w_VD):
  """The gradient of a device's rows, [R, D], summed over all parts of the vocabulary, and that of
  its logits, [V, R], which takes the memory of e."""
  (V, R), D, itemsize = e_VR.shape, w_VD.shape[1], w_VD.dtype.itemsize
  blocks = blocks.fitted(D, itemsize)
  rows, block, group = min(blocks.rows, R), min(blocks.vocabulary, V), V // scale_GR.shape[0]
  grid = pl.cdiv(R, rows), pl.cdiv(V, block)

  # What a last block has too much is summed as well, so its rows of the table are zeros.
  w_VD = jnp.pad(w_VD, ((0, grid[1] * block - V), (0, 0)))
  labels_1R = labels_R[None] - jax.lax.axis_index("model") * V
  of_rows = pl.BlockSpec((1, rows), lambda i, j: (0, i))
  of_e = pl.BlockSpec((block, rows), lambda i, j: (j, i))
  moved = (2 * V * R + grid[0] * V * D + 2 * R * D) * itemsize
  dx_RD, dz_VR = pl.pallas_call(
    functools.partial(_backward_kernel, group, V),
    grid=grid,
    in_specs=[
      of_e,
      pl.BlockSpec((block // group, rows), lambda i, j: (j, i)),
      of_rows,
      of_rows,
      pl.BlockSpec((block, D), lambda i, j: (j, 0)),
    ],
    out_specs=[pl.BlockSpec((rows, D), lambda i, j: (i, 0)), of_e],
    out_shape=[
      jax.ShapeDtypeStruct((R, D), jnp.float32),
      jax.ShapeDtypeStruct((V, R), e_VR.dtype),
    ],
    input_output_aliases={0: 1},
    compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
    cost_estimate=pl.CostEstimate(flops=2 * R * V * D, transcendentals=0, bytes_accessed=moved),
    interpret=platform() != "tpu",
    name="cross_entropy_backward",
  )(e_VR, scale_GR, label_R[None], labels_1R, w_VD)
  return jax.lax.psum(dx_RD, "model").astype(w_VD.dtype), dz_VR


def _backward_kernel(
  group: int, V: int, e_ref, scale_ref, label_ref, labels_ref, w_ref, dx_ref, dz_ref
):
  """The gradient of a block of logits, and what it adds to that of a block of rows."""
  block = w_ref.shape[0]
  first = pl.program_id(1) * block

  @pl.when(first == 0)
  def _():
    dx_ref[...] = jnp.zeros_like(dx_ref)

  for g in range(block // group):
    tokens = slice(g * group, (g + 1) * group)
    p_gR = e_ref[tokens].astype(jnp.float32) * scale_ref[g : g + 1]
    token_gR = jax.lax.broadcasted_iota(jnp.int32, p_gR.shape, 0)
    is_label_gR = token_gR == labels_ref[...] - (first + g * group)
    dz_gR = jnp.where(is_label_gR, label_ref[...], p_gR)
    # A group is of the vocabulary, or beyond it, as a whole.
    dz_ref[tokens] = jnp.where(first + g * group < V, dz_gR, 0.0).astype(dz_ref.dtype)
  dx_ref[...] += matmul_f32(dz_ref[...], w_ref[...], (((0,), (0,)), ((), ())))
