# SPDX-License-Identifier: Apache-2.0
"""Flags that say which of how many processes this one is, for the commands that run on many."""

import contextlib
import dataclasses

from absl import flags

# The flags belong to the command that calls `add_flags`, so that its --help lists them.
flags.disclaim_key_flags()


@dataclasses.dataclass(frozen=True)
class ProcessFlags:
  """The flags of one command; on TPU hosts none is needed."""

  coordinator: flags.FlagHolder
  processes: flags.FlagHolder
  process: flags.FlagHolder
  start_within: flags.FlagHolder

  def initialize(self) -> contextlib.AbstractContextManager:
    """Meets the other processes, if there are any; all leave together at the context's end.

    Raises ValueError for flags that do not go together.
    """
    from gpt2_jax import distributed

    seconds = self.start_within.value
    process = distributed.find_process(
      self.coordinator.value, self.processes.value, self.process.value, seconds
    )
    return distributed.initialize(process, seconds)


def add_flags() -> ProcessFlags:
  """Defines --coordinator, --processes, --process and --start_within for the calling module."""
  return ProcessFlags(
    flags.DEFINE_string(
      "coordinator",
      None,
      "HOST:PORT of process 0, where a TPU does not tell; PORT + 1 is taken, too.",
    ),
    flags.DEFINE_integer("processes", None, "How many processes the run has.", lower_bound=1),
    flags.DEFINE_integer("process", None, "The rank of this one, from 0.", lower_bound=0),
    flags.DEFINE_integer(
      "start_within", 300, "Seconds within which all processes must arrive.", lower_bound=1
    ),
  )


def exit_process(status: int) -> None:
  """Exits after an error; process 0 of several waits for the others to exit first."""
  from gpt2_jax import distributed

  distributed.exit(status)
