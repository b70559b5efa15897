# SPDX-License-Identifier: Apache-2.0
"""llm.c's model file: 256 int32 of header, then all parameters, version 3 in float32 and 5 in bfloat16; both ways."""

import dataclasses
import json
import math
import pathlib

import ml_dtypes
import numpy as np

from gpt2_jax.convert import names
from gpt2_jax.convert.files import read_json, whole
from gpt2_jax.convert.vocabulary import usual_tokenizer
from gpt2_jax.convert.weights import Weights, progress
from gpt2_jax.sharding import padded
from gpt2_jax.tokenizer import Gpt2Bpe, from_json

MAGIC = 20240326
DTYPES = {3: np.dtype("<f4"), 5: np.dtype(ml_dtypes.bfloat16)}  # by version
VERSIONS = {"float32": 3, "bfloat16": 5}
HEADER = 256


def recognizes(path: pathlib.Path) -> bool:
  if not path.is_file():
    return False
  with open(path, "rb") as file:
    return file.read(4) == np.int32(MAGIC).tobytes()


def read(path: pathlib.Path) -> Weights:
  """The weights of a file. Raises ValueError for another version, and if the file is not as long as its header says."""
  with open(path, "rb") as file:
    header = np.frombuffer(file.read(4 * HEADER).ljust(4 * HEADER, b"\0"), "<i4")
  version, n_ctx, n_vocab, n_layer, n_head, n_embd, rows = (int(number) for number in header[1:8])
  if version not in DTYPES:
    raise ValueError(f"{path} is of llm.c's version {version}; 3 (float32) and 5 (bfloat16) hold a model")
  sizes = {"n_vocab": n_vocab, "n_ctx": n_ctx, "n_embd": n_embd, "n_head": n_head, "n_layer": n_layer}
  config, dtype = names.model_config(sizes, f"the header of {path}"), DTYPES[version]
  if rows < n_vocab:
    raise ValueError(f"the header of {path} pads {n_vocab:,} tokens to {rows:,} rows; fetch it again")
  shapes, places, size = names.shapes(config), {}, 4 * HEADER
  for name, shape in shapes.items():
    places[name] = size
    size += math.prod(shape if name != "wte" else (rows, n_embd)) * dtype.itemsize
  if path.stat().st_size != size:
    raise ValueError(f"{path} has {path.stat().st_size:,} bytes, and its header speaks of {size:,}; fetch it again")

  def read_tensor(name):
    shape = shapes[name]
    stored = shape[::-1] if names.is_matrix(name) else shape
    tensor = np.fromfile(path, dtype, math.prod(shape), offset=places[name]).reshape(stored)
    return tensor.T if names.is_matrix(name) else tensor

  beside = _tokenizer_path(path)
  tokenizer = from_json(read_json(beside)) if beside.is_file() else usual_tokenizer(n_vocab)
  return Weights(config, read_tensor, tokenizer, f"{path} (llm.c)")


def _tokenizer_path(path: pathlib.Path) -> pathlib.Path:
  """Where a tokenizer other than GPT-2's is kept, for which llm.c's file has no room."""
  return path.with_name(path.name + ".tokenizer.json")


def write(weights: Weights, path: pathlib.Path, dtype: str = "float32") -> None:
  """Writes a file; absent biases are zero. Raises ValueError for what llm.c's model cannot do."""
  config = weights.config
  if config.gelu != "tanh":
    raise ValueError(f"{weights.source} has the {config.gelu} GELU, and llm.c computes the tanh one")
  if dtype not in VERSIONS:
    raise ValueError(f"llm.c has no {dtype}; it is {' or '.join(VERSIONS)}")
  version, rows = VERSIONS[dtype], padded(config.n_vocab, 128)
  header = np.zeros(HEADER, "<i4")
  header[:8] = MAGIC, version, config.n_ctx, config.n_vocab, config.n_layer, config.n_head, config.n_embd, rows
  given, shapes = names.shapes(config), names.shapes(dataclasses.replace(config, use_bias=True))
  with whole(path) as partial, open(partial, "wb") as file:
    file.write(header.tobytes())
    for name, shape in progress(shapes.items(), "writing"):
      tensor = weights.read(name) if name in given else np.zeros(shape)
      tensor = np.ascontiguousarray(tensor.T if names.is_matrix(name) else tensor, DTYPES[version])
      file.write(tensor.tobytes())
      if name == "wte":
        file.write(bytes((rows - config.n_vocab) * config.n_embd * tensor.itemsize))
    if not isinstance(weights.tokenizer, Gpt2Bpe | None):
      with whole(_tokenizer_path(path)) as beside:
        beside.write_text(json.dumps(weights.tokenizer.to_json()))
