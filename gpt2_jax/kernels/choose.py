# SPDX-License-Identifier: Apache-2.0
"""Chooses the kernels of a platform. Pallas is imported by the kernels, not here."""

import jax.numpy as jnp

from gpt2_jax.sharding import platform

# Tokens and head size up to which both passes of the fused kernel fit into the VMEM that a kernel
# gets unasked: GPT-2's own context and heads, and what is smaller.
FUSED_LONGEST, FUSED_WIDEST = 1024, 64


def fused_fits(T: int, K: int) -> bool:
  """Whether the fused kernel compiles for a TPU at T tokens and heads of width K."""
  return T <= FUSED_LONGEST and K <= FUSED_WIDEST


def choose_attention(kernel: str, T: int, K: int, dtype) -> str:
  """The kernel to use, with "auto" resolved for the platform of the mesh in force.

  "auto" takes the fastest: on TPUs by the compiler's own count of instructions, on GPUs by step
  times of 124M on an H200 (experiments/README.md). Raises ValueError for a kernel that the platform
  does not have.
  """
  here = platform()
  if kernel == "cudnn" and here != "gpu":
    raise ValueError(
      f"attention is cudnn and the devices are {here}s; set --config.model.attention=auto"
    )
  if kernel != "auto":
    return kernel
  if here == "tpu":
    return "fused" if fused_fits(T, K) else "splash"
  if here == "gpu" and dtype == jnp.bfloat16:
    return "cudnn"
  return "chunked"


def choose_cross_entropy(kernel: str, dtype) -> str:
  """The form of the head and its cross-entropy, with "auto" resolved for the mesh in force.

  "fused" is for TPUs and is interpreted elsewhere. Operands of float32 get the plain form: what it
  would save in memory is half, and exactness is why somebody trains in float32.
  """
  if kernel != "auto":
    return kernel
  return "fused" if platform() == "tpu" and dtype == jnp.bfloat16 else "plain"
