# SPDX-License-Identifier: Apache-2.0
"""nanoGPT checkpoints: ckpt.pt, with meta.pkl for a vocabulary of characters; read and written.

Its model is GPT-2 with or without biases, and with the erf GELU; before 14 June 2023 with the tanh
GELU.
"""

import pathlib
import pickle

import numpy as np

from gpt2_jax.convert import names
from gpt2_jax.convert.match import find_gpt2
from gpt2_jax.convert.safe_load import (
  PlainObject,
  import_torch,
  read_plain_pickle,
  read_torch,
  stored_tensors,
)
from gpt2_jax.convert.vocabulary import read_vocabulary, write_vocabulary
from gpt2_jax.convert.weights import Weights
from gpt2_jax.files import atomic_write, note, progress, summarize
from gpt2_jax.model import ModelConfig
from gpt2_jax.tokenizer import Characters, Gpt2Bpe, HuggingFace, Tokenizer
from gpt2_jax.tokenizer.interface import check_unicode

# model_args' name of each size, and this project's
SIZES = {
  "vocab_size": "n_vocab",
  "block_size": "n_ctx",
  "n_embd": "n_embd",
  "n_head": "n_head",
  "n_layer": "n_layer",
}


# nanoGPT's first default, of the weeks in which its model_args had no vocab_size.
DEFAULT_VOCAB = 50257


def read(path: pathlib.Path, gelu: str | None = None) -> Weights:
  """Reads the weights of a ckpt.pt, or of the folder that holds it.

  `gelu` is "tanh" or "erf" for a file that does not say which. Raises ValueError, or ImportError
  without torch.
  """
  # 1. The file, and what it says of its model.
  path = path / "ckpt.pt" if path.is_dir() else path
  saved = read_torch(path)
  model_args = _model_args(saved, path)
  gelu, remark = _gelu(saved, model_args, gelu, path)
  config = _model_config(model_args, gelu, path)

  # 2. The tensors, by their bare names.
  match = find_gpt2(stored_tensors(saved["model"], path), str(path))
  expected = {}
  for name, shape in names.shapes(config).items():
    expected[names.translate_name(name, names.TORCH)] = names.linear_shape(name, shape)
  tensors = match.checked(expected, str(path))

  def read_tensor(name):
    return names.linear_layout(name, tensors[names.translate_name(name, names.TORCH)].read())

  tokenizer = _read_tokenizer(path.with_name("meta.pkl"), config)
  weights = Weights(config, read_tensor, tokenizer, f"{path} (nanoGPT)")
  if remark:
    note(f"{path}: {remark}")
  return match.rounded(weights, str(path))


def _model_args(saved, path: pathlib.Path) -> dict:
  """The sizes that a checkpoint states: nanoGPT's model_args, or the GPTConfig that others save."""
  if not isinstance(saved, dict) or "model" not in saved:
    entries = list(saved) if isinstance(saved, dict) else []
    held = f", but {summarize(map(repr, entries), 4, each=32)}" if entries else ""
    raise ValueError(
      f"{path} is no nanoGPT checkpoint (model, model_args){held}; give a Hugging Face folder whole"
    )
  model_args = saved.get("model_args", saved.get("config"))
  model_args = {"vocab_size": DEFAULT_VOCAB} | _fields(model_args)
  if missing := [name for name in SIZES if name not in model_args]:
    raise ValueError(f"the model_args of {path} say nothing of {', '.join(missing)}")
  return model_args


def _fields(value) -> dict:
  """The fields of a dictionary, a Namespace or a dataclass in a checkpoint; of others none."""
  if isinstance(value, PlainObject):
    return value.fields
  return value if isinstance(value, dict) else {}


def _gelu(
  saved: dict, model_args: dict, gelu: str | None, path: pathlib.Path
) -> tuple[str, str | None]:
  """The GELU of a checkpoint, and what to say of it: `gelu`, if the file leaves it open.

  nanoGPT computed the tanh GELU until 14 June 2023, and computes the erf one since. No file says
  it, but two tell that they are older: model_args have `bias` since 27 January 2023, and the
  optimizer decays the embeddings since 6 May 2023. Raises ValueError where `write` noted another.
  """
  stated = _fields(saved.get("config")).get("gelu")
  if stated is not None:
    if gelu not in (None, stated):
      raise ValueError(f"{path} states the GELU {str(stated)[:20]!r}, and gelu is {gelu!r}")
    return stated, None
  if gelu is not None:
    return gelu, None

  if "bias" not in model_args:
    return "tanh", (
      "no bias in its model_args, as in nanoGPT's before 27 January 2023: read with the tanh GELU "
      "of that time; gelu='erf' (convert --gelu=erf) reads it with the other"
    )
  if _decays_no_embedding(saved, model_args):
    return "tanh", (
      "its optimizer's groups are those of nanoGPT before 6 May 2023: read with the tanh GELU of "
      "that time; gelu='erf' (convert --gelu=erf) reads it with the other"
    )
  return "erf", (
    "read with the erf GELU, nanoGPT's since 14 June 2023; the file does not tell its age, and a "
    "model trained before has the tanh one: gelu='tanh' (convert --gelu=tanh)"
  )


def _decays_no_embedding(saved: dict, model_args: dict) -> bool:
  """Whether the optimizer's first group is four matrices a layer, without the two embeddings."""
  groups = _fields(saved.get("optimizer")).get("param_groups")
  first = groups[0] if isinstance(groups, list) and groups else None
  decayed = _fields(first).get("params")
  n_layer = model_args["n_layer"]
  return isinstance(decayed, list) and type(n_layer) is int and len(decayed) == 4 * n_layer


def _model_config(model_args: dict, gelu: str, path: pathlib.Path) -> ModelConfig:
  """ModelConfig from a checkpoint's model_args. Raises ValueError."""
  # Checkpoints from before the knob have biases.
  use_bias = model_args.get("bias", True)
  if not isinstance(use_bias, bool | int):
    raise ValueError(f"bias in the model_args of {path} is {str(use_bias)[:40]!r}; it is a bool")
  sizes = {size: model_args[name] for name, size in SIZES.items()}
  return names.config_from_sizes(sizes, f"{path}'s model_args", use_bias=bool(use_bias), gelu=gelu)


def _read_tokenizer(meta: pathlib.Path, config: ModelConfig) -> Tokenizer | None:
  """Characters of meta.pkl; without it GPT-2's tokens if the vocabulary is as large.

  That is what nanoGPT's sample.py assumes. Raises ValueError for a damaged meta.pkl.
  """
  if not meta.is_file():
    return read_vocabulary(meta.parent, config.n_vocab)

  # 1. The file is somebody's: every property that is relied on is checked.
  content = read_plain_pickle(meta)
  itos = content.get("itos") if isinstance(content, dict) else None
  entries = dict(enumerate(itos)) if isinstance(itos, list) else itos
  is_whole = isinstance(entries, dict) and set(entries) == set(range(len(entries)))
  if not is_whole or not entries:
    raise ValueError(f"{meta} is no vocabulary of characters (itos, from 0 on)")
  tokens = [entries[i] for i in range(len(entries))]
  is_text = all(isinstance(token, str) and token for token in tokens)
  if not is_text or len(set(tokens)) < len(tokens) or len(tokens) > config.n_vocab:
    raise ValueError(
      f"{meta} is no vocabulary of at most {config.n_vocab:,} characters, each a string, once"
    )

  check_unicode("".join(tokens), f"the vocabulary in {meta}")

  # 2. `encode` goes by stoi, `decode` by itos.
  stoi = content.get("stoi", {token: i for i, token in enumerate(tokens)})
  if stoi != {token: i for i, token in enumerate(tokens)}:
    raise ValueError(f"stoi and itos of {meta} do not agree: ids would not be read as written")
  return _character_tokenizer(tokens, meta)


def _character_tokenizer(tokens: list[str], meta: pathlib.Path) -> Tokenizer:
  """The tokenizer of a meta.pkl: characters in any order, beside special tokens of several.

  A text is encoded by its characters, as nanoGPT does. Raises ValueError if there are none.
  """
  special = [token for token in tokens if len(token) > 1]
  if not special and tokens == sorted(tokens):
    return Characters("".join(tokens))
  if len(special) == len(tokens):
    raise ValueError(f"{meta} has no single characters; nanoGPT encodes by them")
  if special:
    note(
      f"{meta}: {len(special):,} of its {len(tokens):,} tokens are no single characters, and are "
      f"not encoded from a text unless it is asked for: {summarize(map(repr, special), 3, each=32)}"
    )

  # Imported here: it is for unusual vocabularies alone.
  import tokenizers

  model = tokenizers.models.WordLevel({token: i for i, token in enumerate(tokens)})
  tokenizer = tokenizers.Tokenizer(model)
  character = tokenizers.Regex(r"[\s\S]")
  tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Split(character, "isolated")
  tokenizer.decoder = tokenizers.decoders.Fuse()
  tokenizer.add_special_tokens([tokenizers.AddedToken(x, normalized=False) for x in special])
  return HuggingFace(tokenizer.to_str())


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
