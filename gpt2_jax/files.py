# SPDX-License-Identifier: Apache-2.0
"""Atomic writes, locks, paths that people type, JSON that nobody vouches for, SHA-256, the
code's commit, progress, lines about long waits."""

import contextlib
import fcntl
import functools
import hashlib
import json
import os
import pathlib
import secrets
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterable, Iterator


@contextlib.contextmanager
def atomic_write(path: pathlib.Path, overwrite: bool = False) -> Iterator[pathlib.Path]:
  """Atomic write: yields a path for a file or a folder, which becomes `path` at the end.

  It is removed if anything goes wrong; what a killed process left of the same name is removed, too.
  Raises FileExistsError if `path` exists, unless `overwrite` allows to replace it, which only a
  file can.
  """
  remove_stale(path)
  if path.exists() and not overwrite:
    raise FileExistsError(f"{path} is there already; take another name, or move it away")

  path.parent.mkdir(parents=True, exist_ok=True)
  with _partial_folder(path) as folder:
    partial = folder / path.name
    yield partial
    if overwrite:
      os.replace(partial, path)
    else:
      _publish(partial, path)


@contextlib.contextmanager
def _partial_folder(path: pathlib.Path) -> Iterator[pathlib.Path]:
  """A hidden folder beside `path`, each writer's own: two of one process may write the same path.

  It is locked while its writer lives. The kernel drops the lock with the process, however that
  ends.
  """
  folder, descriptor = _locked_folder(path)
  try:
    yield folder
  finally:
    os.close(descriptor)
    shutil.rmtree(folder, ignore_errors=True)


def _locked_folder(path: pathlib.Path) -> tuple[pathlib.Path, int]:
  """A new hidden folder beside `path`, and the open descriptor that locks it."""
  while True:
    folder = path.with_name(f".{path.name[:150]}.{secrets.token_hex(8)}.partial")
    folder.mkdir()
    # Another writer may take it for stale until it is locked; then the next name is tried.
    with contextlib.suppress(FileNotFoundError):
      descriptor = os.open(folder, os.O_RDONLY)
      # Some filesystems have no locks. There nothing is ever taken for stale.
      with contextlib.suppress(OSError):
        fcntl.flock(descriptor, fcntl.LOCK_EX)
      if folder.exists():
        return folder, descriptor
      os.close(descriptor)


def remove_stale(path: pathlib.Path) -> None:
  """Removes what killed writers of `path` left beside it: their folders, which nobody locks.

  One that was killed after it gave the file its name leaves an empty folder. Raises nothing.
  """
  prefix = f".{path.name[:150]}."
  leftovers = []
  with contextlib.suppress(OSError):
    for folder in path.parent.iterdir():
      if folder.name.startswith(prefix) and folder.name.endswith(".partial"):
        leftovers.append(folder)

  for folder in leftovers:
    # A writer that ends, or starts, at this moment is no fault.
    with contextlib.suppress(OSError):
      descriptor = os.open(folder, os.O_RDONLY)
      try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(folder)
      finally:
        os.close(descriptor)


def _publish(partial: pathlib.Path, path: pathlib.Path) -> None:
  """Gives the file or folder its name, unless another writer has taken it meanwhile."""
  try:
    if partial.is_dir():
      # fails if there is a folder with something in it
      partial.rename(path)
    else:
      # fails if there is anything; a rename would overwrite it
      os.link(partial, path)
  except OSError as error:
    if path.exists():
      raise FileExistsError(
        f"{path} has been written by another process meanwhile, and is left as it is"
      ) from error
    raise


@contextlib.contextmanager
def file_lock(path: pathlib.Path, busy: str, wait: bool = False) -> Iterator[None]:
  """Holds an exclusive lock (flock) on a local file, made if need be, while the context lasts.

  If another process, or another part of this one, holds it: raises OSError with the text `busy`,
  or prints that text and waits. The kernel drops the lock when the process ends, however it does:
  no lock is left behind.
  """
  path.parent.mkdir(parents=True, exist_ok=True)
  with open(path, "a") as file:
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
      if not wait:
        raise OSError(busy) from error
      print(busy, file=sys.stderr)
      fcntl.flock(file, fcntl.LOCK_EX)
    yield


def check_writable(path: pathlib.Path, nbytes: int = 0) -> None:
  """Raises OSError unless a local file or folder of that size can be written at `path`.

  The folders above it need not be there: the nearest that is counts.
  """
  folder = path.absolute().parent
  while not folder.exists():
    folder = folder.parent
  if not folder.is_dir():
    raise NotADirectoryError(f"{path} cannot be written: {folder} is a file, not a folder")
  if not os.access(folder, os.W_OK | os.X_OK):
    raise PermissionError(f"{path} cannot be written: no right to write into {folder}")

  free = shutil.disk_usage(folder).free
  if free < nbytes:
    raise OSError(
      f"{path} takes {nbytes / 2**20:,.1f} MiB, and {folder} has {free / 2**20:,.1f} MiB free; "
      f"make room, or take another disk"
    )


def user_path(path: str) -> str:
  """A path as a person typed it, with ~ expanded; a URL such as gs://BUCKET/PATH stays as it is.

  Raises ValueError for an empty path, and for the home of a user that this machine does not have.
  """
  if not str(path).strip():
    raise ValueError("a path is empty; give a file or a folder")
  if "\0" in str(path):
    raise ValueError(f"{str(path)[:80]!r} is no path: it has a NUL in it")
  expanded = os.path.expanduser(path)
  if expanded.startswith("~") and not os.path.lexists(expanded):
    raise ValueError(
      f"{path[:80]}: this machine has no such user; give the path in full, or as ./~"
    )
  return expanded


def local_path(path: str) -> pathlib.Path:
  """`user_path` for what cannot be on gs://. Raises ValueError for a URL, too."""
  if "://" in str(path):
    raise ValueError(f"{path[:80]} is a URL, and only a local path will do; copy it here, or there")
  return pathlib.Path(user_path(path))


def check_folder(folder: pathlib.Path) -> None:
  """Checks that a folder can be made or written into, and makes nothing.

  Raises OSError with the reason.
  """
  parent = folder
  while not os.path.lexists(parent):
    parent = parent.parent
  if not parent.is_dir():
    raise NotADirectoryError(f"{parent} is no folder; take another path, or move it away")
  if not os.access(parent, os.W_OK | os.X_OK):
    raise PermissionError(f"nothing can be written into {parent}; take another path")


def read_text(path: pathlib.Path) -> str:
  """A text file's content. Raises ValueError with the path and the place if it is not UTF-8."""
  content = path.read_bytes()
  try:
    return content.decode("utf-8")
  except UnicodeDecodeError as error:
    raise ValueError(f"{path} is not UTF-8 at byte {error.start:,}") from error


def parse_json(text: str | bytes, place: str) -> object:
  """The value of a JSON text. Raises ValueError with the place, for any text, however deep."""
  try:
    return json.loads(text)
  except RecursionError as error:
    raise ValueError(f"{place} is JSON that is nested too deep") from error
  except ValueError as error:
    raise ValueError(f"{place} is no JSON ({error})") from error


def parse_json_object(text: str | bytes, place: str) -> dict:
  """`parse_json` where an object is expected. Raises ValueError for another kind of value."""
  payload = parse_json(text, place)
  if not isinstance(payload, dict):
    raise ValueError(f"{place} holds a {type(payload).__name__}, not an object of names and values")
  return payload


def read_json_object(path: pathlib.Path) -> dict:
  """The object in a JSON file. Raises ValueError with the path."""
  return parse_json_object(read_text(path), str(path))


def sha256(content: bytes | pathlib.Path) -> str:
  """SHA-256 of bytes, or of a file's content, in hexadecimal digits."""
  if isinstance(content, pathlib.Path):
    with open(content, "rb") as file:
      return hashlib.file_digest(file, "sha256").hexdigest()
  return hashlib.sha256(content).hexdigest()


def json_sha256(payload: object) -> str:
  """SHA-256 of a JSON value, however it was written: names in order, one form of each number.

  Of an object's entries `sha256` does not count, for that is where it is kept. Raises ValueError
  for a value that is nested too deep.
  """
  if isinstance(payload, dict):
    payload = {key: value for key, value in payload.items() if key != "sha256"}
  try:
    return sha256(json.dumps(payload, sort_keys=True).encode())
  except RecursionError as error:
    raise ValueError("it is JSON that is nested too deep") from error


@functools.cache
def source_commit() -> str:
  """The git commit of this package's checkout, with `-dirty` behind it if a file was changed.

  Empty for an installed package, or without git.
  """
  root = pathlib.Path(__file__).resolve().parents[1]
  # An environment may lie in another project's checkout, whose commit is not asked for.
  if not (root / ".git").exists():
    return ""
  command = [
    "git",
    "-C",
    str(root),
    "describe",
    "--always",
    "--dirty",
    "--abbrev=40",
    "--exclude=*",
  ]
  try:
    result = subprocess.run(command, capture_output=True, text=True, timeout=30)
  except (OSError, subprocess.TimeoutExpired):
    return ""
  return result.stdout.strip() if result.returncode == 0 else ""


def first_line(error: BaseException, limit: int = 300) -> str:
  """The first line of an error's text, at most `limit` characters; its class where it has none.

  Libraries raise errors of many lines, with a stack trace or an operation's whole context in them.
  """
  lines = str(error).strip().splitlines() or [type(error).__name__]
  return lines[0][:limit]


def summarize(items: Iterable[object], limit: int = 8, each: int = 80) -> str:
  """The first items for a message, long ones without their middle, and how many more there are."""
  texts = [str(item) for item in items]
  shown = []
  for text in texts[:limit]:
    # The end of a path says more than its middle.
    half = each // 2 - 2
    shown.append(text if len(text) <= each else f"{text[:half]}...{text[-half:]}")
  if len(texts) > limit:
    shown.append(f"and {len(texts) - limit:,} more")
  return ", ".join(shown)


def progress(items: Iterable, what: str, unit: str = "it", disable: bool | None = None) -> Iterable:
  """The items under a progress bar on stderr; `disable=None` draws none where that is no terminal.

  The bar is gone when they are through.
  """
  import tqdm

  return tqdm.tqdm(items, desc=what, unit=unit, disable=disable, leave=False)


# False in a run's processes other than the first: all of them wait for the same thing.
_is_announcing = True

# How many waits are shown: of those inside one another, only the outermost says something.
_waits_shown = 0


def announce_if(is_primary: bool) -> None:
  """Makes `announce` silent in this process from now on, unless it is the first of its run."""
  global _is_announcing
  _is_announcing = is_primary


@functools.cache
def note(text: str) -> None:
  """Prints one line on stderr, `note: ...`, once in a process, and only in the first of a run."""
  if _is_announcing and sys.stderr is not None:
    with contextlib.suppress(OSError):
      print(f"note: {text}", file=sys.stderr, flush=True)


@contextlib.contextmanager
def announce(text: str, seconds: float = 3.0) -> Iterator[None]:
  """Prints one line on stderr if the body still runs after `seconds`: "compiling, about a minute".

  What is quicker leaves no trace. Nothing is printed inside another `announce`, and in processes
  other than the first of a run.
  """
  import tqdm

  is_inside = _waits_shown > 0

  def say():
    # A terminal that is gone ends nothing. tqdm's `write` spares a bar that is drawn meanwhile.
    if _is_announcing and not is_inside and sys.stderr is not None:
      with contextlib.suppress(OSError):
        tqdm.tqdm.write(text, file=sys.stderr)
        sys.stderr.flush()

  timer = threading.Timer(seconds, say)
  timer.daemon = True
  timer.start()
  try:
    with shows_wait():
      yield
  finally:
    timer.cancel()


@contextlib.contextmanager
def shows_wait() -> Iterator[None]:
  """Silences `announce` in its body, for callers that show the wait themselves (a spinner)."""
  global _waits_shown
  _waits_shown += 1
  try:
    yield
  finally:
    _waits_shown -= 1
