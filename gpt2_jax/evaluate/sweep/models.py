# SPDX-License-Identifier: Apache-2.0
"""Resolves a sweep's models: published names, paths, and the checkpoints of a run."""

import dataclasses
import functools
import json
import os
import pathlib
import re
from collections.abc import Iterable

import jax

from gpt2_jax.convert import nanogpt
from gpt2_jax.convert.pretrained import detect_format, is_workdir, resolve_checkpoint
from gpt2_jax.evaluate.sources import SURROGATE
from gpt2_jax.files import sha256, summarize, user_path
from gpt2_jax.gpt1 import new_model
from gpt2_jax.model import GPT2, ModelConfig
from gpt2_jax.runs.checkpoint import Checkpoints, open_saved
from gpt2_jax.sizes import ALIASES, SIZES, model_config
from gpt2_jax.tokenizer import Gpt2Bpe, Tokenizer

# How the name of a null model begins: random weights, to hold a score against.
RANDOM = "random:"


@dataclasses.dataclass(frozen=True)
class SweptModel:
  """A column of the table: what load_pretrained takes, with the step if it is a run's workdir."""

  name: str
  path: str
  step: str  # "latest" for anything but a run
  weights: str  # sha256 of the files, or of a checkpoint's checksums
  adapter: str | None = None  # one of peft's, for the model at `path`


def resolve_models(entries: Iterable[str]) -> list[SweptModel]:
  """The models of all entries, each once.

  An entry is a name, a path, or a run's workdir, which @STEP, @best or @all may follow. Behind all
  of that, +FOLDER is an adapter of peft's for it: gpt2+runs/adapter. random:MODEL@SEED is a null
  model: random weights in the shape of a size or a checkpoint, with its tokenizer.
  """
  # a dict keeps their order
  models = {}
  for entry in entries:
    for model in _resolve(entry):
      models[model] = None
  return list(models)


def _resolve(entry: str) -> list[SweptModel]:
  # An @ may also be part of a path.
  if SURROGATE.search(entry):
    raise ValueError(f"{entry[:80]!a} is not UTF-8, and no table can have it; rename the model")
  if entry.startswith(RANDOM):
    return [_resolve_random(entry)]
  base, adapter = _split_adapter(entry)
  if adapter:
    return [_with_adapter(model, user_path(adapter)) for model in _resolve(base)]
  path, at, step = entry.rpartition("@")
  if not at or os.path.exists(user_path(entry)):
    path, step = entry, "latest"

  # A model's name is what was typed.
  name = path
  path = user_path(path)
  location = resolve_checkpoint(path)
  if is_workdir(location):
    return _resolve_run(name, path, location, step)
  if step != "latest":
    raise ValueError(f"{path} is no workdir of a run, and has no step {step[:40]!r}")
  # What is no checkpoint at all is said before anything is loaded.
  weights = files_sha256(location)
  if detect_format(location) is nanogpt:
    # The second way of reading one: at first all had the erf GELU, the oldest ones too.
    weights = sha256(f"{weights} 2".encode())
  return [SweptModel(entry, path, "latest", weights)]


# ---- null models


def _resolve_random(entry: str) -> SweptModel:
  """The null model of random:MODEL[@SEED]; MODEL is a published size or a checkpoint."""
  name, seed = _split_seed(entry)
  if _is_size(name):
    shape = repr(model_config(name))
  else:
    # What is no checkpoint is said now.
    _open_shape(name)
    [base] = _resolve(name)
    shape = base.weights
  return SweptModel(entry, entry, "latest", sha256(f"{RANDOM} {shape} {seed}".encode()))


def load_random(path: str, mesh: jax.sharding.Mesh, dtype: str) -> tuple[GPT2, Tokenizer | None]:
  """A null model on a mesh: weights drawn by its seed as those before step 0 of a run."""
  name, seed = _split_seed(path)
  config, tokenizer = (model_config(name), Gpt2Bpe()) if _is_size(name) else _open_shape(name)
  config = dataclasses.replace(config, dtype=dtype)
  with jax.set_mesh(mesh):
    return jax.jit(functools.partial(new_model, config))(jax.random.key(seed)), tokenizer


def _split_seed(entry: str) -> tuple[str, int]:
  name, at, seed = entry.removeprefix(RANDOM).rpartition("@")
  if not at:
    return entry.removeprefix(RANDOM), 0
  if not re.fullmatch("[0-9]{1,9}", seed):
    raise ValueError(f"{entry[:80]!r} has no seed behind its @; give a number, as in random:117M@3")
  return name, int(seed)


def _is_size(name: str) -> bool:
  return name in SIZES or any(name in aliases for aliases in ALIASES.values())


def _open_shape(name: str) -> tuple[ModelConfig, Tokenizer | None]:
  """The ModelConfig and tokenizer of a checkpoint, whose weights are not loaded."""
  path = resolve_checkpoint(user_path(name))
  opened = open_saved(str(path)) if is_workdir(path) else detect_format(path).read(path)
  return opened.config, opened.tokenizer


# ---- models


def _split_adapter(entry: str) -> tuple[str, str]:
  """The base and the adapter of an entry; a + may also be part of a path."""
  if "+" not in entry or os.path.exists(user_path(entry)):
    return entry, ""
  parts = entry.split("+")
  splits = [("+".join(parts[:n]), "+".join(parts[n:])) for n in range(1, len(parts))]
  for base, adapter in splits:
    if os.path.exists(user_path(adapter)):
      return base, adapter
  return splits[-1]


def _with_adapter(model: SweptModel, path: str) -> SweptModel:
  """The model with an adapter, which is found and read here: what is wrong with it is told now."""
  # Imported here: a sweep without adapters does not need it.
  from gpt2_jax.convert.peft_files import find_adapter, read_adapter

  read_adapter(path)
  weights = sha256(f"{model.weights} {files_sha256(find_adapter(path))}".encode())
  return dataclasses.replace(model, name=f"{model.name}+{path}", weights=weights, adapter=path)


def _resolve_run(name: str, path: str, workdir: pathlib.Path, step: str) -> list[SweptModel]:
  """The checkpoints of a run: that of a step, the latest, the best, or all."""
  checkpoints = Checkpoints(str(workdir), create=False)
  steps = sorted(checkpoints.steps())
  if not steps:
    raise FileNotFoundError(
      f"{checkpoints.path} holds no checkpoint; is {path} the workdir of a run?"
    )

  if step == "all":
    wanted = steps
  elif step == "latest":
    wanted = steps[-1:]
  elif step == "best":
    # None where no checkpoint has a validation loss.
    best = checkpoints.best_step()
    wanted = [] if best is None else [best]
  else:
    wanted = [n for n in steps if str(n) == step]
  if not wanted:
    raise FileNotFoundError(
      f"no checkpoint of step {step[:40]} in {checkpoints.path}; there are {summarize(steps)}, "
      "best and all"
    )

  # The checksums stand for the weights: what a checkpoint holds counts, not where it lies.
  models = []
  for n in wanted:
    checksums = json.dumps(checkpoints.sums(n)).encode()
    models.append(SweptModel(f"{name}@{n}", path, str(n), sha256(checksums)))
  checkpoints.close()
  return models


def files_sha256(path: pathlib.Path) -> str:
  """SHA-256 of a checkpoint's files.

  Of a folder, all files with their names; of a file, its content and the tokenizer's files in the
  same folder.
  """
  if path.is_dir():
    paths = sorted(path.iterdir())
  else:
    # meta.pkl, and the project's own JSON
    tokenizer = [file for file in path.parent.iterdir() if file.suffix in (".json", ".pkl")]
    paths = [path, *sorted(tokenizer)]

  lines = []
  for file in paths:
    if file.is_file():
      # A checkpoint that is one file may be renamed.
      name = "" if file == path else file.name
      lines.append(f"{name} {sha256(file)}\n")
  return sha256("".join(lines).encode())


def paper_size(config: ModelConfig) -> str | None:
  """The paper's name of a model of this shape: 117M, 345M, 762M or 1542M."""
  dimensions = ("n_vocab", "n_ctx", "n_embd", "n_head", "n_layer")
  for name, size in SIZES.items():
    # distilgpt2 is not in the paper
    if name == "distilgpt2":
      continue
    if all(getattr(size, dimension) == getattr(config, dimension) for dimension in dimensions):
      return name
  return None
