# SPDX-License-Identifier: Apache-2.0
"""Fine-tuning's start: opens a checkpoint of any format, and takes its architecture and vocabulary.

What a run came from (provenance) is a name and the SHA-256 of the weights, which is the same for
the same model in every format and place.
"""

import dataclasses
import os
from collections.abc import Callable

import jax
from ml_collections import ConfigDict

from gpt2_jax.convert.pretrained import (
  detect_format,
  is_workdir,
  resolve_checkpoint,
  split_step,
)
from gpt2_jax.convert.weights import from_model, to_model, weights_sha256
from gpt2_jax.files import user_path
from gpt2_jax.finetune.adapter import n_virtual
from gpt2_jax.model import GPT2, ModelConfig
from gpt2_jax.runs.workdir import is_remote
from gpt2_jax.tokenizer import Tokenizer

# What a model is: no run can change it. The context may be shorter.
ARCHITECTURE = ("n_vocab", "n_embd", "n_head", "n_layer", "use_bias", "gelu", "family")

# How a model is computed, where a config leaves it to the checkpoint: any platform, any mesh.
COMPUTED = {"attention": "auto", "pad_heads": True}


@dataclasses.dataclass(frozen=True)
class Origin:
  """A checkpoint that a run starts from: its config and tokenizer are read, its arrays are not.

  `sha256` is known before the arrays are loaded where a run has recorded it; `base_sha256` computes
  it. `load(mesh, dtype)` loads the model onto a mesh, each process its shards.
  """

  name: str
  config: ModelConfig
  tokenizer: Tokenizer | None
  load: Callable[[jax.sharding.Mesh, str], GPT2] | None
  sha256: str | None = None


def open_origin(init_from: str) -> Origin:
  """Opens a published name, a checkpoint of any format, or the workdir of a run, local or gs://.

  A workdir may be followed by @STEP, @best or @latest. Raises ValueError or OSError, in one line,
  for what is no whole GPT-2.
  """
  place, step = split_step(init_from)
  path = resolve_checkpoint(place)
  if is_workdir(path):
    return _open_workdir(init_from, str(path), step or "latest")
  if step:
    raise ValueError(f"{place[:200]} is no workdir of a run, and has no step {step[:40]!r}")

  weights = detect_format(path).read(path)
  # A name of the Hub stays one; a path is recorded so that it holds in any folder.
  name = os.path.abspath(path) if os.path.exists(user_path(place)) else place

  def load(mesh, dtype):
    return to_model(weights, mesh, dtype)

  return Origin(name, weights.config, weights.tokenizer, load)


def _open_workdir(init_from: str, workdir: str, step: str) -> Origin:
  # Imported here: Orbax takes seconds, and only a workdir needs it.
  from gpt2_jax.runs.checkpoint import open_saved

  saved = open_saved(workdir, step)
  if saved.is_adapted:
    raise ValueError(
      f"{init_from[:200]} holds an adapter or a classifier's head, and no language model alone; "
      f"start from a merged model, or from its base"
    )

  def load(mesh, dtype):
    with jax.set_mesh(mesh):
      return saved.load(dtype)

  # The step itself: what is the latest one changes.
  place = workdir if is_remote(workdir) else os.path.abspath(workdir)
  return Origin(f"{place}@{saved.step}", saved.config, saved.tokenizer, load)


def base_sha256(model: GPT2) -> str:
  """The SHA-256 of a loaded model's weights, on every process; see `weights_sha256`."""
  return weights_sha256(from_model(model, None))


def resolve_model(config: ConfigDict, origin: Origin) -> ConfigDict:
  """The run's config with the architecture filled in: None is what the checkpoint has.

  Raises ValueError with both values where a knob says something else. Only the context (shorter),
  dropout and how the model is computed may differ.
  """
  config = config.copy_and_resolve_references()
  differing = []
  with config.unlocked():
    for field in dataclasses.fields(ModelConfig):
      name = field.name
      theirs = getattr(origin.config, name)
      if name == "n_ctx":
        theirs -= n_virtual(config.adapter)
      value = config.model[name]

      if value is None:
        config.model[name] = COMPUTED.get(name, theirs)
      elif name in ARCHITECTURE and value != theirs:
        differing.append(f"{name} {theirs}, and model.{name} is {str(value)[:40]}")
      elif name == "n_ctx" and value > theirs:
        beside = " beside its virtual tokens" if n_virtual(config.adapter) else ""
        differing.append(f"n_ctx {theirs}{beside}, and a longer model.n_ctx of {value}")

  if differing:
    raise ValueError(
      f"the checkpoint {origin.name[:160]} has {'; '.join(differing)}: architecture and vocabulary "
      f"are the checkpoint's; set these to its values, or to None as --config=finetune does"
    )
  return config
