# SPDX-License-Identifier: Apache-2.0
"""OpenAI's TensorFlow checkpoints: hparams.json, model.ckpt.*, and the vocabulary; read only."""

import pathlib
import re

from gpt2_jax.convert import names
from gpt2_jax.convert.safe_load import read_json
from gpt2_jax.convert.tensor_bundle import open_bundle
from gpt2_jax.convert.vocabulary import read_vocabulary
from gpt2_jax.convert.weights import Weights
from gpt2_jax.files import read_text

SIZES = ("n_vocab", "n_ctx", "n_embd", "n_head", "n_layer")

# Variables that an optimizer left in a fine-tuned checkpoint, which are no part of the model.
OPTIMIZER_STATE = re.compile(r"/Adam(_1)?$|^(?!model/)")


def read(path: pathlib.Path) -> Weights:
  """Reads the weights of OpenAI's folder.

  Raises ValueError if they are not those of its hparams, or damaged.
  """
  # 1. Sizes.
  hparams = read_json(path / "hparams.json")
  if missing := [name for name in SIZES if name not in hparams]:
    raise ValueError(f"{path}/hparams.json says nothing of {', '.join(missing)}")
  sizes = {name: hparams[name] for name in SIZES}
  config = names.config_from_sizes(sizes, f"{path}/hparams.json")

  # 2. Names and shapes: those of the config and no others. A matrix is a convolution of width 1
  #    there, [1, in, out].
  bundle = open_bundle(_checkpoint_prefix(path))
  actual = {}
  for name, entry in bundle.entries.items():
    if not OPTIMIZER_STATE.search(name):
      actual[name] = entry.shape
  expected = {}
  for name, shape in names.shapes(config).items():
    expected[_graph_name(name)] = (1, *shape) if names.is_matrix(name) else shape
  names.check_shapes(actual, expected, str(path))

  # 3. What can be known of the data before a byte of it is read.
  for name in expected:
    bundle.check_entry(name)

  def read_tensor(name):
    tensor = bundle.read(_graph_name(name))
    return tensor[0] if names.is_matrix(name) else tensor

  return Weights(config, read_tensor, read_vocabulary(path, config.n_vocab), f"{path} (OpenAI)")


def _graph_name(name: str) -> str:
  return "model/" + names.translate_name(name, names.OPENAI)


def _checkpoint_prefix(path: pathlib.Path) -> pathlib.Path:
  """The path prefix of a folder's checkpoint: model.ckpt of model.ckpt.index.

  Fine-tuning leaves several checkpoints; then the file `checkpoint` names the latest.
  """
  prefixes = {}
  for file in path.glob("*.index"):
    prefix = file.with_suffix("")
    prefixes[prefix.name] = prefix

  if len(prefixes) > 1 and (path / "checkpoint").is_file():
    # Of the path that is written there only the last part holds: the folder may have moved.
    text = read_text(path / "checkpoint")
    latest = re.match(r'model_checkpoint_path: "(?:.*/)?([^"/]+)"', text)
    if latest and latest[1] in prefixes:
      return prefixes[latest[1]]

  if len(prefixes) != 1:
    raise FileNotFoundError(
      f"{path} has {len(prefixes)} files *.index; "
      f"it takes one, model.ckpt.index, or a file `checkpoint` that names one"
    )
  return next(iter(prefixes.values()))
