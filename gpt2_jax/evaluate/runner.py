# SPDX-License-Identifier: Apache-2.0
"""Evaluation runner: a task on a model, from rows to requests and from answers to sums."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import TypeVar

import numpy as np

from gpt2_jax.evaluate.scorers import Scorer
from gpt2_jax.evaluate.sources import MALFORMED, Row, malformed_reason
from gpt2_jax.evaluate.task import (
  GenerateUntil,
  Loglikelihood,
  NextWords,
  Request,
  RollingLoglikelihood,
  Task,
  TokenStatistics,
)

T = TypeVar("T")
Items = dict[str, np.ndarray]  # for each sum what every item contributes, [N]; `items` are ones


def run(
  task: Task,
  rows: Sequence[Row],
  scorer: Scorer,
  shots: int | None = None,
  seed: int = 0,
  pool: Sequence[Row] | None = None,
) -> Items:
  """Evaluates a task, zero-shot or few-shot: what every row contributes, in the order of the rows.

  `truncated` marks the rows whose context was cut to fit. With `shots`, each row comes after as
  many solved rows; None is the protocol's own number. These are drawn by the seed and the row's
  number from `pool`, or from `rows`, and are never the row itself; `rows` may be the first of the
  pool. Raises ValueError, with the row's number, for a row that is malformed or has nothing to
  score.
  """
  shots = number_of_shots(task, shots)
  if not rows:
    raise ValueError(f"{task.name}: there are no rows")

  # 1. Write the requests of all rows. They are answered together, so that batches are full.
  requests_of_rows = []
  requests = []
  for i in range(len(rows)):
    requests_of_row = _requests(task, rows, i, shots, seed, pool)
    requests_of_rows.append(requests_of_row)
    requests += requests_of_row
  answers = scorer.answers(requests, task.contiguous)
  if task.score_answers is not None:
    answers = task.score_answers(answers)
  answers = iter(answers)

  # 2. Hand each row its answers, and count.
  items = []
  for i, (row, requests_of_row) in enumerate(zip(rows, requests_of_rows, strict=True)):
    answers_of_row = [next(answers) for _ in requests_of_row]
    truncated = any(answer.truncated for answer in answers_of_row)
    sums = _named(task, i, functools.partial(task.sums, row, answers_of_row))
    items.append({"items": 1.0, "truncated": float(truncated)} | sums)

  # 3. From one dict for each row to one array for each sum.
  return {key: np.array([item[key] for item in items], np.float64) for key in items[0]}


def number_of_shots(task: Task, shots: int | None) -> int:
  """How many examples come before each item; None is the protocol's own number.

  Raises ValueError for another number than the protocol has: it would be another protocol.
  """
  if shots is None:
    return task.shots
  if task.shots and shots != task.shots:
    raise ValueError(
      f"{task.name}:{task.protocol} puts {task.shots} examples before each item, and not {shots}; "
      "leave the number out, or take another protocol"
    )
  return shots


def check_rows(
  task: Task,
  rows: Sequence[Row],
  shots: int | None = None,
  seed: int = 0,
  pool: Sequence[Row] | None = None,
) -> None:
  """Raises, before there is a model, what `run` would raise for a row: ValueError, or ImportError.

  It writes all requests, and keeps none of them.
  """
  shots = number_of_shots(task, shots)
  for i in range(len(rows)):
    _requests(task, rows, i, shots, seed, pool)


def totals(items: Items) -> dict[str, float]:
  """The sums over all items, which a metric reads."""
  return {key: float(values.sum()) for key, values in items.items()}


def _requests(
  task: Task, rows: Sequence[Row], i: int, shots: int, seed: int, pool: Sequence[Row] | None
) -> list[Request]:
  """The requests of row i, each after the same few-shot examples."""
  prefix = _few_shot_prefix(task, rows, i, shots, seed, pool)
  requests = _named(task, i, functools.partial(task.requests, rows[i]))

  for request in requests:
    part, text = _required_text(request)
    if not text:
      raise ValueError(f"{task.name}: row {i:,} has nothing to score: its {part} is empty")
  return [_with_prefix(prefix, request) for request in requests] if prefix else requests


def _required_text(request: Request) -> tuple[str, str]:
  """What may not be empty in a request: its name and its text."""
  match request:
    case Loglikelihood(_, continuation):
      return "continuation", continuation
    case NextWords(context):
      return "context", context
    case GenerateUntil(text):
      return "prompt", text
    case RollingLoglikelihood(text) | TokenStatistics(text):
      return "text", text


def _few_shot_prefix(
  task: Task, rows: Sequence[Row], i: int, shots: int, seed: int, pool: Sequence[Row] | None
) -> str:
  """Few-shot prompt of row i: solved rows of the pool, drawn without replacement."""
  if not shots:
    return ""
  if task.example is None:
    raise ValueError(f"{task.name} takes no examples before an item; leave the shots out")
  pool = rows if pool is None else pool

  # 1. The row itself is left out. The pool has it if the pool is the rows, or begins with them.
  has_itself = i < len(pool) and pool[i] is rows[i]
  count = len(pool) - has_itself
  if shots > count:
    raise ValueError(
      f"{task.name}: {shots} examples are asked for, and there are {count:,} rows to draw from"
    )

  # 2. Draw among the others, and skip over the row itself. Seed and row alone decide the draw, so
  #    that the first rows have the same examples in a run of all.
  drawn_K = np.random.default_rng([seed, i]).choice(count, shots, replace=False)
  drawn_K += has_itself & (drawn_K >= i)

  # 3. Write them out.
  prefix = ""
  for j in drawn_K.tolist():
    example = _named(task, j, functools.partial(task.example, pool[j]), "example")
    prefix += example + task.separator
  return prefix


def _with_prefix(prefix: str, request: Request) -> Request:
  """The request after few-shot examples."""
  match request:
    case GenerateUntil(text):
      return dataclasses.replace(request, text=prefix + text)
    case Loglikelihood(context) | NextWords(context):
      return dataclasses.replace(request, context=prefix + context)
    case RollingLoglikelihood() | TokenStatistics():
      raise ValueError("a whole text has no context for examples; leave the shots out")


def _named(task: Task, i: int, call: Callable[[], T], what: str = "row") -> T:
  """Returns what `call` returns; names task and row in the error if the row is malformed."""
  try:
    return call()
  except MALFORMED as error:
    raise ValueError(
      f"{task.name}: {what} {i:,} is malformed: {malformed_reason(error)}"
    ) from error
