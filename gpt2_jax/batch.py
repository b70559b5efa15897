# SPDX-License-Identifier: Apache-2.0
"""The batch of a training step: tokens, and what packed rows, loss masks and objectives add."""

import dataclasses

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from gpt2_jax.sharding import ROWS


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Batch:
  """What a step trains on: tokens [B, T + 1], of which each but the first is predicted.

  `weights_BT` mask or weigh the loss of each predicted token (None: 1 each). Packed rows give the
  segment of each input token, which sees no other, and its position. `extras` are an objective's
  own: labels, features.
  """

  tokens_BT: jax.Array
  weights_BT: jax.Array | None = None
  segments_BT: jax.Array | None = None
  positions_BT: jax.Array | None = None
  extras: dict = dataclasses.field(default_factory=dict)


def batch_hash(tokens_BT):
  """A uint32 that tells batches apart by tokens and their order, on any mesh."""
  B, T = tokens_BT.shape
  row_B1 = jnp.arange(B, dtype=jnp.uint32)[:, None]
  place_BT = (row_B1 * T + jnp.arange(T, dtype=jnp.uint32)) * jnp.uint32(2654435761)
  return jnp.sum((tokens_BT.astype(jnp.uint32) + 1) * (place_BT | 1), dtype=jnp.uint32)


def accumulate(sums_and_grads, batch: Batch, microbatches: int, key, zero_grads):
  """Gradient accumulation: what `sums_and_grads(microbatch, key)` gives, added up.

  The microbatches are computed one after the other, each with a key of its own. Only one's
  activations exist at a time; what is carried along begins with `zero_grads`.
  """

  def add_microbatch(total, indexed):
    index, microbatch = indexed
    microbatch_key = None if key is None else jax.random.fold_in(key, index)
    return jax.tree.map(jnp.add, total, sums_and_grads(microbatch, microbatch_key)), None

  batches_M = jax.tree.map(lambda x: _split_microbatches(x, microbatches), batch)
  first = jax.tree.map(lambda x: x[0], batches_M)
  sums, _ = jax.eval_shape(sums_and_grads, first, key)
  zero = jax.tree.map(jnp.zeros_like, sums), zero_grads
  total, _ = jax.lax.scan(add_microbatch, zero, (jnp.arange(microbatches), batches_M))
  return total


def _split_microbatches(x, microbatches: int):
  """An array [B, ...] as [M, B / M, ...]: microbatches, split over the mesh as the batch is."""
  shape = (-1, microbatches, *x.shape[1:])
  spec = P(ROWS, None, *(None,) * (x.ndim - 1))
  return jnp.reshape(x, shape, out_sharding=spec).swapaxes(0, 1)
