# SPDX-License-Identifier: Apache-2.0
"""Registry of the evaluation tasks; a task's first protocol is its default."""

import difflib
import fnmatch
from collections.abc import Iterable

from gpt2_jax.evaluate.sources import Source
from gpt2_jax.evaluate.task import Task
from gpt2_jax.evaluate.tasks import (
  bold,
  cbt,
  choice,
  coqa,
  crows_pairs,
  lambada,
  machine_text,
  memorization,
  natural_questions,
  pairs,
  perplexity,
  summarization,
  translation,
  winobias,
  winogender,
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
  crows_pairs,
  winobias,
  winogender,
  bold,
  machine_text,
  memorization,
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


def published_datasets(name: str) -> list[str]:
  """The datasets that publish a file of this name, by the names of their folders."""
  datasets = {}
  for protocols in TASKS.values():
    for task in protocols.values():
      for source in (task.source, task.source.examples):
        if source is not None and name in _published_names(source):
          datasets[source.name] = None
  return list(datasets)


def _published_names(source: Source) -> set[str]:
  """The names of a source's files, as far as they are known: a pattern is no name."""
  patterns = (*source.files, *source.alternatives, *source.other_names)
  return {pattern.rpartition("/")[2] for pattern in patterns if "*" not in pattern}


def check_file(source: Source, path: str) -> None:
  """Raises ValueError if a file is by its name that of another dataset than `source` is of.

  A name that no dataset has says nothing, and the file is then what its reader takes it for.
  """
  name = path.rpartition("/")[2]
  owners = published_datasets(name)
  if owners and source.name not in owners and not source.any_file:
    raise ValueError(
      f"{path[-200:]} is by its name the file of {', '.join(owners[:4])}, and {source.name} reads "
      f"{source.files[0]}; give its own file, or the folder of both with --data=FOLDER"
    )


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
