# SPDX-License-Identifier: Apache-2.0
"""Cells of a sweep, a model on a task: what identifies a cell, and its JSON file.

All that a cell's scores depend on names its file: the weights, the task and its rows, and every
knob that matters. A finished cell is therefore never computed again, and another config has cells
of its own in the same folder.
"""

import dataclasses
import json
import os
import pathlib
import re

import numpy as np
from ml_collections import ConfigDict

from gpt2_jax.evaluate import sources, tasks
from gpt2_jax.evaluate.sweep.models import SweptModel
from gpt2_jax.evaluate.task import Task
from gpt2_jax.files import atomic_write, first_line, sha256

# Goes up whenever a task or a scorer comes to other numbers, so that older cells are not kept.
SCORES_VERSION = 1

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


def parse_task(text: str) -> SweptTask:
  """Parses `task`, `task:protocol` or `task:protocol:shots`; an empty protocol is the task's first.

  Raises ValueError.
  """
  name, protocol, shots = (text.split(":") + ["", ""])[:3]

  if text.count(":") > 2 or not (shots or "0").isdecimal():
    raise ValueError(f"{text!r} is not task:protocol:shots, as in lambada:last_word:0")

  return SweptTask(tasks.get(name, protocol or None), int(shots or 0))


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
  examples = []
  if task.examples_source is not None:
    examples = [datasets[task.examples_source].fingerprint]

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
  return Cell(model, task, identity)


@dataclasses.dataclass(frozen=True)
class Outcome:
  """What a sweep has come to: its finished cells, in the order of the config, and the others."""

  cells: list[dict]
  failed: dict[str, str]  # the cells and tasks that could not be computed, with the reason
  missing: dict[str, str]  # the tasks without a dataset, with where to get it


def read(path: pathlib.Path) -> dict:
  """Reads a finished cell, its sums as arrays [N]. Raises ValueError if it is damaged."""
  try:
    content = json.loads(path.read_text(encoding="utf-8"))
    sums = {key: np.array(values, np.float64) for key, values in content["sums"].items()}
    return content | {"sums": sums}
  except (ValueError, KeyError, TypeError) as error:
    raise ValueError(
      f"{path} is no finished cell ({first_line(error, limit=1000)}); remove it, and it will be "
      "computed again"
    ) from error


def write(path: pathlib.Path, content: dict) -> None:
  """Atomic write of a cell: the whole file or none, whenever the process ends."""
  with atomic_write(path, overwrite=True) as partial, open(partial, "w", encoding="utf-8") as file:
    json.dump(content, file)
    # the name must not be on disk before the content is
    file.flush()
    os.fsync(file.fileno())
