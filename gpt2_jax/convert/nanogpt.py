# SPDX-License-Identifier: Apache-2.0
"""nanoGPT checkpoints: ckpt.pt, with meta.pkl for a vocabulary of characters; read and written.

Its model is GPT-2 with the erf GELU, with or without biases.
"""

import pathlib
import pickle

import numpy as np

from gpt2_jax.convert import names
from gpt2_jax.convert.safe_load import (
  check_tensors,
  import_torch,
  read_plain_pickle,
  read_torch,
)
from gpt2_jax.convert.vocabulary import read_vocabulary, write_vocabulary
from gpt2_jax.convert.weights import Weights
from gpt2_jax.files import atomic_write, progress
from gpt2_jax.model import ModelConfig
from gpt2_jax.tokenizer import Characters, Gpt2Bpe, Tokenizer

# model_args' name of each size, and this project's
SIZES = {
  "vocab_size": "n_vocab",
  "block_size": "n_ctx",
  "n_embd": "n_embd",
  "n_head": "n_head",
  "n_layer": "n_layer",
}


def read(path: pathlib.Path) -> Weights:
  """Reads the weights of a ckpt.pt, or of the folder that holds it.

  Raises ValueError, or ImportError without torch.
  """
  path = path / "ckpt.pt" if path.is_dir() else path
  saved = read_torch(path)
  if not isinstance(saved, dict) or not {"model", "model_args"} <= saved.keys():
    raise ValueError(
      f"{path} is no nanoGPT checkpoint (model, model_args); give a Hugging Face folder whole"
    )
  check_tensors(saved["model"], path)
  config = _model_config(saved, path)

  # torch.compile prefixes every name; older versions hold the causal mask.
  tensors = {}
  for name, tensor in saved["model"].items():
    name = name.removeprefix("_orig_mod.").removeprefix("transformer.")
    if not names.CAUSAL_MASK.match(name):
      tensors[name] = tensor
  head = tensors.pop("lm_head.weight", None)

  expected = {}
  for name, shape in names.shapes(config).items():
    expected[names.translate_name(name, names.TORCH)] = names.linear_shape(name, shape)
  names.check_shapes({name: tuple(x.shape) for name, x in tensors.items()}, expected, str(path))

  def to_numpy(tensor):
    return tensor.detach().float().numpy()

  # NaN equals NaN here: that weights are broken does not untie them.
  wte = to_numpy(tensors["wte.weight"])
  if head is not None and not np.array_equal(to_numpy(head), wte, equal_nan=True):
    raise ValueError(names.UNTIED.format(path))

  def read_tensor(name):
    tensor = tensors[names.translate_name(name, names.TORCH)]
    return names.linear_layout(name, to_numpy(tensor))

  tokenizer = _read_tokenizer(path.with_name("meta.pkl"), config)
  return Weights(config, read_tensor, tokenizer, f"{path} (nanoGPT)")


def _model_config(saved: dict, path: pathlib.Path) -> ModelConfig:
  """ModelConfig from a checkpoint's model_args. Raises ValueError."""
  model_args = _dict_or_empty(saved.get("model_args"))
  if missing := [name for name in SIZES if name not in model_args]:
    raise ValueError(f"the model_args of {path} say nothing of {', '.join(missing)}")
  sizes = {size: model_args[name] for name, size in SIZES.items()}

  # Checkpoints from before the knob have biases. The GELU is noted by `write` alone.
  use_bias = model_args.get("bias", True)
  if not isinstance(use_bias, bool | int):
    raise ValueError(f"bias in the model_args of {path} is {str(use_bias)[:40]!r}; it is a bool")
  gelu = _dict_or_empty(saved.get("config")).get("gelu", "erf")
  return names.config_from_sizes(sizes, f"{path}'s model_args", use_bias=bool(use_bias), gelu=gelu)


def _dict_or_empty(value) -> dict:
  return value if isinstance(value, dict) else {}


def _read_tokenizer(meta: pathlib.Path, config: ModelConfig) -> Tokenizer | None:
  """Characters of meta.pkl; without it GPT-2's tokens if the vocabulary is as large.

  That is what nanoGPT's sample.py assumes. Raises ValueError for a damaged meta.pkl.
  """
  if not meta.is_file():
    return read_vocabulary(meta.parent, config.n_vocab)

  # The file is somebody's: every property that `Characters` relies on is checked.
  content = read_plain_pickle(meta)
  itos = content.get("itos") if isinstance(content, dict) else None
  if not isinstance(itos, dict) or list(itos) != list(range(len(itos))):
    raise ValueError(f"{meta} is no vocabulary of characters (itos, from 0 on)")
  single = all(isinstance(x, str) and len(x) == 1 for x in itos.values())
  if not single or len(itos) > config.n_vocab:
    raise ValueError(f"{meta} is no vocabulary of at most {config.n_vocab:,} single characters")

  tokenizer = Characters("".join(itos.values()))
  try:
    # Its alphabet is validated at the first use.
    tokenizer.encode("")
  except ValueError as error:
    raise ValueError(f"{meta}: {error}") from error
  return tokenizer


def write(
  weights: Weights, path: pathlib.Path, dtype: str = "float32", other_gelu: bool = False
) -> None:
  """Writes a folder of ckpt.pt, and of meta.pkl for characters.

  nanoGPT computes the erf GELU only. With `other_gelu` a tanh model is written all the same:
  `read` restores its GELU, which nanoGPT does not know. Raises ValueError otherwise.
  """
  torch = import_torch(path)
  config = weights.config
  if config.gelu != "erf" and not other_gelu:
    raise ValueError(
      f"{weights.source} has the {config.gelu} GELU, and nanoGPT computes the erf one: "
      f"its logits would differ; --other_gelu writes it all the same"
    )

  model_args = {name: getattr(config, size) for name, size in SIZES.items()}
  model_args |= {"bias": config.use_bias, "dropout": 0.0}
  with atomic_write(path) as folder:
    folder.mkdir()

    # 1. The state dict. torch.save needs all of it in memory; the tied head shares wte's.
    model = {}
    for name in progress(names.shapes(config), "reading"):
      tensor = names.linear_layout(name, weights.read(name).astype(np.float32))
      tensor = torch.from_numpy(np.ascontiguousarray(tensor)).to(getattr(torch, dtype))
      model["transformer." + names.translate_name(name, names.TORCH)] = tensor
    model["lm_head.weight"] = model["transformer.wte.weight"]

    # 2. The other entries that nanoGPT's train.py and sample.py expect.
    checkpoint = {
      "model": model,
      "model_args": model_args,
      "iter_num": 0,
      "best_val_loss": 1e9,
      "config": {"gelu": config.gelu},
    }
    torch.save(checkpoint, folder / "ckpt.pt")

    # 3. The tokenizer. nanoGPT assumes GPT-2's; a kind for which it has no file, only `read`
    #    loads again.
    if isinstance(weights.tokenizer, Characters):
      itos = dict(enumerate(weights.tokenizer.alphabet))
      stoi = {character: i for i, character in itos.items()}
      meta = {"vocab_size": len(itos), "itos": itos, "stoi": stoi}
      (folder / "meta.pkl").write_bytes(pickle.dumps(meta))
    elif not isinstance(weights.tokenizer, Gpt2Bpe):
      write_vocabulary(weights.tokenizer, folder, config.n_ctx)
