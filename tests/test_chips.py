# SPDX-License-Identifier: Apache-2.0
import pytest

from gpt2_jax.chips import peak_flops, topology


def test_a_topology_by_shape_or_as_it_is_rented():
  assert topology("v5e:8x8") == topology("v5e-64") and topology("v6e-256").shape == (16, 16)
  assert topology("v4:4x4x4").chips == 64 and topology("v5e:2x4", slices=3).chips == 24
  assert str(topology("v5e:8x8", 2)) == "2 x v5e:8x8" and topology("v5e:8x8", 2).name == "v5e:8x8"


@pytest.mark.parametrize("name", ["v5e", "v5e:8", "v5e:8x8x8", "v4:8x8", "v9:2x2", "v5e-65", "v5e:8xx8", "v5e:0x8", ""])
def test_what_is_no_topology_is_one_line_with_those_that_are(name):
  with pytest.raises(ValueError, match=r"is none: give a generation \(v4, v5e, v5p, v6e\) and a shape") as raised:
    topology(name)
  assert "\n" not in str(raised.value)


def test_slices_are_at_least_one():
  with pytest.raises(ValueError, match="--slices=0 is below 1"):
    topology("v5e:8x8", 0)


def test_peaks_by_the_name_that_jax_tells():
  assert peak_flops("TPU v5 lite") == 197e12 and peak_flops("NVIDIA H200") == 989e12
  assert peak_flops("cpu") is None


def test_rings():
  """An axis of 16 in two dimensions; in three all axes of a slice of whole 4 x 4 x 4 cubes, and none of less."""
  assert [topology("v5e:16x16").closes(0), topology("v5e:8x16").closes(0), topology("v6e:8x16").closes(1)] == [1, 0, 1]
  assert topology("v4:4x4x8").closes(2) and not topology("v4:2x4x4").closes(1) and not topology("v4:4x4x2").closes(0)
