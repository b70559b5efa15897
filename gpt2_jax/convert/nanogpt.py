# SPDX-License-Identifier: Apache-2.0
"""nanoGPT's ckpt.pt, with meta.pkl beside it where its vocabulary is characters; both ways.

Its model is GPT-2 with the erf GELU, with or without biases.
"""

import pathlib
import pickle

import numpy as np

from gpt2_jax.convert import names
from gpt2_jax.convert.files import check_tensors, import_torch, read_plain_pickle, read_torch, whole
from gpt2_jax.convert.vocabulary import read_vocabulary, write_vocabulary
from gpt2_jax.convert.weights import Weights, progress
from gpt2_jax.model import ModelConfig
from gpt2_jax.tokenizer import Characters, Gpt2Bpe

FIELDS = {"vocab_size": "n_vocab", "block_size": "n_ctx", "n_embd": "n_embd", "n_head": "n_head", "n_layer": "n_layer"}


def recognizes(path: pathlib.Path) -> bool:
  if not path.is_file():
    return (path / "ckpt.pt").is_file()
  with open(path, "rb") as file:
    return file.read(2) in (b"PK", b"\x80\x02")  # torch.save's zip, and its older pickle


def read(path: pathlib.Path) -> Weights:
  """The weights of a ckpt.pt, or of the folder that holds it. Raises ValueError, or ImportError without torch."""
  path = path / "ckpt.pt" if path.is_dir() else path
  saved = read_torch(path)
  if not isinstance(saved, dict) or not {"model", "model_args"} <= saved.keys():
    raise ValueError(f"{path} is no nanoGPT checkpoint (model, model_args); give a Hugging Face folder whole")
  check_tensors(saved["model"], path)
  config = _model_config(saved, path)
  tensors = {name.removeprefix("_orig_mod.").removeprefix("transformer."): x for name, x in saved["model"].items()}
  tensors = {name: x for name, x in tensors.items() if not names.MASKS.match(name)}
  head = tensors.pop("lm_head.weight", None)
  expected = {names.foreign(name, names.TORCH): _turned(name, shape) for name, shape in names.shapes(config).items()}
  names.check({name: tuple(x.shape) for name, x in tensors.items()}, expected, str(path))
  if head is not None and not head.equal(tensors["wte.weight"]):
    raise ValueError(names.UNTIED.format(path))

  def read_tensor(name):
    tensor = tensors[names.foreign(name, names.TORCH)].detach().float().numpy()
    return tensor.T if names.is_matrix(name) else tensor

  return Weights(config, read_tensor, _tokenizer(path.with_name("meta.pkl"), config), f"{path} (nanoGPT)")


def _model_config(saved: dict, path: pathlib.Path) -> ModelConfig:
  given, knobs = (saved.get(name) if isinstance(saved.get(name), dict) else {} for name in ("model_args", "config"))
  if missing := [name for name in FIELDS if name not in given]:
    raise ValueError(f"the model_args of {path} say nothing of {', '.join(missing)}")
  sizes = {ours: given[theirs] for theirs, ours in FIELDS.items()}
  use_bias, gelu = bool(given.get("bias", True)), knobs.get("gelu", "erf")
  return names.model_config(sizes, f"{path}'s model_args", use_bias=use_bias, gelu=gelu)


def _turned(name: str, shape: tuple) -> tuple:
  return shape[::-1] if names.is_matrix(name) else shape


def _tokenizer(meta: pathlib.Path, config: ModelConfig):
  """Characters of meta.pkl; without it GPT-2's tokens if the vocabulary is as large, as sample.py assumes there."""
  if not meta.is_file():
    return read_vocabulary(meta.parent, config.n_vocab)
  found = read_plain_pickle(meta)
  characters = found.get("itos") if isinstance(found, dict) else None
  if not isinstance(characters, dict) or list(characters) != list(range(len(characters))):
    raise ValueError(f"{meta} is no vocabulary of characters (itos, from 0 on)")
  if not all(isinstance(x, str) and len(x) == 1 for x in characters.values()) or len(characters) > config.n_vocab:
    raise ValueError(f"{meta} is no vocabulary of at most {config.n_vocab:,} single characters")
  found = Characters("".join(characters.values()))
  try:
    found.encode("")
  except ValueError as error:
    raise ValueError(f"{meta}: {error}") from error
  return found


def write(weights: Weights, path: pathlib.Path, dtype: str = "float32", other_gelu: bool = False) -> None:
  """Writes a folder of ckpt.pt, and of meta.pkl for characters.

  nanoGPT computes the erf GELU only: a tanh model is written with `other_gelu` alone, which `read` remembers and
  nanoGPT does not know. Raises ValueError otherwise.
  """
  torch = import_torch(path)
  config = weights.config
  if config.gelu != "erf" and not other_gelu:
    raise ValueError(
      f"{weights.source} has the {config.gelu} GELU, and nanoGPT computes the erf one: its logits would differ; "
      f"--other_gelu writes it all the same"
    )
  args = {theirs: getattr(config, ours) for theirs, ours in FIELDS.items()} | {"bias": config.use_bias, "dropout": 0.0}
  model = {}
  with whole(path) as folder:
    folder.mkdir()
    for name in progress(names.shapes(config), "reading"):
      tensor = weights.read(name).astype(np.float32)
      tensor = np.ascontiguousarray(tensor.T if names.is_matrix(name) else tensor)
      model["transformer." + names.foreign(name, names.TORCH)] = torch.from_numpy(tensor).to(getattr(torch, dtype))
    model["lm_head.weight"] = model["transformer.wte.weight"]
    about = {"model_args": args, "iter_num": 0, "best_val_loss": 1e9, "config": {"gelu": config.gelu}}
    torch.save({"model": model} | about, folder / "ckpt.pt")
    if not isinstance(weights.tokenizer, Characters | Gpt2Bpe):
      write_vocabulary(weights.tokenizer, folder, config.n_ctx)  # nanoGPT does not read it, `read` does
    if isinstance(weights.tokenizer, Characters):
      itos = dict(enumerate(weights.tokenizer.alphabet))
      meta = {"vocab_size": len(itos), "itos": itos, "stoi": {c: i for i, c in itos.items()}}
      (folder / "meta.pkl").write_bytes(pickle.dumps(meta))
