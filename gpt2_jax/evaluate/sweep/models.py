# SPDX-License-Identifier: Apache-2.0
"""Resolves a sweep's models: published names, paths, and the checkpoints of a run."""

import dataclasses
import json
import os
import pathlib
from collections.abc import Iterable

from gpt2_jax.convert import nanogpt
from gpt2_jax.convert.pretrained import detect_format, is_workdir, resolve_checkpoint
from gpt2_jax.evaluate.sources import SURROGATE
from gpt2_jax.files import sha256, summarize, user_path
from gpt2_jax.model import ModelConfig
from gpt2_jax.runs.checkpoint import Checkpoints
from gpt2_jax.sizes import SIZES


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
  of that, +FOLDER is an adapter of peft's for it: gpt2+runs/adapter.
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
