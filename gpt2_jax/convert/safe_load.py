# SPDX-License-Identifier: Apache-2.0
"""Safe loading of untrusted files: torch files and pickles, none of which can run code."""

import pathlib
import pickle
import warnings
import zipfile

from gpt2_jax.convert.names import CAUSAL_MASK
from gpt2_jax.files import first_line, read_json_object

PICKLED = (
  "it is no torch file of tensors alone (a pickle may run code, so nothing else in it is read)"
)

# A zip in which members expand to more than that many times the file is made to fill a memory.
MAX_EXPANSION = 10


def check_there(path: pathlib.Path) -> None:
  """Raises FileNotFoundError unless the file is there."""
  if not path.is_file():
    raise FileNotFoundError(f"{path} is not there; the checkpoint is not complete without it")


def read_json(path: pathlib.Path) -> dict:
  """The object in a JSON file of a checkpoint. Raises OSError or ValueError with the path."""
  check_there(path)
  return read_json_object(path)


def import_torch(path: pathlib.Path):
  """Imports torch, which only `path` needs. Raises ImportError that says how to install it."""
  try:
    import torch
  except ImportError as error:
    raise ImportError(
      f"{path} is a torch file: pip install 'gpt2_jax[convert]', or convert it where torch is"
    ) from error
  return torch


def read_torch(path: pathlib.Path):
  """Reads what torch.save wrote: tensors and plain values only, memory-mapped from the file.

  The CRC-32 of all that is in the file is checked first. Compressed files are read, too, but not
  mapped. Raises ValueError for anything else, unread.
  """
  torch = import_torch(path)
  try:
    can_map = _is_zip(path) and _check_zip(path)
    # torch warns of what it then refuses: the error says it all.
    with warnings.catch_warnings(action="ignore"):
      return torch.load(path, map_location="cpu", weights_only=True, mmap=can_map)
  except (FileNotFoundError, PermissionError):
    raise
  except pickle.UnpicklingError as error:
    raise ValueError(f"{path} is refused: {PICKLED}") from error
  except Exception as error:
    # Any kind: a damaged file may raise anything.
    raise ValueError(
      f"{path} cannot be read; it is damaged or no torch file ({first_line(error, 120)}); "
      f"fetch it again"
    ) from error


def _check_zip(path: pathlib.Path) -> bool:
  """Checks the CRC-32 of every member of a zip; returns whether torch can map it.

  torch itself looks at no CRC, and maps the compressed bytes of a compressed member.
  """
  with zipfile.ZipFile(path) as archive:
    members = archive.infolist()

    # 1. The directory. torch looks names up without regard to case, and takes the first.
    if len({member.filename.casefold() for member in members}) < len(members):
      raise ValueError("two members have one name")
    expanded = sum(member.file_size for member in members)
    if expanded > MAX_EXPANSION * path.stat().st_size:
      raise ValueError(f"it expands to {expanded:,} bytes, over {MAX_EXPANSION} times its size")

    # 2. The content. torch.serialization.set_crc32_options(False) writes 0 for every CRC, which
    #    then says nothing.
    if any(member.CRC for member in members):
      for member in members:
        with archive.open(member) as content:
          # Raises BadZipFile at the end of a member with another CRC.
          while content.read(1 << 24):
            pass
    return all(member.compress_type == zipfile.ZIP_STORED for member in members)


def check_tensors(state_dict, path: pathlib.Path) -> None:
  """Raises ValueError unless the value is a dictionary of dense float tensors by name.

  Causal masks may be of any dtype.
  """
  torch = import_torch(path)
  fault = f"{path} holds no dictionary of tensors by name"
  if not isinstance(state_dict, dict):
    raise ValueError(fault)
  for name, tensor in state_dict.items():
    if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
      raise ValueError(fault)

  floats = (torch.float32, torch.float16, torch.bfloat16)
  for name, tensor in state_dict.items():
    has_values = tensor.layout == torch.strided and not tensor.is_meta
    if not has_values or (tensor.dtype not in floats and not CAUSAL_MASK.search(name)):
      raise ValueError(
        f"{name[:80]} in {path} is {tensor.dtype}, {tensor.layout}; "
        f"it takes plain floats of 16 or 32 bits"
      )


def _is_zip(path: pathlib.Path) -> bool:
  """Whether torch 1.6 or later saved the file: those are zips, and only a zip can be mapped."""
  with open(path, "rb") as file:
    return file.read(2) == b"PK"


class _PlainUnpickler(pickle.Unpickler):
  """Refuses every import, which is how a pickle calls code."""

  def find_class(self, module, name):
    raise pickle.UnpicklingError(f"it asks for {module}.{name}")


def read_plain_pickle(path: pathlib.Path):
  """Safe unpickling of dicts, lists, strings and numbers.

  Raises ValueError at anything that would have to be imported.
  """
  with open(path, "rb") as file:
    try:
      return _PlainUnpickler(file).load()
    except Exception as error:
      # Any kind: a damaged pickle may raise anything.
      raise ValueError(
        f"{path} is refused: more than plain values, or damaged ({first_line(error)})"
      ) from error
