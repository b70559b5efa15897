# SPDX-License-Identifier: Apache-2.0
"""Registry of the evaluation tasks; a task's first protocol is its default."""

import difflib

from gpt2_jax.evaluate.task import Task
from gpt2_jax.evaluate.tasks import (
  cbt,
  choice,
  coqa,
  lambada,
  natural_questions,
  pairs,
  perplexity,
  summarization,
  translation,
  winograd,
)

FAMILIES = (
  perplexity,
  lambada,
  cbt,
  winograd,
  choice,
  pairs,
  coqa,
  summarization,
  translation,
  natural_questions,
)

# by name, then by protocol
TASKS: dict[str, dict[str, Task]] = {}
for family in FAMILIES:
  for task in family.TASKS:
    TASKS.setdefault(task.name, {})[task.protocol] = task


def get(name: str, protocol: str | None = None) -> Task:
  """Looks up a task by name and protocol; without a protocol, its first.

  Raises ValueError with the nearest name, or with the task's protocols.
  """
  if name not in TASKS:
    [nearest] = difflib.get_close_matches(name, TASKS, 1, cutoff=0)
    raise ValueError(
      f"there is no task {name[:80]!r}; the nearest is {nearest}, and --list shows all"
    )

  protocols = TASKS[name]
  if protocol is None:
    return next(iter(protocols.values()))
  if protocol not in protocols:
    raise ValueError(f"{name} has no protocol {protocol[:80]!r}; it has {', '.join(protocols)}")
  return protocols[protocol]
