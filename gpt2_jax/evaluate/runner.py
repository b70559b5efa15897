# SPDX-License-Identifier: Apache-2.0
"""A task on a model: rows to requests, answers to what each item contributes."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from gpt2_jax.evaluate.scorers import Scorer
from gpt2_jax.evaluate.sources import MALFORMED, Row, reason
from gpt2_jax.evaluate.task import Continuation, NextWords, Passage, Prompt, Request, Task

Items = dict[str, np.ndarray]  # for each sum what every item contributes, [N]; `items` are ones


def run(
  task: Task,
  rows: Sequence[Row],
  scorer: Scorer,
  shots: int = 0,
  seed: int = 0,
  pool: Sequence[Row] | None = None,
) -> Items:
  """What every row contributes, in the order of the rows; `truncated` marks those whose context was cut to fit.

  With `shots`, each item stands after as many solved rows, drawn by the seed and the item's number: of `pool`, which
  may be all rows where `rows` are its first, or of `rows`, and never the item itself. Raises ValueError, with the row's
  number, for a row that is malformed or has nothing to score.
  """
  if not rows:
    raise ValueError(f"{task.name}: there are no rows")
  asked = [_requests(task, rows, i, shots, seed, pool) for i in range(len(rows))]
  answers = iter(scorer.answers([request for requests in asked for request in requests], task.joined))
  items = []
  for i, (row, requests) in enumerate(zip(rows, asked, strict=True)):
    given = [next(answers) for _ in requests]
    truncated = float(any(answer.truncated for answer in given))
    items.append({"items": 1.0, "truncated": truncated} | _guarded(task, i, lambda: task.sums(row, given)))  # noqa: B023
  return {key: np.array([item[key] for item in items], np.float64) for key in items[0]}


def totals(items: Items) -> dict[str, float]:
  """The sums over all items."""
  return {key: float(values.sum()) for key, values in items.items()}


def _requests(task: Task, rows: Sequence[Row], i: int, shots: int, seed: int, pool) -> list[Request]:
  prefix = _examples(task, rows, i, shots, seed, pool)
  requests = _guarded(task, i, lambda: task.requests(rows[i]))
  for request in requests:
    if not _asked(request):
      raise ValueError(f"{task.name}: row {i:,} has nothing to score: its {type(request).__name__.lower()} is empty")
  return [_after(prefix, request) for request in requests] if prefix else requests


def _asked(request: Request) -> str:
  """What may not be empty."""
  match request:
    case Continuation(_, continuation):
      return continuation
    case NextWords(context):
      return context
  return request.text


def _examples(task: Task, rows: Sequence[Row], i: int, shots: int, seed: int, pool) -> str:
  """The solved rows before item i."""
  if not shots:
    return ""
  if task.example is None:
    raise ValueError(f"{task.name} takes no examples before an item; leave the shots out")
  pool = rows if pool is None else pool
  own = i < len(pool) and pool[i] is rows[i]  # the pool is the rows, or all of which they are the first
  count = len(pool) - own
  if shots > count:
    raise ValueError(f"{task.name}: {shots} examples are asked for, and there are {count:,} rows to draw from")
  drawn_K = np.random.default_rng([seed, i]).choice(count, shots, replace=False)
  drawn_K += own & (drawn_K >= i)
  solved = (_guarded(task, j, lambda j=j: task.example(pool[j]), "example") for j in drawn_K.tolist())
  return "".join(example + task.separator for example in solved)


def _after(prefix: str, request: Request) -> Request:
  match request:
    case Prompt(text):
      return dataclasses.replace(request, text=prefix + text)
    case Continuation(context) | NextWords(context):
      return dataclasses.replace(request, context=prefix + context)
    case Passage():
      raise ValueError("a passage has no context in which examples could stand")


def _guarded(task: Task, i: int, make, what: str = "row"):
  try:
    return make()
  except MALFORMED as error:
    raise ValueError(f"{task.name}: {what} {i:,} is malformed: {reason(error)}") from error
