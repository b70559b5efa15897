# SPDX-License-Identifier: Apache-2.0
"""What differs between versions of JAX, and of TFDS's dependencies, is the same thing in each."""

import pathlib
import re
import subprocess
import sys

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from gpt2_jax.compat import bernoulli, categorical, device_platform, get_mesh, uniform
from gpt2_jax.plan.compiling import check_installed
from gpt2_jax.sharding import ROWS, make_mesh

ROOT = pathlib.Path(__file__).parents[1]


def test_get_mesh_is_the_mesh_in_force():
  outer, inner = make_mesh(2, 2, 2), make_mesh(1, 2, 1, devices=jax.devices()[:2])
  with jax.set_mesh(outer):
    assert get_mesh() == outer
    with jax.set_mesh(inner):
      assert get_mesh() == inner != outer
    assert get_mesh() == outer
  assert get_mesh().empty


def test_the_platform_is_that_of_the_devices(mesh):
  with mesh(1, 2, 1):
    device = jax.sharding.get_abstract_mesh().abstract_device
    assert device_platform(device) == jax.devices()[0].platform == "cpu"


@pytest.mark.parametrize("spec", [P("data", "model"), P(("replica", "data"), None)], ids=str)
def test_bernoulli_draws_the_same_bits_on_every_mesh(mesh, spec):
  shape = (8, 6)
  alone = np.asarray(jax.random.bernoulli(jax.random.key(7), 0.7, shape))
  with mesh(2, 2, 2):
    keep = jax.jit(lambda key: bernoulli(key, 0.7, shape, spec))(jax.random.key(7))
    assert keep.sharding.spec == spec
    assert np.array_equal(keep, alone) and 0 < alone.mean() < 1


@pytest.mark.parametrize("sizes", [(1, 1, 1), (2, 2, 2)], ids=str)
def test_rows_of_a_mesh_draw_what_each_draws_alone(mesh, put, sizes):
  logits_BV = np.random.default_rng(0).normal(size=(8, 16)).astype(np.float32)
  keys_B = jax.random.key_data(jax.random.split(jax.random.key(3), 8))

  def draw(key, logits_V):
    key = jax.random.wrap_key_data(key)
    return categorical(key, logits_V), uniform(key, (5,))

  alone = []
  for n in range(8):
    key = jax.random.wrap_key_data(keys_B[n])
    alone.append((jax.random.categorical(key, logits_BV[n]), jax.random.uniform(key, (5,))))
  token_B, uniform_BN = map(np.stack, zip(*alone, strict=True))
  with mesh(*sizes):
    drawn = jax.jit(jax.vmap(draw))(put(keys_B, P(ROWS)), put(logits_BV, P(ROWS)))
  assert np.array_equal(drawn[0], token_B) and np.array_equal(drawn[1], uniform_BN)


def test_versions_of_jax_are_told_apart_in_compat_alone():
  """An attribute that JAX 0.7.2 has not, used beside compat.py, breaks the package there."""
  new = re.compile(
    r"sharding\.get_mesh|random\.(categorical|uniform)\((?!.*out_sharding)|bernoulli\(.*out_sharding|abstract_device\.platform|__version_info__"
    r"|\.set_value\("
  )
  sources = [*ROOT.glob("gpt2_jax/**/*.py"), *ROOT.glob("experiments/*.ipynb")]
  for path in sources:
    if path.name != "compat.py":
      assert not new.search(path.read_text("utf-8")), path


def test_a_plan_is_refused_in_one_line_before_it_starts(monkeypatch):
  monkeypatch.setattr(jax, "__version_info__", (0, 7, 2))
  with pytest.raises(ValueError, match="a plan is made with JAX 0.10 or newer") as refused:
    check_installed()
  assert "\n" not in str(refused.value) and "jax[tpu]>=" in str(refused.value)


def test_tfds_is_imported_with_a_protobuf_older_than_its_messages():
  """As in Colab; protobuf's check of versions is in force again afterwards."""
  script = """
import os
from google.protobuf import runtime_version
runtime_version.MAJOR, runtime_version.MINOR = 5, 29
from gpt2_jax.data.import_tfds import import_tfds
assert import_tfds().core.GeneratorBasedBuilder
assert not [name for name in os.environ if "PROTOBUF_VERSION" in name]
try:
  runtime_version.ValidateProtobufRuntimeVersion(runtime_version.DOMAIN, 6, 31, 1, "", "x.proto")
except runtime_version.VersionError:
  print("checked")
"""
  answer = subprocess.run(
    [sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, timeout=120
  )
  assert answer.stdout == "checked\n", answer.stderr
