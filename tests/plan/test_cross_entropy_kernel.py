# SPDX-License-Identifier: Apache-2.0
"""The fused cross-entropy as the TPU's own compiler takes it, without a TPU."""

import importlib.util

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from gpt2_jax.chips import parse_topology
from gpt2_jax.kernels.tpu_cross_entropy import fused_cross_entropy
from gpt2_jax.plan.compiling import compile_lowered, open_topology
from gpt2_jax.plan.program import arrays
from gpt2_jax.sharding import BATCH, RESIDUAL, make_mesh

if importlib.util.find_spec("libtpu") is None:
  pytest.skip("could not import libtpu", allow_module_level=True)
if jax.__version_info__ < (0, 10):
  pytest.skip("a plan is made with JAX 0.10 or newer", allow_module_level=True)

V, PADDED, D, B, T = 1100, 1152, 320, 2, 300  # blocks each way, and none of them full


def test_float32_logits_are_never_in_hbm():
  """Both kernels compile, and no array in HBM is as large as float32 logits."""
  topology = parse_topology("v5e:1x1")
  mesh = make_mesh(1, 1, 1, devices=open_topology(topology)[:1])

  def shape(sizes, dtype, spec):
    return jax.ShapeDtypeStruct(sizes, dtype, sharding=NamedSharding(mesh, spec))

  def loss(x_BTD, wte_VD, labels_BT):
    return fused_cross_entropy(x_BTD, wte_VD, labels_BT, V).sum()

  with jax.set_mesh(mesh):
    lowered = jax.jit(jax.value_and_grad(loss, (0, 1))).lower(
      shape((B, T, D), jnp.bfloat16, RESIDUAL),
      shape((PADDED, D), jnp.float32, P(("model", "data"), None)),
      shape((B, T), jnp.int32, BATCH),
    )
    scheduled, _ = compile_lowered(lowered, topology, mesh)

  kernels = {x.name for x, _ in scheduled.program.executed() if x.is_kernel}
  assert len(kernels) == 2
  for instruction, _ in scheduled.program.executed():
    if not instruction.shape.startswith("("):
      in_hbm = sum(nbytes for nbytes, is_in_hbm in arrays(instruction.shape) if is_in_hbm)
      assert in_hbm < 4 * PADDED * B * T, instruction.shape
