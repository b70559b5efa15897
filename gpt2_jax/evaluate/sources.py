# SPDX-License-Identifier: Apache-2.0
"""Dataset sources of evaluation: published files, or TFDS; both give the same rows."""

import csv
import dataclasses
import functools
import hashlib
import json
import pathlib
import re
import urllib.parse
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from gpt2_jax.data.corpus import tfds_records
from gpt2_jax.files import local_path, summarize

Row = dict[str, Any]

# What code that reads a record raises if the record is malformed.
MALFORMED = (
  AttributeError,
  LookupError,
  OverflowError,
  RecursionError,
  TypeError,
  ValueError,
  csv.Error,
)
# Halves of UTF-16 pairs: JSON can escape them, and no text has them.
SURROGATE = re.compile("[\ud800-\udfff]")

# How files begin that are no plain text.
PACKED = {
  b"\x1f\x8b": "gzip",
  b"\x28\xb5\x2f\xfd": "zstd",
  b"PK\x03\x04": "zip",
  b"PAR1": "Parquet",
}
JSON_OBJECT = re.compile(rb'\[?\s*\{\s*"[^"\n]*"\s*:')
MARKUP = re.compile(rb"<(\?xml|!doctype|srcset|refset|tstset|mteval)\b", re.IGNORECASE)


@dataclasses.dataclass(frozen=True)
class Download:
  """An address that `--download` fetches, and the files of the dataset's folder that it gives.

  Of an archive, `members` are kept under their names without the folders; the one that the others
  accompany comes first. `sha256` is of what is at `url`, and None where nobody has recorded it.
  """

  url: str
  sha256: str | None = None
  members: tuple[str, ...] = ()

  @property
  def names(self) -> tuple[str, ...]:
    """The names of the files in the dataset's folder."""
    paths = self.members or (urllib.parse.urlsplit(self.url).path,)
    return tuple(path.rpartition("/")[2] for path in paths)


@dataclasses.dataclass(frozen=True)
class Source:
  """One split of a dataset: its published files, and its name in TFDS.

  `read` turns a published file into rows. `row` turns a record of TFDS (its bytes decoded) into the
  same row. Both raise ValueError for a malformed record. Examples for few-shot contexts come from
  `examples`, or from the other rows.
  """

  name: str  # its folder in the data folder
  files: tuple[str, ...]  # glob patterns of the published files, in the order of reading
  read: Callable[[pathlib.Path], Iterator[Row]]
  url: str  # who publishes it
  tfds: str | None = None  # TFDS's name of it, with its config
  split: str = "test"  # TFDS's name of the split
  row: Callable[[dict], Row] | None = None
  examples: "Source | None" = None
  downloads: tuple[
    Download, ...
  ] = ()  # what --download fetches; none where a form has to be signed
  alternatives: tuple[
    str, ...
  ] = ()  # patterns that may stand for `files`, as an archive names them
  other_names: tuple[str, ...] = ()  # patterns each of which alone may stand for `files`
  companions: tuple[str, ...] = ()  # patterns of files that `read` opens beside those
  any_file: bool = False  # for the user's own files: none is the published one


@dataclasses.dataclass(frozen=True)
class DatasetRows(Sequence):
  """The rows of a source in memory, with what they were read from and their fingerprint."""

  rows: list[Row]
  origin: str

  def __len__(self) -> int:
    return len(self.rows)

  def __getitem__(self, i):
    return self.rows[i]

  @functools.cached_property
  def fingerprint(self) -> str:
    """SHA-256 of the rows' content, in their order."""
    digest = hashlib.sha256()
    for row in self.rows:
      digest.update(_canonical_json(row) + b"\n")
    return digest.hexdigest()

  @functools.cached_property
  def digests(self) -> frozenset[bytes]:
    """SHA-256 of each row's content."""
    return frozenset(map(_digest, self.rows))

  def without(self, others: "DatasetRows") -> "DatasetRows":
    """The rows that are not among others; itself if none is."""
    if self.digests.isdisjoint(others.digests):
      return self
    rows = [row for row in self.rows if _digest(row) not in others.digests]
    return DatasetRows(rows, self.origin)


def _canonical_json(row: Row) -> bytes:
  return json.dumps(row, sort_keys=True).encode()


def _digest(row: Row) -> bytes:
  return hashlib.sha256(_canonical_json(row)).digest()


def load(source: Source, data: str | None = None, tfds_dir: str | None = None) -> DatasetRows:
  """Loads all rows of a source: from the data folder (or the very file) `data`, else from TFDS.

  Raises FileNotFoundError if neither has them, with where to get them; ValueError for a malformed
  or empty file.
  """
  rows = []
  paths = find_files(source, data)

  # 1. Published files come first: they are the user's choice.
  if paths:
    origin = ", ".join(map(str, paths))
    for path in paths:
      rows.extend(_read_file(source, path))

  # 2. Else TFDS, from a dataset that is prepared already: nothing is downloaded.
  elif source.tfds:
    origin = f"TFDS {source.tfds}, {source.split}"
    try:
      records = tfds_records(source.tfds, source.split, tfds_dir)
    except FileNotFoundError as error:
      raise FileNotFoundError(f"{_not_found(source, data)}; and {error}") from error
    for i in range(len(records)):
      rows.append(_tfds_row(source, i, records[i]))

  else:
    raise FileNotFoundError(f"{_not_found(source, data)}; TFDS does not have it")

  # An empty file is no result: the score would be of nothing.
  if not rows:
    raise ValueError(f"{source.name}: there are no rows in {summarize([origin], each=300)}")
  return DatasetRows(rows, origin)


def find_files(source: Source, data: str | None) -> list[pathlib.Path]:
  """Finds a source's published files: `data` itself if it is a file, else in its folder or in
  `data`."""
  if data is None:
    return []
  root = local_path(data)
  if root.is_file():
    return [root]

  for folder in (root / source.name, root):
    alone = [(pattern,) for pattern in source.other_names]
    for patterns in (source.files, source.alternatives, *alone):
      matches = [sorted(folder.glob(pattern)) for pattern in patterns]
      # Every pattern has to match: a part of the files would be scored as if it were all.
      if all(matches) and matches:
        return sum(matches, start=[])
  return []


def _read_file(source: Source, path: pathlib.Path) -> Iterator[Row]:
  try:
    yield from source.read(path)
  except UnicodeDecodeError as error:
    raise ValueError(
      f"{path} is not UTF-8: {error.reason}; is it the file of {source.url}?"
    ) from error
  except MALFORMED as error:
    # What a reader says by itself has the place in it.
    if isinstance(error, ValueError):
      raise
    raise ValueError(f"{path} is malformed: {malformed_reason(error)}") from error


def _not_found(source: Source, data: str | None) -> str:
  """What is missing, where to get it, and where to put it."""
  patterns = ", ".join(source.files[:2])
  if len(source.files) > 2:
    patterns += f", ... ({len(source.files)} files)"
  folder = f"{data}/{source.name}/" if data else f"DATA/{source.name}/ with --data=DATA"
  where = f"get it from {source.url}"
  if source.downloads:
    where = f"get it with `evaluate --download`, or from {source.url}"
  return f"{source.name}: {patterns} not found; {where} and put it in {folder}"


def _tfds_row(source: Source, i: int, record: dict) -> Row:
  try:
    return source.row(decoded(record))
  except MALFORMED as error:
    problem = malformed_reason(error)
    raise ValueError(
      f"{source.name}: record {i:,} of TFDS {source.tfds} is malformed: {problem}"
    ) from error


def decoded(value: Any) -> Any:
  """Decodes a record of TFDS: its bytes become text, its arrays lists, its scalars Python's."""
  if isinstance(value, bytes):
    return value.decode("utf-8")
  if isinstance(value, dict):
    return {key: decoded(inner) for key, inner in value.items()}

  # A NumPy scalar has `tolist` too, and no dimension.
  is_array = hasattr(value, "tolist") and getattr(value, "ndim", 0)
  if isinstance(value, list | tuple) or is_array:
    return [decoded(inner) for inner in value]
  return value.item() if hasattr(value, "item") else value


def json_lines(path: pathlib.Path, row: Callable[[dict], Row] = dict) -> Iterator[Row]:
  """JSON Lines reader: `row` of each line's object. Raises ValueError with the line's number."""
  with open(path, encoding="utf-8") as file:
    for number, line in enumerate(file, 1):
      if line.strip():
        yield at_place(f"{path}:{number}", lambda line=line: row(_json_object(line)))


def at_place(place: str, make: Callable[[], Row]) -> Row:
  """Returns what `make` returns; names the place if the record there is malformed.

  The errors of a malformed record become a ValueError that begins with `place`.
  """
  try:
    return make()
  except MALFORMED as error:
    raise ValueError(f"{place} is malformed: {malformed_reason(error)}") from error


def _json_object(line: str) -> dict:
  value = json.loads(line)
  if not isinstance(value, dict):
    raise ValueError(f"a {type(value).__name__} where an object should be")
  return value


def check_plain_text(path: pathlib.Path) -> None:
  """Raises ValueError for a file that begins as packed files, JSON or markup do.

  Read as lines of text it would get a score, which would be of its syntax.
  """
  with open(path, "rb") as file:
    begin = file.read(4096)
  for magic, name in PACKED.items():
    if begin.startswith(magic):
      raise ValueError(f"{path} is a {name} file, where plain text should be; unpack it first")

  begin = begin.removeprefix(b"\xef\xbb\xbf").lstrip()
  if JSON_OBJECT.match(begin):
    raise ValueError(f"{path} is JSON, where plain text should be; is it the file of another task?")
  if MARKUP.match(begin):
    raise ValueError(f"{path} is XML or SGML, where plain text should be; is it of another task?")


def text_field(record: dict, key: str) -> str:
  """The text under a key of a record. Raises ValueError for another type, KeyError for none."""
  value = record[key]
  if not isinstance(value, str):
    raise ValueError(f"its {key} is a {type(value).__name__}, where a text should be")

  # A tokenizer would stop at it, in the middle of a sweep.
  surrogate = SURROGATE.search(value)
  if surrogate:
    raise ValueError(
      f"its {key} has a lone surrogate at character {surrogate.start():,}, which is no text"
    )
  return value


def text_list(record: dict, key: str) -> list[str]:
  """The list of texts under a key of a record. Raises as `text_field` does."""
  values = record[key]
  if not isinstance(values, list | tuple):
    raise ValueError(f"its {key} is a {type(values).__name__}, where a list of texts should be")
  return [text_field({key: value}, key) for value in values]


def whole_number(record: dict, key: str) -> int:
  """The whole number under a key of a record, perhaps as digits. Raises ValueError."""
  value = record[key]
  if isinstance(value, bool) or not isinstance(value, int | str):
    raise ValueError(f"its {key} is a {type(value).__name__}, where a whole number should be")
  return int(value)


def malformed_reason(error: Exception) -> str:
  """First line of a malformed record's error; for a KeyError, which field the record lacks."""
  if isinstance(error, KeyError):
    return f"it has no {str(error)[:80]}"
  return str(error).partition("\n")[0][:300]
