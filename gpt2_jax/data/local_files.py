# SPDX-License-Identifier: Apache-2.0
"""Local text files (.txt, .jsonl, any other) as a TFDS dataset, prepared once for each content.

This module imports TFDS, so it is itself imported only where such a corpus is opened.
"""

import collections
import contextlib
import dataclasses
import glob
import hashlib
import io
import os
import pathlib
import re
import shutil
import sys
from collections.abc import Iterator, Sequence

from gpt2_jax.data.example_records import write_record
from gpt2_jax.data.import_tfds import import_tfds
from gpt2_jax.data.skipped import BadRecord, Skipped
from gpt2_jax.files import (
  file_lock,
  first_line,
  parse_json,
  parse_json_object,
  progress,
  sha256,
  summarize,
  user_path,
)

tfds = import_tfds()

# A record is a protocol buffer: less than 2 GiB.
MAX_BYTES = (1 << 31) - 1


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


def prepare_local_files(
  patterns: str, text_key: str | None, data_dir: str | None, strict: bool
) -> PreparedFiles:
  """Prepares the files that match globs. Errors are those of `file_documents`."""
  names = _expand_globs(patterns)
  paths = _read_once(names)
  if text_key is None:
    _check_record_files(paths)
  files = _read_and_hash(paths, strict)

  # The content names the folder: a changed file is another dataset, an unchanged one is there. The
  # number is the version of how files become documents.
  kind = "examples 1" if text_key is None else f"2\n{text_key}"
  fingerprint = sha256(f"{kind}\n{files.digest}".encode())
  data_dir = user_path(data_dir or tfds.core.constants.DATA_DIR)
  folder = os.path.join(data_dir, "local_files", fingerprint[:16])
  builder = _prepare(folder, files.paths, text_key, strict)
  lines = _skipped_lines(builder)
  skipped = files.skipped + lines
  if strict and lines.count:
    raise BadRecord(f"{lines.first}; without --strict it is skipped")
  if skipped.count:
    print(f"{len(paths):,} files{skipped}", file=sys.stderr)

  # An older version read each name, and no line that is skipped now.
  former = None
  if text_key is not None and files.former_digest and len(paths) == len(names) and not lines.count:
    former = sha256(f"{text_key}\n{files.former_digest}".encode())
  return PreparedFiles(str(builder.data_path), fingerprint, former, skipped)


class LocalFiles(tfds.core.GeneratorBasedBuilder, skip_registration=True):
  """TFDS builder of local text files: one split, "train", and one feature, "text"."""

  VERSION = tfds.core.Version("1.0.0")
  # Nothing is downloaded. Without this, TFDS looks for checksums in the folder of this module.
  url_infos = None

  def __init__(self, paths: Sequence[str], text_key: str | None, strict: bool, **kwargs):
    self._paths = paths
    self._text_key = text_key
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
    folder = _common_folder(self._paths)
    for path in progress(self._paths, "preparing", " files", disable=False):
      name = os.path.relpath(path, folder)
      if self._text_key is None and not _is_jsonl(path):
        records = _read_list(path, name)
      else:
        records = _read_records(path, name, self._text_key)
      for number, text in records:
        if isinstance(text, BadRecord):
          if self._strict:
            raise BadRecord(f"{text}; without --strict it is skipped")
          skipped += Skipped(1, str(text))

        # TFDS shuffles by a hash of these keys. Relative paths keep the order when a folder moves.
        elif text:
          n_texts += 1
          yield os.fsencode(f"{name}:{number}".replace("\\", "/")), {"text": text}

    if not n_texts:
      raise ValueError(f"{len(self._paths):,} files match and none holds text{skipped}")
    # TFDS writes this into the dataset's folder, before the folder gets its name.
    self.info.metadata["skipped"] = skipped.to_json()


def _prepare(folder: str, paths: list[str], text_key: str | None, strict: bool) -> LocalFiles:
  """Writes the dataset to disk, unless it is there, and opens it. Raises ValueError if it cannot.

  Of two processes that prepare one corpus, one waits for the other.
  """

  def build() -> LocalFiles:
    return LocalFiles(paths, text_key, strict, data_dir=folder, file_format="array_record")

  try:
    builder = build()
    if builder.data_path.exists():
      return builder
  except Exception as error:
    # What TFDS finds in a damaged folder, it raises as whatever its parsers raise.
    raise ValueError(_damaged(folder, error)) from error
  with _prepare_lock(str(builder.data_path.parent)):
    _download_and_prepare(builder)
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


def _download_and_prepare(builder: LocalFiles) -> None:
  """TFDS's writing of the dataset, without its messages."""
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


def _read_records(
  path: str, name: str, text_key: str | None
) -> Iterator[tuple[int, str | BadRecord]]:
  """The texts of a file, numbered; for a line that holds none, why not, as `name`:line.

  The number makes the key of a document unique in its file.
  """
  with open(path, "rb") as file:
    if not _is_jsonl(path):
      yield 0, file.read().decode("utf-8")
      return

    # Blank lines are no records. Other lines have a number, even if they hold no text: whoever
    # mends one does not shuffle the others.
    number = 0
    for line_number, line in enumerate(_lines(file, path), 1):
      if not line.strip():
        continue
      try:
        yield number, _json_text(line, text_key, f"{name}:{line_number}")
      except BadRecord as error:
        yield number, error
      number += 1


def _read_list(path: str, name: str) -> Iterator[tuple[int, str | BadRecord]]:
  """The records of a file that is one JSON list; for an item that is no record, why not."""
  with open(path, "rb") as file:
    records = parse_json(file.read().decode("utf-8-sig"), path)
  if not isinstance(records, list):
    raise ValueError(f"{path} is no list of examples; write one JSON object a line into a .jsonl")
  for number, record in enumerate(records):
    place = f"{name}, item {number + 1}"
    try:
      if not isinstance(record, dict):
        raise BadRecord(f"{place} is a {type(record).__name__}, not an object of names and values")
      yield number, write_record(record, place)
    except BadRecord as error:
      yield number, error


def _check_record_files(paths: Sequence[str]) -> None:
  """Raises ValueError for a file that holds no records."""
  for path in paths:
    if not path.lower().endswith((".jsonl", ".json")):
      raise ValueError(
        f"{path} holds no examples: they are lines of a .jsonl file, or a list in a .json file; "
        "text is tokenized with --files"
      )


def _json_text(line: bytes, text_key: str | None, place: str) -> str:
  """The text of a line of JSON, or all of it as a record. `place` names the line in errors."""
  try:
    # Some editors begin a file with a byte order mark.
    record = parse_json_object(line.decode("utf-8-sig"), place)
  except UnicodeDecodeError as error:
    raise BadRecord(f"{place} is not UTF-8 at byte {error.start:,} of the line") from error
  except ValueError as error:
    raise BadRecord(str(error)) from error

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


def _lines(file: io.BufferedReader, path: str) -> Iterator[bytes]:
  """The lines of a file. Raises ValueError for one that does not fit into a record."""
  while line := file.readline(MAX_BYTES):
    if len(line) == MAX_BYTES:
      raise ValueError(f"{path} has a line of 2 GiB or more, a record must have less; split it")
    yield line


def _is_jsonl(path: str) -> bool:
  return path.lower().endswith(".jsonl")


def _common_folder(paths: Sequence[str]) -> str:
  return os.path.dirname(os.path.commonprefix(paths))


def _expand_globs(patterns: str) -> list[str]:
  """The absolute paths of the files that match, sorted, each once."""
  paths = set()
  dangling = []
  for pattern in filter(None, map(str.strip, patterns.split(","))):
    matches = list(_glob(user_path(pattern)))
    files = list(filter(os.path.isfile, matches))
    dangling += [match for match in matches if not os.path.exists(match)]

    # Each pattern must match something: a typo in one of several should not go unnoticed.
    if not files:
      raise FileNotFoundError(
        f"no file matches {pattern[:200]!r}; quote the pattern, and ** crosses folders"
      )
    paths.update(map(os.path.abspath, files))
  if not paths:
    raise FileNotFoundError(f"no file in {patterns[:200]!r}: give globs with commas between them")
  if dangling:
    print(f"symlinks that lead nowhere, left out: {summarize(dangling)}", file=sys.stderr)
  return sorted(paths)


def _glob(pattern: str) -> Iterator[str]:
  """What a glob matches, ** across folders. Unlike Python's, it enters no folder a second time.

  A symlink to a parent would show it the same files 40 times, and two of them 2 ** 40 times.
  """
  # At the first ** that is a whole component: only there does it cross folders.
  head, *rest = re.split(r"(?:^|(?<=/))\*\*(?:/|$)", pattern, maxsplit=1)
  if not rest:
    yield from glob.iglob(pattern)
    return
  for top in glob.iglob(head) if head else [""]:
    for folder in _folders(top):
      yield from _glob(os.path.join(glob.escape(folder), rest[0] or "*"))


def _folders(top: str) -> Iterator[str]:
  """A folder and those in it, each once, but hidden ones; symlinks come after all others."""
  if not os.path.isdir(top or "."):
    return
  seen = set()
  waiting = collections.deque([top])
  linked = collections.deque()
  while waiting or linked:
    folder = waiting.popleft() if waiting else linked.popleft()
    status = os.stat(folder or ".")
    if (status.st_dev, status.st_ino) in seen:
      continue
    seen.add((status.st_dev, status.st_ino))
    yield folder

    with os.scandir(folder or ".") as entries:
      inside = sorted((entry.name, entry.is_symlink()) for entry in entries if entry.is_dir())
    for name, is_symlink in inside:
      if not name.startswith("."):
        (linked if is_symlink else waiting).append(os.path.join(folder, name))


def _read_once(paths: list[str]) -> list[str]:
  """The paths, each file once: of several names, the one that is no symlink, or is shortest."""
  names = {}
  folders = {}
  for path in paths:
    # A folder holds many files: one look at it is enough.
    folder, name = os.path.split(path)
    if folder not in folders:
      folders[folder] = os.path.realpath(folder)
    is_link = os.path.islink(path)
    real = os.path.realpath(path) if is_link else os.path.join(folders[folder], name)
    names.setdefault(real, []).append((is_link, path.count("/"), path))

  if len(names) < len(paths):
    print(f"{len(paths):,} names lead to {len(names):,} files; each is read once", file=sys.stderr)
  return sorted(min(candidates)[-1] for candidates in names.values())


@dataclasses.dataclass(frozen=True)
class _HashedFiles:
  """The files with text in them, and the SHA-256 of their names and contents.

  `digest` knows the files by their names in the folder that all are in. `former_digest` knows them
  by their absolute names; None where an older version would have read them differently.
  """

  paths: list[str]
  digest: str
  former_digest: str | None
  skipped: Skipped


def _read_and_hash(paths: list[str], strict: bool) -> _HashedFiles:
  """Reads all files. Raises ValueError if none holds text, BadRecord for the first fault."""
  hashes = {}
  skipped = Skipped()
  for path in paths:
    try:
      digest = _hash_jsonl(path) if _is_jsonl(path) else _hash_text(path)
    except BadRecord as error:
      if strict:
        raise BadRecord(f"{error}; without --strict it is skipped") from error
      skipped += Skipped(1, str(error))
      continue
    if digest is not None:
      hashes[path] = digest
  if not hashes:
    names = str(skipped) or f": {summarize(paths, 3)}"
    raise ValueError(f"{len(paths):,} files match and none holds text{names}")

  # Names count too: the order of the documents depends on them.
  folder = _common_folder(list(hashes))
  by_relative_name = hashlib.sha256()
  by_absolute_name = hashlib.sha256()
  for path, digest in hashes.items():
    by_relative_name.update(os.fsencode(f"{os.path.relpath(path, folder)}\n{digest}\n"))
    by_absolute_name.update(os.fsencode(f"{path}\n{digest}\n"))

  # Only lower-case .jsonl was read as records.
  is_same = all(path.endswith(".jsonl") == _is_jsonl(path) for path in hashes)
  former_digest = by_absolute_name.hexdigest() if is_same else None
  return _HashedFiles(list(hashes), by_relative_name.hexdigest(), former_digest, skipped)


def _hash_text(path: str) -> str | None:
  """SHA-256 of a text file; None for one without text. Raises BadRecord if it is not UTF-8."""
  with open(path, "rb") as file:
    content = file.read(MAX_BYTES + 1)
  if len(content) > MAX_BYTES:
    size = os.path.getsize(path)
    raise ValueError(f"{path} has {size:,} bytes, a document must have less than 2 GiB; split it")
  try:
    content.decode("utf-8")
  except UnicodeDecodeError as error:
    raise BadRecord(f"{path} is not UTF-8 at byte {error.start:,}") from error
  return sha256(content) if content.strip() else None


def _hash_jsonl(path: str) -> str | None:
  """SHA-256 of a file of lines; None if all of them are blank. Its lines are looked at later."""
  with open(path, "rb") as file:
    if not any(line.strip() for line in _lines(file, path)):
      return None
  return sha256(pathlib.Path(path))
