# SPDX-License-Identifier: Apache-2.0
"""Files of other people: JSON and pickles that run no code, and output that is whole or absent."""

import contextlib
import json
import os
import pathlib
import pickle
import secrets
import shutil
import warnings
from collections.abc import Iterator

PICKLED = "it is no torch file of tensors alone (a pickle may run code, so nothing else in it is read)"


def reason(error: Exception) -> str:
  """The first line of an error's text."""
  return (str(error).strip().splitlines() or [type(error).__name__])[0]


def check_there(path: pathlib.Path) -> None:
  """Raises FileNotFoundError unless the file is there."""
  if not path.is_file():
    raise FileNotFoundError(f"{path} is not there; the checkpoint is not complete without it")


def read_json(path: pathlib.Path) -> dict:
  """The object in a JSON file. Raises ValueError with the path."""
  check_there(path)
  try:
    found = json.loads(path.read_text(encoding="utf-8"))
  except (ValueError, RecursionError) as error:
    raise ValueError(f"{path} is no JSON ({error})") from error
  if not isinstance(found, dict):
    raise ValueError(f"{path} holds a {type(found).__name__}, not an object of names and values")
  return found


def import_torch(path: pathlib.Path):
  """The module, asked for by name where it is missing."""
  try:
    import torch
  except ImportError as error:
    raise ImportError(f"{path} is a torch file: pip install torch, or convert it where torch is") from error
  return torch


def read_torch(path: pathlib.Path):
  """What torch.save wrote, tensors and plain values only, its tensors mapped from the file. Raises ValueError."""
  torch = import_torch(path)
  try:
    with warnings.catch_warnings(action="ignore"):  # it warns of what it then refuses
      return torch.load(path, map_location="cpu", weights_only=True, mmap=_is_zip(path))
  except pickle.UnpicklingError as error:
    raise ValueError(f"{path} is refused: {PICKLED}") from error
  except Exception as error:  # a damaged file may raise anything
    raise ValueError(f"{path} cannot be read; it is truncated or no torch file") from error


def check_tensors(found, path: pathlib.Path) -> None:
  """Raises ValueError unless `found` is a dictionary of plain tensors by name, floats but for the causal masks."""
  torch = import_torch(path)
  floats = (torch.float32, torch.float16, torch.bfloat16)
  if not isinstance(found, dict) or not all(isinstance(k, str) and hasattr(x, "shape") for k, x in found.items()):
    raise ValueError(f"{path} holds no dictionary of tensors by name")
  for name, x in found.items():
    if x.layout != torch.strided or x.is_meta or (x.dtype not in floats and not name.endswith("bias")):
      raise ValueError(f"{name} in {path} is {x.dtype}, {x.layout}; it takes plain floats of 16 or 32 bits")


def _is_zip(path: pathlib.Path) -> bool:
  with open(path, "rb") as file:
    return file.read(2) == b"PK"  # what torch.save has written since 1.6


class _PlainUnpickler(pickle.Unpickler):
  def find_class(self, module, name):
    raise pickle.UnpicklingError(f"it asks for {module}.{name}")


def read_plain_pickle(path: pathlib.Path):
  """A pickle of dicts, lists, strings and numbers. Raises ValueError at anything that would have to be imported."""
  with open(path, "rb") as file:
    try:
      return _PlainUnpickler(file).load()
    except Exception as error:  # a damaged pickle may raise anything
      raise ValueError(f"{path} is refused: more than plain values, or damaged ({reason(error)})") from error


@contextlib.contextmanager
def whole(path: pathlib.Path) -> Iterator[pathlib.Path]:
  """A path to write a file or a folder to, which becomes `path` at the end, or is removed if anything goes wrong.

  Raises FileExistsError if `path` is there: nothing is overwritten.
  """
  if path.exists():
    raise FileExistsError(f"{path} is there already; take another name, or move it away")
  path.parent.mkdir(parents=True, exist_ok=True)
  partial = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.partial")
  try:
    yield partial
    try:
      if partial.is_dir():
        partial.rename(path)  # which fails if there is a folder with something in it
      else:
        os.link(partial, path)  # which fails if there is anything; a rename would overwrite it
    except OSError as error:
      if path.exists():
        raise FileExistsError(f"{path} has been written by another process meanwhile, and is left as it is") from error
      raise
  finally:
    _remove(partial)


def _remove(path: pathlib.Path) -> None:
  if path.is_dir():
    shutil.rmtree(path)
  path.unlink(missing_ok=True)
