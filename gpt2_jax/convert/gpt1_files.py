# SPDX-License-Identifier: Apache-2.0
"""GPT-1's checkpoint as OpenAI published it: params_shapes.json and params_0.npy to params_9.npy.

The files are one row of float32 numbers, cut into ten parts of about one size: the position
embeddings, the token embeddings, and each layer's tensors. A matrix is [1, in, out] there. The
number of heads is stated nowhere: a head has 64 columns, as GPT-1's have.
"""

import dataclasses
import itertools
import json
import math
import pathlib
import re
import tokenize

import numpy as np

from gpt2_jax.convert import names
from gpt2_jax.convert.vocabulary import read_vocabulary
from gpt2_jax.convert.weights import DTYPES, Weights, add_zero_biases
from gpt2_jax.files import atomic_write, first_line, parse_json, progress, read_text, summarize
from gpt2_jax.model import ModelConfig
from gpt2_jax.tokenizer import OWN_TOKENIZER
from gpt2_jax.tokenizer.gpt1_bpe import OPENAI_FILES, TASK_TOKENS, Gpt1Bpe

SHAPES = "params_shapes.json"
N_FILES = 10
HEAD_SIZE = 64

# The tensors of a layer, in the order of its graph.
LAYER = ("attn.c_attn.w", "attn.c_attn.b", "attn.c_proj.w", "attn.c_proj.b", "ln_1.g", "ln_1.b")
LAYER += ("mlp.c_fc.w", "mlp.c_fc.b", "mlp.c_proj.w", "mlp.c_proj.b", "ln_2.g", "ln_2.b")


def read(path: pathlib.Path) -> Weights:
  """Reads the weights of OpenAI's folder, each tensor when it is asked for.

  Raises ValueError for shapes that no GPT-1 has, and for files that do not hold what they say.
  """
  # 1. The shapes say what the model is.
  shapes = _stated_shapes(path / SHAPES)
  config = _model_config(shapes, path / SHAPES)
  stated = _file_shapes(config)
  for number, (name, expected) in enumerate(stated.items()):
    if shapes[number] != expected:
      raise ValueError(
        f"{path / SHAPES} has {str(shapes[number])[:60]} as tensor {number}, and in a GPT-1 of "
        f"width {config.n_embd} that is {name}, {expected}"
      )

  # 2. The numbers, one after another over all files.
  parts = _open_parts(path)
  sizes = [math.prod(shape) for shape in stated.values()]
  actual = sum(map(len, parts))
  if actual != sum(sizes):
    raise ValueError(
      f"{path} has {actual:,} numbers in its {len(parts)} files params_*.npy, and {SHAPES} asks "
      f"for {sum(sizes):,}; fetch them again"
    )
  starts = dict(zip(stated, itertools.accumulate(sizes, initial=0), strict=False))

  def read_tensor(name):
    shape = stated[name]
    tensor = _read_range(parts, starts[name], starts[name] + math.prod(shape)).reshape(shape)
    return tensor[0] if names.is_matrix(name) else tensor

  tokenizer = read_vocabulary(path, config.n_vocab)
  return Weights(config, read_tensor, tokenizer, f"{path} (OpenAI's GPT-1)")


def write(weights: Weights, path: pathlib.Path, dtype: str = "float32") -> None:
  """Writes OpenAI's folder, which its train.py and `read` load. Raises ValueError for a model that
  it has no place for."""
  check_writable_config(weights.config)
  weights = add_zero_biases(weights)
  shapes = _file_shapes(weights.config)
  total = sum(math.prod(shape) for shape in shapes.values())
  with atomic_write(path) as folder:
    folder.mkdir()
    text = "[" + ", ".join(str(list(shape)) for shape in shapes.values()) + "]"
    (folder / SHAPES).write_text(text)
    if isinstance(weights.tokenizer, Gpt1Bpe):
      contents = (weights.tokenizer.vocabulary, weights.tokenizer.merges)
      for name, content in zip(OPENAI_FILES, contents, strict=True):
        (folder / name).write_text(content, encoding="utf-8")
    elif weights.tokenizer is not None:
      (folder / OWN_TOKENIZER).write_text(json.dumps(weights.tokenizer.to_json()))

    # Each file is written in place, so that only one tensor is in memory.
    bounds = [total * part // N_FILES for part in range(N_FILES + 1)]
    parts, place = [], 0
    for number, (start, stop) in enumerate(itertools.pairwise(bounds)):
      part = folder / f"params_{number}.npy"
      mapped = np.lib.format.open_memmap(part, "w+", DTYPES[dtype], (stop - start,))
      parts.append(mapped)

    for name, shape in progress(shapes.items(), "writing"):
      tensor = np.asarray(weights.read(name), DTYPES[dtype]).reshape(-1)
      for part, start in zip(parts, bounds, strict=False):
        first, last = max(place, start), min(place + len(tensor), start + len(part))
        if first < last:
          part[first - start : last - start] = tensor[first - place : last - place]
      place += math.prod(shape)
    for part in parts:
      part.flush()


def add_task_tokens(weights: Weights, seed: int = 0) -> Weights:
  """A GPT-1 with _start_, _delimiter_ and _classify_ behind its vocabulary, for its paper's tasks.

  Their embeddings are N(0, 0.02^2). Raises ValueError for a GPT-2, and where they are there.
  """
  config, tokenizer = weights.config, weights.tokenizer
  if config.family != "gpt1" or not isinstance(tokenizer, Gpt1Bpe):
    raise ValueError(
      f"{weights.source} is no GPT-1 with its tokenizer: the tokens of tasks are GPT-1's"
    )
  if tokenizer.vocab_size != config.n_vocab:
    raise ValueError(
      f"{weights.source} has {config.n_vocab:,} embeddings for {tokenizer.vocab_size:,} tokens; "
      f"new tokens would not stand behind both"
    )
  shape = (len(TASK_TOKENS), config.n_embd)
  rows_VD = np.random.default_rng(seed).normal(0.0, 0.02, shape).astype(np.float32)

  def read_tensor(name):
    tensor = weights.read(name)
    return np.concatenate([tensor, rows_VD]) if name == "wte" else tensor

  return Weights(
    dataclasses.replace(config, n_vocab=config.n_vocab + len(TASK_TOKENS)),
    read_tensor,
    tokenizer.with_tokens(TASK_TOKENS),
    f"{weights.source}, with {', '.join(TASK_TOKENS)}",
  )


def check_writable_config(config: ModelConfig) -> None:
  """Raises ValueError unless OpenAI's GPT-1 files can hold the model."""
  if config.family != "gpt1":
    raise ValueError("params_*.npy hold a GPT-1, and this is a GPT-2; take --format=hf or orbax")
  if config.head_size != HEAD_SIZE:
    raise ValueError(
      f"params_*.npy do not state the heads, which have {HEAD_SIZE} columns there, and the model's "
      f"have {config.head_size}; take --format=hf or orbax"
    )


def check_writable_dtype(dtype: str) -> None:
  """Raises ValueError for a dtype that NumPy's files do not have."""
  if dtype == "bfloat16":
    raise ValueError("there is no bfloat16 in NumPy's files; take float32 or float16")


def _stated_shapes(path: pathlib.Path) -> list[list[int]]:
  """The shapes of params_shapes.json. Raises ValueError for anything but lists of sizes."""
  payload = parse_json(read_text(path), str(path))
  shapes = payload if isinstance(payload, list) else []
  for shape in shapes or [None]:
    # The type itself, since True is an int to isinstance.
    is_shape = isinstance(shape, list) and shape and all(type(n) is int for n in shape)
    if not is_shape or not all(0 < n <= 10**7 for n in shape):
      raise ValueError(f"{path} has {str(shape)[:60]} where the shape of a tensor has to be")
  return shapes


def _model_config(shapes: list[list[int]], path: pathlib.Path) -> ModelConfig:
  """The config of shapes; they begin with the two tables [n_ctx, D] and [n_vocab, D]."""
  n_layer, rest = divmod(len(shapes) - 2, len(LAYER))
  tables = shapes[:2]
  is_gpt1 = n_layer > 0 and not rest and all(len(shape) == 2 for shape in tables)
  if not is_gpt1 or tables[0][1] != tables[1][1] or tables[0][1] % HEAD_SIZE:
    raise ValueError(
      f"{path} has {len(shapes)} shapes from {summarize(tables, each=30)} on, and GPT-1's are "
      f"positions [n_ctx, D], tokens [n_vocab, D] and {len(LAYER)} a layer, D a multiple of "
      f"{HEAD_SIZE}"
    )
  (n_ctx, D), (n_vocab, _) = tables
  sizes = {"n_vocab": n_vocab, "n_ctx": n_ctx, "n_embd": D, "n_layer": n_layer}
  sizes["n_head"] = D // HEAD_SIZE
  rates = dict.fromkeys(("embd_pdrop", "attn_pdrop", "resid_pdrop"), 0.1)
  return names.config_from_sizes(sizes, str(path), family="gpt1", **rates)


def _file_shapes(config: ModelConfig) -> dict[str, list[int]]:
  """The tensors of the files by their canonical names, in their order."""
  canonical = names.shapes(dataclasses.replace(config, use_bias=True))
  order = ["wpe", "wte"]
  for layer in range(config.n_layer):
    order += [f"h.{layer}.{name}" for name in LAYER]
  shapes = {}
  for name in order:
    shapes[name] = [1, *canonical[name]] if names.is_matrix(name) else list(canonical[name])
  return shapes


def _open_parts(path: pathlib.Path) -> list[np.ndarray]:
  """The arrays of params_0.npy, params_1.npy and so on, not read yet."""
  numbers = []
  for file in path.glob("params_*.npy"):
    if number := re.fullmatch(r"params_(\d{1,4})\.npy", file.name):
      numbers.append(int(number[1]))
  if not numbers or sorted(numbers) != list(range(len(numbers))):
    raise ValueError(
      f"{path} has {SHAPES} and the files params_*.npy number {summarize(sorted(numbers), 12)}; "
      f"OpenAI's are 0 to {N_FILES - 1}: fetch them again"
    )
  return [_open_part(path / f"params_{number}.npy") for number in range(len(numbers))]


def _open_part(path: pathlib.Path) -> np.ndarray:
  try:
    part = np.load(path, mmap_mode="r", allow_pickle=False)
  # NumPy reads the header as Python's tokens where it is no literal.
  except (ValueError, OSError, EOFError, tokenize.TokenError) as error:
    raise ValueError(f"{path} is no whole .npy file ({first_line(error, 120)})") from error
  if not isinstance(part, np.ndarray) or part.ndim != 1 or part.dtype not in DTYPES.values():
    kind = f"{part.dtype} {list(part.shape)}" if isinstance(part, np.ndarray) else "an archive"
    raise ValueError(f"{path} is {kind[:60]}, and a part of GPT-1 is one row of floats")
  return part


def _read_range(parts: list[np.ndarray], start: int, stop: int) -> np.ndarray:
  """Numbers [start, stop) of all parts in a row."""
  pieces, begin = [], 0
  for part in parts:
    first, last = max(start, begin), min(stop, begin + len(part))
    if first < last:
      pieces.append(np.array(part[first - begin : last - begin], np.float32))
    begin += len(part)
  return np.concatenate(pieces)
