# SPDX-License-Identifier: Apache-2.0
"""Every task under each of its protocols; the first protocol of a task is the one it goes by."""

import difflib

from gpt2_jax.evaluate.task import Task
from gpt2_jax.evaluate.tasks import (
  cbt,
  choice,
  coqa,
  lambada,
  language,
  pairs,
  questions,
  summarization,
  translation,
  winograd,
)

FAMILIES = (language, lambada, cbt, winograd, choice, pairs, coqa, summarization, translation, questions)

TASKS: dict[str, dict[str, Task]] = {}
for family in FAMILIES:
  for task in family.TASKS:
    TASKS.setdefault(task.name, {})[task.protocol] = task


def get(name: str, protocol: str | None = None) -> Task:
  """A task under a protocol, or under its first one. Raises ValueError with the nearest names."""
  if name not in TASKS:
    raise ValueError(f"there is no task {name!r}; the nearest is {_nearest(name, TASKS)}, and --list shows all")
  protocols = TASKS[name]
  if protocol is None:
    return next(iter(protocols.values()))
  if protocol not in protocols:
    raise ValueError(f"{name} has no protocol {protocol!r}; it has {', '.join(protocols)}")
  return protocols[protocol]


def _nearest(name: str, names) -> str:
  return difflib.get_close_matches(name, names, 1, cutoff=0)[0]
