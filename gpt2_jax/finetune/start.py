# SPDX-License-Identifier: Apache-2.0
"""The initial model of a run: random weights or a checkpoint's, then a head, then an adapter.

It is the one place where a run's model is built, and can be traced without arrays.
"""

import dataclasses
import functools
import warnings

import jax
from ml_collections import ConfigDict

from gpt2_jax.finetune.adapter import TRAINED_NAMES, add_adapter, n_virtual
from gpt2_jax.finetune.objective import add_configured_head
from gpt2_jax.finetune.trainable import merge, partition, trainable_mask
from gpt2_jax.gpt1 import new_model
from gpt2_jax.model import GPT2, ModelConfig, name_of


def initial_model(config: ConfigDict, model_config: ModelConfig, key, base: GPT2 | None = None):
  """The model before step 0: GPT-2, or GPT-1, with random weights or those of `base`, a
  classifier's head with `config.classify`, an adapter with `config.adapter`."""
  # Virtual tokens have positions of their own beside the context.
  n_ctx = model_config.n_ctx + n_virtual(config.adapter)
  model_config = dataclasses.replace(model_config, n_ctx=n_ctx)
  model = new_model(model_config, key) if base is None else reconfigure(base, model_config)
  model = add_configured_head(model, config.classify, jax.random.fold_in(key, 1))
  if config.adapter.kind:
    model = add_adapter(model, config.adapter, jax.random.fold_in(key, 2))
  return model


def build_on(config: ConfigDict, model_config: ModelConfig, key, base: GPT2) -> GPT2:
  """The `initial_model` on the mesh in force, made of the arrays of `base`, which is gone then."""
  build = jax.jit(functools.partial(initial_model, config, model_config), donate_argnums=1)
  with warnings.catch_warnings():
    # What is cut or becomes int8 is an array of its own.
    warnings.filterwarnings("ignore", "Some donated buffers were not usable")
    return build(key, base)


def reconfigure(model: GPT2, model_config: ModelConfig) -> GPT2:
  """The same weights under another ModelConfig: other dropout, dtype or kernel, a shorter context.

  Raises ValueError where the shapes are those of another model.
  """
  target = jax.eval_shape(functools.partial(new_model, model_config), jax.random.key(0))
  leaves = {name_of(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(model)}

  # A shorter context is the first positions of the table.
  leaves["wpe"] = leaves["wpe"][: model_config.n_ctx]

  def take(path, leaf):
    name = name_of(path)
    if name not in leaves or leaves[name].shape != leaf.shape:
      shape = list(leaves[name].shape) if name in leaves else "absent"
      raise ValueError(f"{name} of the checkpoint is {shape}, and the config wants {leaf.shape}")
    return leaves[name]

  return jax.tree_util.tree_map_with_path(take, target)


def trained_names(config: ConfigDict) -> tuple[str, ...]:
  """The names of what a run trains: `trainable`, or an adapter, the head, and what `trainable`
  names besides."""
  trainable = tuple(config.trainable)
  if not config.adapter.kind:
    return trainable
  head = ("classifier",) if config.classify.classes else ()
  besides = () if trainable == ("*",) else trainable
  return (*TRAINED_NAMES[config.adapter.kind], *head, *besides)


def saved_part(config: ConfigDict, state):
  """What a checkpoint holds of a TrainState: all of it, or with an adapter only what is trained.

  The frozen base is left out; it is recorded by its name and SHA-256.
  """
  if not config.adapter.kind:
    return state
  trained, _ = partition(state.model, trainable_mask(state.model, trained_names(config)))
  return dataclasses.replace(state, model=trained)


def restored(config: ConfigDict, state, model):
  """The TrainState whose `saved_part` was restored; the frozen rest is that of `model`."""
  if not config.adapter.kind:
    return state
  _, frozen = partition(model, trainable_mask(model, trained_names(config)))
  return dataclasses.replace(state, model=merge(state.model, frozen))
