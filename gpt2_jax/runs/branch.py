# SPDX-License-Identifier: Apache-2.0
"""Branches of a run: a new workdir that goes on from a checkpoint of another one, `branch_from`.

A branch has the trunk's step, parameters, optimizer state and data position. What it may change is
what comes after: the schedule, the steps, and what is written when. The trunk is only read.
"""

import dataclasses
import os

from ml_collections import ConfigDict

from gpt2_jax.convert.pretrained import split_step
from gpt2_jax.files import user_path
from gpt2_jax.runs.metadata import check_same_run
from gpt2_jax.runs.workdir import is_remote


@dataclasses.dataclass(frozen=True)
class Trunk:
  """The checkpoint that a branch begins with: its metadata are read, its arrays are not."""

  name: str  # workdir@step
  step: int
  metadata: dict
  saved: object  # of runs.checkpoint, which is imported late


def open_trunk(config: ConfigDict, workdir: str) -> Trunk | None:
  """The checkpoint to branch from; None where the config has none, or the branch resumes.

  Raises ValueError or OSError for what is no checkpoint.
  """
  if not config.branch_from:
    return None
  # Imported here: Orbax takes seconds, and only a branch asks so early.
  from gpt2_jax.runs.checkpoint import newest_metadata, open_saved

  if newest_metadata(workdir) is not None:
    return None
  place, step = split_step(config.branch_from)
  place = place if is_remote(place) else os.path.abspath(user_path(place))
  saved = open_saved(place, step or "latest")
  return Trunk(f"{place}@{saved.step}", saved.step, saved.metadata, saved)


def check_branch(trunk: Trunk | None, config: ConfigDict, metadata: dict) -> Trunk | None:
  """The same trunk. Raises ValueError, in one line, where a run cannot go on from it.

  `metadata` are the branch's. The decay of a WSD schedule must not have begun: the learning rate
  would jump.
  """
  if trunk is None:
    return None
  check_same_run(metadata, trunk.metadata, trunk.name, branches=True)
  if config.steps <= trunk.step:
    raise ValueError(
      f"{trunk.name[:200]} is of step {trunk.step}, and the branch ends at steps of "
      f"{config.steps}; set --config.steps higher"
    )

  decay_start = config.steps - config.decay_steps
  if config.schedule == "wsd" and trunk.step > decay_start:
    raise ValueError(
      f"{trunk.name[:200]} is of step {trunk.step}, and the branch decays from step {decay_start} "
      f"on (steps of {config.steps} less decay_steps of {config.decay_steps}); set --config.steps "
      f"to {trunk.step + config.decay_steps} or more"
    )
  return trunk
