# SPDX-License-Identifier: Apache-2.0
"""A distillation as the TPU's compiler takes it: bytes and FLOPs of a teacher, and collectives."""

import importlib.util

import jax
import numpy as np
import pytest

from configs import gpt2
from gpt2_jax.chips import parse_topology
from gpt2_jax.convert import pretrained
from gpt2_jax.convert.weights import from_model
from gpt2_jax.model import ModelConfig
from gpt2_jax.plan.compiling import compile_step
from gpt2_jax.plan.estimate import estimate
from gpt2_jax.runs.metrics import flops_per_token

if importlib.util.find_spec("libtpu") is None:
  pytest.skip("could not import libtpu", allow_module_level=True)
if jax.__version_info__ < (0, 10):
  pytest.skip("a plan is made with JAX 0.10 or newer", allow_module_level=True)

TEACHER = ModelConfig(n_vocab=640, n_ctx=128, n_embd=128, n_head=2, n_layer=3)
STUDENT = {"n_vocab": 640, "n_ctx": 128, "n_embd": 128, "n_head": 2, "n_layer": 1}


@pytest.fixture(scope="module")
def compiled(tmp_path_factory, parameters, place, mesh):
  """A step over four chips, whose teacher is a checkpoint of three layers in bfloat16."""
  folder = tmp_path_factory.mktemp("plan") / "teacher"
  with mesh(1, 1, 1):
    pretrained.write(from_model(place(TEACHER, parameters(TEACHER)), None), str(folder), "hf")
  config = gpt2.get_config("117M")
  config.model.update(STUDENT)
  config.distill.update(teacher=str(folder), dtype="bfloat16")
  config.mesh.update(replica=1, data=2, model=2)
  config.update(batch_size=8)
  return compile_step(config, parse_topology("v5e:2x2"))


def test_the_plan_counts_the_teachers_bytes_and_its_forward_flops(compiled):
  """Its matrices are split in four, in two bytes each; the norms and biases are few."""
  matrices = 3 * 12 * 128**2 + 640 * 128
  assert compiled.hbm["teacher"] == pytest.approx(2 * matrices / 4 + 4 * 128 * 128 / 2, rel=0.15)
  model = flops_per_token(ModelConfig(**STUDENT)) + flops_per_token(TEACHER) / 3
  assert estimate(compiled).model_flops == pytest.approx(model * 8 * 128)
  assert all(nbytes >= 0 for nbytes in compiled.hbm.values())


def test_no_collective_moves_the_vocabulary_of_a_token(compiled):
  """Logits of a chip are [4, 128, 320]; what `model` sums of them is [4, 128]."""
  collectives = [compiled.program.collective(x) for x, _ in compiled.program.executed()]
  shapes = [x.shape for x in collectives if x is not None]
  assert shapes
  assert not [s for s in shapes if "128,640]" in s or "128,320]" in s]
  largest = max(c.bytes for c in estimate(compiled).collectives if c.axes == "model")
  assert largest < np.prod([4, 128, 320]) * 2
