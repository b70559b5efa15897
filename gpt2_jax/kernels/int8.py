# SPDX-License-Identifier: Apache-2.0
"""Int8 quantization of rows (their scales), and the int8 matmul as each backend does it fastest.

Accelerators convert int8 as they read it. XLA's CPU backend writes a converted copy first, which
costs more than a few rows do. But it has a kernel for int8 by int8, so few rows are multiplied limb
by limb.

  # R rows  I inputs  O outputs, which are the weight's rows
"""

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from gpt2_jax.sharding import ROWS, axis_size

TINY = jnp.finfo(jnp.float32).tiny  # a scale for rows of zeros
LIMB = 254  # base of the limbs: -127 to 127


def quantize_rows(w_OI):
  """Symmetric int8 quantization, each row by its largest value: int8 [..., O, I], scales [..., O].

  |w - q * scale| <= scale / 2. A row of zeros stays zeros.
  """
  scale_O = jnp.maximum(jnp.abs(w_OI).max(-1) / 127, TINY)
  return jnp.round(w_OI / scale_O[..., None]).astype(jnp.int8), scale_O


def matmul_int8(x_RI, q_OI, out_sharding: P):
  """`x @ q.T` in float32, with `x` as precise as its dtype: what is quantized is the weight."""
  n_limbs = 2 if x_RI.dtype == jnp.bfloat16 else 3

  def limbs(x_RI, q_OI):
    return matmul_by_limbs(x_RI, q_OI, n_limbs, out_sharding)

  def converted(x_RI, q_OI):
    return matmul_dequantized(x_RI, q_OI, out_sharding)

  def converted_as_read(x_RI, q_OI):
    # Without the barrier XLA would convert once before a loop, and then read two or four times the
    # bytes in it.
    return converted(*jax.lax.optimization_barrier((x_RI, q_OI)))

  # Few rows: up to 10 of float32. At 32 limbs a converted copy is as fast.
  is_few = x_RI.shape[0] * n_limbs <= 32 and axis_size(*ROWS) == 1
  return jax.lax.platform_dependent(
    x_RI, q_OI, cpu=limbs if is_few else converted, default=converted_as_read
  )


def matmul_dequantized(x_RI, q_OI, out_sharding: P):
  """`x @ q.T` with the weight converted to x's dtype."""
  dims = (((1,), (1,)), ((), ()))
  return jax.lax.dot_general(
    x_RI,
    q_OI.astype(x_RI.dtype),
    dims,
    preferred_element_type=jnp.float32,
    out_sharding=out_sharding,
  )


def matmul_by_limbs(x_RI, q_OI, n_limbs: int, out_sharding: P):
  """`x @ q.T` as one int8 product for each limb of x, summed in float32, the highest first."""
  limbs_NI, unit_R1 = int8_limbs(x_RI, n_limbs)
  dims = (((1,), (1,)), ((), ()))
  y_NO = jax.lax.dot_general(
    limbs_NI, q_OI, dims, preferred_element_type=jnp.int32, out_sharding=out_sharding
  )

  rows, parts = x_RI.shape[0], []
  for i in range(n_limbs):
    parts.append(y_NO[rows * i : rows * (i + 1)].astype(jnp.float32) / LIMB**i)
  return sum(parts[1:], parts[0]) * unit_R1


def int8_limbs(x_RI, n_limbs: int):
  """Each row as `n_limbs` int8 limbs of base 254, [n * R, I], highest first, and its unit [R, 1].

  What they leave out is at most (1 / 2) / (127 * 254^(n - 1)) of the row's largest value, and
  float32's rounding.
  """
  x_RI = x_RI.astype(jnp.float32)
  unit_R1 = jnp.maximum(jnp.abs(x_RI).max(1, keepdims=True) / 127, TINY)

  rest_RI, limbs = x_RI / unit_R1, []
  for _ in range(n_limbs):
    limbs.append(jnp.round(rest_RI))
    rest_RI = (rest_RI - limbs[-1]) * LIMB
  return jnp.concatenate(limbs).astype(jnp.int8), unit_R1
