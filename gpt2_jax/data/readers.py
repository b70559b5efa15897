# SPDX-License-Identifier: Apache-2.0
"""Readers of the files that people have: text, JSON lines, JSON lists, Parquet, as documents.

A reader is chosen by a file's name, and for .json by how it begins. Each reads a stream: no file
has to fit into memory, only its largest document.
"""

import contextlib
import dataclasses
import hashlib
import io
import json
import os
from collections.abc import Iterator
from json.decoder import WHITESPACE
from typing import TYPE_CHECKING, ClassVar, Protocol

from gpt2_jax.data.compression import (
  CHUNK_BYTES,
  compression_suffix,
  decompressed_name,
  open_decompressed,
)
from gpt2_jax.data.example_records import plain_record, write_record
from gpt2_jax.data.skipped import BadRecord
from gpt2_jax.files import first_line, parse_json_object, sha256, summarize

if TYPE_CHECKING:
  import pyarrow
  import pyarrow.parquet as pq

# A record is a protocol buffer: less than 2 GiB.
MAX_BYTES = (1 << 31) - 1
# How far into a .json file its first record is looked for.
SNIFF_BYTES = 1 << 24
# The fields of an example: other columns of a table may hold what JSON has not, such as images.
EXAMPLE_FIELDS = ("text", "prompt", "completion", "messages", "label")
# The names of files that hold records. Any other is text.
LINES = (".jsonl", ".ndjson")
RECORDS = (*LINES, ".json", ".parquet")
ARCHIVES = (".tar", ".zip", ".tgz")

Records = Iterator[tuple[int, str | BadRecord]]


class Reader(Protocol):
  """How a file becomes documents."""

  # What the fingerprint of a corpus says of this reading.
  kind: ClassVar[str]

  def digest(self, path: str) -> str | None:
    """SHA-256 of the content; None without any. Raises BadRecord for a file that is skipped."""
    ...

  def records(self, path: str, name: str) -> Records:
    """The documents, numbered; for one that cannot be read, why not, with `name` and its place.

    The number makes the key of a document unique in its file.
    """
    ...


def choose_reader(path: str, text_key: str | None, split_on: str | None) -> Reader:
  """The reader of a file. Raises ValueError for a file without records where `text_key` is None.

  Without a `text_key`, a document is a whole record. `split_on` is what stands between the
  documents of a text.
  """
  suffix = os.path.splitext(decompressed_name(path))[1].lower()
  if suffix in LINES:
    return JsonLines(text_key)
  if suffix == ".parquet":
    return Parquet(text_key)
  if suffix == ".json" and (reader := _json_reader(path, text_key)):
    return reader
  if text_key is None:
    raise ValueError(
      f"{path} holds no examples: they are lines of a .jsonl file, a list in a .json file, or rows "
      "of a .parquet file; text is tokenized with --files"
    )
  return SplitText(split_on.encode()) if split_on else WholeText()


def _json_reader(path: str, text_key: str | None) -> "JsonLines | JsonList | None":
  """The reader of a .json file, by its first record; None for one that is a text like any other.

  It holds records if it is a list that begins with one, or if its first line is one and another
  line follows. A record is an object with a text under `text_key`, or any without one. Without a
  key, a file of neither is read as a list, which says what is wrong with it.
  """

  def is_record(value: object) -> bool:
    return isinstance(value, dict) and (text_key is None or isinstance(value.get(text_key), str))

  with open_decompressed(path) as file:
    head = file.read(SNIFF_BYTES)
  lines = head.lstrip(b"\xef\xbb\xbf \t\r\n").split(b"\n", 1)

  try:
    if not lines[0].startswith(b"["):
      has_more = len(lines) > 1 and lines[1].strip()
      if has_more and is_record(json.loads(lines[0])):
        return JsonLines(text_key)
    text = io.TextIOWrapper(io.BytesIO(head), "utf-8-sig", "ignore")
    if is_record(next(_JsonList(text, path).items(), None)):
      return JsonList(text_key)
  except (ValueError, RecursionError):
    # No JSON, or not to be read as such.
    pass
  return JsonList(None) if text_key is None else None


@dataclasses.dataclass(frozen=True)
class WholeText:
  """A file that is one document."""

  kind: ClassVar[str] = "text"

  def digest(self, path: str) -> str | None:
    content = self._read(path)
    try:
      content.decode("utf-8")
    except UnicodeDecodeError as error:
      raise BadRecord(f"{path} is not UTF-8 at byte {error.start:,}{_hint(path)}") from error
    return sha256(content) if content.strip() else None

  def records(self, path: str, name: str) -> Records:
    yield 0, self._read(path).decode("utf-8")

  def _read(self, path: str) -> bytes:
    if decompressed_name(path).lower().endswith(ARCHIVES) and compression_suffix(path):
      raise BadRecord(f"{path} is an archive; unpack it, and give the files in it")
    with open_decompressed(path) as file:
      content = file.read(MAX_BYTES + 1)
    if len(content) > MAX_BYTES:
      raise ValueError(
        f"{path} has 2 GiB of text or more, a document must have less; split it, or say with "
        "--split_on what stands between its documents"
      )
    return content


def _hint(path: str) -> str:
  """What else a file that is not UTF-8 may be, by its name."""
  if path.lower().endswith((".bin", ".npy")):
    return "; tokens are read with --tokens"
  if path.lower().endswith(ARCHIVES):
    return "; unpack the archive, and give the files in it"
  return ""


@dataclasses.dataclass(frozen=True)
class SplitText:
  """A file of documents with a separator between them, such as <|endoftext|>."""

  kind: ClassVar[str] = "split"
  separator: bytes

  def digest(self, path: str) -> str | None:
    return _hash_content(path)

  def records(self, path: str, name: str) -> Records:
    with open_decompressed(path) as file:
      for number, document in enumerate(split_stream(file, self.separator, path)):
        try:
          # What is blank, such as after the last separator, is no document.
          yield number, document.decode("utf-8") if document.strip() else ""
        except UnicodeDecodeError as error:
          place = f"{name}, document {number + 1:,}"
          yield number, BadRecord(f"{place} is not UTF-8 at byte {error.start:,} of it")


def split_stream(file: io.BufferedReader, separator: bytes, path: str) -> Iterator[bytes]:
  """What stands between the separators of a stream. Raises ValueError for 2 GiB without any."""
  buffer = bytearray()
  searched = 0
  while chunk := file.read(CHUNK_BYTES):
    buffer += chunk
    start = 0
    while (stop := buffer.find(separator, max(start, searched))) >= 0:
      yield bytes(buffer[start:stop])
      start = stop + len(separator)

    # A separator may lie across two chunks: its beginning is looked at again, and no more.
    del buffer[:start]
    searched = max(0, len(buffer) - len(separator) + 1)
    if len(buffer) > MAX_BYTES:
      raise ValueError(
        f"{path} has 2 GiB or more without {separator.decode()[:40]!r}, a document must have less"
      )
  yield bytes(buffer)


@dataclasses.dataclass(frozen=True)
class JsonLines:
  """A file with a JSON object on each line."""

  kind: ClassVar[str] = "lines"
  text_key: str | None

  def digest(self, path: str) -> str | None:
    return _hash_content(path)

  def records(self, path: str, name: str) -> Records:
    # Blank lines are no records. Other lines have a number, even if they hold no text: whoever
    # mends one does not shuffle the others.
    number = 0
    with open_decompressed(path) as file:
      for line_number, line in enumerate(_lines(file, path), 1):
        if not line.strip():
          continue
        place = f"{name}:{line_number}"
        try:
          yield number, record_text(_parse_line(line, place), self.text_key, place)
        except BadRecord as error:
          yield number, error
        number += 1


def _lines(file: io.BufferedReader, path: str) -> Iterator[bytes]:
  """The lines of a file. Raises ValueError for one that does not fit into a record."""
  while line := file.readline(MAX_BYTES):
    if len(line) == MAX_BYTES:
      raise ValueError(f"{path} has a line of 2 GiB or more, a record must have less; split it")
    yield line


def _parse_line(line: bytes, place: str) -> dict:
  try:
    # Some editors begin a file with a byte order mark.
    return parse_json_object(line.decode("utf-8-sig"), place)
  except UnicodeDecodeError as error:
    raise BadRecord(f"{place} is not UTF-8 at byte {error.start:,} of the line") from error
  except ValueError as error:
    raise BadRecord(str(error)) from error


@dataclasses.dataclass(frozen=True)
class JsonList:
  """A file that is one JSON list of objects."""

  kind: ClassVar[str] = "list"
  text_key: str | None

  def digest(self, path: str) -> str | None:
    return _hash_content(path)

  def records(self, path: str, name: str) -> Records:
    with open_decompressed(path) as file:
      items = _JsonList(io.TextIOWrapper(file, "utf-8-sig"), path).items()
      for number, item in enumerate(items):
        place = f"{name}, item {number + 1}"
        try:
          if not isinstance(item, dict):
            kind = type(item).__name__
            raise BadRecord(f"{place} is a {kind}, not an object of names and values")
          yield number, record_text(item, self.text_key, place)
        except BadRecord as error:
          yield number, error


class _JsonList:
  """The items of a JSON list in a text stream, one at a time."""

  # An error so near to the end of what was read may be only that end.
  MARGIN = 20

  def __init__(self, file: io.TextIOBase, path: str):
    self._file = file
    self._path = path
    self._text = ""
    self._at = 0
    self._n_items = 0

  def items(self) -> Iterator[object]:
    """The items. Raises ValueError, with the path and the item, where it is no list."""
    if self._next() != "[":
      raise ValueError(
        f"{self._path} is no list of records; write one JSON object a line into a .jsonl"
      )
    self._at += 1
    if self._next() != "]":
      yield self._item()
      while self._next() == ",":
        self._at += 1
        yield self._item()

    if self._next() != "]":
      raise self._error("a comma or the end of the list is missing")
    self._at += 1
    if self._next():
      raise self._error("something follows the end of the list")

  def _error(self, reason: str) -> ValueError:
    return ValueError(f"{self._path} is no JSON after item {self._n_items:,} of its list: {reason}")

  def _fill(self) -> bool:
    """Reads on, as much as is there already: an item is parsed again a few times only."""
    rest = self._text[self._at :]
    if len(rest) > MAX_BYTES:
      raise self._error("an item of 2 GiB or more, a record must have less")
    try:
      more = self._file.read(max(CHUNK_BYTES, len(rest)))
    except UnicodeDecodeError as error:
      raise self._error("it is not UTF-8") from error
    self._text = rest + more
    self._at = 0
    return bool(more)

  def _next(self) -> str:
    """The next character that is no white space; "" at the end."""
    while True:
      self._at = WHITESPACE.match(self._text, self._at).end()
      if self._at < len(self._text):
        return self._text[self._at]
      if not self._fill():
        return ""

  def _item(self) -> object:
    """The value that begins here."""
    while True:
      # Every value in a list is followed by something. Where nothing is in sight, a number may go
      # on after what was read.
      self._next()
      try:
        item, end = json.JSONDecoder().raw_decode(self._text, self._at)
        if end < len(self._text):
          self._at = end
          self._n_items += 1
          return item
        reason = "it ends within the list"
      except json.JSONDecodeError as error:
        # Its message without its place, which is one in what is in sight.
        reason = error.msg
        is_open = error.msg.startswith("Unterminated string")
        if not is_open and error.pos < len(self._text) - self.MARGIN:
          raise self._error(reason) from error
      except RecursionError as error:
        raise self._error("it is nested too deep") from error
      except ValueError as error:
        # A number of thousands of digits, which Python does not read.
        raise self._error(first_line(error, 100)) from error
      if not self._fill():
        raise self._error(reason)


@dataclasses.dataclass(frozen=True)
class Parquet:
  """A Parquet table: each row is a record, and `text_key` a column."""

  kind: ClassVar[str] = "parquet"
  text_key: str | None

  # Rows that are decoded at a time.
  N_ROWS: ClassVar[int] = 64

  def digest(self, path: str) -> str | None:
    if compression_suffix(path):
      raise BadRecord(f"{path} is a compressed Parquet file; decompress it, for it is no stream")
    with self._errors(path), self._open(path) as table:
      self._columns(table.schema_arrow.names, path)
      n_rows = table.metadata.num_rows
    with open(path, "rb") as file:
      return hashlib.file_digest(file, "sha256").hexdigest() if n_rows else None

  def records(self, path: str, name: str) -> Records:
    number = 0
    with self._errors(path), self._open(path) as table:
      columns = self._columns(table.schema_arrow.names, path)
      # One thread and buffered reads: a few pages of the columns are in memory, and no row group.
      for batch in table.iter_batches(self.N_ROWS, columns=columns, use_threads=False):
        for row in range(batch.num_rows):
          place = f"{name}, row {number + 1:,}"
          try:
            yield number, record_text(self._row(batch, row, place), self.text_key, place)
          except BadRecord as error:
            yield number, error
          except TypeError as error:
            yield number, BadRecord(f"{place} cannot be written as JSON: {first_line(error, 80)}")
          number += 1

  @staticmethod
  def _open(path: str) -> "pq.ParquetFile":
    import pyarrow.parquet as pq

    return pq.ParquetFile(
      path, buffer_size=CHUNK_BYTES, pre_buffer=False, page_checksum_verification=True
    )

  @staticmethod
  @contextlib.contextmanager
  def _errors(path: str) -> Iterator[None]:
    try:
      yield
    except BadRecord:
      raise
    except (OSError, ValueError, NotImplementedError) as error:
      # Arrow's own classes are among these.
      raise ValueError(
        f"{path} cannot be read as Parquet, it is truncated, damaged or none "
        f"({first_line(error, 200)}); get it again"
      ) from error

  def _columns(self, names: list[str], path: str) -> list[str]:
    """The columns that are read. Raises BadRecord if there is none."""
    wanted = EXAMPLE_FIELDS if self.text_key is None else (self.text_key,)
    columns = [name for name in wanted if name in names]
    if not columns:
      raise BadRecord(
        f"{path} has no column {summarize(wanted, each=40)} (of "
        f"{summarize(names, limit=8, each=30) or 'none'})"
        + ("; see --text_key" if self.text_key is not None else "")
      )
    return columns

  def _row(self, batch: "pyarrow.RecordBatch", row: int, place: str) -> dict:
    try:
      record = {name: batch.column(name)[row].as_py() for name in batch.schema.names}
      record = plain_record(record)
    except UnicodeDecodeError as error:
      raise BadRecord(f"{place} is not UTF-8 at byte {error.start:,} of it") from error
    if self.text_key is not None:
      return record

    # A table has every column in each row: a field that is null is none of this example's.
    return {name: value for name, value in record.items() if value is not None}


def record_text(record: dict, text_key: str | None, place: str) -> str:
  """The text of a record, or all of it as one. Raises BadRecord; `place` names it in errors."""
  if text_key is None:
    return write_record(record, place)
  text = record.get(text_key)
  if not isinstance(text, str):
    keys = summarize(record, limit=5, each=30) or "no key"
    kind = f"{type(text).__name__} under" if text_key in record else "no text under"
    raise BadRecord(f"{place} has {kind} {text_key!r} (of {keys}); see --text_key")
  try:
    text.encode("utf-8")
  except UnicodeEncodeError as error:
    raise BadRecord(f"{place} has a lone surrogate in its text: no UTF-8 writes it") from error
  return text


def _hash_content(path: str) -> str | None:
  """SHA-256 of a file's content, decompressed; None if all of it is white space."""
  digest = hashlib.sha256()
  has_text = False
  with open_decompressed(path) as file:
    while chunk := file.read(CHUNK_BYTES):
      digest.update(chunk)
      has_text = has_text or bool(chunk.strip())
  return digest.hexdigest() if has_text else None
