# SPDX-License-Identifier: Apache-2.0
"""Hugging Face's folder: config.json, weights as safetensors or pytorch_model.bin, whole or in shards; both ways."""

import dataclasses
import json
import pathlib
import shutil
from collections.abc import Callable

import huggingface_hub
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from gpt2_jax.convert import names
from gpt2_jax.convert.files import check_tensors, check_there, read_json, read_torch, whole
from gpt2_jax.convert.vocabulary import read_vocabulary, write_vocabulary
from gpt2_jax.convert.weights import DTYPES, Weights, progress
from gpt2_jax.model import ModelConfig
from gpt2_jax.tokenizer import HuggingFace

GELU = {"gelu_new": "tanh", "gelu_pytorch_tanh": "tanh", "gelu_fast": "tanh", "gelu": "erf"}
# What transformers can do to a GPT-2 and this model does not: the one value of each that is GPT-2's own.
FIXED = {
  "scale_attn_weights": True,
  "scale_attn_by_inverse_layer_idx": False,
  "add_cross_attention": False,
  "tie_word_embeddings": True,
  "layer_norm_epsilon": 1e-5,
}
SHARD = "2GB"  # files are held in memory while they are written


def recognizes(path: pathlib.Path) -> bool:
  return (path / "config.json").is_file()


def read(path: pathlib.Path) -> Weights:
  """The weights of a folder. Raises ValueError if it is no GPT-2, or not all of one."""
  payload = read_json(path / "config.json")
  config, shapes, read_tensor = _model_config(payload, path), {}, {}
  for name, (shape, read_one) in _tensors(path).items():
    name = name.removeprefix("transformer.")
    if not names.MASKS.match(name):
      shapes[name], read_tensor[name] = shape, read_one
  expected = {names.foreign(name, names.TORCH): shape for name, shape in names.shapes(config).items()}
  head = shapes.pop("lm_head.weight", None)
  names.check(shapes, expected, str(path))
  if head is not None and not np.array_equal(read_tensor["lm_head.weight"](), read_tensor["wte.weight"]()):
    raise ValueError(names.UNTIED.format(path))
  tokenizer, end = read_vocabulary(path, config.n_vocab), payload.get("eos_token_id")
  if isinstance(tokenizer, HuggingFace) and type(end) is int and 0 <= end < config.n_vocab and end != tokenizer.eot:
    tokenizer = dataclasses.replace(tokenizer, end=end)

  def read_canonical(name):
    return read_tensor[names.foreign(name, names.TORCH)]()

  return Weights(config, read_canonical, tokenizer, f"{path} (Hugging Face)")


def _model_config(payload: dict, path: pathlib.Path) -> ModelConfig:
  if payload.get("model_type") != "gpt2":
    raise ValueError(f"{path} holds a model of type {payload.get('model_type')!r}, not gpt2; this is GPT-2 only")
  try:
    sizes = {name: payload[name] for name in ("n_embd", "n_head", "n_layer")}
    sizes["n_vocab"] = payload["vocab_size"]
    sizes["n_ctx"] = payload["n_positions"] if "n_positions" in payload else payload["n_ctx"]
  except KeyError as error:
    raise ValueError(f"{path}/config.json says nothing of {error}") from error
  kind = str(payload.get("activation_function", "gelu_new"))
  rates = {name: payload.get(name, 0.0) for name in ("embd_pdrop", "attn_pdrop", "resid_pdrop")}
  config = names.model_config(sizes, f"{path}/config.json", gelu=GELU.get(kind, "tanh"), **rates)
  other = [f"{name}={payload[name]}" for name, fixed in FIXED.items() if payload.get(name, fixed) != fixed]
  other += [f"activation_function={kind}"] if kind not in GELU else []
  other += [f"n_inner={payload['n_inner']}"] if payload.get("n_inner") not in (None, 4 * config.n_embd) else []
  if other:
    raise ValueError(f"{path} departs from GPT-2 ({', '.join(other)}), which this model does not do")
  return config


def _tensors(path: pathlib.Path) -> dict[str, tuple[tuple, Callable[[], np.ndarray]]]:
  """Shape and reader of every tensor, by the file's own names."""
  for stem, open_file in (("model.safetensors", _safetensors), ("pytorch_model.bin", _torch_tensors)):
    index = path / f"{stem}.index.json"
    if (path / stem).is_file():
      return open_file(path / stem)
    if index.is_file():
      parts = read_json(index).get("weight_map")
      if not isinstance(parts, dict) or not parts or any(pathlib.Path(str(x)).name != x for x in parts.values()):
        raise ValueError(f"{index} names no files, or some outside of its folder")
      found = {}
      for part in sorted(set(parts.values())):
        found |= open_file(path / part)
      return found
  raise FileNotFoundError(f"{path} has neither model.safetensors nor pytorch_model.bin, whole or in shards")


def _safetensors(path: pathlib.Path):
  check_there(path)

  def read_one(name):
    with safe_open(path, "np") as file:  # opened anew for each: what was mapped is given back
      return file.get_tensor(name)

  try:
    with safe_open(path, "np") as file:
      slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
      odd = {name: part.get_dtype() for name, part in slices.items() if part.get_dtype() not in ("F32", "F16", "BF16")}
      if odd := {name: kind for name, kind in odd.items() if not names.MASKS.match(name.removeprefix("transformer."))}:
        raise ValueError(f"{path} has tensors that are no floats of 16 or 32 bits: {odd}")
      return {name: (tuple(part.get_shape()), lambda name=name: read_one(name)) for name, part in slices.items()}
  except SafetensorError as error:
    raise ValueError(f"{path} is no whole safetensors file ({error}); fetch it again") from error


def _torch_tensors(path: pathlib.Path):
  check_there(path)
  tensors = read_torch(path)
  check_tensors(tensors, path)
  return {
    name: (tuple(tensor.shape), lambda tensor=tensor: tensor.detach().float().numpy())
    for name, tensor in tensors.items()
  }


def write(weights: Weights, path: pathlib.Path, dtype: str = "float32") -> None:
  """Writes the folder that `transformers` and `read` load; a model without biases gets biases of zero."""
  config, shapes = weights.config, names.shapes(dataclasses.replace(weights.config, use_bias=True))

  given = names.shapes(config)

  def tensor(name):
    return np.ascontiguousarray(weights.read(name) if name in given else np.zeros(shapes[name]), DTYPES[dtype])

  split = huggingface_hub.split_state_dict_into_shards_factory(
    {name: np.broadcast_to(DTYPES[dtype](0), shape) for name, shape in shapes.items()},
    get_storage_size=lambda x: x.size * x.itemsize,
    filename_pattern="model{suffix}.safetensors",
    max_shard_size=SHARD,
  )
  with whole(path) as folder:
    folder.mkdir()
    write_vocabulary(weights.tokenizer, folder, config.n_ctx)
    torch_name = {name: "transformer." + names.foreign(name, names.TORCH) for name in shapes}
    for file, held in progress(split.filename_to_tensors.items(), "writing"):
      save_file({torch_name[name]: tensor(name) for name in held}, folder / file, metadata={"format": "pt"})
    if split.is_sharded:
      of = {torch_name[name]: file for name, file in split.tensor_to_filename.items()}
      index = {"metadata": split.metadata, "weight_map": of}
      (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
    eot = weights.tokenizer.eot if weights.tokenizer else None
    (folder / "config.json").write_text(json.dumps(_payload(config, dtype, eot), indent=2, sort_keys=True) + "\n")
    for file in folder.glob("*.safetensors"):  # which that library makes readable for their owner alone
      shutil.copymode(folder / "config.json", file)


def _payload(config: ModelConfig, dtype: str, eot: int | None) -> dict:
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
