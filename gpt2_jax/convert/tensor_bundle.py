# SPDX-License-Identifier: Apache-2.0
"""TensorFlow's checkpoint format (TensorBundle): an index of names, and data files; read only.

TensorFlow itself is not needed. PREFIX.index is a table as LevelDB writes it: blocks of sorted
keys and values, an index block that says where they are, and a footer that says where that is.
The value of the empty key is a BundleHeaderProto, that of a variable's name a BundleEntryProto.
PREFIX.data-00000-of-00001 and its siblings hold the tensors' bytes. Every block and every tensor
has a CRC-32C, which is checked before anything in it is used. (tensorflow/core/lib/io/format.cc,
tensorflow/core/protobuf/tensor_bundle.proto)
"""

import dataclasses
import math
import pathlib
import struct
from collections.abc import Iterator

import google_crc32c
import ml_dtypes
import numpy as np

MAGIC = 0xDB4775248B80FB57  # the table's last eight bytes
FOOTER = 48  # two block handles, padded to 40 bytes, and the magic number
TRAILER = 5  # after each block: its compression in one byte, and a CRC-32C of the block and that
MAX_INDEX = 4 * 2**20  # bytes; that of 1.5B with its optimizer has less than 100 KB
MAX_NAME = 4096  # bytes
MAX_RANK = 254  # TensorFlow's own
VERSION = 1  # of the bundle's format, the only one there has been

# By TensorFlow's number of the type, in tensorflow/core/framework/types.proto.
FLOATS = {
  1: np.dtype("<f4"),
  2: np.dtype("<f8"),
  14: np.dtype(ml_dtypes.bfloat16),
  19: np.dtype("<f2"),
}


@dataclasses.dataclass(frozen=True)
class BundleEntry:
  """Where a variable is, and what it is, as BundleEntryProto says it."""

  dtype: int  # TensorFlow's number
  shape: tuple[int, ...]
  shard: int
  offset: int
  size: int
  crc32c: int
  is_partitioned: bool


@dataclasses.dataclass(frozen=True)
class TensorBundle:
  """A checkpoint whose index has been read; `read(name)` maps one tensor of it."""

  prefix: pathlib.Path
  n_shards: int
  entries: dict[str, BundleEntry]

  def data_path(self, shard: int) -> pathlib.Path:
    name = f"{self.prefix.name}.data-{shard:05d}-of-{self.n_shards:05d}"
    return self.prefix.with_name(name)

  def check_entry(self, name: str) -> None:
    """Raises ValueError or OSError unless a variable is a float tensor that its file has room for.

    The values are not looked at.
    """
    entry = self.entries[name]
    if entry.is_partitioned:
      raise ValueError(
        f"{self.prefix} holds {name} in partitions, and only whole variables are read; "
        f"save it again without a partitioner"
      )
    if entry.dtype not in FLOATS:
      raise ValueError(
        f"{name} in {self.prefix} is of TensorFlow's type {entry.dtype}; "
        f"floats of 16, 32 and 64 bits are read"
      )

    expected = math.prod(entry.shape) * FLOATS[entry.dtype].itemsize
    if entry.shard >= self.n_shards or entry.size != expected:
      raise ValueError(
        f"{self.prefix}.index is damaged: it speaks of {entry.size:,} bytes in shard "
        f"{entry.shard} for {name}, which has {expected:,}; fetch it again"
      )
    path = self.data_path(entry.shard)
    if not path.is_file():
      raise FileNotFoundError(f"{path} is not there; the checkpoint is not complete without it")
    if (size := path.stat().st_size) < entry.offset + entry.size:
      raise ValueError(
        f"{path} is damaged: it ends at byte {size:,}, and {name} at byte "
        f"{entry.offset + entry.size:,}; fetch it again"
      )

  def read(self, name: str) -> np.ndarray:
    """Maps a variable's tensor from its file, read-only, after a look at its checksum.

    Raises ValueError or OSError with the file's path if it is not whole.
    """
    self.check_entry(name)
    entry = self.entries[name]
    path = self.data_path(entry.shard)

    # A file of no bytes cannot be mapped.
    content = np.empty(0, np.uint8)
    if entry.size:
      mapped = np.memmap(path, np.uint8, "r", entry.offset, (entry.size,))
      content = mapped.view(np.ndarray)
    if _masked_crc32c(content) != entry.crc32c:
      raise ValueError(f"{path} is damaged: {name} has another checksum; fetch it again")
    return content.view(FLOATS[entry.dtype]).reshape(entry.shape)


def open_bundle(prefix: pathlib.Path) -> TensorBundle:
  """Reads the index of a checkpoint, PREFIX.index.

  Raises ValueError with the path for what is no whole index, and for a bundle that is compressed
  or big-endian; OSError if it cannot be read.
  """
  path = prefix.with_name(prefix.name + ".index")
  if (size := path.stat().st_size) > MAX_INDEX:
    raise ValueError(f"{path} has {size:,} bytes; the index of a checkpoint has a few thousand")
  try:
    values = _read_table(path.read_bytes())
    n_shards = _parse_header(values)
    entries = {}
    for key, value in values.items():
      # Names are UTF-8; the keys of partitions are not, and nobody asks for them.
      entries[key.decode("utf-8", "backslashreplace")] = _parse_entry(value)
  except ValueError as error:
    raise ValueError(f"{path} is no whole TensorFlow checkpoint: {error}") from error
  return TensorBundle(prefix, n_shards, entries)


def _masked_crc32c(content: bytes | np.ndarray) -> int:
  """The CRC-32C of bytes in the form that both kinds of file hold: rotated, and a constant added.

  So a checksum of data that has checksums in it stays a good one.
  """
  crc = google_crc32c.value(content)
  return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


class _Cursor:
  """A position in bytes that nobody vouches for: it reads on, or raises ValueError."""

  def __init__(self, content: bytes):
    self.content = content
    self.position = 0

  @property
  def at_end(self) -> bool:
    return self.position == len(self.content)

  def take(self, size: int) -> bytes:
    """The next `size` bytes."""
    taken = self.content[self.position : self.position + size]
    if len(taken) != size:
      raise ValueError("an entry of it ends too soon; fetch it again")
    self.position += size
    return taken

  def varint(self) -> int:
    """The next integer: seven bits a byte, the lowest first, and a bit that says whether more
    follow."""
    number = 0
    for shift in range(0, 70, 7):
      byte = self.take(1)[0]
      number |= (byte & 127) << shift
      if byte < 128:
        return number
    raise ValueError("a number of it has no end; fetch it again")


def _read_table(content: bytes) -> dict[bytes, bytes]:
  """All keys and values of a table. Raises ValueError with a reason and the way out."""
  # 1. The footer: handles of a block of other metadata, which is empty, and of the index block.
  footer = content[-FOOTER:]
  if len(footer) < FOOTER or int.from_bytes(footer[-8:], "little") != MAGIC:
    raise ValueError("it does not end as one; fetch it again")
  cursor = _Cursor(footer)
  handles = [cursor.varint() for _ in range(4)]
  index_block = _read_block(content, *handles[2:])

  # 2. The data blocks in their order. None may be read twice, and no key may come twice: what is
  #    made up cannot be much larger in memory than on disk.
  values = {}
  block_end = 0
  last_key = None
  for _, handle in _read_entries(index_block):
    cursor = _Cursor(handle)
    offset, size = cursor.varint(), cursor.varint()
    if offset < block_end:
      raise ValueError("its blocks overlap; fetch it again")
    block_end = offset + size + TRAILER

    for key, value in _read_entries(_read_block(content, offset, size)):
      if last_key is not None and key <= last_key:
        raise ValueError("its names are not in order; fetch it again")
      values[key] = value
      last_key = key
  return values


def _read_block(content: bytes, offset: int, size: int) -> bytes:
  """A block's content, if its checksum is right and it is not compressed."""
  cursor = _Cursor(content[offset : offset + size + TRAILER])
  block = cursor.take(size)
  compression = cursor.take(1)
  if _masked_crc32c(block + compression) != int.from_bytes(cursor.take(4), "little"):
    raise ValueError(f"its block at byte {offset:,} has another checksum; fetch it again")
  if compression != b"\0":
    raise ValueError(
      "it is compressed, which is not read; save it again with tf.train.Saver, which does not"
    )
  return block


def _read_entries(block: bytes) -> Iterator[tuple[bytes, bytes]]:
  """The keys and values of a block. A key is stored without the prefix that it shares with the
  one before."""
  # At the end is a list of entries that share nothing, for a binary search, and its length.
  if len(block) < 4:
    raise ValueError("a block of it is too short; fetch it again")
  n_restarts = int.from_bytes(block[-4:], "little")
  end = len(block) - 4 * (n_restarts + 1)
  if end < 0:
    raise ValueError("a block of it is too short; fetch it again")

  cursor = _Cursor(block[:end])
  key = b""
  while not cursor.at_end:
    shared, rest, value_size = cursor.varint(), cursor.varint(), cursor.varint()
    if shared > len(key) or shared + rest > MAX_NAME:
      raise ValueError("a name of it cannot be; fetch it again")
    key = key[:shared] + cursor.take(rest)
    yield key, cursor.take(value_size)


def _parse_header(values: dict[bytes, bytes]) -> int:
  """The number of data files, from BundleHeaderProto, which is taken out of `values`."""
  if b"" not in values:
    raise ValueError("it has no header; fetch it again")
  header = _parse_message(values.pop(b""))

  if _integer(header, 2):
    raise ValueError("it is big-endian, which is not read; save it again on a usual machine")
  versions = _submessages(header, 3)
  if versions and (oldest := _integer(versions[-1], 2)) > VERSION:
    raise ValueError(f"it asks for readers of version {oldest}, and this one is of {VERSION}")
  return _integer(header, 1)


def _parse_entry(content: bytes) -> BundleEntry:
  """A BundleEntryProto."""
  entry = _parse_message(content)
  shapes = _submessages(entry, 2)
  dimensions = _submessages(shapes[-1], 2) if shapes else []
  shape = tuple(_integer(dimension, 1) for dimension in dimensions)
  if len(shape) > MAX_RANK or math.prod(shape) >= 2**63:
    raise ValueError("a shape of it cannot be; fetch it again")
  return BundleEntry(
    dtype=_integer(entry, 1),
    shape=shape,
    shard=_integer(entry, 3),
    offset=_integer(entry, 4),
    size=_integer(entry, 5),
    crc32c=_integer(entry, 6),
    is_partitioned=bool(_submessages(entry, 7)),
  )


def _parse_message(content: bytes) -> dict[int, list[int | bytes]]:
  """The fields of a protobuf message by number: integers, or the bytes of texts and messages."""
  fields = {}
  cursor = _Cursor(content)
  while not cursor.at_end:
    number, wire_type = divmod(cursor.varint(), 8)
    if wire_type == 0:
      value = cursor.varint()
    elif wire_type == 1:
      value = struct.unpack("<Q", cursor.take(8))[0]
    elif wire_type == 2:
      value = cursor.take(cursor.varint())
    elif wire_type == 5:
      value = struct.unpack("<I", cursor.take(4))[0]
    else:
      raise ValueError("an entry of it is no protobuf; fetch it again")
    fields.setdefault(number, []).append(value)
  return fields


def _integer(fields: dict[int, list], number: int) -> int:
  """An integer field; 0 where it is left out, as protobuf leaves every 0 out."""
  integers = [value for value in fields.get(number, []) if isinstance(value, int)]
  return integers[-1] if integers else 0


def _submessages(fields: dict[int, list], number: int) -> list[dict[int, list]]:
  """The messages of a field that may be repeated."""
  contents = [value for value in fields.get(number, []) if isinstance(value, bytes)]
  return [_parse_message(content) for content in contents]
