# SPDX-License-Identifier: Apache-2.0
"""Writes TensorFlow's checkpoints (TensorBundle) without TensorFlow, which this project only reads.

TensorFlow itself reads what this writes: test_tensorflow_reads_and_writes_the_same_tensors.
"""

import pathlib
from collections.abc import Mapping

import google_crc32c
import ml_dtypes
import numpy as np

DTYPES = {"float32": 1, "float64": 2, "int64": 9, "bfloat16": 14, "float16": 19}
RESTART_INTERVAL = 16  # entries from one whole key to the next
HANDLES = 40
MAGIC = 0xDB4775248B80FB57


def varint(number: int) -> bytes:
  encoded = b""
  while number > 127:
    encoded += bytes([number & 127 | 128])
    number >>= 7
  return encoded + bytes([number])


def field(number: int, value: int | bytes) -> bytes:
  """A field of a protobuf message: an integer, a text or a message."""
  if isinstance(value, int):
    return varint(number << 3) + varint(value)
  return varint(number << 3 | 2) + varint(len(value)) + value


def masked_crc32c(content: bytes) -> bytes:
  crc = google_crc32c.value(content)
  return ((crc >> 15 | crc << 17) + 0xA282EAD8 & 0xFFFFFFFF).to_bytes(4, "little")


def entry(tensor: np.ndarray, offset: int, shard: int = 0, more: bytes = b"") -> bytes:
  """A BundleEntryProto."""
  content = tensor.tobytes()
  shape = b"".join(field(2, field(1, size)) for size in tensor.shape)
  return (
    field(1, DTYPES[tensor.dtype.name])
    + field(2, shape)
    + field(3, shard)
    + field(4, offset)
    + field(5, len(content))
    + varint(6 << 3 | 5)
    + masked_crc32c(content)
    + more
  )


def block(entries: list[tuple[bytes, bytes]]) -> bytes:
  """Keys without the prefix that they share with the one before, values, and the restarts."""
  content, restarts, last = b"", [], b""
  for n, (key, value) in enumerate(entries):
    shared = 0
    if n % RESTART_INTERVAL == 0:
      restarts.append(len(content))
    else:
      while shared < min(len(key), len(last)) and key[shared] == last[shared]:
        shared += 1
    content += varint(shared) + varint(len(key) - shared) + varint(len(value))
    content += key[shared:] + value
    last = key
  return content + np.array([*(restarts or [0]), len(restarts) or 1], "<u4").tobytes()


def write_index(
  path: pathlib.Path, values: Mapping[bytes, bytes], in_block: int = 20, compression: int = 0
) -> None:
  """A table of the values, `in_block` a block, in the order that they come in."""
  file = b""

  def add(content: bytes) -> bytes:
    nonlocal file
    handle = varint(len(file)) + varint(len(content))
    content += bytes([compression])
    file += content + masked_crc32c(content)
    return handle

  entries = list(values.items())
  index = []
  for start in range(0, len(entries), in_block):
    part = entries[start : start + in_block]
    index.append((part[-1][0] + b"\0", add(block(part))))
  handles = add(block([])) + add(block(index))
  path.write_bytes(file + handles.ljust(HANDLES, b"\0") + MAGIC.to_bytes(8, "little"))


def write_bundle(
  prefix: pathlib.Path,
  tensors: Mapping[str, np.ndarray],
  shards: int = 1,
  header: bytes = field(3, field(1, 1)),
  more: bytes = b"",
  **index,
) -> None:
  """A checkpoint of the tensors, in turn in each of its data files.

  `header` and `more` are further fields of the header (the version) and of every entry; `index`
  goes to `write_index`.
  """
  contents = [b""] * shards
  values = {b"": field(1, shards) + header}
  for n, name in enumerate(sorted(tensors)):
    tensor, shard = np.asarray(tensors[name]), n % shards
    values[name.encode()] = entry(tensor, len(contents[shard]), shard, more)
    contents[shard] += tensor.tobytes()

  write_index(prefix.with_name(prefix.name + ".index"), values, **index)
  for shard, content in enumerate(contents):
    prefix.with_name(f"{prefix.name}.data-{shard:05d}-of-{shards:05d}").write_bytes(content)


def examples() -> dict[str, np.ndarray]:
  """A tensor of each type that is read, and of odd shapes; 60 names that share prefixes."""
  rng = np.random.default_rng(0)
  tensors = {
    "scalar": np.float32(3.5),
    "empty": np.zeros((0, 3), np.float32),
    "a/double": rng.normal(size=(2, 3)),
    "a/half": rng.normal(size=5).astype(np.float16),
    "a/brain": rng.normal(size=(3, 1, 2)).astype(ml_dtypes.bfloat16),
    "ü": rng.normal(size=7).astype(np.float32),
  }
  for n in range(60):
    tensors[f"model/h{n}/w"] = rng.normal(size=(1, 2, 3)).astype(np.float32)
  return tensors
