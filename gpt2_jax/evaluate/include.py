# SPDX-License-Identifier: Apache-2.0
"""Includes a user's file of tasks: it is a Python program, and is run.

Whatever it raises, when it is loaded or when its functions are called, becomes one line with the
place in the file. What can be checked of its tasks is checked before anything is computed.
"""

import dataclasses
import functools
import importlib.machinery
import importlib.util
import json
import math
import pathlib
import re
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np

from gpt2_jax.evaluate import tasks
from gpt2_jax.evaluate.metric import Metric, RankMetric, Sums
from gpt2_jax.evaluate.sources import Download, Row, Source
from gpt2_jax.evaluate.task import (
  Answer,
  GenerateUntil,
  Loglikelihood,
  NextWords,
  Request,
  RollingLoglikelihood,
  Task,
  TokenStatistics,
)
from gpt2_jax.files import first_line, sha256, summarize, user_path

# Names stand in tables, in names of files, and before a colon in --task.
NAME = re.compile(r"[A-Za-z0-9_.-]{1,60}")
# What the runner adds to the sums of every item.
GIVEN = ("items", "truncated")


def include(path: str) -> list[Task]:
  """Runs a file that defines `TASKS`, and adds them to the tasks that there are.

  Their `program` is the SHA-256 of the file: a cell of another version of it is another cell.
  Raises OSError or ValueError.
  """
  file = pathlib.Path(user_path(path))
  if not file.is_file():
    raise FileNotFoundError(
      f"--include={path}: there is no such file; evaluate --template prints one to begin with"
    )
  place = str(file)
  program = sha256(file)

  # 1. Run it, as an import would.
  defined = getattr(_run(file), "TASKS", None)
  if not isinstance(defined, list | tuple) or not defined:
    raise ValueError(
      f"{place} defines no TASKS, a list or tuple of tasks; evaluate --template prints an example"
    )

  # 2. All of them are checked before one is added.
  included = []
  for task in defined:
    _check(task, place)
    included.append(_guarded(dataclasses.replace(task, program=program), place))
  for task in included:
    tasks.add(task, place)
  return included


def _run(file: pathlib.Path):
  """The module that a file makes. Raises ValueError with the place of what goes wrong in it."""
  name = f"gpt2_jax_included_{re.sub(r'[^A-Za-z0-9_]', '_', file.stem)}"
  loader = importlib.machinery.SourceFileLoader(name, str(file))
  module = importlib.util.module_from_spec(importlib.util.spec_from_loader(name, loader))

  # Dataclasses look their module up by its name.
  sys.modules[name] = module
  try:
    loader.exec_module(module)
  except (Exception, SystemExit) as error:
    del sys.modules[name]
    raise ValueError(_describe(error, str(file))) from error
  return module


def _describe(error: BaseException, place: str) -> str:
  """An error with its class, and the line of the user's file that it came from."""
  if isinstance(error, SyntaxError) and error.filename == place:
    return f"{place}:{error.lineno}: {error.msg}"
  lines = [
    line
    for frame, line in traceback.walk_tb(error.__traceback__)
    if frame.f_code.co_filename == place
  ]
  where = f"{place}:{lines[-1]}" if lines else place
  text = first_line(error, 250)
  # A ValueError's text is meant for people. Of the others, the class says what happened.
  if isinstance(error, ValueError) or text == type(error).__name__:
    return f"{where}: {text}"
  return f"{where}: {type(error).__name__}: {text}"


# ---- checks at the start


def _check(task: object, place: str) -> None:
  """Raises ValueError unless a value of TASKS is a task that can be run."""
  if not isinstance(task, Task):
    raise ValueError(f"{place}: a {type(task).__name__} in TASKS, where a Task should be")
  for name in (task.name, task.protocol):
    if not isinstance(name, str) or not NAME.fullmatch(name):
      raise ValueError(
        f"{place}: {str(name)[:80]!r} is no name of a task or protocol; give it letters, digits, "
        "_, - and ., 60 at most"
      )

  label = f"{place}: {task.name}:{task.protocol}"
  _check_source(f"{label}: its source", task.source)
  functions = {"requests": task.requests, "sums": task.sums, "example": task.example or str}
  functions["score_answers"] = task.score_answers or list
  for name, function in functions.items():
    if not callable(function):
      raise ValueError(f"{label}: its {name} is a {type(function).__name__}, and no function")
  for name, text in {"description": task.description, "separator": task.separator}.items():
    if not isinstance(text, str):
      raise ValueError(f"{label}: its {name} is a {type(text).__name__}, and no text")

  is_count = isinstance(task.shots, int) and not isinstance(task.shots, bool) and task.shots >= 0
  if not is_count or (task.shots and task.example is None):
    raise ValueError(
      f"{label}: its shots are no number of examples from 0 on, or it has no example"
    )

  if not isinstance(task.metrics, dict) or not task.metrics:
    raise ValueError(f"{label}: its metrics are no dict with at least one Metric")
  for name, metric in task.metrics.items():
    _check_metric(f"{label}: its metric {str(name)[:60]!r}", name, metric, place)
  if not isinstance(task.chance, dict) or not all(map(_is_number, task.chance.values())):
    raise ValueError(f"{label}: its chance is no dict of a metric's name and a number")


def _check_source(label: str, source: object) -> None:
  if not isinstance(source, Source):
    raise ValueError(f"{label} is a {type(source).__name__}, and no Source")
  if not isinstance(source.name, str) or not NAME.fullmatch(source.name):
    raise ValueError(f"{label} has the name {str(source.name)[:80]!r}, and no folder can have it")

  tuples = {
    "files": (source.files, str),
    "alternatives": (source.alternatives, str),
    "other_names": (source.other_names, str),
    "companions": (source.companions, str),
    "downloads": (source.downloads, Download),
  }
  for name, (values, kind) in tuples.items():
    if not isinstance(values, tuple) or not all(isinstance(value, kind) for value in values):
      raise ValueError(f"{label}: its {name} are no tuple of {kind.__name__}; mind the comma")
  if not callable(source.read):
    raise ValueError(f"{label}: its read is a {type(source.read).__name__}, and no function")
  if source.examples is not None:
    _check_source(f"{label}: its examples", source.examples)


def _check_metric(label: str, name: object, metric: object, place: str) -> None:
  """Raises ValueError unless a metric maps arrays of sums to an array of scores.

  The bootstrap hands it all resamples at once.
  """
  if not isinstance(name, str) or not isinstance(metric, Metric):
    raise ValueError(f"{label} is a {type(metric).__name__}, and no Metric with a name")
  if not isinstance(metric.keys, tuple) or not metric.keys:
    raise ValueError(f"{label}: its keys are no tuple of the sums that it reads; mind the comma")
  if not isinstance(metric.unit, str) or not isinstance(metric.higher, bool):
    raise ValueError(f"{label}: its unit is a text, and `higher` is True or False")
  sums = {key: np.ones(3) for key in (*metric.keys, "items")}
  with np.errstate(all="ignore"):
    _guarded_value(metric, place)(sums)


# ---- functions that name the place of what goes wrong


def _guarded(task: Task, place: str) -> Task:
  """The task with functions that raise one line, and that check what they return."""
  metrics = {
    name: dataclasses.replace(metric, value=_guarded_value(metric, place))
    for name, metric in task.metrics.items()
  }
  return dataclasses.replace(
    task,
    source=_guarded_source(task.source, place),
    requests=_guarded_requests(task.requests, place),
    sums=_guarded_sums(task, place),
    metrics=metrics,
    example=task.example and _guarded_example(task.example, place),
  )


def _calling(function: Callable, place: str) -> Callable:
  """The function, with the place in the error that it raises."""

  @functools.wraps(function)
  def call(*arguments):
    try:
      return function(*arguments)
    except Exception as error:
      raise ValueError(_describe(error, place)) from error

  return call


@functools.cache
def _guarded_source(source: Source, place: str) -> Source:
  """The source with checked rows. Of one source it is always the same: rows are loaded once."""

  def read(path: pathlib.Path) -> Iterator[Row]:
    try:
      for row in source.read(path):
        if not isinstance(row, dict):
          raise ValueError(f"`read` gives a {type(row).__name__}, where a dict should be")
        # Rows have a fingerprint, of their JSON.
        json.dumps(row, sort_keys=True)
        yield row
    except OSError:
      raise
    except Exception as error:
      raise ValueError(_describe(error, place)) from error

  examples = source.examples and _guarded_source(source.examples, place)
  row = source.row and _calling(source.row, place)
  return dataclasses.replace(source, read=read, row=row, examples=examples)


def _guarded_requests(function: Callable, place: str) -> Callable[[Row], list[Request]]:
  call = _calling(function, place)

  def requests(row: Row) -> list[Request]:
    returned = call(row)
    if not isinstance(returned, list | tuple):
      raise ValueError(
        f"{place}: `requests` returns a {type(returned).__name__}, where a list should be"
      )
    for request in returned:
      _check_request(request, place)
    return list(returned)

  return requests


def _check_request(request: object, place: str) -> None:
  """Raises ValueError for what no scorer can answer."""
  n_new = 1
  match request:
    case Loglikelihood(context, continuation):
      texts = (context, continuation)
    case RollingLoglikelihood(text) | TokenStatistics(text):
      texts = (text,)
    case GenerateUntil(text, n_new, stop):
      texts = (text, *stop)
    case NextWords(context, n_new):
      texts = (context,)
    case _:
      raise ValueError(
        f"{place}: `requests` returns a {type(request).__name__}, where a request should be: "
        "Loglikelihood, RollingLoglikelihood, GenerateUntil, NextWords or TokenStatistics"
      )

  for text in texts:
    if not isinstance(text, str):
      raise ValueError(f"{place}: a request has a {type(text).__name__}, where a text should be")
  if not isinstance(n_new, int) or n_new < 1:
    raise ValueError(f"{place}: a request for {str(n_new)[:40]!r} tokens or words; give 1 or more")


def _guarded_example(function: Callable, place: str) -> Callable[[Row], str]:
  call = _calling(function, place)

  def example(row: Row) -> str:
    returned = call(row)
    if not isinstance(returned, str):
      raise ValueError(f"{place}: `example` returns a {type(returned).__name__}, and no text")
    return returned

  return example


def _guarded_sums(task: Task, place: str) -> Callable[[Row, list[Answer]], dict[str, float]]:
  call = _calling(task.sums, place)
  read = {key for metric in task.metrics.values() for key in metric.keys}
  needed = sorted(read.difference(GIVEN))

  def sums(row: Row, answers: Sequence[Answer]) -> dict[str, float]:
    returned = call(row, answers)
    if not isinstance(returned, Mapping):
      raise ValueError(f"{place}: `sums` returns a {type(returned).__name__}, and no dict")
    missing = [key for key in needed if key not in returned]
    if missing:
      raise ValueError(f"{place}: `sums` returns no {summarize(missing)}, which a metric reads")

    # Only what metrics read: all rows must have the same.
    numbers = {key: returned[key] for key in needed}
    for key, number in numbers.items():
      if not _is_number(number):
        raise ValueError(f"{place}: `sums` returns {str(number)[:60]!r} as {key}, and no number")
    return {key: float(number) for key, number in numbers.items()}

  return sums


def _is_number(value: object) -> bool:
  return isinstance(value, int | float | np.number) and math.isfinite(value)


def _guarded_value(metric: Metric, place: str) -> Callable[[Sums], np.ndarray]:
  call = _calling(metric.value, place)

  def value(sums: Sums) -> np.ndarray:
    returned = call(sums)
    shape = np.shape(next(iter(sums.values()))) if sums else ()
    if isinstance(metric, RankMetric):
      shape = np.shape(sums["items"])[:-1]
    if np.shape(returned) != shape:
      raise ValueError(
        f"{place}: a metric's value has the shape {np.shape(returned)} for sums of the shape "
        f"{shape}; it takes arrays, and divides them as they are"
      )
    return np.asarray(returned)

  return value
