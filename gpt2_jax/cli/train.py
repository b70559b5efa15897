# SPDX-License-Identifier: Apache-2.0
"""Trains a GPT-2, or resumes its training: the same command starts, resumes and finishes a run.

python launch/train.py --config=configs/gpt2.py:117M --workdir=runs/117M --config.learning_rate=3e-4

On TPU hosts, slices and GKE the same command on every host is one run. Elsewhere each process is
told its rank: --coordinator=HOST:PORT --processes=N --process=I, with HOST the one of process 0,
and PORT and PORT + 1 open.

Exit status: 0 done, or stopped and saved after SIGTERM or SIGINT; 2 an error that the line
explains; 75 a process of the run was lost: start the same command again on every host.
"""

from absl import flags
from ml_collections import config_flags

from gpt2_jax.cli import shell
from gpt2_jax.runs import knobs

_CONFIG = config_flags.DEFINE_config_file(
  "config", None, "A file of configs/, with :SIZE where it takes one."
)
_WORKDIR = flags.DEFINE_string(
  "workdir", None, "Where checkpoints, metrics.jsonl, TensorBoard and traces go; local or gs://."
)
_COORDINATOR = flags.DEFINE_string(
  "coordinator", None, "HOST:PORT of process 0, where a TPU does not tell."
)
_PROCESSES = flags.DEFINE_integer(
  "processes", None, "How many processes the run has.", lower_bound=1
)
_PROCESS = flags.DEFINE_integer("process", None, "The rank of this one, from 0.", lower_bound=0)
_START_WITHIN = flags.DEFINE_integer(
  "start_within", 300, "Seconds within which all processes must arrive.", lower_bound=1
)


def main() -> None:
  from gpt2_jax import distributed, train

  process = distributed.find_process(
    _COORDINATOR.value, _PROCESSES.value, _PROCESS.value, _START_WITHIN.value
  )
  with distributed.initialize(process, _START_WITHIN.value):
    train.run(_CONFIG.value, _WORKDIR.value)


def _exit(status: int) -> None:
  from gpt2_jax import distributed

  distributed.exit(status)


def run() -> None:
  flags.mark_flags_as_required(["config", "workdir"])
  shell.run(
    main,
    f"{__doc__}\n{knobs.help_text()}\n",
    imports=("gpt2_jax.train",),
    exit_process=_exit,
  )
