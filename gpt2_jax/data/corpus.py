# SPDX-License-Identifier: Apache-2.0
"""A corpus as a random-access sequence of documents: a TFDS dataset, or local files.

TFDS's data sources read both, from ArrayRecord files; TensorFlow is never imported. TFDS itself is
imported where a corpus is opened. `Documents` pickles as the name of a folder, so that worker
processes reopen the corpus by themselves.
"""

import contextlib
import dataclasses
import difflib
import functools
import importlib.util
import os
import re
from collections.abc import Iterator, Sequence
from fractions import Fraction
from typing import TYPE_CHECKING

import numpy as np

from gpt2_jax.data.example_records import plain_record, write_record
from gpt2_jax.data.import_tfds import import_tfds
from gpt2_jax.data.skipped import BadRecord, Skipped
from gpt2_jax.files import first_line, user_path

if TYPE_CHECKING:
  import tensorflow_datasets as tfds


@dataclasses.dataclass(frozen=True)
class Documents(Sequence):
  """The documents of a corpus, random access: `len(documents)`, `documents[i] -> str`.

  Where `text_key` is None, a document is a whole record, as `write_record` writes it.
  They are one split of a prepared dataset; `source` says in JSON which, and `former_source` what an
  older version said of the same text. `skipped` are records that are no documents, of all splits.
  Raises ValueError for a split that does not exist or is empty, or a key that is no text, and
  BadRecord for a document that is not UTF-8, when it is read.
  """

  folder: str
  split: str
  text_key: str | None
  source: dict = dataclasses.field(repr=False)
  skipped: Skipped = Skipped()
  former_source: dict | None = dataclasses.field(default=None, repr=False)

  @functools.cached_property
  def _records(self) -> Sequence[dict]:
    tfds = import_tfds()
    try:
      builder = tfds.builder_from_directory(self.folder)
    except Exception as error:
      # What TFDS finds in a damaged folder, it raises as whatever its parsers raise.
      raise ValueError(
        f"{self.folder} cannot be read: {first_line(error)}; remove it and prepare it again"
      ) from error
    features = builder.info.features
    text_keys = sorted(key for key in features if isinstance(features[key], tfds.features.Text))
    if self.text_key is not None and self.text_key not in text_keys:
      raise ValueError(
        f"{builder.info.full_name} has no text under {self.text_key!r}; "
        f"--text_key is one of {', '.join(text_keys) or 'none'}"
      )
    return _open_split(builder, self.split)

  def __reduce__(self):
    # Without the dataset that this process has opened: each process opens its own.
    return Documents, (
      self.folder,
      self.split,
      self.text_key,
      self.source,
      self.skipped,
      self.former_source,
    )

  def __len__(self) -> int:
    return len(self._records)

  def __getitem__(self, i: int) -> str:
    # The range turns negative indices into positive ones, and raises IndexError.
    place = range(len(self))[i]
    try:
      record = self._records[place]
      if self.text_key is None:
        return write_record(plain_record(record), f"record {place:,} of {self.source['name']}")
      return record[self.text_key].decode("utf-8")
    except UnicodeDecodeError as error:
      raise BadRecord(
        f"document {place:,} of {self.folder} is not UTF-8 at byte {error.start:,}"
      ) from error
    except (RuntimeError, IndexError) as error:
      # What ArrayRecord's reader raises where a file is damaged, or shorter than it was.
      raise ValueError(
        f"document {place:,} of {self.folder} cannot be read: {first_line(error)}; "
        "remove that folder and prepare it again"
      ) from error


def tfds_documents(
  tfds_name: str, split: str, text_key: str | None, data_dir: str | None = None
) -> Documents:
  """Opens a TFDS dataset ("lm1b", "wiki40b/en:1.3.0") that was prepared as ArrayRecord.

  It is looked for in `data_dir`. Without a `text_key`, documents are whole records. Raises
  ValueError for an unknown name, FileNotFoundError for an unprepared dataset, and as `Documents`
  does.
  """
  builder = _open_builder(tfds_name, data_dir)
  source = {"kind": "tfds", "name": builder.info.full_name, "split": split, "text_key": text_key}
  return _opened(Documents(str(builder.data_path), split, text_key, source))


def tfds_records(tfds_name: str, split: str, data_dir: str | None = None) -> Sequence[dict]:
  """Opens a TFDS dataset for all fields of its records, where `tfds_documents` gives one text.

  Errors are the same.
  """
  return _open_split(_open_builder(tfds_name, data_dir), split)


def file_documents(
  patterns: str,
  split: str = "train",
  text_key: str | None = "text",
  data_dir: str | None = None,
  strict: bool = False,
  split_on: str | None = None,
) -> Documents:
  """Opens local files as a TFDS dataset, prepared in `data_dir` once for each content.

  `patterns` are globs with commas between them; ** crosses folders. A record is a document, with
  its text under `text_key`: a line of a .jsonl or .ndjson file, a row of a .parquet file, an item
  of the list or a line in a .json file that begins with such a record. Any other file is a text and
  one document, or several with `split_on` between them. Each may be compressed: .gz, .zst, .bz2,
  .xz. Without a `text_key`, a document is a whole record. A file that is found by several names is
  read once. Documents and records that are not UTF-8, or have no text, are skipped and counted on
  stderr, unless `strict`: a model would learn the U+FFFD in their place. Empty documents are
  dropped. TFDS shuffles documents by a hash of their names, so a slice of the split
  ("train[:90%]") is a sample. Raises FileNotFoundError if nothing matches, ValueError if there is
  no text or a file is damaged, and as `Documents` does.
  """
  from gpt2_jax.data.local_files import prepare_local_files

  prepared = prepare_local_files(patterns, text_key, data_dir, strict, split_on)
  source = {
    "kind": "files",
    "patterns": patterns,
    "split": split,
    "text_key": text_key,
    "sha256": prepared.fingerprint,
  }
  if split_on:
    source["split_on"] = split_on
  former = source | {"sha256": prepared.former_fingerprint}
  return _opened(Documents(prepared.folder, split, "text", source, prepared.skipped, former))


def is_same_source(saved: object, source: dict, former_source: dict | None = None) -> bool:
  """Whether a `source` that was saved tells the same documents.

  The content counts, and not the patterns by which it was found. `former_source` is what an older
  version said of the documents of `source`.
  """
  if not isinstance(saved, dict):
    return False
  for known in (source, former_source):
    if known is not None and saved | {"patterns": None} == known | {"patterns": None}:
      return True
  return False


def readable(documents: Sequence[str]) -> Iterator[str]:
  """The documents without those that cannot be read."""
  for i in range(len(documents)):
    # Whoever encodes the documents counts these.
    with contextlib.suppress(BadRecord):
      yield documents[i]


@dataclasses.dataclass(frozen=True)
class CharacterSlice(Sequence):
  """Characters [low, high) of the documents' text, as if nothing stood between documents.

  `readable` are the documents that can be read, `starts` the character at which each of them
  starts, and the end of the last one. `skipped` are the others, in the slice or outside of it.
  """

  documents: Sequence[str]
  low: int
  high: int
  readable: np.ndarray = dataclasses.field(repr=False)
  starts: np.ndarray = dataclasses.field(repr=False)
  source: dict = dataclasses.field(repr=False)
  skipped: Skipped

  @property
  def former_source(self) -> dict | None:
    former = self.documents.former_source
    return former and former | {"characters": self.source["characters"]}

  @property
  def _covered(self) -> range:
    """The documents with a character in the slice."""
    # From the last one that starts at `low` or before, up to the first one that starts at `high` or
    # after, which is not in the range any more.
    first = np.searchsorted(self.starts, self.low, side="right") - 1
    last = np.searchsorted(self.starts, self.high, side="left")
    return range(int(first), int(last))

  def __len__(self) -> int:
    return len(self._covered)

  def __getitem__(self, i: int) -> str:
    document = self._covered[i]

    # Of the first and the last document, only a part may be in the slice.
    start = int(self.starts[document])
    text = self.documents[int(self.readable[document])]
    return text[max(0, self.low - start) : self.high - start]


def slice_characters(documents: Documents, bounds: str) -> CharacterSlice:
  """Slices the text by FROM:TO, in characters or in per cent of them: ":90%", "90%:", "1000:2000".

  A bound of p % is rounded down to a character, so ":90%" and "90%:" share out the text exactly.
  Reads all documents. Raises ValueError for other syntax or an empty slice.
  """
  first, last = parse_bounds(bounds)

  # Only lengths are kept: the text may not fit into memory.
  lengths = []
  places = []
  skipped = documents.skipped
  for i in range(len(documents)):
    try:
      lengths.append(len(documents[i]))
      places.append(i)
    except BadRecord as error:
      skipped += Skipped(1, first_line(error))
  starts = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
  total = int(starts[-1])

  low = _bound_to_characters(first, total)
  high = _bound_to_characters(last, total)
  if low >= high:
    raise ValueError(
      f"characters {bounds} are none: they run from {low:,} to {high:,} of {total:,}"
    )
  source = documents.source | {"characters": bounds}
  return CharacterSlice(documents, low, high, np.array(places), starts, source, skipped)


def parse_bounds(bounds: str) -> tuple[str, str]:
  """The two bounds of a slice FROM:TO. Raises ValueError for other syntax."""
  # No file has more characters than 18 digits tell; Python refuses to read thousands of them.
  number = r"(\d{1,18}(?:\.\d{1,18})?%|\d{1,18})?"
  match = re.fullmatch(f"{number}:{number}", bounds, re.ASCII)
  if not match:
    raise ValueError(
      f"characters {bounds[:40]!r} is not FROM:TO, "
      "each a number, a percentage or nothing, as in :90%"
    )
  return match[1] or "0", match[2] or "100%"


def _bound_to_characters(bound: str, total: int) -> int:
  # A fraction and not a float: 0.9 * total may round to the wrong side of a whole number.
  if bound.endswith("%"):
    return min(total, int(Fraction(bound[:-1]) * total / 100))
  return min(total, int(bound))


def _open_builder(tfds_name: str, data_dir: str | None) -> "tfds.core.DatasetBuilder":
  tfds = import_tfds()
  data_dir = data_dir and user_path(data_dir)
  try:
    builder = tfds.builder(tfds_name, data_dir=data_dir)
  except tfds.core.DatasetNotFoundError as error:
    if importlib.util.find_spec("tensorflow"):
      raise ValueError(_unknown_name(tfds_name, data_dir)) from error
    # TFDS hides the datasets whose own code needs TensorFlow: this may be one of them.
    command = _prepare_command(tfds_name, data_dir)
    raise FileNotFoundError(
      f"{_unknown_name(tfds_name, data_dir)}; if the name is right, TFDS needs TensorFlow for it: "
      f"pip install tensorflow, and once: {command}"
    ) from error
  except Exception as error:
    # Mostly, the name is known, but not its config or version. What TFDS finds in a damaged folder,
    # it raises as whatever its parsers raise.
    raise ValueError(f"TFDS cannot open {tfds_name!r}: {first_line(error)}") from error

  # Nothing is downloaded here: that may take hours, and is done once, by hand.
  if not builder.data_path.exists():
    raise FileNotFoundError(
      f"{tfds_name} is not prepared in {builder.data_path}; "
      f"once: {_prepare_command(tfds_name, data_dir)}"
    )
  return builder


def _open_split(builder: "tfds.core.DatasetBuilder", split: str) -> Sequence[dict]:
  """The records of a split, random access."""
  name = builder.info.full_name
  file_format = builder.info.file_format.value
  if file_format != "array_record":
    command = _prepare_command(name, os.path.dirname(builder.data_path))
    raise ValueError(
      f"{name} is prepared as {file_format}, which has no random access; "
      f"prepare it as ArrayRecord: {command}"
    )

  try:
    return builder.as_data_source(split=split)
  except ValueError as error:
    # An empty part of a split, such as train[:0%], is refused like an unknown name.
    splits = []
    for split_name, info in builder.info.splits.items():
      splits.append(f"{split_name} of {info.num_examples:,}")
    raise ValueError(
      f"{name} has no documents in split {split!r}; it has {', '.join(splits)}, "
      "and a part is written train[:90%]"
    ) from error


def _opened(documents: Documents) -> Documents:
  # The length opens the dataset: errors come now, and not with the first document.
  len(documents)
  return documents


def _unknown_name(tfds_name: str, data_dir: str | None) -> str:
  tfds = import_tfds()
  base = re.split("[/:]", tfds_name)[0]
  # Community datasets are left out: TFDS would fetch their list.
  names = tfds.list_builders(with_community_datasets=False)
  nearest = difflib.get_close_matches(base, names, n=3, cutoff=0.5)
  return (
    f"TFDS knows no dataset {base!r} and none is prepared in {data_dir or 'its data_dir'}; "
    f"the nearest names are {', '.join(nearest) or 'none'}"
  )


def _prepare_command(name: str, data_dir: str | None) -> str:
  folder = f", data_dir={data_dir!r}" if data_dir else ""
  build = f"tfds.builder({name!r}, file_format='array_record'{folder}).download_and_prepare()"
  return f'python -c "import tensorflow_datasets as tfds; {build}"'
