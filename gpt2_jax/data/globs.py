# SPDX-License-Identifier: Apache-2.0
"""Globs with commas between them, as the files that they match: each once, whatever its names."""

import collections
import glob
import os
import re
import sys
from collections.abc import Iterator

from gpt2_jax.files import summarize, user_path


def expand_globs(patterns: str) -> list[str]:
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


def drop_other_names(paths: list[str]) -> list[str]:
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
