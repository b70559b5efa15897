# SPDX-License-Identifier: Apache-2.0
"""Provenance of a run: what it starts from, at its start and when it resumes."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from gpt2_jax.compat import get_mesh
from gpt2_jax.convert.hub import PUBLISHED
from gpt2_jax.files import announce
from gpt2_jax.finetune.init_from import Origin, base_sha256, open_origin, resolve_model
from gpt2_jax.finetune.objective import make_objective
from gpt2_jax.model import GPT2, ModelConfig
from gpt2_jax.runs.branch import open_trunk
from gpt2_jax.runs.metadata import (
  check_same_run,
  check_same_start,
  saved_model_config,
  saved_tokenizer,
)
from gpt2_jax.sizes import GPT1_CONFIG, GPT1_NAMES, model_config
from gpt2_jax.tokenizer import Tokenizer, load_tokenizer


def find_origin(config: ConfigDict, workdir: str) -> Origin | None:
  """What the run starts from; None for random weights.

  A run that resumes has it from its newest checkpoint, and a branch from its trunk's, where
  `init_from` is the same and the checkpoint holds all arrays: what it once started from may be
  gone. Raises ValueError or OSError for what is no checkpoint.
  """
  make_objective(config)  # one that cannot be is refused before anything is opened
  if not config.init_from and config.distill.layers:
    raise ValueError(
      f"distill.layers is {config.distill.layers[:80]!r}, which are layers of a checkpoint, and "
      f"the run starts from none; set --config.init_from"
    )
  if config.adapter.kind and config.distill.layers:
    raise ValueError(
      f"adapter.kind is {config.adapter.kind[:40]!r}, whose base is a whole checkpoint, and "
      f"distill.layers is {config.distill.layers[:80]!r}; leave one of them out"
    )
  if not config.init_from:
    if config.adapter.kind:
      raise ValueError(
        f"adapter.kind is {config.adapter.kind[:40]!r}, which is trained beside a frozen "
        f"checkpoint, and the run starts from none; set --config.init_from"
      )
    return None
  with announce(f"opening {config.init_from}"):
    trunk = open_trunk(config, workdir)
    saved = _newest_metadata(workdir) if trunk is None else trunk.metadata
    is_known = saved is not None and "init_from" in saved and not config.adapter.kind
    if not is_known or saved["config"].get("init_from") != config.init_from:
      return with_layers(open_origin(config.init_from), config.distill.layers)

    model_config = saved_model_config(saved)
    tokenizer = saved_tokenizer(saved, model_config)
    return Origin(**saved["init_from"], config=model_config, tokenizer=tokenizer, load=None)


def planned_origin(name: str) -> Origin:
  """Opens a checkpoint for its config alone: of a published name nothing is downloaded.

  Raises ValueError or OSError for what is no checkpoint.
  """
  if name in PUBLISHED:
    published = GPT1_CONFIG if name in GPT1_NAMES else model_config(name)
    return Origin(name, published, None, load=None)
  return open_origin(name)


def resolve_planned(config: ConfigDict) -> ConfigDict:
  """The config of a run that is planned and not started: see `resolve_model`, `planned_origin`."""
  if None not in config.model.values():
    return config
  return resolve_model(config, with_layers(planned_origin(config.init_from), config.distill.layers))


def with_layers(origin: Origin, layers: str) -> Origin:
  """The origin of a model with some of a checkpoint's layers, as "0,2,4,7,9,11", and with all that
  is not in layers; the origin itself for "".

  Raises ValueError for layers that the checkpoint has not.
  """
  if not layers:
    return origin
  numbers, n_layer = layers.split(","), origin.config.n_layer
  if not all(number.isdecimal() and int(number) < n_layer for number in numbers):
    raise ValueError(
      f"distill.layers is {layers[:80]!r}; it is numbers of layers of {origin.name[:160]}, "
      f"0 to {n_layer - 1}, with commas"
    )
  config = dataclasses.replace(origin.config, n_layer=len(numbers))

  def load(mesh, dtype):
    with jax.set_mesh(mesh):
      return take_layers(origin.load(mesh, dtype), tuple(map(int, numbers)))

  return Origin(f"{origin.name}, layers {layers}", config, origin.tokenizer, load)


@functools.partial(jax.jit, static_argnums=1)
def take_layers(model: GPT2, layers: tuple[int, ...]) -> GPT2:
  """The model with these of its layers, in this order; embeddings and the last norm are as they
  are."""
  copy = jax.tree.unflatten(jax.tree.structure(model), jax.tree.leaves(model))
  copy.h = jax.tree.map(lambda x_L: x_L[jnp.array(layers)], model.h)
  copy.config = dataclasses.replace(model.config, n_layer=len(layers))
  return copy


def load_base(origin: Origin | None, model_config: ModelConfig, metadata: dict, workdir: str):
  """The model of `origin`, and the metadata with its record: its name and SHA-256.

  The model is None for random weights, and where the run resumes from a checkpoint that holds all
  arrays. Raises ValueError if the workdir holds another run.
  """
  if origin is None:
    return None, metadata
  if origin.sha256 is not None:
    return None, metadata | {"init_from": {"name": origin.name, "sha256": origin.sha256}}

  # A run of another kind is refused before gigabytes are read.
  saved = _newest_metadata(workdir)
  if saved is not None:
    unread = {"name": origin.name, "sha256": ""}
    known = {"init_from": saved.get("init_from", unread), "teacher": saved.get("teacher")}
    check_same_run(metadata | known, saved, workdir)

  with announce(f"loading {origin.name}, seconds to a minute"):
    base = origin.load(get_mesh(), model_config.dtype)
    record = {"name": origin.name, "sha256": base_sha256(base)}
  if saved is not None:
    check_same_start(saved["init_from"], record, workdir)
  return base, metadata | {"init_from": record}


def resolve_tokenizer(origin: Origin, name_or_path: str) -> Tokenizer:
  """The checkpoint's tokenizer; `name_or_path` is empty, or another place of the same one.

  Raises ValueError where it is another, and where there is none.
  """
  if not name_or_path:
    if origin.tokenizer is None:
      raise ValueError(
        f"the checkpoint {origin.name[:160]} has no tokenizer; set --config.data.tokenizer"
      )
    return origin.tokenizer

  tokenizer = load_tokenizer(name_or_path)
  if origin.tokenizer is not None and tokenizer.fingerprint != origin.tokenizer.fingerprint:
    raise ValueError(
      f"data.tokenizer is {name_or_path[:160]} (fingerprint {tokenizer.fingerprint[:12]}), and the "
      f"checkpoint {origin.name[:160]} has another (fingerprint "
      f"{origin.tokenizer.fingerprint[:12]}): vocabulary and ids are the checkpoint's; "
      f"set --config.data.tokenizer=''"
    )
  return tokenizer


def _newest_metadata(workdir: str) -> dict | None:
  # Imported here: Orbax takes seconds, and only a run that starts from a checkpoint asks so early.
  from gpt2_jax.runs.checkpoint import newest_metadata

  return newest_metadata(workdir)
