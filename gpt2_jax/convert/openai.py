# SPDX-License-Identifier: Apache-2.0
"""OpenAI's TensorFlow folder: hparams.json, model.ckpt.*, encoder.json, vocab.bpe; read only."""

import os
import pathlib
import re

from gpt2_jax.convert import names
from gpt2_jax.convert.files import read_json
from gpt2_jax.convert.vocabulary import read_vocabulary
from gpt2_jax.convert.weights import Weights

TRAINING = re.compile(r"/Adam(_1)?$|^(?!model/)")  # what an optimizer left beside the model


def recognizes(path: pathlib.Path) -> bool:
  return (path / "hparams.json").is_file() or any(path.glob("*.index"))


def read(path: pathlib.Path) -> Weights:
  """The weights of a folder. Raises ValueError if they are not those of its hparams, ImportError without TensorFlow."""
  hparams = read_json(path / "hparams.json")
  fields = ("n_vocab", "n_ctx", "n_embd", "n_head", "n_layer")
  if missing := [name for name in fields if name not in hparams]:
    raise ValueError(f"{path}/hparams.json says nothing of {', '.join(missing)}")
  config = names.model_config({name: hparams[name] for name in fields}, f"{path}/hparams.json")
  prefix = _prefix(path)
  reader, expected = _reader(prefix), {}
  for name, shape in names.shapes(config).items():
    expected["model/" + names.foreign(name, names.OPENAI)] = (1, *shape) if names.is_matrix(name) else shape
  found = {name: tuple(shape) for name, shape in reader.get_variable_to_shape_map().items()}
  names.check({name: found[name] for name in found if not TRAINING.search(name)}, expected, str(path))

  def read_tensor(name):
    try:
      tensor = reader.get_tensor("model/" + names.foreign(name, names.OPENAI))
    except Exception as error:  # TensorFlow's own, and IndexError for a file that ends too soon
      raise ValueError(f"{prefix}.data-* is damaged or not there; fetch it again") from error
    return tensor[0] if names.is_matrix(name) else tensor

  return Weights(config, read_tensor, read_vocabulary(path, config.n_vocab), f"{path} (OpenAI)")


def _prefix(path: pathlib.Path) -> pathlib.Path:
  """The checkpoint that the file `checkpoint` names, as fine-tuning leaves several; or the only one."""
  prefixes = {file.with_suffix("").name: file.with_suffix("") for file in path.glob("*.index")}
  if len(prefixes) > 1 and (path / "checkpoint").is_file():
    named = re.match(r'model_checkpoint_path: "(?:.*/)?([^"/]+)"', (path / "checkpoint").read_text(encoding="utf-8"))
    prefixes = {named[1]: prefixes[named[1]]} if named and named[1] in prefixes else prefixes
  if len(prefixes) != 1:
    raise FileNotFoundError(
      f"{path} has {len(prefixes)} files *.index; it takes one, model.ckpt.index, or a file `checkpoint` that names one"
    )
  return next(iter(prefixes.values()))


def _reader(prefix: pathlib.Path):
  os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
  os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")  # or it prints a line about them; nothing is computed
  try:
    import tensorflow as tf
  except ImportError as error:
    raise ImportError(f"{prefix} is a TensorFlow checkpoint: pip install tensorflow-cpu to read it") from error
  try:
    return tf.train.load_checkpoint(str(prefix))
  except (tf.errors.OpError, ValueError, RuntimeError) as error:
    raise ValueError(f"{prefix}.* is no whole TensorFlow checkpoint; fetch it again") from error
