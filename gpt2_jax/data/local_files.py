# SPDX-License-Identifier: Apache-2.0
"""Local text files (.txt, .jsonl, any other) as a TFDS dataset, prepared once for each content.

This module imports TFDS, so it is itself imported only where such a corpus is opened.
"""

import contextlib
import glob
import hashlib
import io
import itertools
import json
import os
import sys
from collections.abc import Iterator, Sequence

import tensorflow_datasets as tfds

from gpt2_jax.files import first_line, progress, sha256


def prepare_local_files(patterns: str, text_key: str, data_dir: str | None) -> tuple[str, str]:
  """Prepares the files that match globs. Returns the dataset's folder, and its content's SHA-256.

  Errors are those of `file_documents`.
  """
  paths, digest = _read_and_hash(_expand_globs(patterns))
  fingerprint = sha256(f"{text_key}\n{digest}".encode())

  # The content names the folder: a changed file is another dataset, an unchanged one is there.
  folder = os.path.join(data_dir or tfds.core.constants.DATA_DIR, "local_files", fingerprint[:16])
  builder = LocalFiles(paths, text_key, data_dir=folder, file_format="array_record")
  _download_and_prepare(builder)
  return str(builder.data_path), fingerprint


class LocalFiles(tfds.core.GeneratorBasedBuilder, skip_registration=True):
  """TFDS builder of local text files: one split, "train", and one feature, "text"."""

  VERSION = tfds.core.Version("1.0.0")
  # Nothing is downloaded. Without this, TFDS looks for checksums in the folder of this module.
  url_infos = None

  def __init__(self, paths: Sequence[str], text_key: str, **kwargs):
    self._paths = paths
    self._text_key = text_key
    super().__init__(**kwargs)

  def _info(self) -> tfds.core.DatasetInfo:
    features = tfds.features.FeaturesDict({"text": tfds.features.Text()})
    return tfds.core.DatasetInfo(builder=self, features=features)

  def _split_generators(self, dl_manager: object) -> dict:
    return {"train": self._generate_examples()}

  def _generate_examples(self) -> Iterator[tuple[str, dict]]:
    # TFDS shuffles by a hash of these keys. Relative paths keep the order when a folder moves.
    folder = os.path.dirname(os.path.commonprefix(self._paths))
    for path in progress(self._paths, "preparing", " files", disable=False):
      for number, text in _read_texts(path, self._text_key):
        yield f"{os.path.relpath(path, folder)}:{number}", {"text": text}


def _download_and_prepare(builder: LocalFiles) -> None:
  """Writes the dataset to disk, unless it is there. Raises ValueError if it cannot."""
  # TFDS announces downloads on stdout and with bars of its own; there are none.
  tfds.disable_progress_bar()
  config = tfds.download.DownloadConfig(try_download_gcs=False)
  try:
    with contextlib.redirect_stdout(io.StringIO()):
      builder.download_and_prepare(download_config=config)
  except RuntimeError as error:
    # ArrayRecord's writer raises it if the disk is full.
    raise ValueError(f"cannot prepare {builder.data_path}: {first_line(error)}") from error
  finally:
    tfds.enable_progress_bar()


def _read_texts(path: str, text_key: str) -> Iterator[tuple[int, str]]:
  """Reads the texts of a file, numbered, without those that are empty."""
  with open(path, "rb") as file:
    if path.endswith(".jsonl"):
      texts = _jsonl_texts(path, file, text_key)
    else:
      texts = [file.read().decode("utf-8")]

    # The number makes the key of the document unique in its file.
    for number, text in enumerate(texts):
      if text:
        yield number, text


def _jsonl_texts(path: str, lines: Iterator[bytes], text_key: str) -> Iterator[str]:
  for line_number, line in enumerate(lines, 1):
    if line.strip():
      yield _json_text(line, text_key, f"{path}:{line_number}")


def _json_text(line: bytes, text_key: str, place: str) -> str:
  """The text of a line of JSON. `place` names the line in errors."""
  try:
    record = json.loads(line)
  except ValueError as error:
    raise ValueError(f"{place} is no JSON: {error}") from error

  if not isinstance(record, dict):
    raise ValueError(f"{place} is no JSON object but a {type(record).__name__}")

  text = record.get(text_key)
  if not isinstance(text, str):
    raise ValueError(
      f"{place} has no text under {text_key!r}, only {', '.join(record)}; set --text_key"
    )
  return text


def _expand_globs(patterns: str) -> list[str]:
  """The absolute paths of the files that match, sorted, each once."""
  paths = set()
  for pattern in filter(None, map(str.strip, patterns.split(","))):
    matches = glob.glob(os.path.expanduser(pattern), recursive=True)
    files = list(filter(os.path.isfile, matches))

    # Each pattern must match something: a typo in one of several should not go unnoticed.
    if not files:
      raise FileNotFoundError(
        f"no file matches {pattern!r}; quote the pattern, and ** crosses folders"
      )
    paths.update(map(os.path.abspath, files))
  if not paths:
    raise FileNotFoundError(f"no file in {patterns!r}: give globs with commas between them")
  return sorted(paths)


def _read_and_hash(paths: list[str]) -> tuple[list[str], str]:
  """The files that are UTF-8 with text in them, and the SHA-256 of their names and contents."""
  kept = []
  skipped = []
  digest = hashlib.sha256()
  for path in paths:
    with open(path, "rb") as file:
      content = file.read()

    # A file may be one record, which is a protocol buffer: less than 2 GiB.
    if len(content) >= 1 << 31:
      raise ValueError(
        f"{path} has {len(content):,} bytes, a file must have less than 2 GiB; split it"
      )

    try:
      content.decode("utf-8")
    except UnicodeDecodeError:
      skipped.append(path)
      continue

    # Names count too: the order of the documents depends on them.
    if content.strip():
      kept.append(path)
      digest.update(f"{path}\n{sha256(content)}\n".encode())

  if skipped:
    print(
      f"{len(skipped)} of {len(paths)} files are not UTF-8, skipped: {_first_three(skipped)}",
      file=sys.stderr,
    )
  if not kept:
    raise ValueError(f"{len(paths)} files match and none holds text: {_first_three(paths)}")
  return kept, digest.hexdigest()


def _first_three(paths: list[str]) -> str:
  return ", ".join(itertools.islice(paths, 3)) + (", ..." if len(paths) > 3 else "")
