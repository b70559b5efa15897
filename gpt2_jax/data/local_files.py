# SPDX-License-Identifier: Apache-2.0
"""Local files of text or records as a TFDS dataset, prepared once for each content.

This module imports TFDS, so it is itself imported only where such a corpus is opened.
"""

import contextlib
import dataclasses
import hashlib
import io
import json
import os
import pathlib
import shutil
import sys
from collections.abc import Iterator, Sequence

from gpt2_jax.data.compression import compression_suffix, decompressed_name
from gpt2_jax.data.globs import drop_other_names, expand_globs
from gpt2_jax.data.import_tfds import import_tfds
from gpt2_jax.data.readers import JsonList, Reader, SplitText, WholeText, choose_reader
from gpt2_jax.data.skipped import BadRecord, Skipped
from gpt2_jax.files import file_lock, first_line, progress, sha256, summarize, user_path

tfds = import_tfds()


@dataclasses.dataclass(frozen=True)
class PreparedFiles:
  """A prepared dataset's folder, the SHA-256 of its content, and what is not in it.

  `former_fingerprint` is what an older version made of the same files, which it knew by their
  absolute names; None where it read them differently.
  """

  folder: str
  fingerprint: str
  former_fingerprint: str | None
  skipped: Skipped


@dataclasses.dataclass(frozen=True)
class _File:
  """A file with text in it, how it is read, and what the keys of its documents begin with."""

  path: str
  reader: Reader
  key: str


def prepare_local_files(
  patterns: str, text_key: str | None, data_dir: str | None, strict: bool, split_on: str | None
) -> PreparedFiles:
  """Prepares the files that match globs. Errors are those of `file_documents`."""
  # 1. Which files, and how each is read.
  names = expand_globs(patterns)
  paths = drop_other_names(names)
  readers = {path: choose_reader(path, text_key, split_on) for path in paths}
  if split_on and not any(isinstance(reader, SplitText) for reader in readers.values()):
    raise ValueError(f"--split_on is for text, and all {len(paths):,} files hold records")
  files = _read_and_hash(readers, strict)

  # 2. The content names the folder: a changed file is another dataset, an unchanged one is there.
  #    The number is the version of how files become documents.
  kind = "examples 1" if text_key is None else f"2\n{text_key}"
  if split_on:
    kind += f"\nsplit on {json.dumps(split_on)}"
  fingerprint = sha256(f"{kind}\n{files.digest}".encode())
  data_dir = user_path(data_dir or tfds.core.constants.DATA_DIR)
  folder = os.path.join(data_dir, "local_files", fingerprint[:16])

  # 3. Write it, and say what is not in it.
  builder = _prepare(folder, files.files, strict)
  lines = _skipped_lines(builder)
  skipped = files.skipped + lines
  if strict and lines.count:
    raise BadRecord(f"{lines.first}; without --strict it is skipped")
  if skipped.count:
    print(f"{len(paths):,} files{skipped}", file=sys.stderr)
  _announce_records(readers, text_key)

  # 4. An older version read each name, and no line that is skipped now.
  former = None
  if text_key is not None and files.former_digest and len(paths) == len(names) and not lines.count:
    former = sha256(f"{text_key}\n{files.former_digest}".encode())
  return PreparedFiles(str(builder.data_path), fingerprint, former, skipped)


class LocalFiles(tfds.core.GeneratorBasedBuilder, skip_registration=True):
  """TFDS builder of local text files: one split, "train", and one feature, "text"."""

  VERSION = tfds.core.Version("1.0.0")
  # Nothing is downloaded. Without this, TFDS looks for checksums in the folder of this module.
  url_infos = None

  def __init__(self, files: Sequence[_File], strict: bool, **kwargs):
    self._files = files
    self._strict = strict
    super().__init__(**kwargs)

  def _info(self) -> tfds.core.DatasetInfo:
    features = tfds.features.FeaturesDict({"text": tfds.features.Text()})
    metadata = tfds.core.MetadataDict()
    return tfds.core.DatasetInfo(builder=self, features=features, metadata=metadata)

  def _split_generators(self, dl_manager: object) -> dict:
    return {"train": self._generate_examples()}

  def _generate_examples(self) -> Iterator[tuple[bytes, dict]]:
    n_texts = 0
    skipped = Skipped()
    split, is_split = None, False
    folder = _common_folder([file.path for file in self._files])

    for file in progress(self._files, "preparing", " files", disable=False):
      for number, text in file.reader.records(file.path, os.path.relpath(file.path, folder)):
        if isinstance(text, BadRecord):
          if self._strict:
            raise BadRecord(f"{text}; without --strict it is skipped")
          skipped += Skipped(1, str(text))

        # TFDS shuffles by a hash of these keys. Relative paths keep the order when a folder moves.
        elif text:
          n_texts += 1
          yield os.fsencode(f"{file.key}:{number}".replace("\\", "/")), {"text": text}

        if isinstance(file.reader, SplitText):
          split = file.reader.separator
          is_split = is_split or number > 0

    if not n_texts:
      raise ValueError(f"{len(self._files):,} files match and none holds text{skipped}")
    if split and not is_split:
      raise ValueError(
        f"no text holds {split.decode()[:40]!r}, so nothing is split there; see --split_on"
      )
    # TFDS writes this into the dataset's folder, before the folder gets its name.
    self.info.metadata["skipped"] = skipped.to_json()


def _prepare(folder: str, files: list[_File], strict: bool) -> LocalFiles:
  """Writes the dataset to disk, unless it is there, and opens it. Raises ValueError if it cannot.

  Of two processes that prepare one corpus, one waits for the other.
  """

  def build() -> LocalFiles:
    return LocalFiles(files, strict, data_dir=folder, file_format="array_record")

  try:
    builder = build()
    # Opened anew: when the first one looked, another process may not have been done.
    if builder.data_path.exists():
      return build()
  except Exception as error:
    # What TFDS finds in a damaged folder, it raises as whatever its parsers raise.
    raise ValueError(_damaged(folder, error)) from error
  with _prepare_lock(str(builder.data_path.parent)):
    download_and_prepare(builder)
  return build()


def _skipped_lines(builder: LocalFiles) -> Skipped:
  """What the dataset's folder says of lines that are not in it. Raises ValueError with the path."""
  try:
    return Skipped.from_json(builder.info.metadata["skipped"])
  except Exception as error:
    # As above: its metadata is read only now.
    raise ValueError(_damaged(builder.data_path, error)) from error


def _damaged(folder: str | os.PathLike, error: Exception) -> str:
  reason = first_line(error, limit=200)
  return f"{folder} cannot be read: {reason}; remove that folder and run this again"


@contextlib.contextmanager
def _prepare_lock(folder: str) -> Iterator[None]:
  """Keeps other processes from preparing the same dataset; what a killed one left is removed."""
  if "://" in folder:
    yield
    return
  busy = f"another process is preparing {folder}; waiting for it"
  with file_lock(pathlib.Path(folder, "lock"), busy, wait=True):
    for stale in pathlib.Path(folder).glob("incomplete.*"):
      shutil.rmtree(stale, ignore_errors=True)
    yield


def download_and_prepare(builder: tfds.core.DatasetBuilder) -> None:
  """TFDS's writing of the dataset, without its messages. Raises ValueError if that fails."""
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


@dataclasses.dataclass(frozen=True)
class _HashedFiles:
  """The files with text in them, and the SHA-256 of their names and contents.

  `digest` knows the files by their names in the folder that all are in. `former_digest` knows them
  by their absolute names; None where an older version would have read them differently.
  """

  files: list[_File]
  digest: str
  former_digest: str | None
  skipped: Skipped


def _read_and_hash(readers: dict[str, Reader], strict: bool) -> _HashedFiles:
  """Reads all files. Raises ValueError if none holds text, BadRecord for the first fault."""
  hashes = {}
  skipped = Skipped()
  for path, reader in readers.items():
    try:
      digest = reader.digest(path)
    except BadRecord as error:
      if strict:
        raise BadRecord(f"{error}; without --strict it is skipped") from error
      skipped += Skipped(1, str(error))
      continue
    if digest is not None:
      hashes[path] = digest
  if not hashes:
    names = str(skipped) or f": {summarize(readers, 3)}"
    raise ValueError(f"{len(readers):,} files match and none holds text{names}")

  # Names count too: the order of the documents depends on them. So does a reading that older
  # versions did not have: they took the same bytes for something else.
  folder = _common_folder(list(hashes))
  by_relative_name = hashlib.sha256()
  by_absolute_name = hashlib.sha256()
  for path, digest in hashes.items():
    digest = _new_reading(path, readers[path]) + digest
    by_relative_name.update(os.fsencode(f"{os.path.relpath(path, folder)}\n{digest}\n"))
    by_absolute_name.update(os.fsencode(f"{path}\n{digest}\n"))

  # Only lower-case .jsonl was read as records.
  is_same = all(path.endswith(".jsonl") == path.lower().endswith(".jsonl") for path in hashes)
  former_digest = by_absolute_name.hexdigest() if is_same else None
  files = _name_keys({path: readers[path] for path in hashes}, folder)
  return _HashedFiles(files, by_relative_name.hexdigest(), former_digest, skipped)


def _new_reading(path: str, reader: Reader) -> str:
  """What the fingerprint says of a reading; "" for those that there were from the beginning."""
  is_old = {
    "text": True,
    "lines": path.lower().endswith(".jsonl"),
    "list": isinstance(reader, JsonList) and reader.text_key is None,
  }
  if is_old.get(reader.kind) and not compression_suffix(path):
    return ""
  return f"{reader.kind} {compression_suffix(path)} "


def _name_keys(readers: dict[str, Reader], folder: str) -> list[_File]:
  """The files, with what the keys of their documents begin with.

  Records get the keys that they would have in a .jsonl file, and compressed files those of their
  content, so that the same documents have the same order in every format. Where two files would
  have the same keys, the second one has its own name.
  """
  names = {path: os.path.relpath(path, folder) for path in readers}
  taken = set(names.values())
  files = []
  for path, reader in readers.items():
    key = decompressed_name(names[path])
    if _new_reading(path, reader) and reader.kind != "text":
      key = f"{os.path.splitext(key)[0]}.jsonl"
    key = names[path] if key in taken else key
    taken.add(key)
    files.append(_File(path, reader, key))
  return files


def _announce_records(readers: dict[str, Reader], text_key: str | None) -> None:
  """Says which .json files are read as records: by their names they might be texts, too."""
  if text_key is None:
    return
  paths = []
  for path, reader in readers.items():
    if decompressed_name(path).lower().endswith(".json") and not isinstance(reader, WholeText):
      paths.append(path)
  if paths:
    print(
      f"{len(paths):,} .json files hold records, each with a document under {text_key!r}: "
      f"{summarize(paths, 3)}",
      file=sys.stderr,
    )


def _common_folder(paths: Sequence[str]) -> str:
  return os.path.dirname(os.path.commonprefix(paths))
