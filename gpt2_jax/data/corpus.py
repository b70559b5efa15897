# SPDX-License-Identifier: Apache-2.0
"""Text as a random-access sequence of documents: a dataset of TFDS, or local files through a builder of ours.

Both are read from ArrayRecord files by TFDS's data sources; TensorFlow is never imported. `Documents` pickles as
the name of a folder, so that worker processes reopen it by themselves.
"""

import contextlib
import dataclasses
import difflib
import functools
import glob
import hashlib
import io
import itertools
import json
import os
import re
import sys
from collections.abc import Iterator, Sequence
from fractions import Fraction

import numpy as np
import tensorflow_datasets as tfds
import tqdm


@dataclasses.dataclass(frozen=True)
class Documents(Sequence):
  """The texts of one split of a prepared dataset: `len(documents)`, `documents[i] -> str`.

  `source` says in JSON what they are. Raises ValueError for a split that is not there or holds nothing, a key
  that is no text, or (when read) text that is not UTF-8.
  """

  folder: str
  split: str
  text_key: str
  source: dict = dataclasses.field(repr=False)

  @functools.cached_property
  def _records(self) -> Sequence[dict]:
    builder = tfds.builder_from_directory(self.folder)
    features = builder.info.features
    texts = sorted(key for key in features if isinstance(features[key], tfds.features.Text))
    if self.text_key not in texts:
      name, those = builder.info.full_name, ", ".join(texts) or "none"
      raise ValueError(f"{name} has no text under {self.text_key!r}; --text_key is one of {those}")
    return _records(builder, self.split)

  def __reduce__(self):
    return Documents, (self.folder, self.split, self.text_key, self.source)

  def __len__(self) -> int:
    return len(self._records)

  def __getitem__(self, i: int) -> str:
    text = self._records[range(len(self))[i]][self.text_key]
    try:
      return text.decode("utf-8")
    except UnicodeDecodeError as error:
      raise ValueError(f"document {i:,} of {self.folder} is not UTF-8 at byte {error.start:,}") from error


@dataclasses.dataclass(frozen=True)
class CharacterSlice(Sequence):
  """Characters [low, high) of the documents' text, as if they were joined by nothing."""

  documents: Sequence[str]
  low: int
  high: int
  starts: np.ndarray = dataclasses.field(repr=False)  # where each document starts, and the end of the last
  source: dict = dataclasses.field(repr=False)

  @property
  def _covered(self) -> range:
    first = np.searchsorted(self.starts, self.low, side="right") - 1
    return range(int(first), int(np.searchsorted(self.starts, self.high, side="left")))

  def __len__(self) -> int:
    return len(self._covered)

  def __getitem__(self, i: int) -> str:
    document = self._covered[i]
    start = int(self.starts[document])
    return self.documents[document][max(0, self.low - start) : self.high - start]


def tfds_documents(tfds_name: str, split: str, text_key: str, data_dir: str | None = None) -> Documents:
  """A TFDS dataset ("lm1b", "wiki40b/en:1.3.0") that was prepared in `data_dir` as ArrayRecord.

  Raises ValueError for an unknown name, FileNotFoundError for an unprepared one, and as `Documents` does.
  """
  builder = _prepared(tfds_name, data_dir)
  source = {"kind": "tfds", "name": builder.info.full_name, "split": split, "text_key": text_key}
  return _checked(Documents(str(builder.data_path), split, text_key, source))


def tfds_records(tfds_name: str, split: str, data_dir: str | None = None) -> Sequence[dict]:
  """All fields of a dataset's records, where `tfds_documents` gives one text of each. Errors as there."""
  return _records(_prepared(tfds_name, data_dir), split)


def _prepared(tfds_name: str, data_dir: str | None) -> tfds.core.DatasetBuilder:
  try:
    builder = tfds.builder(tfds_name, data_dir=data_dir)
  except tfds.core.DatasetNotFoundError as error:
    raise ValueError(_unknown_name(tfds_name, data_dir)) from error
  except (ValueError, RuntimeError, AssertionError) as error:
    raise ValueError(f"TFDS cannot open {tfds_name!r}: {_first_line(error)}") from error
  if not builder.data_path.exists():
    raise FileNotFoundError(
      f"{tfds_name} is not prepared in {builder.data_path}; once: {_how_to_prepare(tfds_name, data_dir)}"
    )
  return builder


def _records(builder: tfds.core.DatasetBuilder, split: str) -> Sequence[dict]:
  """The records of a split, in random access."""
  name, form = builder.info.full_name, builder.info.file_format.value
  if form != "array_record":
    raise ValueError(
      f"{name} is prepared as {form}, which has no random access; "
      f"prepare it as ArrayRecord: {_how_to_prepare(name, os.path.dirname(builder.data_path))}"
    )
  try:
    return builder.as_data_source(split=split)
  except ValueError as error:
    splits = ", ".join(f"{split} of {info.num_examples:,}" for split, info in builder.info.splits.items())
    raise ValueError(
      f"{name} has no documents in split {split!r}; it has {splits}, and a part is written train[:90%]"
    ) from error


def file_documents(
  patterns: str, split: str = "train", text_key: str = "text", data_dir: str | None = None
) -> Documents:
  """Local files as a TFDS dataset, prepared in `data_dir` once for each state of their names and contents.

  `patterns` are globs with commas between them; ** crosses folders. A line of a .jsonl file is a document, its
  text under `text_key`; any other file is one. Files that are not UTF-8 are skipped and counted on stderr, since
  the U+FFFD in their place would be learned; empty documents are dropped. TFDS shuffles documents by a hash of
  their names, so a slice of the split ("train[:90%]") is a sample. Raises FileNotFoundError where nothing
  matches, ValueError where there is no text, and as `Documents` does.
  """
  paths, digest = _read_all(_expand(patterns))
  fingerprint = hashlib.sha256(f"{text_key}\n{digest}".encode()).hexdigest()
  folder = os.path.join(data_dir or tfds.core.constants.DATA_DIR, "local_files", fingerprint[:16])
  builder = LocalFiles(paths, text_key, data_dir=folder, file_format="array_record")
  _prepare(builder)
  source = {
    "kind": "files",
    "patterns": patterns,
    "split": split,
    "text_key": text_key,
    "sha256": fingerprint,
  }
  return _checked(Documents(str(builder.data_path), split, "text", source))


def slice_characters(documents: Documents, bounds: str) -> CharacterSlice:
  """The part FROM:TO of the text, counted in characters or in per cent of them: ":90%", "90%:", "1000:2000".

  A bound of p % is rounded down to a character, so ":90%" and "90%:" share out the text exactly. Reads all
  documents. Raises ValueError for other syntax or an empty part.
  """
  number = r"(\d+(?:\.\d+)?%|\d+)?"
  match = re.fullmatch(f"{number}:{number}", bounds)
  if not match:
    raise ValueError(f"characters {bounds!r} is not FROM:TO, each a number, a percentage or nothing, as in :90%")
  starts = np.concatenate([[0], np.cumsum([len(text) for text in documents], dtype=np.int64)])
  total = int(starts[-1])

  def count(bound: str) -> int:
    return min(total, int(Fraction(bound[:-1]) * total / 100) if bound.endswith("%") else int(bound))

  low, high = count(match[1] or "0"), count(match[2] or "100%")
  if low >= high:
    raise ValueError(f"characters {bounds} are none: they run from {low:,} to {high:,} of {total:,}")
  return CharacterSlice(documents, low, high, starts, documents.source | {"characters": bounds})


class LocalFiles(tfds.core.GeneratorBasedBuilder, skip_registration=True):
  """Local text files as a dataset of one split, "train", and one feature, "text"."""

  VERSION = tfds.core.Version("1.0.0")
  url_infos = None  # nothing is downloaded; TFDS would look for checksums beside this file

  def __init__(self, paths: Sequence[str], text_key: str, **kwargs):
    self._paths, self._text_key = paths, text_key
    super().__init__(**kwargs)

  def _info(self) -> tfds.core.DatasetInfo:
    return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict({"text": tfds.features.Text()}))

  def _split_generators(self, dl_manager: object) -> dict:
    return {"train": self._generate_examples()}

  def _generate_examples(self) -> Iterator[tuple[str, dict]]:
    folder = os.path.dirname(os.path.commonprefix(self._paths))
    for path in tqdm.tqdm(self._paths, desc="preparing", unit=" files"):
      for number, text in _texts(path, self._text_key):
        yield f"{os.path.relpath(path, folder)}:{number}", {"text": text}


def _prepare(builder: LocalFiles) -> None:
  """Without TFDS's own announcements, which speak of downloads."""
  tfds.disable_progress_bar()
  try:
    with contextlib.redirect_stdout(io.StringIO()):
      builder.download_and_prepare(download_config=tfds.download.DownloadConfig(try_download_gcs=False))
  except RuntimeError as error:  # ArrayRecord's writer says so when the disk is full
    raise ValueError(f"cannot prepare {builder.data_path}: {_first_line(error)}") from error
  finally:
    tfds.enable_progress_bar()


def _texts(path: str, text_key: str) -> Iterator[tuple[int, str]]:
  """The texts of a file that are not empty, numbered."""
  with open(path, "rb") as file:
    if not path.endswith(".jsonl"):
      lines = [file.read().decode("utf-8")]
    else:
      lines = (_json_text(line, text_key, f"{path}:{n}") for n, line in enumerate(file, 1) if line.strip())
    yield from ((number, text) for number, text in enumerate(lines) if text)


def _json_text(line: bytes, text_key: str, place: str) -> str:
  try:
    record = json.loads(line)
  except ValueError as error:
    raise ValueError(f"{place} is no JSON: {error}") from error
  match record:
    case dict() if isinstance(text := record.get(text_key), str):
      return text
    case dict():
      raise ValueError(f"{place} has no text under {text_key!r}, only {', '.join(record)}; set --text_key")
  raise ValueError(f"{place} is no JSON object but a {type(record).__name__}")


def _expand(patterns: str) -> list[str]:
  """The absolute paths of the files, sorted, each once."""
  paths = set()
  for pattern in filter(None, map(str.strip, patterns.split(","))):
    found = [path for path in glob.glob(os.path.expanduser(pattern), recursive=True) if os.path.isfile(path)]
    if not found:
      raise FileNotFoundError(f"no file matches {pattern!r}; quote the pattern, and ** crosses folders")
    paths.update(map(os.path.abspath, found))
  if not paths:
    raise FileNotFoundError(f"no file in {patterns!r}: give globs with commas between them")
  return sorted(paths)


def _read_all(paths: list[str]) -> tuple[list[str], str]:
  """The files that are UTF-8 with text in them, and the sha256 of their names and contents."""
  kept, skipped, digest = [], [], hashlib.sha256()
  for path in paths:
    with open(path, "rb") as file:
      content = file.read()
    if len(content) >= 1 << 31:
      raise ValueError(f"{path} has {len(content):,} bytes, a file must have less than 2 GiB; split it")
    try:
      content.decode("utf-8")
    except UnicodeDecodeError:
      skipped.append(path)
      continue
    if content.strip():
      kept.append(path)
      digest.update(f"{path}\n{hashlib.sha256(content).hexdigest()}\n".encode())
  if skipped:
    print(f"{len(skipped)} of {len(paths)} files are not UTF-8, skipped: {_some(skipped)}", file=sys.stderr)
  if not kept:
    raise ValueError(f"{len(paths)} files match and none holds text: {_some(paths)}")
  return kept, digest.hexdigest()


def _checked(documents: Documents) -> Documents:
  len(documents)  # opens it, so that what is wrong is said now
  return documents


def _unknown_name(tfds_name: str, data_dir: str | None) -> str:
  base = re.split("[/:]", tfds_name)[0]
  nearest = difflib.get_close_matches(base, tfds.list_builders(with_community_datasets=False), n=3, cutoff=0.5)
  return (
    f"TFDS knows no dataset {base!r} and none is prepared in {data_dir or 'its data_dir'}; "
    f"the nearest names are {', '.join(nearest) or 'none'}"
  )


def _how_to_prepare(name: str, data_dir: str | None) -> str:
  folder = f", data_dir={data_dir!r}" if data_dir else ""
  build = f"tfds.builder({name!r}, file_format='array_record'{folder}).download_and_prepare()"
  return f'python -c "import tensorflow_datasets as tfds; {build}"'


def _first_line(error: Exception) -> str:
  return next(iter(str(error).splitlines()), type(error).__name__)


def _some(paths: list[str]) -> str:
  return ", ".join(itertools.islice(paths, 3)) + (", ..." if len(paths) > 3 else "")
