# SPDX-License-Identifier: Apache-2.0
import json
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from gpt2_jax.compat import get_mesh
from gpt2_jax.sharding import (
  AXES,
  abstract_mesh,
  axis_size,
  check_divides,
  concrete,
  make_mesh,
  padded,
)


@pytest.mark.parametrize(
  "asked, made", [((1, -1, 1), (1, 8, 1)), ((2, 2, -1), (2, 2, 2)), ((1, 1, 8), (1, 1, 8))]
)
def test_make_mesh_has_three_explicit_axes(asked, made):
  mesh = make_mesh(*asked)
  assert tuple(mesh.shape.items()) == tuple(zip(AXES, made, strict=True))
  assert set(mesh.axis_types) == {AxisType.Explicit}
  assert make_mesh(devices=jax.devices()[:1]).shape == dict(zip(AXES, (1, 1, 1), strict=True))


@pytest.mark.parametrize(
  "asked, rule",
  [
    ((1, 3, 1), r"\(1, 3, 1\) does not multiply to the 8 devices"),
    ((1, 16, 1), "does not multiply to the 8 devices"),
    ((3, -1, 1), "does not multiply to the 8 devices"),
    ((16, -1, 1), "does not multiply to the 8 devices"),
    ((1, -1, -1), "at most one is -1"),
    ((0, 8, 1), "sizes are 1 or more"),
    ((1, -2, 1), "sizes are 1 or more"),
  ],
)
def test_make_mesh_refuses_with_the_rule(asked, rule):
  with pytest.raises(ValueError, match=rule):
    make_mesh(*asked)


@pytest.fixture(scope="module")
def slices():
  """Two slices of eight v5e chips, from libtpu's compile-only client; no TPU is needed."""
  pytest.importorskip("libtpu")
  script = pathlib.Path(__file__).parent / "tpu_slices.py"
  found = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=120)
  assert found.returncode == 0, found.stderr
  return json.loads(found.stdout)


def test_replica_runs_over_the_slices_and_nothing_else_does(slices):
  for sizes in ("2 8 1", "2 2 4", "4 4 1"):
    made, of_slices = slices[sizes]
    assert made == [int(size) for size in sizes.split()]
    for replica, its_slices in enumerate(of_slices):
      assert set(its_slices) == {replica * 2 // made[0]}
  assert slices["one"] == [1, 4, 2]


def test_a_mesh_that_would_cross_slices_elsewhere_is_refused(slices):
  for sizes in ("1 16 1", "1 2 8"):
    assert (
      "over 2 slices: only replica may cross slices" in slices[sizes]
      and "replica=2" in slices[sizes]
    )


def test_axis_size_follows_the_mesh_in_force():
  with jax.sharding.use_abstract_mesh(abstract_mesh(2, 16, 4)):
    assert axis_size("model") == 4
    assert axis_size("replica", "data") == 32
    assert axis_size("absent", "model") == 4


def test_check_divides():
  with jax.sharding.use_abstract_mesh(abstract_mesh(2, 4, 1)):
    check_divides(16, "a batch", "replica", "data", way_out="change it")
    with pytest.raises(
      ValueError, match="a batch of 12 does not divide by the replica x data axes of 8; change it"
    ):
      check_divides(12, "a batch", "replica", "data", way_out="change it")


def test_padded_is_the_next_multiple():
  for size in range(1, 40):
    for multiple in range(1, 10):
      least = min(n for n in range(size, size + multiple) if n % multiple == 0)
      assert padded(size, multiple) == least


def test_concrete_puts_abstract_shardings_on_devices(mesh):
  with mesh(2, 2, 2):
    spec = P("data", "model")
    abstract = jax.eval_shape(lambda: {"w": jnp.zeros((4, 6), jnp.bfloat16, out_sharding=spec)})
    leaf = concrete(abstract, get_mesh())["w"]
    assert leaf.sharding == NamedSharding(get_mesh(), spec)
    assert (leaf.shape, leaf.dtype) == ((4, 6), jnp.bfloat16)
    assert jax.device_put(jnp.ones((4, 6)), leaf.sharding).addressable_shards[0].data.shape == (
      2,
      3,
    )
