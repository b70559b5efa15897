# SPDX-License-Identifier: Apache-2.0
import os
import pathlib
import pickle
import zipfile

import pytest

from gpt2_jax.convert.safe_load import PlainObject, read_plain_pickle, read_torch


@pytest.mark.parametrize("value", [{"a": [1, 2.5, "x", None, (True, b"y")]}, {0: "a"}, []])
def test_plain_pickles_are_read(value, tmp_path):
  for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
    (tmp_path / "x.pkl").write_bytes(pickle.dumps(value, protocol))
    try:
      assert read_plain_pickle(tmp_path / "x.pkl") == value
    except ValueError:
      assert protocol < 3 and "b'y'" in str(value), "bytes, which old protocols made by a call"


@pytest.mark.parametrize(
  "value", [print, pathlib.Path("a"), {1, 2, print}, os.system, {"itos": os.getcwd}]
)
def test_other_pickles_are_refused(value, tmp_path):
  (tmp_path / "x.pkl").write_bytes(pickle.dumps(value))
  with pytest.raises(ValueError, match="more than plain values, or damaged") as error:
    read_plain_pickle(tmp_path / "x.pkl")
  assert "\n" not in str(error.value)


@pytest.mark.parametrize(
  "content", [b"", b"\x80", b"junk", b"P0\n.", b"\x80\x04]\x94K\x01", b"cos\nsystem\n."], ids=ascii
)
def test_a_damaged_pickle_is_one_line(content, tmp_path):
  (tmp_path / "x.pkl").write_bytes(content)
  with pytest.raises(
    ValueError, match="x.pkl is refused: more than plain values, or damaged"
  ) as error:
    read_plain_pickle(tmp_path / "x.pkl")
  assert "\n" not in str(error.value)


def test_code_in_a_pickle_is_not_run(payload, tmp_path):
  for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
    (tmp_path / "x.pkl").write_bytes(pickle.dumps({"itos": payload}, protocol))
    with pytest.raises(ValueError, match="is refused"):
      read_plain_pickle(tmp_path / "x.pkl")


def torch_zip(path, compression=zipfile.ZIP_STORED, **extra):
  """A file of torch.save, its members packed anew; `extra` are members more, by name."""
  torch = pytest.importorskip("torch")
  tensors = {"a": torch.arange(5000.0), "b": torch.full((3, 100), 0.5)}
  torch.save(tensors, path)
  if compression == zipfile.ZIP_STORED and not extra:
    return tensors

  with zipfile.ZipFile(path) as archive:
    contents = {member.filename: archive.read(member) for member in archive.infolist()}
  folder = next(iter(contents)).split("/")[0]
  contents |= {f"{folder}/{name}": content for name, content in extra.items()}
  with zipfile.ZipFile(path, "w", compression) as archive:
    for name, content in contents.items():
      archive.writestr(name, content)
  return tensors


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_a_compressed_torch_file_holds_the_same_tensors(compression, tmp_path):
  """Mapped, the compressed bytes would be taken for numbers."""
  expected = torch_zip(tmp_path / "x.pt", compression)
  tensors = read_torch(tmp_path / "x.pt")
  assert tensors.keys() == expected.keys()
  assert all(tensors[name].equal(expected[name]) for name in expected)


def test_a_compression_that_torch_does_not_know_is_refused(tmp_path):
  for compression in (zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA):
    torch_zip(tmp_path / "x.pt", compression)
    with pytest.raises(ValueError, match="cannot be read; it is damaged or no torch file"):
      read_torch(tmp_path / "x.pt")


def test_every_flipped_byte_of_a_tensor_is_found(tmp_path):
  """A torch file has a CRC of every tensor, at which torch does not look."""
  torch_zip(tmp_path / "x.pt")
  whole = (tmp_path / "x.pt").read_bytes()
  with zipfile.ZipFile(tmp_path / "x.pt") as archive:
    member = max(archive.infolist(), key=lambda member: member.file_size)
  first = whole.index(b"\0\0\x80\x3f\0\0\0\x40", member.header_offset)
  for at in range(first, first + member.file_size - 8, 1009):
    mutant = bytearray(whole)
    mutant[at] ^= 1
    (tmp_path / "x.pt").write_bytes(mutant)
    with pytest.raises(ValueError, match="x.pt cannot be read; .*Bad CRC-32.*; fetch it again"):
      read_torch(tmp_path / "x.pt")


def test_a_torch_file_without_crcs_is_read(tmp_path):
  """As torch writes them when it is told to: 0 for every member."""
  torch = pytest.importorskip("torch")
  torch.serialization.set_crc32_options(False)
  try:
    expected = torch_zip(tmp_path / "x.pt")
  finally:
    torch.serialization.set_crc32_options(True)
  with zipfile.ZipFile(tmp_path / "x.pt") as archive:
    assert not any(member.CRC for member in archive.infolist())
  assert read_torch(tmp_path / "x.pt")["a"].equal(expected["a"])


def test_a_zip_made_to_fill_the_memory_is_refused(tmp_path):
  torch_zip(tmp_path / "x.pt", zipfile.ZIP_DEFLATED, bomb=bytes(1 << 24))
  with pytest.raises(ValueError, match=r"expands to 16,\d+,\d+ bytes, over 10 times its size"):
    read_torch(tmp_path / "x.pt")


def test_a_zip_with_two_members_of_one_name_is_refused(tmp_path):
  """torch looks names up without regard to case: which of the two was checked?"""
  torch_zip(tmp_path / "x.pt", **{"DATA/0": b"other"})
  with pytest.raises(ValueError, match="two members have one name"):
    read_torch(tmp_path / "x.pt")


def opcodes(value) -> bytes:
  """A value's pickle as part of another one, in torch's protocol."""
  return pickle.dumps(value, 2)[2:-1]


def call(module: str, name: str, *args) -> bytes:
  """The opcodes of a call to `name` of `module`, neither of which need be there."""
  return f"c{module}\n{name}\n".encode() + opcodes(args) + b"R"


def torch_file(path, content: bytes) -> None:
  """A file of torch.save with another pickle in it."""
  torch = pytest.importorskip("torch")
  torch.save({}, path)
  with zipfile.ZipFile(path) as archive:
    members = {member.filename: archive.read(member) for member in archive.infolist()}
  with zipfile.ZipFile(path, "w") as archive:
    for name, old in members.items():
      archive.writestr(name, content if name.endswith("data.pkl") else old)


PLAIN = [  # what checkpoints hold beside their tensors, and nothing of it is imported
  ("argparse", "Namespace"),
  ("numpy.core.multiarray", "scalar"),
  ("numpy._core.multiarray", "scalar"),
  ("pathlib", "PosixPath"),
  ("__main__", "GPTConfig"),
  ("a_module_that_is_nowhere.model", "ModelArgs"),
]


@pytest.mark.parametrize("name", PLAIN, ids=".".join)
def test_settings_are_read_without_their_classes(name, tmp_path):
  """An object's fields, if it has any; its class is never looked up."""
  made = call(*name, 1, "a")
  torch_file(tmp_path / "x.pt", b"\x80\x02" + made + opcodes({"n_layer": 2}) + b"b.")
  found = read_torch(tmp_path / "x.pt")
  assert isinstance(found, PlainObject) and found.fields == {"n_layer": 2}


@pytest.mark.parametrize(
  "name",
  [
    *(("posix", "system"), ("os", "Config"), ("builtins", "eval"), ("builtins", "exec")),
    *(("subprocess", "Popen"), ("numpy", "load"), ("numpy.core.multiarray", "fromfile")),
    *(("pickle", "loads"), ("argparse", "FileType"), ("pathlib", "os"), ("", "Config")),
    *(("torch.hub", "load"), ("transformers.trainer_utils", "IntervalStrategy")),
  ],
  ids=".".join,
)
def test_other_names_are_refused(name, tmp_path):
  torch_file(tmp_path / "x.pt", b"\x80\x02" + call(*name, "a") + b".")
  with pytest.raises(ValueError, match="x.pt (is refused|cannot be read)") as error:
    read_torch(tmp_path / "x.pt")
  assert "\n" not in str(error.value) and len(str(error.value)) < 600


def test_settings_are_no_places_to_write(tmp_path):
  """A pickle may set entries of what it makes, and put it where a tensor belongs."""
  made = call("argparse", "Namespace")
  for opcode in (b"K\1K\2s", b"(K\1K\2u", b"K\1a"):
    torch_file(tmp_path / "x.pt", b"\x80\x02" + made + opcode + b".")
    with pytest.raises(ValueError, match="x.pt (is refused|cannot be read)"):
      read_torch(tmp_path / "x.pt")
