# SPDX-License-Identifier: Apache-2.0
"""Muon: Nesterov momentum, orthogonalized by Newton-Schulz iterations, for the blocks' matrices.

Sources: Jordan et al. 2024, "Muon: An optimizer for hidden layers in neural networks" (the
iterations, their coefficients, the momentum); Liu et al. 2025, "Muon is Scalable for LLM Training"
(the scale). The scale gives an update the RMS of AdamW's, about 0.2 of the learning rate, so that
one learning rate and one weight decay serve both, and those that were tuned for AdamW carry over.

A matrix is each layer's, and q, k and v of c_attn are three. Iterations need whole matrices, which
the mesh splits. So once a step they change places: each device gets some matrices whole, iterates
without communication, and the updates change places back. Matrices of one shape travel together:
those of attention, and those of the MLP.

  # S stacked matrices, of which a device gets some  N columns of a matrix, no fewer than its rows D
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from gpt2_jax.model import name_of
from gpt2_jax.optimizer import adamw, descend
from gpt2_jax.sharding import AXES, axis_size, padded

# Jordan's quintic a x + b x^3 + c x^5: steep at 0, and near 1 it swings between 0.68 and 1.21.
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
ITERATIONS = 5

# RMS of the entries of an update, over the learning rate; twice it is above any that can be.
UPDATE_RMS = 0.2

# The axes that split a matrix [S, D, N], with the dimension of each.
SPLIT = (("data", 1), ("model", 2))

# On TPUs and GPUs a float32 product is one of fewer bits unless it is told to be one.
einsum = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)


def make_optimizer(config: ConfigDict, learning_rate: optax.Schedule, head_size: int):
  """The optimizer that a config asks for. Raises ValueError for a name that is none."""
  knobs = (config.b1, config.b2, config.weight_decay, config.clip_norm)
  if config.optimizer == "adamw":
    return adamw(learning_rate, *knobs)
  if config.optimizer == "muon":
    return muon(learning_rate, *knobs, config.momentum, head_size)
  raise ValueError(f"optimizer is {config.optimizer[:80]!r}; it is one of adamw, muon")


def muon(
  learning_rate: optax.Schedule,
  b1: float,
  b2: float,
  weight_decay: float,
  clip_norm: float,
  momentum: float,
  head_size: int,
):
  """Muon for the blocks' matrices, and AdamW for embeddings, vectors and all else that is trained.

  `head_size` is the model's: the columns of c_attn run head by head.
  """

  def others(model):
    return jax.tree.map(lambda is_matrix: not is_matrix, block_matrices(model))

  directions = [
    ("adam", optax.masked(optax.scale_by_adam(b1, b2, eps=1e-8), others)),
    ("muon", optax.masked(scale_by_muon(momentum, head_size), block_matrices)),
  ]
  return descend(directions, learning_rate, weight_decay, clip_norm)


class MuonState(NamedTuple):
  """The momentum of each matrix."""

  mu: optax.Updates


def block_matrices(model):
  """A mask like `model`: True for the blocks' matrices, stacked over layers, which Muon trains."""

  def is_matrix(path, leaf):
    names = name_of(path).split(".")
    return names[0] == "h" and names[-1] == "w" and leaf.ndim == 3

  return jax.tree_util.tree_map_with_path(is_matrix, model)


def scale_by_muon(momentum: float, head_size: int) -> optax.GradientTransformationExtraArgs:
  """Muon's direction of each matrix, float32, laid out as the parameters are.

  With `is_bound`, `update` gives a cheap direction in place of it: a larger one, which is not
  finite where Muon's would not be.
  """

  def init(params):
    if not jax.tree.leaves(params):
      raise ValueError(
        "optimizer is muon, which trains the blocks' matrices, and this run trains none of them; "
        "set --config.optimizer=adamw"
      )
    return MuonState(jax.tree.map(jnp.zeros_like, params))

  def average(old, new):
    return jax.tree.map(lambda m, g: momentum * m + (1 - momentum) * g, old, new)

  def update(grads, state, params=None, *, is_bound: bool = False, **others):
    mu = average(state.mu, grads)
    nesterov = average(mu, grads)
    if is_bound:
      return jax.tree.map(bound, nesterov), MuonState(mu)
    return orthogonalize(nesterov, head_size), MuonState(mu)

  return optax.GradientTransformationExtraArgs(init, update)


def bound(x):
  """x scaled to an RMS that no update has: iterations keep finite what its norm can divide."""
  return x * (2 * UPDATE_RMS / (jnp.sqrt(jnp.mean(jnp.square(x))) + 1e-30))


def newton_schulz(x_SDN):
  """Orthogonalizes matrices: of each U S V^T about U V^T, float32.

  The singular values, over their norm, pass five times through the quintic: from 0.002 on they
  come out between 0.68 and 1.21, and a matrix of zeros stays zeros.
  """
  a, b, c = COEFFICIENTS
  norm_S11 = jnp.sqrt(jnp.square(x_SDN).sum((1, 2), keepdims=True))

  def iterate(_, x_SDN):
    gram_SDD = einsum("sdn,sen->sde", x_SDN, x_SDN)
    factor_SDD = b * gram_SDD + c * einsum("sde,sef->sdf", gram_SDD, gram_SDD)
    return a * x_SDN + einsum("sde,sen->sdn", factor_SDD, x_SDN)

  return jax.lax.fori_loop(0, ITERATIONS, iterate, x_SDN / (norm_S11 + 1e-7))


def orthogonalize(tree, head_size: int):
  """Each matrix of each layer orthogonalized and scaled; a tree of [L, I, O], laid out as it is."""
  paths, leaves = zip(*jax.tree_util.tree_leaves_with_path(tree), strict=True)
  names = [name_of(path) for path in paths]
  specs = tuple(jax.typeof(leaf).sharding.spec for leaf in leaves)

  def on_shards(*leaves):
    # 1. Stacks of matrices with no fewer columns than rows, alike in what splits them.
    stacks = []
    for name, leaf in zip(names, leaves, strict=True):
      stacks.append(_to_stack(name, leaf, head_size))

    # 2. Those of one shape together.
    results = [None] * len(stacks)
    for shape in dict.fromkeys(stack.shape[1:] for stack in stacks):
      members = [i for i, stack in enumerate(stacks) if stack.shape[1:] == shape]
      ends = [0]
      for i in members:
        ends.append(ends[-1] + stacks[i].shape[0])
      done_SDN = _spread(jnp.concatenate([stacks[i] for i in members]))
      for i, start, end in zip(members, ends, ends[1:], strict=False):
        results[i] = done_SDN[start:end]

    # 3. Back to the parameters' form.
    return tuple(
      _from_stack(name, stack, head_size) for name, stack in zip(names, results, strict=True)
    )

  directions = jax.shard_map(on_shards, in_specs=specs, out_specs=specs, check_vma=False)(*leaves)
  scaled = []
  for name, leaf in zip(names, directions, strict=True):
    scaled.append(leaf * (UPDATE_RMS * _columns(name, leaf) ** 0.5))
  return jax.tree.unflatten(jax.tree.structure(tree), scaled)


def _columns(name: str, w_LIO) -> int:
  """The larger side of a matrix. Attention's are all square, but for the padding of heads."""
  _, inputs, outputs = w_LIO.shape
  if ".c_attn." in name:
    return inputs
  return outputs if ".attn." in name else max(inputs, outputs)


def _to_stack(name: str, w_LIO, K: int):
  """A device's part of a parameter as stacked matrices, [S, D, N]: `data` splits D, `model` N."""
  if ".c_proj." in name:
    return jnp.swapaxes(w_LIO, 1, 2)
  if ".c_attn." not in name:
    return w_LIO
  L, D, C = w_LIO.shape
  w_LDH3K = w_LIO.reshape(L, D, C // (3 * K), 3, K)
  return jnp.transpose(w_LDH3K, (0, 3, 1, 2, 4)).reshape(3 * L, D, C // 3)


def _from_stack(name: str, w_SDN, K: int):
  """The inverse of `_to_stack`."""
  if ".c_proj." in name:
    return jnp.swapaxes(w_SDN, 1, 2)
  if ".c_attn." not in name:
    return w_SDN
  S, D, N = w_SDN.shape
  w_L3DHK = w_SDN.reshape(S // 3, 3, D, N // K, K)
  return jnp.transpose(w_L3DHK, (0, 2, 3, 1, 4)).reshape(S // 3, D, 3 * N)


def _spread(x_SDN):
  """`newton_schulz` of matrices that the mesh splits, in a `shard_map`: one reshard in, one out.

  The stack is padded with zeros to a multiple of the devices.
  """
  S = x_SDN.shape[0]
  rows = padded(S, axis_size(*AXES))
  x_SDN = jnp.pad(x_SDN, ((0, rows - S), (0, 0), (0, 0)))
  split = [(axis, dim) for axis, dim in SPLIT if axis_size(axis) > 1]

  # In: a replica takes its part of the stack, which it has; then whole matrices come together.
  replicas = axis_size("replica")
  if replicas > 1:
    part = rows // replicas
    start = jax.lax.axis_index("replica") * part
    x_SDN = jax.lax.dynamic_slice_in_dim(x_SDN, start, part)

  # The barrier keeps the stack one array. XLA for CPUs would exchange the parameters that it is
  # made of, each in a layout of its own, and then refuse that.
  x_SDN = jax.lax.optimization_barrier(x_SDN)
  for axis, dim in split:
    x_SDN = jax.lax.all_to_all(x_SDN, axis, 0, dim, tiled=True)

  x_SDN = newton_schulz(x_SDN)

  # Out: the same way back.
  for axis, dim in reversed(split):
    x_SDN = jax.lax.all_to_all(x_SDN, axis, dim, 0, tiled=True)
  if replicas > 1:
    x_SDN = jax.lax.all_gather(x_SDN, "replica", tiled=True)
  return x_SDN[:S]
