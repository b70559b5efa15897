# SPDX-License-Identifier: Apache-2.0
"""Runs a sweep of models x tasks, and resumes it after a kill: finished cells are kept.

Each finished cell is a file of its own (cells.py). The same command computes what is missing.
"""

import contextlib
import csv
import json
import math
import pathlib
import sys
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from ml_collections import ConfigDict
from tqdm import tqdm

from gpt2_jax.convert.pretrained import load_pretrained
from gpt2_jax.evaluate import runner, sources
from gpt2_jax.evaluate.scorers import Scorer
from gpt2_jax.evaluate.sweep import bootstrap, cells
from gpt2_jax.evaluate.sweep.cells import Cell, Datasets, Outcome, SweptTask
from gpt2_jax.evaluate.sweep.models import SweptModel, paper_size, resolve_models
from gpt2_jax.evaluate.task import Task
from gpt2_jax.files import first_line
from gpt2_jax.sharding import make_mesh

COMPUTED = "computed.jsonl"  # a line for each cell that was computed here, in their order
# What fails a cell, and leaves the others to be computed.
CELL_ERRORS = (ValueError, OSError, ImportError, FloatingPointError, RuntimeError)
# What fails the tasks of a dataset whose files cannot be read.
DATASET_ERRORS = (ValueError, OSError, ImportError, KeyError, TypeError, csv.Error)
# Characters of an error's line. With a missing dataset it says where to get it.
ERROR_LENGTH = 1000
LEAST = {"resamples": 1, "seed": 0, "limit": 0, "stride": 0}


def run(config: ConfigDict, out: str, skip_missing: bool = False) -> Outcome:
  """Runs or resumes a sweep: computes those of the config's cells that are not in `out`/cells yet.

  Raises FileNotFoundError, before any model is loaded, with all datasets that are missing and where
  to get them, unless they are to be skipped. A cell that cannot be computed is a line on stderr,
  and the others are computed.
  """
  # 1. The tasks by name.
  requested = _requested_tasks(config)

  # 2. All datasets before any model: a sweep of hours must not end at a file that is not there.
  datasets, missing, broken = _load_datasets(
    requested.values(), config.data or None, config.tfds_dir or None
  )
  if missing and not skip_missing:
    ways = " | ".join(dict.fromkeys(missing.values()))
    raise FileNotFoundError(
      f"datasets that are not there: {len(missing)} ({ways}); --skip_missing leaves them out"
    )
  models = resolve_models(config.models)

  # 3. The tasks whose rows and examples could be read.
  absent = _tasks_without(requested, missing)
  failed = _tasks_without(requested, broken)
  for name, text in failed.items():
    print(f"failed {name}: {text}", file=sys.stderr)
  ready = [task for name, task in requested.items() if name not in absent | failed]

  # 4. The cells, model by model, so that each model is loaded once at most.
  folder = pathlib.Path(out).expanduser() / "cells"
  folder.mkdir(parents=True, exist_ok=True)
  sweep = []
  for model in models:
    sweep.append([cells.make_cell(model, task, datasets, config) for task in ready])
  total = len(models) * len(ready)
  with tqdm(total=total, unit="cell", disable=None, dynamic_ncols=True) as bar:
    for cells_of_model in sweep:
      failed |= _complete(cells_of_model, datasets, config, folder, bar)

  # 5. What is there now.
  finished = []
  for cells_of_model in sweep:
    for cell in cells_of_model:
      if str(cell) not in failed:
        finished.append(cells.read(folder / cell.file))
  return Outcome(finished, failed, absent)


def _requested_tasks(config: ConfigDict) -> dict[str, SweptTask]:
  """The config's tasks by name, each once. Raises ValueError for knobs that make no sense."""
  for knob, least in LEAST.items():
    if config[knob] < least:
      raise ValueError(f"{knob} is {config[knob]}; it is {least} or more")

  # two spellings may be one task: lambada, lambada:last_word, lambada::0
  requested = {}
  for text in config.tasks:
    task = cells.parse_task(text)
    requested[task.name] = task
  if not config.models or not requested:
    raise ValueError("there is nothing to do; give at least one model and one task")
  return requested


def _load_datasets(
  requested, data: str | None, tfds_dir: str | None
) -> tuple[Datasets, dict[sources.Source, str], dict[sources.Source, str]]:
  """The rows of all sources; the sources that are missing, and the broken ones, with the reason."""
  datasets, missing, broken = {}, {}, {}
  needed = {}
  for task in requested:
    needed |= dict.fromkeys(task.all_sources)

  for source in needed:
    try:
      datasets[source] = sources.load(source, data, tfds_dir)
    except FileNotFoundError as error:
      missing[source] = first_line(error, limit=ERROR_LENGTH)
    except DATASET_ERRORS as error:
      broken[source] = first_line(error, limit=ERROR_LENGTH)
  return datasets, missing, broken


def _tasks_without(
  requested: Mapping[str, SweptTask], reasons: Mapping[sources.Source, str]
) -> dict[str, str]:
  """The tasks that lack one of their sources, by name, with the reason."""
  without = {}
  for name, task in requested.items():
    for source in task.all_sources:
      if source in reasons:
        without[name] = reasons[source]
  return without


# ---- the cells of one model


def _complete(
  cells_of_model: Sequence[Cell],
  datasets: Datasets,
  config: ConfigDict,
  folder: pathlib.Path,
  bar: tqdm,
) -> dict[str, str]:
  """Computes the missing cells of one model, which is loaded if there are any, and gone afterwards.

  Returns the cells that have no score, with the reason.
  """
  failed = {}

  # 1. Keep the finished ones.
  todo = []
  for cell in cells_of_model:
    if not (folder / cell.file).exists():
      todo.append(cell)
      continue
    with _reporting(cell, "kept", failed, bar):
      _refresh_intervals(folder / cell.file, cell, config)

  # 2. Compute the others. A model that cannot be loaded fails each of them, and is tried once.
  scorer = _load_scorer(todo[0].model, config) if todo else None
  for cell in todo:
    with _reporting(cell, "computed", failed, bar):
      if isinstance(scorer, Exception):
        raise scorer
      content = _compute(cell, datasets, scorer, config)
      cells.write(folder / cell.file, content)

      # After the cell: a line here says that its file is there.
      with open(folder.parent / COMPUTED, "a", encoding="utf-8") as log:
        log.write(json.dumps({"cell": cell.file, "items": content["items"]}) + "\n")
  return failed


@contextlib.contextmanager
def _reporting(cell: Cell, done: str, failed: dict[str, str], bar: tqdm) -> Iterator[None]:
  """Prints one line for a cell, with an error if one is raised, which also goes into `failed`."""
  bar.set_description(str(cell))
  try:
    yield
    line = f"{done} {cell}"
  except CELL_ERRORS as error:
    failed[str(cell)] = first_line(error, limit=ERROR_LENGTH)
    line = f"failed {cell}: {failed[str(cell)]}"

  # not update(), which counts nothing if the bar is not drawn
  bar.n += 1
  bar.write(f"[{bar.n}/{bar.total}] {line}", file=sys.stderr)
  bar.refresh()


def _load_scorer(model: SweptModel, config: ConfigDict) -> Scorer | Exception:
  """A scorer of the model, or the error that there is none: each of its cells reports it."""
  mesh = make_mesh(**config.mesh)
  try:
    weights, tokenizer = load_pretrained(model.path, mesh, config.dtype, step=model.step)
    if tokenizer is None:
      raise ValueError(f"{model.path} has no tokenizer; put its files beside the checkpoint")
    return Scorer(weights, tokenizer, config.batch_size, config.stride or None, config.seed)
  except CELL_ERRORS as error:
    return error


def _compute(cell: Cell, datasets: Datasets, scorer: Scorer, config: ConfigDict) -> dict:
  """Scores a task's rows; returns the content of the cell's file."""
  # 1. The rows, and what few-shot examples are drawn from.
  task = cell.task.task
  rows = datasets[cell.task.rows_source]
  pool = rows
  if cell.task.examples_source is not None:
    examples = datasets[cell.task.examples_source]
    # If one file serves for both, the runner must see the same rows: no item is its own example.
    if examples.fingerprint != rows.fingerprint:
      pool = examples

  # 2. The scores.
  scored = rows[: config.limit or None]
  items = runner.run(task, scored, scorer, cell.task.shots, config.seed, pool)

  # 3. The file. Only a run has steps.
  is_run = cell.model.step != "latest"
  model_config = scorer.model.config
  return {
    "identity": cell.identity,
    "origin": rows.origin,
    "step": int(cell.model.step) if is_run else None,
    "run": cell.model.path if is_run else None,
    "parameters": model_config.n_params,
    "size": paper_size(model_config),
    "items": len(scored),
    "of": len(rows),
    "truncated": int(items["truncated"].sum()),
    "resamples": config.resamples,
    "metrics": _metrics(task, items, config),
    "sums": _as_lists(items),
  }


def _metrics(task: Task, items: runner.Items, config: ConfigDict) -> dict:
  """Each metric with its interval, as JSON has it: a number that is not finite is null."""
  intervals = bootstrap.intervals(task.metrics, items, config.resamples, config.seed)
  metrics = {}
  for name, metric in task.metrics.items():
    numbers = intervals[name]._asdict()
    metrics[name] = {key: x if math.isfinite(x) else None for key, x in numbers.items()}
    metrics[name] |= {"unit": metric.unit, "higher": metric.higher}
  return metrics


def _refresh_intervals(path: pathlib.Path, cell: Cell, config: ConfigDict) -> None:
  """Draws a cell's intervals again, if the config asks for another number of resamples.

  The items' sums are in the file, so that no model is needed.
  """
  content = cells.read(path)
  if content["resamples"] != config.resamples:
    metrics = _metrics(cell.task.task, content["sums"], config)
    sums = _as_lists(content["sums"])
    cells.write(path, content | {"resamples": config.resamples, "metrics": metrics, "sums": sums})


def _as_lists(sums: Mapping[str, np.ndarray]) -> dict[str, list[float]]:
  return {key: values.tolist() for key, values in sums.items()}
