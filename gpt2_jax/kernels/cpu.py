# SPDX-License-Identifier: Apache-2.0
"""Matmul forms for XLA's CPU backend: the same sums as in linear.py, written as the backend wants.

It wants two dimensions, and float32 sums forward and backward: otherwise bfloat16 runs at a quarter
of its speed. Letters as in model.py.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from gpt2_jax.sharding import ROWS, axis_size
from gpt2_jax.unreduced import last_split, sum_over_rows


def dot(a, b, contract: tuple[int, int], out_sharding: P):
  """Matmul of two matrices, summed over one dimension of each in float32."""
  # Decoding one row: the backend has bfloat16 kernels for two rows or more, and would convert the
  # whole weight for one.
  is_one_row = a.shape[0] == 1 and contract[0] == 1
  pads = is_one_row and a.dtype == jnp.bfloat16 and axis_size(*ROWS) == 1
  if pads:
    a = jnp.pad(a, ((0, 1), (0, 0)))

  dims = (((contract[0],), (contract[1],)), ((), ()))
  y = jax.lax.dot_general(a, b, dims, preferred_element_type=jnp.float32, out_sharding=out_sharding)
  return y[:1] if pads else y


def flatten_batch(x_BTI):
  """[B, T, I] as [B * T, I]; the batch stays split over the mesh as it was."""
  spec = P(ROWS, jax.typeof(x_BTI).sharding.spec[2])
  return jnp.reshape(x_BTI, (-1, x_BTI.shape[-1]), out_sharding=spec)


def unflatten_batch(x_RO, like_BTI):
  """What `flatten_batch` made of an array shaped like `like_BTI`, as [B, T, O] again."""
  B, T, _ = like_BTI.shape
  spec = P(ROWS, None, jax.typeof(x_RO).sharding.spec[1])
  return jnp.reshape(x_RO, (B, T, x_RO.shape[1]), out_sharding=spec)


def matmul_rows_flat(x_BTI, w, contract: int, last):
  """`linear.matmul_rows` with the batch flattened to one dimension."""
  y_RO = dot(flatten_batch(x_BTI), w, (1, contract), P(ROWS, last))
  return unflatten_batch(y_RO, x_BTI)


def weight_gradient_flat(a_BTI, b_BTO, spec: P):
  """`linear.weight_gradient` as a product of two matrices."""
  contract = functools.partial(dot, transpose_rows(a_BTI), flatten_batch(b_BTO), (1, 0))
  return sum_over_rows(contract, spec, (last_split(a_BTI), last_split(b_BTO)))


def transpose_rows(x_BTI):
  """Transposes [B, T, I] to [I, B * T].

  bfloat16 goes in blocks: XLA would fold a plain transpose into the product, and then run that in
  float32 at half the speed.
  """
  if x_BTI.dtype != jnp.bfloat16:
    return flatten_batch(x_BTI).T
  B, T, n = x_BTI.shape
  x_IBTt = jnp.moveaxis(x_BTI.reshape(B, -1, math.gcd(T, 128), n), 3, 0)
  return jnp.reshape(x_IBTt, (n, B * T), out_sharding=P(jax.typeof(x_BTI).sharding.spec[2], ROWS))


def bias_gradient_as_matmul(y_BTO, spec: P):
  """`linear.bias_gradient` as a product with ones: the backend reduces rows many times slower."""
  y_RO = flatten_batch(y_BTO)
  ones = jnp.ones((8, y_RO.shape[0]), y_RO.dtype, out_sharding=P(None, ROWS))
  contract = functools.partial(dot, ones, y_RO, (1, 0))
  last = (None, last_split(y_BTO))
  return sum_over_rows(contract, P(*last, unreduced=spec.unreduced), last)[0]
