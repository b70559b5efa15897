# SPDX-License-Identifier: Apache-2.0
"""Safe loading of untrusted files: torch files and pickles, none of which can run code."""

import dataclasses
import functools
import pathlib
import pickle
import re
import warnings
import zipfile
from collections.abc import Callable

import numpy as np

from gpt2_jax.files import first_line, read_json_object

PICKLED = (
  "it is no torch file of tensors alone (a pickle may run code, so nothing else in it is read)"
)

# A zip in which members expand to more than that many times the file is made to fill a memory.
MAX_EXPANSION = 10


# Values that a checkpoint holds beside its tensors, and that nobody needs: losses of NumPy, a
# generator's state, paths, and settings. Their classes are not loaded, whatever they are.
PLAIN = re.compile(
  r"(numpy\._?core\.multiarray\.(scalar|_reconstruct)|numpy\.(dtype|ndarray|[a-z]+\d+|bool_?))$"
  r"|numpy\.dtypes\.\w+$|pathlib\.(_local\.)?\w*Path$|argparse\.Namespace$|types\.SimpleNamespace$"
  r"|([A-Za-z_]\w*\.)+\w*(Config|Args|Arguments|Params|HParams)$"
)
# In a file of before torch 1.6, where the names are not looked up first.
PLAIN_NAMES = (
  *("argparse.Namespace", "types.SimpleNamespace", "pathlib.PosixPath", "numpy.dtype"),
  *("numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar", "numpy.ndarray"),
)


class PlainObject:
  """What stands in a torch file for an object of a class that is not loaded: its fields alone."""

  def __new__(cls, *args):
    self = object.__new__(cls)
    self.fields = {}
    return self

  def __init__(self, *args):
    pass

  def __setstate__(self, state):
    if isinstance(state, dict):
      self.fields = dict(state)


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
    plain = torch.serialization.safe_globals(_plain_classes(path))
    with warnings.catch_warnings(action="ignore"), plain:
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


def _plain_classes(path: pathlib.Path) -> list[type]:
  """A `PlainObject` for each class that the file names and that PLAIN describes.

  torch takes them for the classes of those names.
  """
  torch = import_torch(path)
  full_names = set(PLAIN_NAMES)
  if _is_zip(path):
    full_names |= set(torch.serialization.get_unsafe_globals_in_checkpoint(path))

  classes = []
  for full_name in sorted(filter(PLAIN.match, full_names)):
    module, _, name = full_name.rpartition(".")
    classes.append(type(name, (PlainObject,), {"__module__": module, "__qualname__": name}))
  return classes


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


@dataclasses.dataclass(frozen=True)
class StoredTensor:
  """A tensor in a file: its shape and dtype are known, its values are loaded by `read`.

  `dtype` is the file's own word for it.
  """

  shape: tuple[int, ...]
  dtype: str
  read: Callable[[], np.ndarray]


def stored_tensors(state_dict, path: pathlib.Path) -> dict[str, StoredTensor]:
  """The tensors of a state dict by name. Raises ValueError if the value is no state dict."""
  torch = import_torch(path)
  fault = f"{path} holds no dictionary of tensors by name"
  if not isinstance(state_dict, dict):
    raise ValueError(fault)

  stored = {}
  for name, tensor in state_dict.items():
    if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
      raise ValueError(fault)
    read = functools.partial(_to_numpy, tensor)
    stored[name] = StoredTensor(tuple(tensor.shape), _dtype(tensor), read)
  return stored


def _dtype(tensor) -> str:
  """The dtype of a torch tensor, with its layout where it is no plain array in memory."""
  if tensor.is_meta:
    return f"{tensor.dtype} without values"
  is_plain = str(tensor.layout) == "torch.strided" and not tensor.is_quantized
  return str(tensor.dtype) if is_plain else f"{tensor.dtype}, {tensor.layout}"


def _to_numpy(tensor) -> np.ndarray:
  """The values of a torch tensor: float64 as it is, any other float as float32."""
  tensor = tensor.detach()
  return (tensor if tensor.element_size() == 8 else tensor.float()).numpy()


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
