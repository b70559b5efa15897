# SPDX-License-Identifier: Apache-2.0
"""llm.c model files: a header of 256 int32, then all parameters; read and written.

Version 3 holds float32, version 5 bfloat16.
"""

import contextlib
import fcntl
import json
import math
import os
import pathlib
from collections.abc import Iterator

import ml_dtypes
import numpy as np

from gpt2_jax.convert import names
from gpt2_jax.convert.safe_load import read_json
from gpt2_jax.convert.vocabulary import check_tokenizer, checked, default_tokenizer
from gpt2_jax.convert.weights import Weights, add_zero_biases
from gpt2_jax.files import atomic_write, progress
from gpt2_jax.model import ModelConfig
from gpt2_jax.sharding import padded
from gpt2_jax.tokenizer import Gpt2Bpe, Tokenizer, from_json

MAGIC = 20240326  # the file's first int32
HEADER = 256
SIZES = ("n_ctx", "n_vocab", "n_layer", "n_head", "n_embd")  # in the header's order
DTYPE_OF_VERSION = {3: np.dtype("<f4"), 5: np.dtype(ml_dtypes.bfloat16)}
VERSION_OF_DTYPE = {"float32": 3, "bfloat16": 5}


def read(path: pathlib.Path) -> Weights:
  """Reads the weights of an llm.c file.

  Raises ValueError for another version, and if the file is not as long as its header says.
  """
  config, dtype, padded_vocab = _read_header(path)
  shapes = names.shapes(config)
  offsets = {}
  offset = 4 * HEADER
  for name, shape in shapes.items():
    offsets[name] = offset
    # Only wte is padded in the file, to a multiple of 128 rows.
    stored_shape = (padded_vocab, config.n_embd) if name == "wte" else shape
    offset += math.prod(stored_shape) * dtype.itemsize

  size = path.stat().st_size
  if size != offset:
    raise ValueError(
      f"{path} has {size:,} bytes, and its header speaks of {offset:,}; fetch it again"
    )

  def read_tensor(name):
    shape = shapes[name]
    flat = np.fromfile(path, dtype, math.prod(shape), offset=offsets[name])
    return names.linear_layout(name, flat.reshape(names.linear_shape(name, shape)))

  return Weights(config, read_tensor, _read_tokenizer(path, config), f"{path} (llm.c)")


def _read_header(path: pathlib.Path) -> tuple[ModelConfig, np.dtype, int]:
  """Config, dtype of the parameters, and rows of wte. Raises ValueError if they cannot be."""
  # A file that ends in its header reads as zeros, which are no version and no size.
  with open(path, "rb") as file:
    header = np.frombuffer(file.read(4 * HEADER).ljust(4 * HEADER, b"\0"), "<i4")
  version, *sizes, padded_vocab = header[1:8].tolist()
  if version not in DTYPE_OF_VERSION:
    raise ValueError(
      f"{path} is of llm.c's version {version}; 3 (float32) and 5 (bfloat16) hold a model"
    )

  by_name = dict(zip(SIZES, sizes, strict=True))
  # Errors list the sizes in the order of every other format.
  by_name = {name: by_name[name] for name in ("n_vocab", "n_ctx", "n_embd", "n_head", "n_layer")}
  config = names.config_from_sizes(by_name, f"the header of {path}")
  if padded_vocab < config.n_vocab:
    raise ValueError(
      f"the header of {path} pads {config.n_vocab:,} tokens to {padded_vocab:,} rows; "
      f"fetch it again"
    )
  return config, DTYPE_OF_VERSION[version], padded_vocab


def _read_tokenizer(path: pathlib.Path, config: ModelConfig) -> Tokenizer | None:
  extra_file = _tokenizer_path(path)
  if not extra_file.is_file():
    return default_tokenizer(config.n_vocab)

  with checked(extra_file):
    tokenizer = from_json(read_json(extra_file))
  check_tokenizer(tokenizer, config.n_vocab, extra_file)
  return tokenizer


def _tokenizer_path(path: pathlib.Path) -> pathlib.Path:
  """A file next to llm.c's for a tokenizer other than GPT-2's, which that has no room for."""
  return path.with_name(path.name + ".tokenizer.json")


def write(weights: Weights, path: pathlib.Path, dtype: str = "float32") -> None:
  """Writes an llm.c file; absent biases are zero.

  Raises ValueError for what llm.c's model cannot compute.
  """
  config = weights.config
  if config.gelu != "tanh":
    raise ValueError(
      f"{weights.source} has the {config.gelu} GELU, and llm.c computes the tanh one"
    )
  check_dtype(dtype)

  # 1. The header.
  version = VERSION_OF_DTYPE[dtype]
  padded_vocab = padded(config.n_vocab, 128)
  sizes = [getattr(config, name) for name in SIZES]
  header = np.zeros(HEADER, "<i4")
  header[:8] = [MAGIC, version, *sizes, padded_vocab]

  # 2. The parameters in the name table's order, a tensor at a time.
  weights = add_zero_biases(weights)
  with contextlib.ExitStack() as publishing, atomic_write(path) as partial:
    with open(partial, "wb") as file:
      file.write(header.tobytes())
      for name in progress(names.shapes(weights.config), "writing"):
        tensor = names.linear_layout(name, weights.read(name))
        tensor = np.ascontiguousarray(tensor, DTYPE_OF_VERSION[version])
        file.write(tensor.tobytes())
        if name == "wte":
          padding = (padded_vocab - config.n_vocab) * config.n_embd
          file.write(bytes(padding * tensor.itemsize))

    # 3. The tokenizer, before the model's file gets its name: a model is never without it. The
    #    lock is held until both are there: of two writers, one must not give the model and the
    #    other the tokenizer.
    publishing.enter_context(_folder_lock(path.parent))
    check_absent(path)
    if not isinstance(weights.tokenizer, Gpt2Bpe | None):
      with atomic_write(_tokenizer_path(path)) as extra_file:
        extra_file.write_text(json.dumps(weights.tokenizer.to_json()))


def check_dtype(dtype: str) -> None:
  """Raises ValueError for a dtype that no version of the format holds."""
  if dtype not in VERSION_OF_DTYPE:
    raise ValueError(f"llm.c has no {dtype}; it is {' or '.join(VERSION_OF_DTYPE)}")


def check_absent(path: pathlib.Path) -> None:
  """Raises FileExistsError if the file is there, or a tokenizer's that would be taken for its."""
  for file in (path, _tokenizer_path(path)):
    if file.exists():
      raise FileExistsError(f"{file} is there already; take another name, or move it away")


@contextlib.contextmanager
def _folder_lock(folder: pathlib.Path) -> Iterator[None]:
  """Waits for the lock of a folder, and holds it; without effect where a filesystem has none."""
  descriptor = os.open(folder, os.O_RDONLY)
  try:
    with contextlib.suppress(OSError):
      fcntl.flock(descriptor, fcntl.LOCK_EX)
    yield
  finally:
    os.close(descriptor)
