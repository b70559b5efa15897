# SPDX-License-Identifier: Apache-2.0
"""Datasets of evaluation in a folder on gs://, which every host of a sweep can read."""

import dataclasses
import pathlib
import shutil
import tempfile

from gpt2_jax.evaluate.sources import DatasetRows, Source
from gpt2_jax.evaluate.sources import load as load_local
from gpt2_jax.files import local_path
from gpt2_jax.runs.workdir import as_path, cloud_errors, is_remote


def is_file(data: str) -> bool:
  """Whether `data` is one file, local or on gs://, and no folder. Raises as `load` does."""
  if not is_remote(data):
    return local_path(data).is_file()
  with cloud_errors(data):
    return as_path(data).is_file()


def load(source: Source, data: str | None = None, tfds_dir: str | None = None) -> DatasetRows:
  """Loads all rows of a source as `sources.load` does; `data` may be on gs://.

  Raises what that raises, and OSError if gs:// cannot be reached.
  """
  if data is None or not is_remote(data):
    return load_local(source, data, tfds_dir)

  # The readers open local files. What they say speaks of the place that was given.
  with tempfile.TemporaryDirectory(prefix="gpt2_jax_") as folder:
    try:
      rows = load_local(source, _copy(source, data, pathlib.Path(folder)), tfds_dir)
    except FileNotFoundError as error:
      raise FileNotFoundError(str(error).replace(folder, data)) from error
    except ValueError as error:
      raise ValueError(str(error).replace(folder, data)) from error
    return dataclasses.replace(rows, origin=rows.origin.replace(folder, data.rstrip("/")))


def _copy(source: Source, data: str, folder: pathlib.Path) -> str:
  """Copies a source's published files to a local folder; returns what takes the place of `data`.

  As for a local `data` they lie in its folder of the source's name, or in itself, or it is the very
  file. Nothing is copied where one of them is missing.
  """
  root = as_path(data)
  with cloud_errors(data):
    if root.is_file():
      _copy_companions(source, root.parent, folder)
      return str(_copy_file(root, folder / root.name))

    for place in (root / source.name, root):
      paths = _published_files(source, place)
      for path in paths:
        _copy_file(path, folder / source.name / path.relative_to(place))
        _copy_companions(source, path.parent, folder / source.name / path.parent.relative_to(place))
      if paths:
        break
  return str(folder)


def _published_files(source: Source, place) -> list:
  """A source's files in a folder, as `sources.find_files` finds them on a disk."""
  alone = [(pattern,) for pattern in source.other_names]
  for patterns in (source.files, source.alternatives, *alone):
    matches = [sorted(place.glob(pattern)) for pattern in patterns]
    if all(matches) and matches:
      return sum(matches, start=[])
  return []


def _copy_companions(source: Source, place, folder: pathlib.Path) -> None:
  """Copies the files that the reader opens beside the published ones."""
  for pattern in source.companions:
    for path in place.glob(pattern):
      _copy_file(path, folder / path.name)


def _copy_file(path, target: pathlib.Path) -> pathlib.Path:
  target.parent.mkdir(parents=True, exist_ok=True)
  with path.open("rb") as remote, open(target, "wb") as local:
    shutil.copyfileobj(remote, local, 1 << 20)
  return target
