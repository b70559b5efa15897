# SPDX-License-Identifier: Apache-2.0
"""One gradient all-reduce a step over `replica`, by JAX's `reduced` and `unreduced` shardings.

Microbatches and layers each add to a gradient. Were every part reduced over the replicas, the same
bytes would cross the network once a microbatch. So a parameter is `reduced` while it is
differentiated (an equal copy on each replica), and its gradient is `unreduced`: each replica holds
the sum over its own rows. `all_reduce_gradients` adds them up, once, at the end.

JAX checks both by type. What a parameter is multiplied with is split over `replica`, so it enters
by a reshard to a plain spec in a custom VJP, or by a broadcast to rows with an `out_sharding`: its
transpose, a sum over rows, is unreduced by itself.
"""

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from gpt2_jax.compat import has_unreduced
from gpt2_jax.sharding import ROWS, axis_size

DEFERRED = frozenset({"replica"})


def defer_reduction(parameters):
  """The same parameters, whose gradients stay sums over each replica's own rows.

  With one replica, and with a JAX that lacks `unreduced`, they are what they were.
  """
  if axis_size("replica") == 1 or not has_unreduced():
    return parameters

  def defer(x):
    return jax.sharding.reshard(x, jax.typeof(x).sharding.spec.update(reduced=DEFERRED))

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


def gradient_spec(parameter) -> P:
  """The spec of a parameter's gradient: its own, and unreduced where the parameter is reduced."""
  spec = jax.typeof(parameter).sharding.spec
  return P(*spec.partitions, unreduced=spec.reduced) if spec.reduced else spec


def last_split(x_BTI):
  """The mesh axis that splits the last axis of an array, or None."""
  return jax.typeof(x_BTI).sharding.spec[-1]


def sum_over_rows(contract, spec: P, last: tuple):
  """`contract(out_sharding=...)`, a matrix summed over the rows of a batch, laid out by `spec`.

  `last` are the axes that split its operands. What stays unreduced over `replica` is left so over
  all rows at first, for JAX has no product in between, and then reduce-scattered over `data`.
  """
  if not spec.unreduced:
    return contract(out_sharding=spec)
  return jax.sharding.reshard(contract(out_sharding=P(*last, unreduced=set(ROWS))), spec)
