# SPDX-License-Identifier: Apache-2.0
"""OpenAI's TensorFlow checkpoints: hparams.json, model.ckpt.*, and the vocabulary; read only."""

import os
import pathlib
import re

from gpt2_jax.convert import names
from gpt2_jax.convert.safe_load import read_json
from gpt2_jax.convert.vocabulary import read_vocabulary
from gpt2_jax.convert.weights import Weights

SIZES = ("n_vocab", "n_ctx", "n_embd", "n_head", "n_layer")

# Variables that an optimizer left in a fine-tuned checkpoint, which are no part of the model.
OPTIMIZER_STATE = re.compile(r"/Adam(_1)?$|^(?!model/)")


def read(path: pathlib.Path) -> Weights:
  """Reads the weights of OpenAI's folder.

  Raises ValueError if they are not those of its hparams, ImportError without TensorFlow.
  """
  # 1. Sizes.
  hparams = read_json(path / "hparams.json")
  if missing := [name for name in SIZES if name not in hparams]:
    raise ValueError(f"{path}/hparams.json says nothing of {', '.join(missing)}")
  sizes = {name: hparams[name] for name in SIZES}
  config = names.config_from_sizes(sizes, f"{path}/hparams.json")

  # 2. Names and shapes: those of the config and no others. A matrix is a convolution of width 1
  #    there, [1, in, out].
  prefix = _checkpoint_prefix(path)
  reader = _open_checkpoint(prefix)
  actual = {}
  for name, shape in reader.get_variable_to_shape_map().items():
    if not OPTIMIZER_STATE.search(name):
      actual[name] = tuple(shape)
  expected = {}
  for name, shape in names.shapes(config).items():
    expected[_graph_name(name)] = (1, *shape) if names.is_matrix(name) else shape
  names.check_shapes(actual, expected, str(path))

  def read_tensor(name):
    try:
      tensor = reader.get_tensor(_graph_name(name))
    except Exception as error:
      # Any kind: TensorFlow's own, and IndexError for a file that ends too soon.
      raise ValueError(f"{prefix}.data-* is damaged or not there; fetch it again") from error
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
    text = (path / "checkpoint").read_text(encoding="utf-8")
    latest = re.match(r'model_checkpoint_path: "(?:.*/)?([^"/]+)"', text)
    if latest and latest[1] in prefixes:
      return prefixes[latest[1]]

  if len(prefixes) != 1:
    raise FileNotFoundError(
      f"{path} has {len(prefixes)} files *.index; "
      f"it takes one, model.ckpt.index, or a file `checkpoint` that names one"
    )
  return next(iter(prefixes.values()))


def _open_checkpoint(prefix: pathlib.Path):
  """TensorFlow's reader of a checkpoint."""
  # Read once, at TensorFlow's import: without them it prints lines about its own build.
  os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
  os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")
  try:
    import tensorflow as tf
  except ImportError as error:
    raise ImportError(
      f"{prefix} is a TensorFlow checkpoint: pip install tensorflow-cpu to read it"
    ) from error

  try:
    return tf.train.load_checkpoint(str(prefix))
  except (tf.errors.OpError, ValueError, RuntimeError) as error:
    raise ValueError(f"{prefix}.* is no whole TensorFlow checkpoint; fetch it again") from error
