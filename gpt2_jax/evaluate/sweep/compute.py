# SPDX-License-Identifier: Apache-2.0
"""Runs a sweep of models x tasks, and resumes it after a kill: finished cells are kept.

Each finished cell is a file of its own (cells.py). The same command computes what is missing.

Of several processes each computes its part of the cells, on its own devices, and waits for nobody
until it is through. A GPT-2 fits the devices of any one host, so no model is split over two.
"""

import contextlib
import math
import os
import pathlib
import sys
from collections.abc import Iterator, Mapping, Sequence

import jax
import numpy as np
from ml_collections import ConfigDict
from tqdm import tqdm

import gpt2_jax.distributed as distributed
from gpt2_jax.convert.pretrained import (
  detect_format,
  is_workdir,
  load_pretrained,
  resolve_checkpoint,
)
from gpt2_jax.evaluate import remote_data, runner, sources, tasks
from gpt2_jax.evaluate.scorers import Scorer
from gpt2_jax.evaluate.sweep import bootstrap, cells
from gpt2_jax.evaluate.sweep.cells import Cell, Datasets, Outcome, Sweep, SweptTask
from gpt2_jax.evaluate.sweep.models import (
  RANDOM,
  SweptModel,
  load_random,
  paper_size,
  resolve_models,
)
from gpt2_jax.evaluate.task import Task
from gpt2_jax.files import first_line, source_commit, summarize, user_path
from gpt2_jax.runs.checkpoint import open_saved
from gpt2_jax.runs.knobs import Knob
from gpt2_jax.sharding import make_mesh
from gpt2_jax.tokenizer import Tokenizer

# What fails a cell, and leaves the others to be computed.
CELL_ERRORS = (ValueError, OSError, ImportError, FloatingPointError, RuntimeError, MemoryError)
# Seconds in which the other processes may still be computing: a month. Death is seen at once.
UNTIL_ALL_END = 30 * 24 * 3600
# Characters of an error's line. With a missing dataset it says where to get it.
ERROR_LENGTH = 500

KNOBS = {
  "models": Knob(tuple, "names, paths or workdirs"),
  "tasks": Knob(tuple, "task, task:protocol or task:protocol:shots"),
  "data": Knob(str, "folder of the datasets, local or gs://"),
  "tfds_dir": Knob(str, "folder of TFDS's datasets"),
  "limit": Knob(int, "first items of each task", 0),
  "batch_size": Knob(int, "rows in one call", 1),
  "stride": Knob(int, "tokens that a window predicts; 0 is the context", 0),
  "dtype": Knob(str, "float32 or bfloat16"),
  "seed": Knob(int, "of examples, sampling and resamples", 0, 2**32 - 1),
  # A million is far beyond what an interval's four digits need, and takes minutes.
  "resamples": Knob(int, "of the bootstrap", 1, 1_000_000),
  "seen_above": Knob(float, "share of seen n-grams", 0, 1),
  "page": Knob(bool, "whether report.md is written, a page with a picture of each task"),
  "mesh.replica": Knob(int, "data parallelism; -1 is the rest", -1),
  "mesh.data": Knob(int, "sharded weights; -1 is the rest", -1),
  "mesh.model": Knob(int, "tensor parallelism", -1),
}


def prepare(config: ConfigDict, out: str, skip_missing: bool = False) -> Sweep:
  """Checks a sweep: all that can be known before a model is loaded.

  Raises FileNotFoundError with the datasets that are missing, unless they are to be skipped;
  ValueError or OSError for knobs, tasks, models or a folder that make no sweep, or if no task is
  left. A task whose rows are malformed is a line on stderr, and the others are left.
  """
  # 1. Knobs, tasks by name, and the folder.
  requested = _requested_tasks(config)
  folder = cells.out_folder(out)
  cells.check_out(folder)

  # 2. All datasets before any model: a sweep of hours must not end at a file that is not there.
  tfds_dir = user_path(config.tfds_dir) if config.tfds_dir else None
  if tfds_dir and "://" not in tfds_dir and not pathlib.Path(tfds_dir).is_dir():
    raise FileNotFoundError(f"tfds_dir {tfds_dir[:200]} is no folder; leave it out for TFDS's own")
  datasets, missing, broken = _load_datasets(requested.values(), config.data or None, tfds_dir)
  if missing and not skip_missing:
    raise FileNotFoundError(_missing_line(missing, config.data))
  models = resolve_models(config.models)

  # 3. The tasks whose rows and examples could be read.
  absent = _tasks_without(requested, missing)
  failed = _tasks_without(requested, broken)
  ready = [task for name, task in requested.items() if name not in absent | failed]
  failed |= _without_examples(ready, datasets)
  ready = [task for task in ready if task.name not in failed]

  # 4. The cells. Those that are not there yet will ask for every row: all are written out now.
  of_tasks = {}
  there = cells.finished(folder / "cells")
  for task in ready:
    of_task = [cells.make_cell(model, task, datasets, config) for model in models]
    try:
      if not there.issuperset(cell.file for cell in of_task):
        runner.check_rows(task.task, *_rows_and_pool(task, datasets, config))
      of_tasks[task.name] = of_task
    except (*CELL_ERRORS, *sources.MALFORMED) as error:
      failed[task.name] = first_line(error, limit=ERROR_LENGTH)

  # 5. What is left of the tasks.
  if not of_tasks:
    reasons = summarize((failed | absent).values(), limit=1, each=ERROR_LENGTH)
    raise ValueError(f"none of the {len(requested)} tasks can be run: {reasons}")
  for name, text in failed.items():
    if distributed.is_primary():
      print(f"failed {name}: {text}", file=sys.stderr)
  by_model = [list(of_model) for of_model in zip(*of_tasks.values(), strict=True)]
  _check_same_cells(by_model, failed | absent)
  return Sweep(config, folder, datasets, by_model, failed, absent)


def _check_same_cells(by_model: Sequence[Sequence[Cell]], reasons: Mapping[str, str]) -> None:
  """Raises ValueError unless every process has the same rows of the same tasks, and weights."""
  files = dict(reasons)
  for cells_of_model in by_model:
    files |= {str(cell): cell.file for cell in cells_of_model}
  distributed.check_same("sweep (model, task or rows)", files)


def run(sweep: Sweep) -> Outcome:
  """Runs or resumes a sweep: computes those of its cells that are not in its folder yet.

  A cell that cannot be computed is a line on stderr, and the others are computed. Raises ValueError
  if there is no cell in the end.
  """
  # 1. This process's cells, model by model.
  folder = sweep.folder / "cells"
  failed = dict(sweep.failed)
  there = set(distributed.broadcast("the finished cells", sorted(cells.finished(folder))))
  cells_here = _cells_of_process(sweep.cells, there, jax.process_index(), jax.process_count())
  total = sum(map(len, sweep.cells))
  n_here = sum(map(len, cells_here))
  if n_here < total:
    print(f"process {jax.process_index()}: {n_here} of {total} cells", file=sys.stderr)
  with (
    distributed.alone(),
    tqdm(total=n_here, unit="cell", disable=None, dynamic_ncols=True) as bar,
  ):
    for cells_of_model in cells_here:
      failed |= _complete(cells_of_model, sweep.datasets, sweep.config, folder, there, bar)

  # 2. The other processes' cells. Some take longer by hours.
  for failed_there in distributed.all_gather_json("the end of the cells", failed, UNTIL_ALL_END):
    failed |= failed_there

  # 3. What is there now.
  finished = []
  for cells_of_model in sweep.cells:
    for cell in cells_of_model:
      if str(cell) not in failed:
        finished.append(cells.read(folder / cell.file, cell.identity))
  if not finished:
    reason = summarize(failed.values(), limit=1, each=300)
    raise ValueError(f"none of the {total} cells could be computed: {reason}")
  return Outcome(finished, failed, sweep.missing)


def _requested_tasks(config: ConfigDict) -> dict[str, SweptTask]:
  """The config's tasks by name, each once. Raises ValueError for knobs that make no sense."""
  check_knobs(config)

  # two spellings may be one task: lambada, lambada:last_word, lambada::0
  requested = {}
  for text in config.tasks:
    task = cells.parse_task(text)
    requested[task.name] = task
  if not config.models or not requested:
    raise ValueError("there is nothing to do; give at least one model and one task")
  return requested


def requested_sources(config: ConfigDict) -> list[sources.Source]:
  """The sources of the config's tasks, with those of their examples."""
  requested = []
  for task in _requested_tasks(config).values():
    requested += task.all_sources
  return requested


def check_knobs(config: ConfigDict) -> None:
  """Raises ValueError for a knob that is missing, of another type or out of range."""
  for name, knob in KNOBS.items():
    value = config
    for part in name.split("."):
      if not isinstance(value, ConfigDict) or part not in value:
        raise ValueError(f"the config has no {name} ({knob.help}); begin with configs/zero_shot.py")
      value = value[part]
    problem = knob.problem(value)
    if problem:
      raise ValueError(f"{name} is {str(value)[:80]}, which {problem}; set --config.{name}")

  if config.dtype not in ("float32", "bfloat16"):
    raise ValueError(f"dtype is {config.dtype[:40]!r}; it is float32 or bfloat16")
  _local_mesh(config)


def _local_mesh(config: ConfigDict) -> jax.sharding.Mesh:
  """The config's mesh over the devices of this process."""
  return make_mesh(**config.mesh, devices=jax.local_devices())


def _load_datasets(
  requested, data: str | None, tfds_dir: str | None
) -> tuple[Datasets, dict[sources.Source, str], dict[sources.Source, str]]:
  """The rows of all sources; the sources that are missing, and the broken ones, with the reason."""
  datasets, missing, broken = {}, {}, {}

  # 1. Where each source is looked for. A file in --data holds the rows under test and nothing else:
  #    the examples of a task are files beside it.
  is_file = data is not None and remote_data.is_file(data)
  folder = data
  if is_file:
    folder = os.path.dirname(data) or "."
  tested = {task.rows_source for task in requested}
  needed = {}
  for task in requested:
    for source in task.all_sources:
      needed[source] = data if source in tested else folder

  # 2. Load each.
  for source, place in needed.items():
    try:
      if is_file and source in tested:
        tasks.check_file(source, data)
      datasets[source] = remote_data.load(source, place, tfds_dir)
    except FileNotFoundError as error:
      missing[source] = first_line(error, limit=ERROR_LENGTH)
    except (OSError, ImportError, *sources.MALFORMED) as error:
      broken[source] = first_line(error, limit=ERROR_LENGTH)
  return datasets, missing, broken


def _missing_line(missing: Mapping[sources.Source, str], data: str) -> str:
  """One line for all datasets that are missing: for one, where to get it; for more, their names."""
  reasons = list(dict.fromkeys(missing.values()))
  if len(reasons) == 1:
    return f"a dataset is not there: {reasons[0]}; --skip_missing leaves it out"

  # Protocols of a task may have files of their own in the same folder.
  names = [f"{source.name} ({summarize(source.files, 1, 30)})" for source in missing]
  names = summarize(dict.fromkeys(names))
  return (
    f"{len(reasons)} datasets are not there: {names}; --list says from where to get each, and it "
    f"goes into {data[:80] or 'DATA'}/NAME/; --skip_missing leaves them out"
  )


def _rows_and_pool(
  task: SweptTask, datasets: Datasets, config: ConfigDict
) -> tuple[Sequence[sources.Row], int, int, Sequence[sources.Row]]:
  """What the runner takes of a task: the rows that are scored, shots, seed, and the examples."""
  rows = datasets[task.rows_source]
  pool = cells.example_rows(task, datasets)
  return rows[: config.limit or None], task.shots, config.seed, rows if pool is None else pool


def _without_examples(ready: Sequence[SweptTask], datasets: Datasets) -> dict[str, str]:
  """The tasks whose examples are all under test, with the reason; says where some of them are."""
  failed = {}
  for task in ready:
    pool = cells.example_rows(task, datasets)
    if pool is None:
      continue
    total = len(datasets[task.examples_source])
    text = (
      f"{total - len(pool):,} of the {total:,} examples in {pool.origin[-200:]} are rows under test"
    )
    if not len(pool):
      failed[task.name] = (
        f"{text}, and no others are there; put {summarize(task.examples_source.files)} there"
      )
    elif len(pool) < total and distributed.is_primary():
      print(f"{task.name}: {text}, and are not drawn", file=sys.stderr)
  return failed


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


# ---- the cells of one process, and of one model


def _cells_of_process(
  by_model: Sequence[Sequence[Cell]], there: set[str], rank: int, count: int
) -> list[list[Cell]]:
  """One process's part of the cells, model by model: as many as another's, or one more or less.

  They are dealt in rounds, and each round begins one process later, so that a task that takes long
  is not the same process's for every model. What is to be computed and what is finished is dealt
  apart.
  """
  dealt = {True: 0, False: 0}
  part = []
  for cells_of_model in by_model:
    of_model = []
    for cell in cells_of_model:
      number = dealt[cell.file in there]
      dealt[cell.file in there] += 1
      if (number + number // count) % count == rank:
        of_model.append(cell)
    part.append(of_model)
  return part


def _complete(
  cells_of_model: Sequence[Cell],
  datasets: Datasets,
  config: ConfigDict,
  folder: pathlib.Path,
  there: set[str],
  bar: tqdm,
) -> dict[str, str]:
  """Computes the missing cells of one model, which is loaded if there are any, and gone afterwards.

  Returns the cells that have no score, with the reason.
  """
  failed = {}

  # 1. Keep the finished ones.
  todo = []
  for cell in cells_of_model:
    if cell.file not in there or _counts_unscored_bytes(folder / cell.file, cell):
      todo.append(cell)
      continue
    with _reporting(cell, "kept", failed, bar, config):
      _refresh_intervals(folder / cell.file, cell, config)

  # 2. Compute the others. A model that cannot be loaded fails each of them, and is tried once.
  scorer = _load_scorer(todo[0].model, config) if todo else None
  for cell in todo:
    with _reporting(cell, "computed", failed, bar, config):
      if isinstance(scorer, Exception):
        raise scorer
      content = _compute(cell, datasets, scorer, config)
      cells.write(folder / cell.file, content)

      # After the cell: a line here says that its file is there.
      cells.log_computed(folder.parent, cell, content["items"])
  return failed


@contextlib.contextmanager
def _reporting(
  cell: Cell, done: str, failed: dict[str, str], bar: tqdm, config: ConfigDict
) -> Iterator[None]:
  """Prints one line for a cell, with an error if one is raised, which also goes into `failed`."""
  bar.set_description(str(cell))
  try:
    yield
    line = f"{done} {cell}"
  except CELL_ERRORS as error:
    failed[str(cell)] = _reason(error, config)
    line = f"failed {cell}: {failed[str(cell)]}"

  # not update(), which counts nothing if the bar is not drawn
  bar.n += 1
  bar.write(f"[{bar.n}/{bar.total}] {line}", file=sys.stderr)
  bar.refresh()


def _reason(error: Exception, config: ConfigDict) -> str:
  """Why a cell failed, in one line; if memory was short, with the knobs that need less."""
  if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error):
    return (
      f"out of memory in batches of {config.batch_size} rows ({first_line(error, 200)}); set "
      "--config.batch_size lower, --config.dtype=bfloat16, or --config.mesh.model to shard"
    )
  return first_line(error, limit=ERROR_LENGTH)


def _load_scorer(model: SweptModel, config: ConfigDict) -> Scorer | Exception:
  """A scorer of the model, or the error that there is none: each of its cells reports it."""
  mesh = _local_mesh(config)
  try:
    if model.path.startswith(RANDOM):
      weights, tokenizer = load_random(model.path, mesh, config.dtype)
    else:
      weights, tokenizer = load_pretrained(
        model.path, mesh, config.dtype, step=model.step, adapter=model.adapter
      )
    if tokenizer is None:
      raise ValueError(f"{model.path} has no tokenizer; put its files beside the checkpoint")
    return Scorer(weights, tokenizer, config.batch_size, config.stride or None, config.seed)
  except CELL_ERRORS as error:
    return error


def _compute(cell: Cell, datasets: Datasets, scorer: Scorer, config: ConfigDict) -> dict:
  """Scores a task's rows; returns the content of the cell's file."""
  # 1. The scores.
  task = cell.task.task
  rows = datasets[cell.task.rows_source]
  scored, shots, seed, pool = _rows_and_pool(cell.task, datasets, config)
  items = runner.run(task, scored, scorer, shots, seed, pool)

  # 2. The file. Only a run has steps.
  is_run = cell.model.step != "latest"
  model_config = scorer.model.config
  return {
    "identity": cell.identity,
    "commit": source_commit(),
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
    value, low, high, method = intervals[name]
    numbers = {"value": value, "low": low, "high": high}
    metrics[name] = {key: x if math.isfinite(x) else None for key, x in numbers.items()}
    metrics[name] |= {"unit": metric.unit, "higher": metric.higher, "method": method}
  return metrics


def _counts_unscored_bytes(path: pathlib.Path, cell: Cell) -> bool:
  """Whether a cell counts the bytes of a first token that has no score, as cells once did.

  That is so where the tokenizer has no `<|endoftext|>`; a newer cell says what was not scored.
  """
  try:
    sums = cells.read(path, cell.identity)["sums"]
    if not {"nats", "tokens", "bytes"} <= sums.keys() or "unscored" in sums:
      return False
    tokenizer = _tokenizer(cell.model)
  except CELL_ERRORS:
    # What is wrong with the cell, or with the model, is said where it is needed.
    return False
  return tokenizer is not None and tokenizer.eot is None


def _tokenizer(model: SweptModel) -> Tokenizer | None:
  """The tokenizer of a model, whose weights are not loaded."""
  path = resolve_checkpoint(model.path)
  if is_workdir(path):
    return open_saved(str(path), model.step).tokenizer
  return detect_format(path, has_adapter=True).read(path).tokenizer


def _refresh_intervals(path: pathlib.Path, cell: Cell, config: ConfigDict) -> None:
  """Draws a cell's intervals again, if the config asks for another number of resamples.

  Likewise those of a cell from before it said how they were found: all were percentiles then. The
  items' sums are in the file, so that no model is needed.
  """
  content = cells.read(path, cell.identity)
  says_how = all("method" in score for score in content["metrics"].values())
  if content["resamples"] != config.resamples or not says_how:
    metrics = _metrics(cell.task.task, content["sums"], config)
    sums = _as_lists(content["sums"])
    cells.write(path, content | {"resamples": config.resamples, "metrics": metrics, "sums": sums})


def _as_lists(sums: Mapping[str, np.ndarray]) -> dict[str, list[float]]:
  return {key: values.tolist() for key, values in sums.items()}
