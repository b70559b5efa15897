# SPDX-License-Identifier: Apache-2.0
"""Atomic writes of files and folders, SHA-256, the first line of an error, progress bars."""

import contextlib
import hashlib
import os
import pathlib
import secrets
import shutil
from collections.abc import Iterable, Iterator


@contextlib.contextmanager
def atomic_write(path: pathlib.Path, overwrite: bool = False) -> Iterator[pathlib.Path]:
  """Atomic write: yields a path for a file or a folder, which becomes `path` at the end.

  It is removed if anything goes wrong. Raises FileExistsError if `path` exists, unless `overwrite`
  allows to replace it, which only a file can.
  """
  if path.exists() and not overwrite:
    raise FileExistsError(f"{path} is there already; take another name, or move it away")

  # The name is hidden, and its own for each writer: two of one process may write the same path.
  path.parent.mkdir(parents=True, exist_ok=True)
  partial = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.partial")
  try:
    yield partial
    if overwrite:
      os.replace(partial, path)
    else:
      _publish(partial, path)
  finally:
    _remove(partial)


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


def _remove(path: pathlib.Path) -> None:
  if path.is_dir():
    shutil.rmtree(path)
  path.unlink(missing_ok=True)


def sha256(content: bytes | pathlib.Path) -> str:
  """SHA-256 of bytes, or of a file's content, in hexadecimal digits."""
  if isinstance(content, pathlib.Path):
    with open(content, "rb") as file:
      return hashlib.file_digest(file, "sha256").hexdigest()
  return hashlib.sha256(content).hexdigest()


def first_line(error: BaseException, limit: int = 300) -> str:
  """The first line of an error's text, at most `limit` characters; its class where it has none.

  Libraries raise errors of many lines, with a stack trace or an operation's whole context in them.
  """
  lines = str(error).strip().splitlines() or [type(error).__name__]
  return lines[0][:limit]


def progress(items: Iterable, what: str, unit: str = "it", disable: bool | None = None) -> Iterable:
  """The items under a progress bar on stderr; `disable=None` draws none where that is no terminal.

  The bar is gone when they are through.
  """
  import tqdm

  return tqdm.tqdm(items, desc=what, unit=unit, disable=disable, leave=False)
