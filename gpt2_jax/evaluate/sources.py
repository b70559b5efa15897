# SPDX-License-Identifier: Apache-2.0
"""Where rows come from: the files that a dataset's authors publish, or TFDS; both give the same rows."""

import dataclasses
import functools
import hashlib
import json
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from gpt2_jax.data.corpus import tfds_records

Row = dict[str, Any]
MALFORMED = (AttributeError, IndexError, KeyError, TypeError, ValueError)  # what reading a record raises that is none


@dataclasses.dataclass(frozen=True)
class Source:
  """One split of a dataset.

  `read` turns a published file into rows, `row` a record of TFDS (its bytes decoded) into the same row; both raise
  ValueError for what is no such record. Examples for few-shot contexts come from `examples`, or from the other rows.
  """

  name: str  # its folder in the data folder
  files: tuple[str, ...]  # patterns of the published files there, in the order in which they are read
  read: Callable[[pathlib.Path], Iterator[Row]]
  url: str  # who publishes it
  tfds: str | None = None  # TFDS's name of it, with its config
  split: str = "test"  # TFDS's name of the split
  row: Callable[[dict], Row] | None = None
  examples: "Source | None" = None


@dataclasses.dataclass(frozen=True)
class Rows(Sequence):
  """The rows of a source, and what they were read from."""

  rows: list[Row]
  origin: str

  def __len__(self) -> int:
    return len(self.rows)

  def __getitem__(self, i):
    return self.rows[i]

  @functools.cached_property
  def fingerprint(self) -> str:
    """sha256 of their content, in their order."""
    digest = hashlib.sha256()
    for row in self.rows:
      digest.update(json.dumps(row, sort_keys=True).encode() + b"\n")
    return digest.hexdigest()


def load(source: Source, data: str | None = None, tfds_dir: str | None = None) -> Rows:
  """All rows, from the data folder (or the very file) `data` if they lie there, else from TFDS.

  Raises FileNotFoundError where neither has them, with where to get them; ValueError for a malformed or empty file.
  """
  paths = find(source, data)
  if paths:
    rows = [row for path in paths for row in _read(source, path)]
    origin = ", ".join(map(str, paths))
  elif source.tfds:
    try:
      records = tfds_records(source.tfds, source.split, tfds_dir)
    except FileNotFoundError as error:
      raise FileNotFoundError(f"{_missing(source, data)}; and {error}") from error
    rows = [_row(source, i, records[i]) for i in range(len(records))]
    origin = f"TFDS {source.tfds}, {source.split}"
  else:
    raise FileNotFoundError(f"{_missing(source, data)}; TFDS does not have it")
  if not rows:
    raise ValueError(f"{source.name}: there are no rows in {origin}")
  return Rows(rows, origin)


def find(source: Source, data: str | None) -> list[pathlib.Path]:
  """The published files: `data` itself if it is a file; in its folder of the source's name, or in `data`."""
  if data is None:
    return []
  root = pathlib.Path(data).expanduser()
  if root.is_file():
    return [root]
  for folder in (root / source.name, root):
    found = [sorted(folder.glob(pattern)) for pattern in source.files]
    if all(found):
      return [path for paths in found for path in paths]
  return []


def _read(source: Source, path: pathlib.Path) -> Iterator[Row]:
  try:
    yield from source.read(path)
  except UnicodeDecodeError as error:
    raise ValueError(f"{path} is not UTF-8: {error.reason}; is it the file of {source.url}?") from error


def _missing(source: Source, data: str | None) -> str:
  where = f"{data}/{source.name}/" if data else f"DATA/{source.name}/ with --data=DATA"
  some = ", ".join(source.files[:2]) + (f", ... ({len(source.files)} files)" if len(source.files) > 2 else "")
  return f"{source.name}: {some} not found; get it from {source.url} and put it in {where}"


def _row(source: Source, i: int, record: dict) -> Row:
  try:
    return source.row(decoded(record))
  except MALFORMED as error:
    raise ValueError(f"{source.name}: record {i:,} of TFDS {source.tfds} is malformed: {reason(error)}") from error


def decoded(value: Any) -> Any:
  """A record of TFDS with its bytes as text and its arrays as lists."""
  if isinstance(value, bytes):
    return value.decode("utf-8")
  if isinstance(value, dict):
    return {key: decoded(inner) for key, inner in value.items()}
  if isinstance(value, list | tuple) or (hasattr(value, "tolist") and getattr(value, "ndim", 0)):
    return [decoded(inner) for inner in value]
  return value.item() if hasattr(value, "item") else value


def json_lines(path: pathlib.Path, row: Callable[[dict], Row] = dict) -> Iterator[Row]:
  """`row` of each line's object. Raises ValueError with the line's number."""
  with open(path, encoding="utf-8") as file:
    for number, line in enumerate(file, 1):
      if line.strip():
        yield at_place(f"{path}:{number}", lambda line=line: row(_object(line)))


def at_place(place: str, make: Callable[[], Row]) -> Row:
  """What `make` returns; what is wrong with the record there becomes a ValueError that begins with `place`."""
  try:
    return make()
  except MALFORMED as error:
    raise ValueError(f"{place} is malformed: {reason(error)}") from error


def _object(line: str) -> dict:
  found = json.loads(line)
  if not isinstance(found, dict):
    raise ValueError(f"a {type(found).__name__} where an object should be")
  return found


def reason(error: Exception) -> str:
  """An error's text; that of a KeyError says what it is about."""
  return f"it has no {error}" if isinstance(error, KeyError) else str(error).partition("\n")[0]
