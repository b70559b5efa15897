# SPDX-License-Identifier: Apache-2.0
"""Options of the compiler: what a knob's text means, and what a compiler does not take."""

import importlib.util
import warnings

import jax
import pytest

from gpt2_jax import compiler_options, files
from gpt2_jax.chips import TPUS, parse_topology
from gpt2_jax.compat import get_mesh
from gpt2_jax.sharding import make_mesh


def test_a_knob_adds_to_the_automatic_options_or_stands_for_all():
  assert compiler_options.parse_options("auto") == (True, {})
  assert compiler_options.parse_options("none") == (False, {})
  own = {"xla_a": True, "xla_b": -3, "xla_c": "ENABLED"}
  assert compiler_options.parse_options("auto, xla_a=true, --xla_b=-3,xla_c=ENABLED") == (True, own)
  assert compiler_options.parse_options("xla_a=true,xla_b=-3,xla_c=ENABLED") == (False, own)


@pytest.mark.parametrize("knob", ["", "yes", "auto,", "auto,none", "a=", "=1", "a=b c", "x=\n1"])
def test_what_is_no_option_is_one_line_with_the_way_out(knob):
  with pytest.raises(ValueError, match="--config.compiler_options to auto, none") as raised:
    compiler_options.parse_options(knob)
  assert "\n" not in str(raised.value) and len(str(raised.value)) < 300


def test_an_unknown_option_is_left_out_with_a_note_and_refused_from_the_user(mesh, capsys):
  files.note.cache_clear()
  with mesh(1, 1, 1):
    known = {"xla_embed_ir_in_executable": True}
    unknown = {"xla_of_another_version": True}
    known_to_compiler = compiler_options._known_to_compiler
    assert known_to_compiler(known | unknown, {}, get_mesh()) == known
    assert "note: this compiler does not know the option xla_of" in capsys.readouterr().err
    for own in (unknown, {"xla_embed_ir_in_executable": "perhaps"}):
      with pytest.raises(ValueError, match=r"does not take xla_\w+=\w+: .*--config.compiler_opt"):
        compiler_options.for_mesh(get_mesh(), f"auto,{next(iter(own))}={own.popitem()[1]}")


def test_other_platforms_have_no_options_of_their_own(mesh):
  with mesh(1, 1, 1):
    assert compiler_options.for_mesh(get_mesh()) == {}
  assert set(compiler_options.BY_GENERATION) <= set(TPUS)


@pytest.mark.skipif(
  importlib.util.find_spec("libtpu") is None or jax.__version_info__ < (0, 10),
  reason="a plan is made with libtpu and JAX 0.10 or newer",
)
@pytest.mark.parametrize("topology", ["v5e:2x2", "v6e:2x2", "v4:2x2x1", "v5p:2x2x1"])
def test_the_tpu_compiler_takes_every_automatic_option(topology, capsys):
  """A name that was mistyped, or is gone in a newer libtpu, would be left out with a note."""
  from gpt2_jax.plan.compiling import open_topology

  files.note.cache_clear()
  devices = open_topology(parse_topology(topology))
  mesh = make_mesh(1, -1, 1, devices=devices)
  options = compiler_options.for_mesh(mesh)
  generation = topology.partition(":")[0]
  expected = compiler_options.BY_GENERATION.get(generation, {})
  assert options == compiler_options.NO_WINDOWED_EINSUM | expected
  assert compiler_options.for_mesh(mesh, "none") == {}

  # Parts of n_embd that fill no whole tile.
  size = mesh.shape["data"]
  whole, part = (compiler_options.for_mesh(mesh, n_embd=rows * size) for rows in (200, 100))
  assert whole == options
  assert part == {k: v for k, v in options.items() if k not in compiler_options.MINOR_SHARDING}
  assert "note:" not in capsys.readouterr().err


@pytest.mark.skipif(
  importlib.util.find_spec("libtpu") is None or jax.__version_info__ < (0, 10),
  reason="a plan is made with libtpu and JAX 0.10 or newer",
)
def test_asking_the_compiler_twice_warns_of_nothing():
  """A compiler without devices writes to JAX's persistent cache, and cannot read it back."""
  from gpt2_jax.plan.compiling import open_topology

  mesh = make_mesh(1, -1, 1, devices=open_topology(parse_topology("v5e:1x1")))
  least = jax.config.jax_persistent_cache_min_compile_time_secs
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
  try:
    with warnings.catch_warnings():
      warnings.simplefilter("error")
      compiler_options.for_mesh(mesh)
      jax.clear_caches()  # those in memory
      compiler_options.for_mesh(mesh)
  finally:
    jax.config.update("jax_persistent_cache_min_compile_time_secs", least)
