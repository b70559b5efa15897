# SPDX-License-Identifier: Apache-2.0
import math
import pathlib
import re
import subprocess
import sys

import pytest

from gpt2_jax import chips
from gpt2_jax.chips import TPUS, parse_accelerator, parse_topology, peak_flops

ROOT = pathlib.Path(__file__).parents[1]


def test_a_topology_by_shape_or_as_it_is_rented():
  assert parse_topology("v5e:8x8") == parse_topology("v5e-64")
  assert parse_topology("v6e-256").shape == (16, 16)
  assert parse_topology("v4:4x4x4").chips == 64
  assert parse_topology("v5e:2x4", slices=3).chips == 24
  assert str(parse_topology("v5e:8x8", 2)) == "2 x v5e:8x8"
  assert parse_topology("v5e:8x8", 2).name == "v5e:8x8"


@pytest.mark.parametrize(
  "name",
  ["v5e", "v5e:8", "v5e:8x8x8", "v4:8x8", "v9:2x2", "v5e-65", "v5e:8xx8", "v5e:0x8", "", "v5e:²x2"],
)
def test_what_is_not_a_topology_is_one_line_with_those_that_are(name):
  with pytest.raises(
    ValueError, match=r"is not a topology: give a generation \(v4, v5e, v5p, v6e\) and a shape"
  ) as raised:
    parse_topology(name)
  assert "\n" not in str(raised.value)


def test_slices_are_at_least_one():
  with pytest.raises(ValueError, match="--slices=0 is below 1"):
    parse_topology("v5e:8x8", 0)


def test_peaks_by_the_device_kind_of_jax():
  assert peak_flops("TPU v5 lite") == 197e12 and peak_flops("NVIDIA H200") == 989e12
  assert peak_flops("cpu") is None


def test_wraparound():
  """An axis of 16 in two dimensions; in three all axes of a slice of whole 4 x 4 x 4 cubes, and
  none of less."""

  def wraps(name, axis):
    return parse_topology(name).wraps_around(axis)

  assert wraps("v5e:16x16", 0) and wraps("v6e:8x16", 1) and wraps("v4:4x4x8", 2)
  assert not wraps("v5e:8x16", 0)
  assert not wraps("v4:2x4x4", 1) and not wraps("v4:4x4x2", 0)


def test_a_default_shape_has_as_many_chips_as_it_is_listed_under():
  for dimensions, shapes in chips.DEFAULT_SHAPES.items():
    for count, shape in shapes.items():
      assert math.prod(shape) == count and len(shape) == dimensions


def test_an_accelerator_type_by_its_name_or_by_its_default_shape():
  assert parse_accelerator("v5e-64") == parse_accelerator("v5litepod-64") == ("v5e", 64)
  assert parse_accelerator("v5e:8x8") == ("v5e", 64)
  assert parse_accelerator("v4-128") == parse_accelerator("v4:4x4x4") == ("v4", 64)
  assert parse_accelerator("v5p-24") == ("v5p", 12)
  assert chips.accelerator_type("v5e", 64) == "v5litepod-64"
  assert chips.accelerator_type("v4", 64) == "v4-128"


def test_hosts_of_a_slice():
  hosts = {"v5e-1": 1, "v5e-4": 1, "v5e-8": 1, "v5e-16": 4, "v6e-8": 1, "v4-8": 1, "v4-16": 2}
  for name, count in hosts.items():
    assert chips.hosts_of_slice(*parse_accelerator(name)) == count


def test_a_script_can_ask_by_path_without_jax():
  """As tpu_vm.sh does: no site packages, and so no JAX, is on the path."""
  command = [sys.executable, "-IS", ROOT / "gpt2_jax" / "chips.py", "accelerator", "v5p:4x4x4"]
  done = subprocess.run(command, capture_output=True, text=True, check=True)
  assert done.stdout == "v5p v5p-128 v2-alpha-tpuv5 64 420 16\n" and done.stderr == ""


def test_the_page_on_launching_quotes_the_prices_of_the_table():
  page = (ROOT / "launch" / "README.md").read_text()
  rows = re.findall(r"^\| (v\w+) \| ([\d.]+) \| `(\S+)` \| (\d+) \| ([\d.]+) \|", page, re.M)
  assert {generation for generation, *_ in rows} == set(TPUS)
  for generation, price, name, count, an_hour in rows:
    assert float(price) == TPUS[generation].usd_per_chip_hour
    assert parse_accelerator(name) == (generation, int(count))
    assert float(an_hour) == pytest.approx(int(count) * float(price))
