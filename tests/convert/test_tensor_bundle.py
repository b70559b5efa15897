# SPDX-License-Identifier: Apache-2.0
import importlib.machinery
import pathlib
import random
import subprocess
import sys

import numpy as np
import pytest

from gpt2_jax.convert.tensor_bundle import open_bundle
from tests.convert.tensor_bundles import examples, field, write_bundle, write_index

# In a process of its own: TensorFlow next to torch's triton crashes.
TENSORFLOW = """
import sys
import tensorflow as tf
from tests.convert.tensor_bundles import examples

source, folder = sys.argv[1:]
reader = tf.train.load_checkpoint(source)
tensors = examples()
assert set(reader.get_variable_to_shape_map()) == set(tensors)
for name, tensor in tensors.items():
  stored = reader.get_tensor(name)
  assert stored.dtype == tensor.dtype and stored.shape == tensor.shape
  assert stored.tobytes() == tensor.tobytes()

names = sorted(tensors)
for part, start in (("one", 0), ("two", 1)):
  mine = names[start::2]
  tf.raw_ops.SaveV2(prefix=f"{folder}/{part}", tensor_names=mine, shape_and_slices=[""] * len(mine),
    tensors=[tensors[name] for name in mine])
tf.raw_ops.MergeV2Checkpoints(checkpoint_prefixes=[f"{folder}/one", f"{folder}/two"],
  destination_prefix=f"{folder}/both")
"""


@pytest.fixture
def refuses():
  """refuses(prefix, message, name=None): opening, or reading `name`, raises one line with it."""

  def check(prefix, message, name=None):
    with pytest.raises((ValueError, OSError), match=message) as error:
      bundle = open_bundle(prefix)
      bundle.read(name)
    assert "\n" not in str(error.value) and len(str(error.value)) < 600

  return check


def check_equal(bundle, tensors) -> None:
  assert set(bundle.entries) == set(tensors)
  for name, tensor in tensors.items():
    stored = bundle.read(name)
    assert stored.dtype == tensor.dtype and stored.shape == tensor.shape
    assert stored.tobytes() == tensor.tobytes()


@pytest.mark.skipif(
  importlib.machinery.PathFinder.find_spec("tensorflow") is None,
  reason="could not import tensorflow",
)
def test_tensorflow_reads_and_writes_the_same_tensors(tmp_path):
  """Ours are TensorFlow's, and TensorFlow's ours: every float type, several blocks and shards."""
  write_bundle(tmp_path / "ours", examples(), shards=3)
  command = [sys.executable, "-c", TENSORFLOW, str(tmp_path / "ours"), str(tmp_path)]
  root = pathlib.Path(__file__).parents[2]
  process = subprocess.run(command, cwd=root, capture_output=True, text=True)
  assert process.returncode == 0, process.stderr[-2000:]
  bundle = open_bundle(tmp_path / "both")
  assert bundle.n_shards == 2
  check_equal(bundle, examples())


@pytest.mark.parametrize(("shards", "in_block"), [(1, 1000), (1, 1), (4, 20)])
def test_what_is_written_is_read(shards, in_block, tmp_path):
  write_bundle(tmp_path / "model.ckpt", examples(), shards, in_block=in_block)
  check_equal(open_bundle(tmp_path / "model.ckpt"), examples())


def test_tensors_are_mapped(tmp_path):
  """Nothing is held in memory but what is being used."""
  write_bundle(tmp_path / "x", {"x": np.ones(1000, np.float32)})
  base = open_bundle(tmp_path / "x").read("x")
  assert not base.flags.writeable
  while not isinstance(base, np.memmap):
    base = base.base


@pytest.mark.parametrize("suffix", ["index", "data-00000-of-00001"])
def test_every_damage_is_found_or_harmless(suffix, tmp_path):
  """Each byte changed, each length cut: ValueError, or every tensor as it was."""
  tensors = {name: examples()[name] for name in ("a/brain", "a/double", "empty", "model/h1/w")}
  prefix = tmp_path / "model.ckpt"
  write_bundle(prefix, tensors)
  path = tmp_path / f"model.ckpt.{suffix}"
  whole = path.read_bytes()
  rng = random.Random(0)
  mutants = [whole[:size] for size in range(len(whole))]
  for at in range(len(whole)):
    changed = bytes([whole[at] ^ rng.randrange(1, 256)])
    mutants.append(whole[:at] + changed + whole[at + 1 :])
    mutants.append(whole[:at] + rng.randbytes(rng.randrange(1, 9)) + whole[at:])

  refused = 0
  for mutant in mutants:
    path.write_bytes(mutant)
    try:
      check_equal(open_bundle(prefix), tensors)
    except ValueError as error:
      refused += 1
      assert str(path) in str(error) and "fetch it again" in str(error)
  assert refused > 0.8 * len(mutants)


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    ({"compression": 1}, "it is compressed, which is not read; save it again"),
    ({"header": field(2, 1)}, "it is big-endian, which is not read; save it again"),
    ({"header": field(3, field(2, 7))}, "it asks for readers of version 7, and this one is of 1"),
    ({"more": field(7, b"")}, "holds x in partitions, and only whole variables are read"),
    ({"more": field(1, 9)}, "x in .* is of TensorFlow's type 9; floats of 16, 32 and 64 bits"),
    ({"more": field(3, 5)}, "speaks of 24 bytes in shard 5 for x, which has 24; fetch it again"),
    ({"more": field(5, 25)}, "speaks of 25 bytes in shard 0 for x, which has 24"),
    ({"more": field(2, field(2, field(1, 2**62)))}, "which has 18,446,744,073,709,551,616"),
    (
      {"more": field(2, field(2, field(1, 2**62)) * 300)},
      "a shape of it cannot be; fetch it again",
    ),
    ({"more": field(4, 2**63)}, "ends at byte 24, and x at byte 9,223,372,036,854,775,832"),
    ({"more": b"\xff" * 12}, "a number of it has no end"),
    ({"more": b"\x0b"}, "an entry of it is no protobuf"),
    ({"more": field(6, b"")[:1] + b"\x7f"}, "an entry of it ends too soon"),
  ],
)
def test_what_cannot_be_read_is_one_line(fields, message, tmp_path, refuses):
  """Its checksums are right: these are other bundles, or made up."""
  write_bundle(tmp_path / "x", {"x": np.ones(6, np.float32)}, **fields)
  refuses(tmp_path / "x", message, "x")


def test_made_up_tables_are_one_line(tmp_path, refuses):
  """With right checksums, too: no header, names that come twice, too long, or in no order."""
  path = tmp_path / "x.index"
  header = {b"": field(1, 1)}
  for values, message in (
    ({}, "it has no header"),
    ({b"a": b""}, "it has no header"),
    (header | {b"b": b"", b"a": b""}, "its names are not in order"),
    (header | {b"a" * 5000: b""}, "a name of it cannot be"),
  ):
    write_index(path, values)
    refuses(tmp_path / "x", message)
    write_index(path, values, in_block=1)
    refuses(tmp_path / "x", message)
  path.write_bytes(bytes(5 * 2**20))
  refuses(tmp_path / "x", "has 5,242,880 bytes; the index of a checkpoint has a few thousand")


def test_missing_files_are_named(tmp_path, refuses):
  write_bundle(tmp_path / "x", {"a": np.ones(2, np.float32), "b": np.ones(2, np.float32)}, 2)
  (tmp_path / "x.data-00001-of-00002").unlink()
  assert open_bundle(tmp_path / "x").read("a").tolist() == [1, 1]
  refuses(tmp_path / "x", "x.data-00001-of-00002 is not there; the checkpoint is not complete", "b")
  (tmp_path / "x.index").unlink()
  refuses(tmp_path / "x", "x.index")
