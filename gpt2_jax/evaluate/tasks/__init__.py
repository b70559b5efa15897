# SPDX-License-Identifier: Apache-2.0
"""Registry of the evaluation tasks; a task's first protocol is its default."""

import difflib
import fnmatch
from collections.abc import Iterable

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


def add(task: Task, place: str) -> None:
  """Adds a task that a user's file defines. Raises ValueError for a name that is taken."""
  protocols = TASKS.setdefault(task.name, {})
  # Under a name of ours, even with another protocol, the paper's figures would stand beside it.
  if any(other.program != task.program for other in protocols.values()):
    raise ValueError(f"{place}: there is a task {task.name} already; take another name")
  if task.protocol in protocols:
    raise ValueError(
      f"{place}: {task.name} has the protocol {task.protocol} already; take another name for it"
    )
  protocols[task.protocol] = task


def matching(texts: Iterable[str]) -> list[str]:
  """The texts, `task`, `task:protocol` or `task:protocol:shots`; blimp_* is all that begin so.

  Raises ValueError for a pattern that no task's name matches.
  """
  expanded = []
  for text in texts:
    pattern, colon, rest = text.partition(":")
    if "*" not in pattern:
      expanded.append(text)
      continue
    names = fnmatch.filter(TASKS, pattern)
    if not names:
      raise ValueError(f"no task matches {pattern[:80]!r}; --list shows all")
    expanded += [name + colon + rest for name in names]
  return expanded


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
