# SPDX-License-Identifier: Apache-2.0
"""Hugging Face checkpoints: config.json with safetensors or pytorch_model.bin, maybe in shards.

Parameters are renamed by names.py, and are not transposed. Both ways: `read` loads such a folder,
`write` makes one that `transformers` loads.
"""

import dataclasses
import functools
import json
import pathlib
import re
import shutil
from collections.abc import Callable

import numpy as np

from gpt2_jax.convert import names
from gpt2_jax.convert.match import find_gpt2
from gpt2_jax.convert.safe_load import (
  StoredTensor,
  check_there,
  read_json,
  read_torch,
  stored_tensors,
)
from gpt2_jax.convert.vocabulary import read_vocabulary, write_vocabulary
from gpt2_jax.convert.weights import DTYPES, Weights, add_zero_biases
from gpt2_jax.files import atomic_write, first_line, progress, summarize
from gpt2_jax.model import ModelConfig
from gpt2_jax.tokenizer import HuggingFace, Tokenizer

# The names that transformers has for the two GELUs. Its other activations are other functions:
# gelu_10 is clipped, quick_gelu is a sigmoid.
GELU = {
  "gelu_new": "tanh",
  "gelu_pytorch_tanh": "tanh",
  "gelu_python_tanh": "tanh",
  "gelu_fast": "tanh",
  "gelu_accurate": "tanh",
  "gelu": "erf",
  "gelu_python": "erf",
}

# What transformers can do to a GPT-2 and this model does not: of each the value that is GPT-2's.
FIXED = {
  "scale_attn_weights": True,
  "scale_attn_by_inverse_layer_idx": False,
  "add_cross_attention": False,
  "tie_word_embeddings": True,
  "layer_norm_epsilon": 1e-5,
}
# The folders of transformers' Trainer, and files of weights that are not read.
TRAINER_STEP = re.compile(r"checkpoint-(\d{1,12})$")
OTHER_WEIGHTS = (".h5", ".msgpack", ".gguf", ".onnx", ".pt", ".pth", ".ckpt", ".npz")

# Where training loops (Lightning, DeepSpeed, and those written by hand) put the state dict.
STATE_DICTS = ("state_dict", "model_state_dict", "model", "module")

DEPARTS = "{} departs from GPT-2 ({}), which this model does not do"
SHARD = "2GB"  # a shard is held in memory while it is written


def read(path: pathlib.Path) -> Weights:
  """Reads the weights of a Hugging Face folder.

  Raises ValueError if it is no GPT-2, or not all of one.
  """
  # 1. The config is checked before a file of weights is opened.
  payload = read_json(path / "config.json")
  config = _model_config(payload, path)

  # 2. The tensors by GPT-2's names, whatever stands before them in the file.
  tensors = _open_tensors(path)
  if config.family == "gpt1":
    tensors = names.without_gpt1_names(tensors)
  match = find_gpt2(tensors, str(path))
  if not payload.get("tie_word_embeddings", True) and match.head is None:
    raise ValueError(DEPARTS.format(path, "tie_word_embeddings=False, without an lm_head"))

  expected = {}
  for name, shape in names.shapes(config).items():
    expected[names.translate_name(name, names.TORCH)] = shape
  tensors = match.checked(expected, str(path))

  def read_canonical(name):
    return tensors[names.translate_name(name, names.TORCH)].read()

  tokenizer = _with_end(read_vocabulary(path, config.n_vocab), payload, config)
  weights = Weights(config, read_canonical, tokenizer, f"{path} (Hugging Face)")
  return match.rounded(weights, str(path))


def _with_end(tokenizer: Tokenizer | None, payload: dict, config: ModelConfig) -> Tokenizer | None:
  """The tokenizer whose texts end with config.json's eos_token_id, if that is a token."""
  end = payload.get("eos_token_id")
  is_token = type(end) is int and 0 <= end < config.n_vocab
  if isinstance(tokenizer, HuggingFace) and is_token and end != tokenizer.eot:
    return dataclasses.replace(tokenizer, end=end)
  return tokenizer


def _model_config(payload: dict, path: pathlib.Path) -> ModelConfig:
  """ModelConfig from config.json. Raises ValueError for what departs from GPT-2.

  Whether the head is tied, the tensors say.
  """
  family = _family(payload, path)

  # 1. Sizes. The first files called the context n_ctx.
  try:
    sizes = {name: payload[name] for name in ("n_embd", "n_head", "n_layer")}
    sizes["n_vocab"] = payload["vocab_size"]
    sizes["n_ctx"] = payload["n_positions"] if "n_positions" in payload else payload["n_ctx"]
  except KeyError as error:
    raise ValueError(f"{path}/config.json says nothing of {error}") from error

  # GPT-1's "gelu" is the tanh form, and its other activations are other functions.
  if family == "gpt1":
    activation, known = str(payload.get("afn", "gelu")), {"gelu": "tanh"}
  else:
    activation, known = str(payload.get("activation_function", "gelu_new")), GELU
  gelu = known.get(activation, "tanh")
  rates = {name: payload.get(name, 0.0) for name in ("embd_pdrop", "attn_pdrop", "resid_pdrop")}
  config = names.config_from_sizes(sizes, f"{path}/config.json", gelu=gelu, family=family, **rates)

  # 2. Variants that transformers computes and this model does not: their logits would be wrong.
  variants = []
  for name, fixed in FIXED.items():
    if name != "tie_word_embeddings" and payload.get(name, fixed) != fixed:
      variants.append(f"{name}={payload[name]!r}")
  if activation not in known:
    variants.append(f"{'afn' if family == 'gpt1' else 'activation_function'}={activation!r}")
  if payload.get("n_inner") not in (None, 4 * config.n_embd):
    variants.append(f"n_inner={payload['n_inner']!r}")
  if payload.get("quantization_config"):
    variants.append("quantization_config: its weights are quantized")
  if variants:
    raise ValueError(DEPARTS.format(path, summarize(variants, each=60)))
  return config


def _family(payload: dict, path: pathlib.Path) -> str:
  """Whether a config.json is of a GPT-2 or a GPT-1. Raises ValueError for one of another model.

  The first files, and those of other libraries, name no type: then the architecture says it, or
  the fields of the sizes, whose names are GPT-2's. The tensors have to be GPT-2's in any case.
  """
  model_type, architectures = payload.get("model_type"), payload.get("architectures")
  if model_type is None and architectures:
    first = str(architectures[0]) if isinstance(architectures, list) else ""
    model_type = "gpt2" if first.startswith("GPT2") else architectures
    model_type = "openai-gpt" if first.startswith("OpenAIGPT") else model_type
  elif model_type is None and {"n_embd", "n_head", "n_layer", "vocab_size"} <= payload.keys():
    model_type = "gpt2"
  if model_type not in ("gpt2", "openai-gpt"):
    raise ValueError(
      f"{path} holds a model of type {repr(model_type)[:40]}, not gpt2; this is GPT-2 only "
      f"(and GPT-1, openai-gpt)"
    )
  return "gpt1" if model_type == "openai-gpt" else "gpt2"


def _open_tensors(path: pathlib.Path) -> dict[str, StoredTensor]:
  """Every tensor of a folder by the file's own names, safetensors before pickled weights."""
  for stem, open_file in (
    ("model.safetensors", open_safetensors),
    ("pytorch_model.bin", open_torch),
  ):
    if (path / stem).is_file():
      return open_file(path / stem)

    index = path / f"{stem}.index.json"
    if index.is_file():
      return _open_shards(index, open_file)

  raise FileNotFoundError(
    f"{path} has neither model.safetensors nor pytorch_model.bin, whole or in shards"
    f"{other_weights(path)}"
  )


def other_weights(path: pathlib.Path) -> str:
  """What an error adds where a folder has no weights: those of a Trainer's sub-folders, or of
  another format."""
  steps, files = {}, []
  for entry in sorted(path.iterdir()) if path.is_dir() else ():
    if entry.is_dir() and (number := TRAINER_STEP.match(entry.name)):
      steps[int(number[1])] = entry.name
    elif entry.suffix in OTHER_WEIGHTS:
      files.append(entry.name)

  if steps:
    latest = steps[max(steps)]
    listed = summarize((steps[n] for n in sorted(steps)), 4, each=40)
    return f"; the Trainer's checkpoints are in its folders {listed}: give {path.name}/{latest}"
  return f"; it has {summarize(files, 4, each=40)}, which is not read" if files else ""


def _open_shards(index: pathlib.Path, open_file: Callable) -> dict[str, StoredTensor]:
  """Every tensor of the shards of an index, which have to hold what it says, and nothing else.

  Raises ValueError for a path out of the folder, too.
  """
  # 1. The index is somebody's file: it must not reach any other.
  payload = read_json(index)
  weight_map = payload.get("weight_map")
  fault = f"{index} names no files, or some outside of its folder"
  if not isinstance(weight_map, dict) or not weight_map:
    raise ValueError(fault)
  for file in weight_map.values():
    if not isinstance(file, str) or pathlib.Path(file).name != file or len(file) > 255:
      raise ValueError(fault)

  # 2. The tensors. A name in two shards would be two tensors.
  tensors = {}
  misplaced = []
  for shard in sorted(set(weight_map.values())):
    for name, tensor in open_file(index.with_name(shard)).items():
      if weight_map.get(name) == shard:
        tensors[name] = tensor
      else:
        misplaced.append(f"{name!r} of {shard}")
  misplaced += [repr(name) for name in weight_map if name not in tensors]
  if misplaced:
    raise ValueError(
      f"{index} and its shards do not hold the same tensors: {summarize(misplaced, 4)}; "
      f"fetch them again"
    )

  # 3. The sum of their sizes. That of pickled shards is another: two names may share a tensor.
  metadata = payload.get("metadata")
  stated = metadata.get("total_size") if isinstance(metadata, dict) else None
  if open_file is open_safetensors and stated is not None:
    actual = sum(_data_size(index.with_name(shard)) for shard in set(weight_map.values()))
    if stated != actual:
      raise ValueError(
        f"{index} states {str(stated)[:40]!r} bytes in all, and its shards hold {actual}; "
        f"fetch them again"
      )
  return tensors


def _data_size(path: pathlib.Path) -> int:
  """The bytes of a safetensors file's tensors, which lie behind a header with its length first."""
  with open(path, "rb") as file:
    return path.stat().st_size - 8 - int.from_bytes(file.read(8), "little")


def open_safetensors(path: pathlib.Path) -> dict[str, StoredTensor]:
  """Every tensor of a safetensors file, of any dtype. Raises ValueError for what is damaged."""
  # Imported here: `import gpt2_jax` should not load what only this format needs.
  from safetensors import SafetensorError, safe_open

  check_there(path)
  tensors = {}
  try:
    with safe_open(path, "np") as file:
      for name in file.keys():  # noqa: SIM118
        stored = file.get_slice(name)
        dtype, shape = stored.get_dtype(), tuple(stored.get_shape())
        read_tensor = functools.partial(_read_safetensor, path, name)
        tensors[name] = StoredTensor(shape, dtype, read_tensor)
  except SafetensorError as error:
    raise ValueError(
      f"{path} is no whole safetensors file ({first_line(error, 200)}); fetch it again"
    ) from error
  return tensors


def _read_safetensor(path: pathlib.Path, name: str) -> np.ndarray:
  from safetensors import SafetensorError, safe_open

  # The file is opened for each tensor: closing it gives back the memory that was mapped.
  try:
    with safe_open(path, "np") as file:
      return file.get_tensor(name)
  except SafetensorError as error:
    raise ValueError(
      f"{path} has changed since it was opened ({first_line(error, 200)})"
    ) from error


def open_torch(path: pathlib.Path) -> dict[str, StoredTensor]:
  """Every tensor of a torch file, of which nothing is run (safe_load)."""
  check_there(path)
  saved = read_torch(path)

  # Training loops save the state dict as one entry of several.
  for entry in STATE_DICTS:
    if isinstance(saved, dict) and isinstance(saved.get(entry), dict):
      return stored_tensors(saved[entry], path)
  return stored_tensors(saved, path)


def write(weights: Weights, path: pathlib.Path, dtype: str = "float32") -> None:
  """Writes a Hugging Face folder, which `transformers` and `read` load.

  A model without biases gets biases of zero.
  """
  # Imported here: `import gpt2_jax` should not load what only this format needs.
  import huggingface_hub
  from safetensors.numpy import save_file

  weights = add_zero_biases(weights)
  if weights.config.family == "gpt1" and weights.config.gelu != "tanh":
    raise ValueError("transformers' GPT-1 has the tanh GELU alone, and this model's is erf")
  shapes = names.shapes(weights.config)
  torch_name = {}
  for name in shapes:
    torch_name[name] = "transformer." + names.hugging_face_name(name, weights.config)

  # 1. Plan the shards by size alone: broadcast scalars have a shape and take no memory.
  split = huggingface_hub.split_state_dict_into_shards_factory(
    {name: np.broadcast_to(DTYPES[dtype](0), shape) for name, shape in shapes.items()},
    get_storage_size=lambda x: x.size * x.itemsize,
    filename_pattern="model{suffix}.safetensors",
    max_shard_size=SHARD,
  )

  with atomic_write(path) as folder:
    folder.mkdir()
    write_vocabulary(weights.tokenizer, folder, weights.config.n_ctx)

    # 2. The weights, a shard at a time, and the index that says which shard holds what.
    for file, members in progress(split.filename_to_tensors.items(), "writing"):
      shard = {}
      for name in members:
        shard[torch_name[name]] = np.ascontiguousarray(weights.read(name), DTYPES[dtype])
      save_file(shard, folder / file, metadata={"format": "pt"})
    if split.is_sharded:
      weight_map = {torch_name[name]: file for name, file in split.tensor_to_filename.items()}
      index = {"metadata": split.metadata, "weight_map": weight_map}
      _write_json(index, folder / "model.safetensors.index.json")

    # 3. The config. safetensors makes its files readable for their owner alone: they get the mode
    #    of any other file.
    eot = weights.tokenizer.eot if weights.tokenizer else None
    _write_json(config_json(weights.config, dtype, eot), folder / "config.json")
    for file in folder.glob("*.safetensors"):
      shutil.copymode(folder / "config.json", file)


def _write_json(payload: dict, path: pathlib.Path) -> None:
  path.write_text(json.dumps(payload, indent=2, sort_keys=True) + "\n")


def config_json(config: ModelConfig, dtype: str, eot: int | None) -> dict:
  """The content of config.json, in transformers' own names."""
  if config.family == "gpt1":
    own = {
      "afn": "gelu",
      "architectures": ["OpenAIGPTLMHeadModel"],
      "layer_norm_epsilon": FIXED["layer_norm_epsilon"],
      "model_type": "openai-gpt",
      "tie_word_embeddings": True,
    }
  else:
    own = FIXED | {
      "activation_function": "gelu_new" if config.gelu == "tanh" else "gelu",
      "architectures": ["GPT2LMHeadModel"],
      "model_type": "gpt2",
      "n_inner": None,
      "reorder_and_upcast_attn": False,
      "use_cache": True,
    }
  return own | {
    "attn_pdrop": config.attn_pdrop,
    "bos_token_id": eot,
    "dtype": dtype,
    "embd_pdrop": config.embd_pdrop,
    "eos_token_id": eot,
    "initializer_range": 0.02,
    "n_ctx": config.n_ctx,
    "n_embd": config.n_embd,
    "n_head": config.n_head,
    "n_layer": config.n_layer,
    "n_positions": config.n_ctx,
    "resid_pdrop": config.resid_pdrop,
    "vocab_size": config.n_vocab,
  }
