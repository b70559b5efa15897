# SPDX-License-Identifier: Apache-2.0
"""Models x tasks: each pair a cell, each finished cell one file that is never computed again.

What a cell means (the weights, the task and its rows, every knob that its scores depend on) names its file, so that
the same command goes on after a kill, and another config has cells of its own in the same folder.
"""

import contextlib
import csv
import dataclasses
import hashlib
import json
import math
import os
import pathlib
import re
import sys
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
from ml_collections import ConfigDict
from tqdm import tqdm

from gpt2_jax.checkpoint import Checkpoints
from gpt2_jax.convert.files import reason
from gpt2_jax.convert.names import shapes
from gpt2_jax.evaluate import bootstrap, runner, sources, tasks
from gpt2_jax.evaluate.scorers import Scorer
from gpt2_jax.evaluate.task import Task
from gpt2_jax.model import SIZES, ModelConfig
from gpt2_jax.pretrained import find, is_workdir, load_pretrained
from gpt2_jax.sharding import make_mesh

SCORES = 1  # changes whenever a task or a scorer comes to other numbers: what was computed before is not kept
COMPUTED = "computed.jsonl"  # a line for each cell that was computed here, in their order
FAILURES = (ValueError, OSError, ImportError, FloatingPointError, RuntimeError)  # of a cell; the others go on


@dataclasses.dataclass(frozen=True)
class Model:
  """A column of the table: what load_pretrained takes, at a step of a run if it is one."""

  name: str
  path: str
  step: str
  weights: str  # sha256 of the files, or of a checkpoint's checksums


@dataclasses.dataclass(frozen=True)
class Asked:
  """A row of the table: a task under a protocol after some examples."""

  task: Task
  shots: int

  @property
  def name(self) -> str:
    return f"{self.task.name}:{self.task.protocol}:{self.shots}"


@dataclasses.dataclass(frozen=True)
class Cell:
  """`identity` is all that its scores depend on."""

  model: Model
  asked: Asked
  identity: dict

  @property
  def file(self) -> str:
    """Readable, and by its hash another one for each identity."""
    sha = hashlib.sha256(json.dumps(self.identity, sort_keys=True).encode()).hexdigest()
    readable = re.sub(r"[^\w.@-]+", "_", f"{self.model.name[-60:]}.{self.asked.name}").strip("_.")
    return f"{readable}.{sha[:12]}.json"

  def __str__(self) -> str:
    return f"{self.asked.name} of {self.model.name}"


@dataclasses.dataclass(frozen=True)
class Outcome:
  """Finished cells in the order of the config, the others with the reason why there is no score."""

  cells: list[dict]
  failed: dict[str, str]
  missing: dict[str, str]


def run(config: ConfigDict, out: str, skip_missing: bool = False) -> Outcome:
  """Computes what is not there yet of the config's cells, under `out`/cells.

  Raises FileNotFoundError, before any model is loaded, with all datasets that are missing and where to get them, unless
  they are to be left out. A cell that cannot be computed is a line on stderr, and the others go on.
  """
  for knob, least in (("resamples", 1), ("seed", 0), ("limit", 0), ("stride", 0)):
    if config[knob] < least:
      raise ValueError(f"{knob} is {config[knob]}; it is {least} or more")
  asked = list({one.name: one for one in map(parse, config.tasks)}.values())
  if not config.models or not asked:
    raise ValueError("there is nothing to do; give at least one model and one task")
  rows, missing, broken = _datasets(asked, config.data or None, config.tfds_dir or None)
  if missing and not skip_missing:
    ways = " | ".join(dict.fromkeys(missing.values()))
    raise FileNotFoundError(
      f"datasets that are not there: {len(missing)} ({ways}); --skip_missing goes on without them"
    )
  chosen = models(config.models)
  absent = {one.name: missing[source] for one in asked for source in _sources(one) if source in missing}
  failed = {one.name: broken[source] for one in asked for source in _sources(one) if source in broken}
  for name, text in failed.items():
    print(f"failed {name}: {text}", file=sys.stderr)
  asked = [one for one in asked if one.name not in absent | failed]
  cells = [Cell(model, one, _identity(model, one, rows, config)) for model in chosen for one in asked]
  folder = pathlib.Path(out).expanduser() / "cells"
  folder.mkdir(parents=True, exist_ok=True)
  with tqdm(total=len(cells), unit="cell", disable=None, dynamic_ncols=True) as bar:
    for model in chosen:
      failed |= _model([cell for cell in cells if cell.model == model], rows, config, folder, bar)
  return Outcome([read(folder / cell.file) for cell in cells if str(cell) not in failed], failed, absent)


def parse(text: str) -> Asked:
  """`task`, `task:protocol` or `task:protocol:shots`; an empty protocol is the task's first. Raises ValueError."""
  name, protocol, shots = (text.split(":") + ["", ""])[:3]
  if text.count(":") > 2 or not (shots or "0").isdecimal():
    raise ValueError(f"{text!r} is not task:protocol:shots, as in lambada:last_word:0")
  return Asked(tasks.get(name, protocol or None), int(shots or 0))


def models(entries: Iterable[str]) -> list[Model]:
  """Each entry's models: a name, a path, or a run's workdir, which @STEP, @best or @all may follow."""
  return list(dict.fromkeys(model for entry in entries for model in _models(entry)))


def _models(entry: str) -> list[Model]:
  path, at, step = entry.rpartition("@")
  if not at or pathlib.Path(entry).expanduser().exists():
    path, step = entry, "latest"
  found = find(path)
  if not is_workdir(found):
    if step != "latest":
      raise ValueError(f"{path} is no workdir of a run, and has no step {step!r}")
    return [Model(entry, path, "latest", _files_sha256(found))]
  checkpoints = Checkpoints(str(found), create=False)
  steps = sorted(checkpoints.steps())
  if not steps:
    raise FileNotFoundError(f"{checkpoints.path} holds no checkpoint; is {path} the workdir of a run?")
  named = {"latest": steps[-1:], "best": [checkpoints.manager.best_step()], "all": steps}
  wanted = named.get(step, [n for n in steps if str(n) == step])
  if not wanted:
    raise FileNotFoundError(f"no checkpoint of step {step} in {checkpoints.path}; there are {steps}, best and all")
  runs = [Model(f"{path}@{n}", path, str(n), _sha256(json.dumps(checkpoints.sums(n)))) for n in wanted]
  checkpoints.close()
  return runs


def _files_sha256(path: pathlib.Path) -> str:
  """Of the contents of all files in a folder, with their names; of a file, with those of the tokenizer beside it."""
  digest = hashlib.sha256()
  beside = [file for file in path.parent.iterdir() if file.suffix in (".json", ".pkl")]  # meta.pkl, and our own form
  for file in sorted(path.iterdir()) if path.is_dir() else [path, *sorted(beside)]:
    if file.is_file():
      with open(file, "rb") as content:
        name = "" if file == path else file.name
        digest.update(f"{name} {hashlib.file_digest(content, 'sha256').hexdigest()}\n".encode())
  return digest.hexdigest()


def _sha256(text: str) -> str:
  return hashlib.sha256(text.encode()).hexdigest()


def _sources(asked: Asked) -> list[sources.Source]:
  """What a cell reads: the rows, and those of its examples."""
  source = asked.task.source
  return [source, source.examples] if asked.shots and source.examples else [source]


def _datasets(asked: Sequence[Asked], data: str | None, tfds_dir: str | None):
  """The rows of all sources, the sources that are not there, and those that cannot be read, each with its line."""
  rows, missing, broken = {}, {}, {}
  for source in dict.fromkeys(source for one in asked for source in _sources(one)):
    try:
      rows[source] = sources.load(source, data, tfds_dir)
    except FileNotFoundError as error:
      missing[source] = reason(error)
    except (ValueError, OSError, ImportError, KeyError, TypeError, csv.Error) as error:
      broken[source] = reason(error)
  return rows, missing, broken


def _identity(model: Model, asked: Asked, rows: dict, config: ConfigDict) -> dict:
  source, *examples = _sources(asked)
  return {
    "scores": SCORES,
    "model": model.name,
    "weights": model.weights,
    "task": asked.task.name,
    "protocol": asked.task.protocol,
    "shots": asked.shots,
    "rows": rows[source].fingerprint,
    "examples": [rows[pool].fingerprint for pool in examples],
    "limit": config.limit if config.limit < len(rows[source]) else 0,
    **{knob: config[knob] for knob in ("seed", "stride", "dtype")},
  }


def _model(cells: list[Cell], rows: dict, config: ConfigDict, folder: pathlib.Path, bar: tqdm) -> dict[str, str]:
  """Computes what is missing of one model's cells: it is loaded if anything is, and gone afterwards.

  Returns the cells that have no score, with the reason.
  """
  failed = {}
  there = [cell for cell in cells if (folder / cell.file).exists()]
  for cell in there:
    with _told(cell, "kept", failed, bar):
      _refresh(folder / cell.file, cell, config)
  left = [cell for cell in cells if cell not in there]
  scorer = _loaded(left[0].model, config) if left else None
  for cell in left:
    with _told(cell, "computed", failed, bar):
      if isinstance(scorer, Exception):
        raise scorer
      found = _compute(cell, rows, scorer, config)
      _write(folder / cell.file, found)
      with open(folder.parent / COMPUTED, "a", encoding="utf-8") as log:
        log.write(json.dumps({"cell": cell.file, "items": found["items"]}) + "\n")
  return failed


@contextlib.contextmanager
def _told(cell: Cell, done: str, failed: dict[str, str], bar: tqdm) -> Iterator[None]:
  """One line for each cell; what goes wrong with it stands there and in `failed`."""
  bar.set_description(str(cell))
  try:
    yield
    line = f"{done} {cell}"
  except FAILURES as error:
    failed[str(cell)] = reason(error)
    line = f"failed {cell}: {reason(error)}"
  bar.n += 1  # update() counts nothing where the bar is not drawn
  bar.write(f"[{bar.n}/{bar.total}] {line}", file=sys.stderr)
  bar.refresh()


def _loaded(model: Model, config: ConfigDict) -> Scorer | Exception:
  """A scorer of the model, or why there is none: each of its cells will say so."""
  mesh = make_mesh(**config.mesh)
  try:
    loaded, tokenizer = load_pretrained(model.path, mesh, config.dtype, step=model.step)
    if tokenizer is None:
      raise ValueError(f"{model.path} has no tokenizer; put its files beside the checkpoint")
    return Scorer(loaded, tokenizer, config.batch_size, config.stride or None, config.seed)
  except FAILURES as error:
    return error


def _compute(cell: Cell, rows: dict, scorer: Scorer, config: ConfigDict) -> dict:
  """What a cell's file holds."""
  task, (source, *examples) = cell.asked.task, _sources(cell.asked)
  chosen = rows[source][: config.limit or None]
  pool = rows[(examples or [source])[0]]
  if pool.fingerprint == rows[source].fingerprint:  # one file for both: no item is its own example
    pool = rows[source]
  items = runner.run(task, chosen, scorer, cell.asked.shots, config.seed, pool)
  about = scorer.model.config
  return {
    "identity": cell.identity,
    "origin": rows[source].origin,
    "step": None if cell.model.step == "latest" else int(cell.model.step),
    "run": None if cell.model.step == "latest" else cell.model.path,
    "parameters": sum(map(math.prod, shapes(about).values())),
    "size": size_of(about),
    "items": len(chosen),
    "of": len(rows[source]),
    "truncated": int(items["truncated"].sum()),
    "resamples": config.resamples,
    "metrics": _metrics(task, items, config),
    "sums": {key: values.tolist() for key, values in items.items()},
  }


def _metrics(task: Task, items: runner.Items, config: ConfigDict) -> dict:
  found = bootstrap.intervals(task.metrics, items, config.resamples, config.seed)
  return {
    name: {end: _number(x) for end, x in found[name]._asdict().items()} | {"unit": metric.unit, "higher": metric.higher}
    for name, metric in task.metrics.items()
  }


def _refresh(path: pathlib.Path, cell: Cell, config: ConfigDict) -> None:
  """Draws the intervals anew, of the items that are there, if the config asks for another number of resamples."""
  found = read(path)
  if found["resamples"] != config.resamples:
    metrics = _metrics(cell.asked.task, found["sums"], config)
    sums = {key: values.tolist() for key, values in found["sums"].items()}
    _write(path, found | {"resamples": config.resamples, "metrics": metrics, "sums": sums})


def read(path: pathlib.Path) -> dict:
  """A finished cell, its sums as arrays [N]. Raises ValueError if it is damaged."""
  try:
    found = json.loads(path.read_text(encoding="utf-8"))
    return found | {"sums": {key: np.array(values, np.float64) for key, values in found["sums"].items()}}
  except (ValueError, KeyError, TypeError) as error:
    raise ValueError(
      f"{path} is no finished cell ({reason(error)}); remove it, and it will be computed again"
    ) from error


def _write(path: pathlib.Path, found: dict) -> None:
  """The whole file or none, whenever the process ends."""
  partial = path.with_name(f".{path.name}.partial")
  with open(partial, "w", encoding="utf-8") as file:
    json.dump(found, file)
    file.flush()
    os.fsync(file.fileno())
  os.replace(partial, path)


def _number(x: float) -> float | None:
  """JSON has no other numbers."""
  return x if math.isfinite(x) else None


def size_of(config: ModelConfig) -> str | None:
  """The paper's name of a model of this shape."""
  sizes = ("n_vocab", "n_ctx", "n_embd", "n_head", "n_layer")
  same = (name for name, one in SIZES.items() if all(getattr(one, size) == getattr(config, size) for size in sizes))
  return next((name for name in same if name != "distilgpt2"), None)
