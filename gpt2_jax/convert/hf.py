# SPDX-License-Identifier: Apache-2.0
"""Hugging Face checkpoints: config.json with safetensors or pytorch_model.bin, maybe in shards.

Parameters are renamed by names.py, and are not transposed. Both ways: `read` loads such a folder,
`write` makes one that `transformers` loads.
"""

import dataclasses
import functools
import json
import pathlib
import shutil
from collections.abc import Callable

import numpy as np

from gpt2_jax.convert import names
from gpt2_jax.convert.safe_load import check_tensors, check_there, read_json, read_torch
from gpt2_jax.convert.vocabulary import read_vocabulary, write_vocabulary
from gpt2_jax.convert.weights import DTYPES, Weights, add_zero_biases
from gpt2_jax.files import atomic_write, first_line, progress, summarize
from gpt2_jax.model import ModelConfig
from gpt2_jax.tokenizer import HuggingFace, Tokenizer

GELU = {"gelu_new": "tanh", "gelu_pytorch_tanh": "tanh", "gelu_fast": "tanh", "gelu": "erf"}

# What transformers can do to a GPT-2 and this model does not: of each the value that is GPT-2's.
FIXED = {
  "scale_attn_weights": True,
  "scale_attn_by_inverse_layer_idx": False,
  "add_cross_attention": False,
  "tie_word_embeddings": True,
  "layer_norm_epsilon": 1e-5,
}
FLOATS = ("F32", "F16", "BF16")  # as safetensors calls them
SHARD = "2GB"  # a shard is held in memory while it is written


@dataclasses.dataclass(frozen=True)
class StoredTensor:
  """A tensor in a file: its shape is known, its values are loaded by `read`."""

  shape: tuple[int, ...]
  read: Callable[[], np.ndarray]


def read(path: pathlib.Path) -> Weights:
  """Reads the weights of a Hugging Face folder.

  Raises ValueError if it is no GPT-2, or not all of one.
  """
  payload = read_json(path / "config.json")
  config = _model_config(payload, path)

  # Old files have bare names; newer ones a prefix. Both may hold the causal mask.
  tensors = {}
  for name, tensor in _open_tensors(path).items():
    name = name.removeprefix("transformer.")
    if not names.CAUSAL_MASK.match(name):
      tensors[name] = tensor
  head = tensors.pop("lm_head.weight", None)

  expected = {}
  for name, shape in names.shapes(config).items():
    expected[names.translate_name(name, names.TORCH)] = shape
  names.check_shapes({name: x.shape for name, x in tensors.items()}, expected, str(path))
  # NaN equals NaN here: that weights are broken does not untie them.
  wte = tensors["wte.weight"]
  if head is not None and not np.array_equal(head.read(), wte.read(), equal_nan=True):
    raise ValueError(names.UNTIED.format(path))

  def read_canonical(name):
    return tensors[names.translate_name(name, names.TORCH)].read()

  tokenizer = _with_end(read_vocabulary(path, config.n_vocab), payload, config)
  return Weights(config, read_canonical, tokenizer, f"{path} (Hugging Face)")


def _with_end(tokenizer: Tokenizer | None, payload: dict, config: ModelConfig) -> Tokenizer | None:
  """The tokenizer whose texts end with config.json's eos_token_id, if that is a token."""
  end = payload.get("eos_token_id")
  is_token = type(end) is int and 0 <= end < config.n_vocab
  if isinstance(tokenizer, HuggingFace) and is_token and end != tokenizer.eot:
    return dataclasses.replace(tokenizer, end=end)
  return tokenizer


def _model_config(payload: dict, path: pathlib.Path) -> ModelConfig:
  """ModelConfig from config.json. Raises ValueError for what departs from GPT-2."""
  if payload.get("model_type") != "gpt2":
    model_type = repr(payload.get("model_type"))[:40]
    raise ValueError(f"{path} holds a model of type {model_type}, not gpt2; this is GPT-2 only")

  # 1. Sizes. The first files called the context n_ctx.
  try:
    sizes = {name: payload[name] for name in ("n_embd", "n_head", "n_layer")}
    sizes["n_vocab"] = payload["vocab_size"]
    sizes["n_ctx"] = payload["n_positions"] if "n_positions" in payload else payload["n_ctx"]
  except KeyError as error:
    raise ValueError(f"{path}/config.json says nothing of {error}") from error

  activation = str(payload.get("activation_function", "gelu_new"))
  gelu = GELU.get(activation, "tanh")
  rates = {name: payload.get(name, 0.0) for name in ("embd_pdrop", "attn_pdrop", "resid_pdrop")}
  config = names.config_from_sizes(sizes, f"{path}/config.json", gelu=gelu, **rates)

  # 2. Variants that transformers computes and this model does not: their logits would be wrong.
  variants = []
  for name, fixed in FIXED.items():
    if payload.get(name, fixed) != fixed:
      variants.append(f"{name}={payload[name]!r}")
  if activation not in GELU:
    variants.append(f"activation_function={activation!r}")
  if payload.get("n_inner") not in (None, 4 * config.n_embd):
    variants.append(f"n_inner={payload['n_inner']!r}")
  if variants:
    raise ValueError(
      f"{path} departs from GPT-2 ({summarize(variants, each=60)}), which this model does not do"
    )
  return config


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
  )


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
  """Every tensor of a safetensors file. Raises ValueError for what is damaged or no floats."""
  # Imported here: `import gpt2_jax` should not load what only this format needs.
  from safetensors import SafetensorError, safe_open

  check_there(path)
  tensors, other_dtypes = {}, {}
  try:
    with safe_open(path, "np") as file:
      for name in file.keys():  # noqa: SIM118
        stored = file.get_slice(name)
        dtype, shape = stored.get_dtype(), tuple(stored.get_shape())
        tensors[name] = StoredTensor(shape, functools.partial(_read_safetensor, path, name))

        # Old files have the causal mask, too, in any dtype.
        if dtype not in FLOATS and not names.CAUSAL_MASK.match(name.removeprefix("transformer.")):
          other_dtypes[name] = dtype
  except SafetensorError as error:
    raise ValueError(
      f"{path} is no whole safetensors file ({first_line(error, 200)}); fetch it again"
    ) from error

  if other_dtypes:
    listed = summarize((f"{name!r} is {dtype}" for name, dtype in other_dtypes.items()), 4)
    raise ValueError(f"{path} has tensors that are no floats of 16 or 32 bits: {listed}")
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
  tensors = read_torch(path)
  check_tensors(tensors, path)

  stored = {}
  for name, tensor in tensors.items():
    stored[name] = StoredTensor(tuple(tensor.shape), functools.partial(_to_numpy, tensor))
  return stored


def _to_numpy(tensor) -> np.ndarray:
  return tensor.detach().float().numpy()


def write(weights: Weights, path: pathlib.Path, dtype: str = "float32") -> None:
  """Writes a Hugging Face folder, which `transformers` and `read` load.

  A model without biases gets biases of zero.
  """
  # Imported here: `import gpt2_jax` should not load what only this format needs.
  import huggingface_hub
  from safetensors.numpy import save_file

  weights = add_zero_biases(weights)
  shapes = names.shapes(weights.config)
  torch_name = {}
  for name in shapes:
    torch_name[name] = "transformer." + names.translate_name(name, names.TORCH)

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
  return FIXED | {
    "activation_function": "gelu_new" if config.gelu == "tanh" else "gelu",
    "architectures": ["GPT2LMHeadModel"],
    "attn_pdrop": config.attn_pdrop,
    "bos_token_id": eot,
    "dtype": dtype,
    "embd_pdrop": config.embd_pdrop,
    "eos_token_id": eot,
    "initializer_range": 0.02,
    "model_type": "gpt2",
    "n_ctx": config.n_ctx,
    "n_embd": config.n_embd,
    "n_head": config.n_head,
    "n_inner": None,
    "n_layer": config.n_layer,
    "n_positions": config.n_ctx,
    "reorder_and_upcast_attn": False,
    "resid_pdrop": config.resid_pdrop,
    "use_cache": True,
    "vocab_size": config.n_vocab,
  }
