# SPDX-License-Identifier: Apache-2.0
"""Cells of a sweep, a model on a task: what identifies a cell, and its JSON file.

All that a cell's scores depend on names its file: the weights, the task and its rows, and every
knob that matters. A finished cell is therefore never computed again, and another config has cells
of its own in the same folder.
"""

import contextlib
import dataclasses
import json
import math
import os
import pathlib
import re
import shutil
import typing
import uuid
from collections.abc import Iterator

import jax
import numpy as np
from ml_collections import ConfigDict

import gpt2_jax.distributed as distributed
from gpt2_jax.evaluate import runner, sources, tasks
from gpt2_jax.evaluate.sweep import bootstrap
from gpt2_jax.evaluate.sweep.models import SweptModel
from gpt2_jax.evaluate.task import Task
from gpt2_jax.files import (
  atomic_write,
  check_folder,
  file_lock,
  first_line,
  json_sha256,
  local_path,
  parse_json_object,
  sha256,
)
from gpt2_jax.runs.workdir import as_path, check_shared, cloud_errors, is_remote

if typing.TYPE_CHECKING:
  from etils import epath

# Goes up whenever a task or a scorer comes to other numbers, so that older cells are not kept.
SCORES_VERSION = 1

# Names in a sweep's folder, besides `cells`. The first has a line for each cell that was computed
# here, in their order; process 1 of several has computed.1.jsonl, and so on.
COMPUTED = "computed.jsonl"
RESULTS = "results.jsonl"
TABLE = "table.md"
PLOTS = "plots"

# What a finished cell holds besides its identity, sums and metrics.
FIELDS = {
  "origin": str,
  "step": int | None,
  "run": str | None,
  "parameters": int,
  "size": str | None,
  "items": int,
  "of": int,
  "truncated": int,
  "resamples": int,
}

Datasets = dict[sources.Source, sources.DatasetRows]


@dataclasses.dataclass(frozen=True)
class SweptTask:
  """A row of the table: a task under a protocol, after some examples."""

  task: Task
  shots: int

  @property
  def name(self) -> str:
    return f"{self.task.name}:{self.task.protocol}:{self.shots}"

  @property
  def rows_source(self) -> sources.Source:
    return self.task.source

  @property
  def examples_source(self) -> sources.Source | None:
    """Where its few-shot examples come from; None if there are none, or if they are other rows."""
    return self.task.source.examples if self.shots else None

  @property
  def all_sources(self) -> list[sources.Source]:
    if self.examples_source is None:
      return [self.rows_source]
    return [self.rows_source, self.examples_source]


def example_rows(task: SweptTask, datasets: Datasets) -> sources.DatasetRows | None:
  """The rows that few-shot examples are drawn from; None if they are the task's other rows.

  No row under test is among them, even where one file serves for both.
  """
  if task.examples_source is None:
    return None
  return datasets[task.examples_source].without(datasets[task.rows_source])


def parse_task(text: str) -> SweptTask:
  """Parses `task`, `task:protocol` or `task:protocol:shots`; an empty protocol is the task's first.

  Raises ValueError.
  """
  name, protocol, shots = (text.split(":") + ["", ""])[:3]

  # Digits of other scripts are decimal, too, and no number here has ten.
  is_number = re.fullmatch("[0-9]{0,9}", shots)
  if text.count(":") > 2 or not is_number:
    raise ValueError(f"{text[:80]!r} is not task:protocol:shots, as in lambada:last_word:0")

  task = tasks.get(name, protocol or None)
  if int(shots or 0) and task.example is None:
    raise ValueError(
      f"{task.name}:{task.protocol} takes no examples before an item; leave the {shots} shots out"
    )
  return SweptTask(task, runner.number_of_shots(task, int(shots) if shots else None))


@dataclasses.dataclass(frozen=True)
class Cell:
  """A model on a task; `identity` is all that its scores depend on."""

  model: SweptModel
  task: SweptTask
  identity: dict

  @property
  def file(self) -> str:
    """The file's name: readable, and another one for each identity by its hash."""
    identity = json.dumps(self.identity, sort_keys=True).encode()
    # the end of a long path says more than its beginning
    readable = re.sub(r"[^\w.@-]+", "_", f"{self.model.name[-60:]}.{self.task.name}").strip("_.")
    return f"{readable}.{sha256(identity)[:12]}.json"

  def __str__(self) -> str:
    return f"{self.task.name} of {self.model.name}"


def make_cell(model: SweptModel, task: SweptTask, datasets: Datasets, config: ConfigDict) -> Cell:
  """A cell with its identity; a limit that all rows are within is none."""
  rows = datasets[task.rows_source]
  pool = example_rows(task, datasets)
  examples = [] if pool is None else [pool.fingerprint]

  # Batch size, mesh and number of resamples are not in it: scores do not depend on them.
  identity = {
    "scores": SCORES_VERSION,
    "model": model.name,
    "weights": model.weights,
    "task": task.task.name,
    "protocol": task.task.protocol,
    "shots": task.shots,
    "rows": rows.fingerprint,
    "examples": examples,
    "limit": config.limit if config.limit < len(rows) else 0,
    "seed": config.seed,
    "stride": config.stride,
    "dtype": config.dtype,
  }
  # A user's own task is another one when its file has been changed.
  if task.task.program:
    identity["program"] = task.task.program
  return Cell(model, task, identity)


@dataclasses.dataclass(frozen=True)
class Sweep:
  """A sweep whose tasks, datasets, models and folder have been checked: nothing is written yet."""

  config: ConfigDict
  folder: "pathlib.Path | epath.Path"
  datasets: Datasets
  cells: list[list[Cell]]  # model by model, so that each is loaded once at most
  failed: dict[str, str]  # the tasks that cannot be run, with the reason
  missing: dict[str, str]  # the tasks without a dataset, with where to get it


@dataclasses.dataclass(frozen=True)
class Outcome:
  """What a sweep has come to: its finished cells, in the order of the config, and the others."""

  cells: list[dict]
  failed: dict[str, str]  # the cells and tasks that could not be computed, with the reason
  missing: dict[str, str]  # the tasks without a dataset, with where to get it


# ---- the folder of a sweep


def out_folder(out: str) -> "pathlib.Path | epath.Path":
  """A sweep's folder from the flag: local, or on gs://. Raises ValueError, ImportError."""
  return as_path(out) if is_remote(out) else local_path(out)


def check_out(folder: "pathlib.Path | epath.Path") -> None:
  """Checks that a sweep can write into its folder, and makes nothing. Raises OSError.

  Whether gs:// can be written to shows at the lock.
  """
  if is_remote(str(folder)):
    return
  for name in (".", "cells", PLOTS):
    check_folder(folder / name)
  for name in (COMPUTED, RESULTS, TABLE):
    if (folder / name).is_dir():
      raise IsADirectoryError(f"{folder / name} is a folder; take another --out, or move it away")


@contextlib.contextmanager
def lock_folder(folder: "pathlib.Path | epath.Path") -> Iterator[None]:
  """Locks a sweep's folder for as long as the context lasts, so that no cell is computed twice.

  A folder that was made for this, and into which nothing came, is removed. Raises OSError if
  another sweep holds it. On gs:// there is no lock: two sweeps may compute a cell twice there.
  Raises ValueError if another process of this sweep does not see the same folder.
  """
  with _lock_of_primary(folder) if distributed.is_primary() else contextlib.nullcontext():
    _mark_folder(folder)
    yield


@contextlib.contextmanager
def _lock_of_primary(folder: "pathlib.Path | epath.Path") -> Iterator[None]:
  if is_remote(str(folder)):
    yield
    return

  busy = f"another sweep is writing into {folder}; wait until it ends, or take another --out"
  was_there = folder.exists()
  with file_lock(folder / ".lock", busy):
    try:
      yield
    finally:
      if not was_there:
        _remove_if_empty(folder)


def _mark_folder(folder: "pathlib.Path | epath.Path") -> None:
  """Writes a mark of this sweep into its lock, which every process of it must see."""
  if jax.process_count() == 1 and not is_remote(str(folder)):
    return
  own_mark = uuid.uuid4().hex if distributed.is_primary() else None
  if own_mark:
    with cloud_errors(str(folder)):
      (folder / ".lock").write_text(own_mark)
  mark = distributed.broadcast("the lock of the sweep", own_mark)
  check_shared(folder / ".lock", mark, own_mark == mark, "--out")


def _remove_if_empty(folder: pathlib.Path) -> None:
  """Removes a sweep's folder with no file in it but its lock."""
  if not any(path.is_file() for path in folder.rglob("*") if path != folder / ".lock"):
    shutil.rmtree(folder, ignore_errors=True)


# ---- files of cells


def finished(folder: "pathlib.Path | epath.Path") -> set[str]:
  """The names of the files in a folder of cells; one listing, however many there are."""
  with cloud_errors(str(folder)), contextlib.suppress(FileNotFoundError):
    return {path.name for path in folder.iterdir()}
  return set()


def write(path: "pathlib.Path | epath.Path", content: dict) -> None:
  """Atomic write of a cell: the whole file or none, whenever the process ends."""
  text = json.dumps(content | {"sha256": json_sha256(content)})
  # An object of gs:// appears when all of it is there.
  if is_remote(str(path)):
    with cloud_errors(str(path)):
      path.write_text(text)
    return

  with atomic_write(path, overwrite=True) as partial, open(partial, "w", encoding="utf-8") as file:
    file.write(text)
    # the name must not be on disk before the content is
    file.flush()
    os.fsync(file.fileno())


def log_computed(folder: "pathlib.Path | epath.Path", cell: Cell, items: int) -> None:
  """Adds a line to this process's list of what was computed. No two write the same file."""
  rank = jax.process_index()
  path = folder / (COMPUTED.replace(".", f".{rank}.") if rank else COMPUTED)
  line = json.dumps({"cell": cell.file, "items": items}) + "\n"
  if not is_remote(str(path)):
    with open(path, "a", encoding="utf-8") as log:
      log.write(line)
    return

  # Nothing can be appended to an object of gs://.
  with cloud_errors(str(path)):
    before = path.read_text() if path.exists() else ""
    path.write_text(before + line)


def read(path: "pathlib.Path | epath.Path", identity: dict | None = None) -> dict:
  """Reads a finished cell, its sums as arrays [N].

  Raises ValueError if it is damaged, or not the cell of that identity.
  """
  try:
    with cloud_errors(str(path)):
      file = path.read_bytes()
    content = parse_json_object(file, str(path))
    _check_content(content, identity)
    # It has served: results have no checksum of a file.
    content.pop("sha256", None)
    return content | {"sums": _as_arrays(content["sums"])}
  except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
    reason = f"it has no {error}" if isinstance(error, KeyError) else first_line(error)
    raise ValueError(
      f"{path} is no finished cell ({reason}); remove it, and it will be computed again"
    ) from error


def _as_arrays(sums: dict) -> dict[str, np.ndarray]:
  return {key: np.array(values, np.float64) for key, values in sums.items()}


def _check_content(content: dict, identity: dict | None) -> None:
  """Holds a cell against its checksum, its name, and itself. Raises ValueError and others."""
  # 1. The checksum. Cells of before it have none, and are held against themselves alone.
  checksum = json_sha256(content)
  if content.get("sha256", checksum) != checksum:
    raise ValueError("its checksum is another")
  if identity is not None and content["identity"] != identity:
    raise ValueError("it is of another model or task, or of another version of them")

  # 2. The types of what the report reads.
  for name, type_ in FIELDS.items():
    if not isinstance(content[name], type_) or isinstance(content[name], bool):
      raise ValueError(f"its {name} is {str(content[name])[:80]!r}")
  n = content["items"]
  if not 1 <= n <= content["of"]:
    raise ValueError(f"it has {n:,} items of {content['of']:,}")

  # 3. The sums: as many numbers as items.
  sums = _as_arrays(content["sums"])
  for name, values in sums.items():
    if values.shape != (n,):
      raise ValueError(f"its sum {name[:80]!r} has not {n:,} numbers")
  if sums["truncated"].sum() != content["truncated"]:
    raise ValueError("its number of truncated items is not that of its sums")

  # 4. The metrics follow from what the items have.
  task = tasks.get(content["identity"]["task"], content["identity"]["protocol"])
  if content["metrics"].keys() != task.metrics.keys():
    raise ValueError(f"its metrics are not {', '.join(task.metrics)}")
  for name, metric in task.metrics.items():
    with np.errstate(all="ignore"):
      value = float(metric.of_counts(sums, np.ones((1, n)))[0])
    _check_metric(name, content["metrics"][name], value)


def _check_metric(name: str, score: dict, value: float) -> None:
  """Raises ValueError unless a cell's score is `value`, with an interval."""
  numbers = [score[end] for end in ("value", "low", "high")]
  is_number = [x is None or math.isfinite(x) for x in numbers]
  if not all(is_number) or not isinstance(score["unit"], str):
    raise ValueError(f"its {name} has no value, low and high")
  # Cells from before intervals had more than one method do not say it.
  if score.get("method", bootstrap.PERCENTILE) not in bootstrap.METHODS:
    raise ValueError(f"its {name} has an interval by {str(score['method'])[:40]!r}")

  # Not equal bit by bit: exp may differ between libraries of mathematics.
  same = score["value"] is None
  if math.isfinite(value):
    same = score["value"] is not None and math.isclose(
      score["value"], value, rel_tol=1e-9, abs_tol=1e-9
    )
  if not same or score["higher"] not in (True, False):
    raise ValueError(f"its {name} is {str(score['value'])[:40]}, and its sums give {value:g}")
