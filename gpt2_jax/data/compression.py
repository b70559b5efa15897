# SPDX-License-Identifier: Apache-2.0
"""Compressed files (.gz, .zst, .bz2, .xz) as streams of their content."""

import bz2
import contextlib
import gzip
import io
import lzma
import os
import zlib
from collections.abc import Iterator
from typing import BinaryIO

from gpt2_jax.files import first_line

SUFFIXES = (".gz", ".zst", ".bz2", ".xz")
# How much is read at a time.
CHUNK_BYTES = 1 << 20


def compression_suffix(path: str) -> str:
  """The ending that tells how a file is compressed, such as ".gz"; "" for one that is not."""
  suffix = os.path.splitext(path)[1].lower()
  return suffix if suffix in SUFFIXES else ""


def decompressed_name(path: str) -> str:
  """The name without the ending of its compression: a.jsonl of a.jsonl.gz."""
  return path[: len(path) - len(compression_suffix(path))]


@contextlib.contextmanager
def open_decompressed(path: str) -> Iterator[io.BufferedReader]:
  """Opens a file for its content, decompressed as its name says, however many members it has.

  Reading raises ValueError with the path where a compressed file is truncated or damaged.
  """
  if not compression_suffix(path):
    with open(path, "rb") as file:
      yield file
    return
  with contextlib.closing(_open_compressed(path)) as stream:
    yield io.BufferedReader(_NamedStream(path, stream), CHUNK_BYTES)


def _open_compressed(path: str) -> BinaryIO:
  match compression_suffix(path):
    case ".gz":
      return gzip.open(path)
    case ".bz2":
      return bz2.open(path)
    case ".xz":
      return lzma.open(path)
  # Python has it from 3.14 on. A window of more than 128 MiB is refused: it would be held whole.
  import pyarrow

  return pyarrow.input_stream(path, compression="zstd")


class _NamedStream(io.RawIOBase):
  """A decompressing stream, whose errors name its file and are ValueErrors."""

  def __init__(self, path: str, stream: BinaryIO):
    self._path = path
    self._stream = stream

  def readable(self) -> bool:
    return True

  def readinto(self, buffer: memoryview) -> int:
    try:
      content = self._stream.read(len(buffer))
    except (EOFError, OSError, ValueError, zlib.error, lzma.LZMAError) as error:
      # Each of the libraries has classes of its own, for a file that is cut off, too.
      raise ValueError(
        f"{self._path} cannot be decompressed, it is truncated, damaged or no "
        f"{compression_suffix(self._path)} file ({first_line(error, 120)}); get it again"
      ) from error
    buffer[: len(content)] = content
    return len(content)
