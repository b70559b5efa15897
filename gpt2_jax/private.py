# SPDX-License-Identifier: Apache-2.0
"""DP-SGD: gradients of single examples, clipped and summed, and noise on the sum.

Source: Abadi et al. 2016, "Deep Learning with Differential Privacy", algorithm 1. An example is a
row of a batch: a window of text, or one prompt and response. Rows are drawn by Poisson sampling
(data/poisson.py), and runs/privacy.py accounts for epsilon.

A microbatch is one row on each part of the mesh that splits a batch. What a part adds to a gradient
is then the gradient of one example, and is clipped before anything is reduced over the mesh.

  # B rows of a batch  M microbatches  R rows of a microbatch, one for each part of the mesh
"""

import dataclasses

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from gpt2_jax.batch import Batch, accumulate
from gpt2_jax.compat import has_unreduced
from gpt2_jax.finetune.trainable import merge
from gpt2_jax.model import name_of
from gpt2_jax.sharding import ROWS, axis_size, unshard
from gpt2_jax.unreduced import defer_reduction, stack_shards, zero_shards


def make_aggregator(settings: ConfigDict, plain):
  """How a config, of which `settings` is `private`, makes a gradient: `plain`, or DP-SGD."""
  if not settings.clip_norm:
    return plain
  return PrivateGradients(
    float(settings.clip_norm), float(settings.noise_multiplier), settings.batch_size
  )


@dataclasses.dataclass(frozen=True)
class PrivateGradients:
  """In place of `train.gradients`: (sum of clipped gradients + N(0, (sigma C)^2)) / `batch_size`.

  C is `clip_norm`, the largest norm of an example's gradient; sigma is `noise_multiplier`.
  `batch_size` is how many examples are expected: how many were drawn is a secret, too.
  """

  clip_norm: float
  noise_multiplier: float
  batch_size: int

  def __call__(self, objective, trained, frozen, batch: Batch, microbatches: int, key=None):
    """Sums over the examples, each a mean over its tokens, and the gradient in what is trained."""
    k_noise, key = (None, None) if key is None else jax.random.split(key)
    sums, clipped = self.clipped_sum(objective, trained, frozen, batch, microbatches, key)
    if self.noise_multiplier:
      n_vocab = merge(trained, frozen).config.n_vocab
      clipped = add_noise(clipped, self.noise_multiplier * self.clip_norm, k_noise, n_vocab)
    return sums, jax.tree.map(lambda x: x / self.batch_size, clipped)

  def clipped_sum(self, objective, trained, frozen, batch: Batch, microbatches: int, key=None):
    """Sums over the examples, and the sum of their clipped gradients, laid out as `trained`."""
    # 1. What is trained is gathered on each part of the mesh; its gradients stay a part's own.
    check_microbatches(batch.tokens_BT.shape[0], microbatches)
    gathered = defer_reduction(jax.tree.map(unshard, trained))

    def sums_of(gathered, batch, key):
      sums = objective(merge(gathered, frozen), batch, key)
      return sums["nats"], sums

    # 2. Microbatch by microbatch: clip each row's gradient, and add it to those of its part.
    def sums_and_clipped(microbatch, key):
      gradient = jax.value_and_grad(sums_of, has_aux=True)
      (_, sums), grads = gradient(gathered, microbatch, key)
      return sums, clip_rows(stack_shards(grads), self.clip_norm)

    zero = zero_shards(gathered)
    means = mean_rows(batch)
    sums, clipped_R = accumulate(sums_and_clipped, means, microbatches, key, zero)

    # 3. One sum over the mesh, which is then split as the parameters are.
    def reduce(x_R, parameter):
      return jax.sharding.reshard(x_R.sum(0), jax.typeof(parameter).sharding.spec)

    return sums, jax.tree.map(reduce, clipped_R, trained)


def check_microbatches(rows: int, microbatches: int) -> None:
  """Raises ValueError unless a microbatch is one row on each part of the mesh in force."""
  parts = axis_size(*ROWS)
  if parts > 1 and not has_unreduced():
    raise ValueError(
      f"private training on {parts} parts of a batch takes JAX 0.10.2 or newer, and this is "
      f"{jax.__version__}; set --config.mesh.data=1, with the devices in --config.mesh.model"
    )
  if rows != microbatches * parts:
    raise ValueError(
      f"private training clips each example alone: a batch of {rows} on {parts} parts of the mesh "
      f"takes {max(1, rows // parts)} microbatches and has {microbatches}; set "
      f"--config.microbatches={max(1, rows // parts)}"
    )


def mean_rows(batch: Batch) -> Batch:
  """The batch with weights that sum to 1 in each row, so that sums over it are sums of means.

  A row without weights keeps none: its gradient is zero.
  """
  weights_BT = batch.weights_BT
  if weights_BT is None:
    weights_BT = jnp.ones_like(batch.tokens_BT[:, 1:], jnp.float32)
  total_B1 = weights_BT.sum(1, keepdims=True)
  return dataclasses.replace(batch, weights_BT=weights_BT / jnp.maximum(total_B1, 1e-9))


def clip_rows(grads_R, clip_norm: float):
  """Gradients of rows, each scaled down to a norm of `clip_norm` over all of its leaves.

  One that is not finite becomes zero: it may not move the sum by more than another.
  """
  squares = [jnp.square(x).sum(tuple(range(1, x.ndim))) for x in jax.tree.leaves(grads_R)]
  norm_R = jnp.sqrt(sum(squares))
  factor_R = jnp.minimum(1.0, clip_norm / jnp.maximum(norm_R, 1e-30))
  is_finite_R = jnp.isfinite(norm_R)

  def clip(x_R):
    shape = (-1, *(1,) * (x_R.ndim - 1))
    scaled_R = x_R * factor_R.reshape(shape)
    return jnp.where(is_finite_R.reshape(shape), scaled_R, 0.0)

  return jax.tree.map(clip, grads_R)


def add_noise(grads, std: float, key, n_vocab: int):
  """Gradients plus N(0, std^2), the same on any mesh; the vocabulary's padding stays zero."""
  paths, leaves = zip(*jax.tree_util.tree_leaves_with_path(grads), strict=True)
  noisy = []
  for index, (path, leaf) in enumerate(zip(paths, leaves, strict=True)):
    spec = jax.typeof(leaf).sharding.spec
    leaf_key = jax.random.fold_in(key, index)
    noise = std * jax.random.normal(leaf_key, leaf.shape, jnp.float32, out_sharding=spec)
    if name_of(path) == "wte":
      token_VD = jax.lax.broadcasted_iota(jnp.int32, leaf.shape, 0, out_sharding=spec)
      noise = jnp.where(token_VD < n_vocab, noise, 0.0)
    noisy.append(leaf + noise)
  return jax.tree.unflatten(jax.tree.structure(grads), noisy)
