# SPDX-License-Identifier: Apache-2.0
"""One gradient all-reduce a step over `replica`, by JAX's `reduced` and `unreduced` shardings.

Microbatches and layers each add to a gradient. Were every part reduced over the replicas, the same
bytes would cross the network once a microbatch. So a parameter is `reduced` while it is
differentiated (an equal copy on each replica), and its gradient is `unreduced`: each replica holds
the sum over its own rows. `all_reduce_gradients` adds them up, once, at the end.

A parameter that FSDP splits over `data` has its gradient reduce-scattered there as it is summed,
by layer and microbatch: whole ones would not fit. A bias or a gain, which it does not split, waits.

JAX checks both by type. What a parameter is multiplied with is split over `replica`, so it enters
by a reshard to a plain spec in a custom VJP, or by `in_each_row`.
"""

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import mlir
from jax.sharding import PartitionSpec as P

from gpt2_jax.compat import has_unreduced
from gpt2_jax.sharding import RESIDUAL, ROWS, axis_size


def defer_reduction(parameters):
  """The same parameters, whose gradients stay sums over each replica's own rows.

  With one device to a batch, and with a JAX that lacks `unreduced`, they are what they were.
  """
  if axis_size(*ROWS) == 1 or not has_unreduced():
    return parameters

  def defer(x):
    spec = jax.typeof(x).sharding.spec
    is_sharded = any("data" in (part if isinstance(part, tuple) else (part,)) for part in spec)
    return jax.sharding.reshard(x, spec.update(reduced={"replica"} if is_sharded else set(ROWS)))

  return jax.tree.map(defer, parameters)


def zero_gradients(parameters):
  """Zeros to which the gradients of the parameters are added."""

  def zeros(x):
    return jax.sharding.reshard(jnp.zeros(x.shape, x.dtype), gradient_spec(x))

  return jax.tree.map(zeros, parameters)


def all_reduce_gradients(grads):
  """Sums gradients over the replicas where that was deferred."""

  def reduce(x):
    spec = jax.typeof(x).sharding.spec
    return jax.sharding.reshard(x, P(*spec.partitions)) if spec.unreduced else x

  return jax.tree.map(reduce, grads)


# JAX's types know an unreduced array only as a term of its sum. This gives a device its term, as an
# array of its own, typed as `like` is.
_own_part = Primitive("own_part")
_own_part.def_abstract_eval(lambda x, like: like)
mlir.register_lowering(_own_part, lambda context, x, like: [x])


def stack_shards(grads):
  """The sums that parts of the mesh have of their own rows, one above the other: leaves [R, ...].

  `grads` are of parameters that were unsharded before their reduction was deferred; R is the number
  of parts, each of which keeps its own. Nothing is communicated.
  """
  if axis_size(*ROWS) == 1:
    return jax.tree.map(lambda x: jax.sharding.reshard(x[None], _stacked_spec(x)), grads)

  def stack(x):
    spec = jax.typeof(x).sharding.spec
    varies = (*ROWS, *(name for name in spec.partitions if name is not None))

    def on_shard(x):
      like = jax.lax.pcast(jnp.zeros(x.shape, x.dtype), varies, to="varying")
      return _own_part.bind(x, like)[None]

    return jax.shard_map(on_shard, in_specs=(spec,), out_specs=_stacked_spec(x))(x)

  return jax.tree.map(stack, grads)


def zero_shards(parameters):
  """Zeros to which `stack_shards` of the parameters' gradients are added."""

  def zeros(x):
    return jnp.zeros((axis_size(*ROWS), *x.shape), x.dtype, out_sharding=_stacked_spec(x))

  return jax.tree.map(zeros, parameters)


def _stacked_spec(x) -> P:
  return P(ROWS, *jax.typeof(x).sharding.spec.partitions)


def gradient_spec(parameter) -> P:
  """The spec of a parameter's gradient: its own, and unreduced where the parameter is reduced."""
  spec = jax.typeof(parameter).sharding.spec
  return P(*spec.partitions, unreduced=spec.reduced) if spec.reduced else spec


def last_split(x_BTI):
  """The mesh axis that splits the last axis of an array, or None."""
  return jax.typeof(x_BTI).sharding.spec[-1]


def sum_over_rows(contract, spec: P, last: tuple):
  """`contract(out_sharding=...)`, a matrix summed over the rows of a batch, laid out by `spec`.

  `last` are the axes that split its operands. JAX has products that are unreduced over all rows,
  and none in between: what is only over `replica` is then reduce-scattered over `data`.
  """
  if not spec.unreduced:
    return contract(out_sharding=spec)
  return jax.sharding.reshard(contract(out_sharding=P(*last, unreduced=set(ROWS))), spec)


def in_each_row(x, shape: tuple[int, ...], spec: P = RESIDUAL):
  """Broadcasts what is the same for each row of a batch to `shape`, [B, ...], split like the batch.

  The spec makes its gradient a sum over rows that may stay unreduced.
  """
  axes = range(len(shape) - x.ndim, len(shape))
  return jax.lax.broadcast_in_dim(x, shape, tuple(axes), out_sharding=spec)
