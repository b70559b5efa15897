# SPDX-License-Identifier: Apache-2.0
"""Trains a GPT-2, or resumes its training: the same command starts, resumes and finishes a run.

gpt2-jax train --config=gpt2:117M --workdir=runs/117M --config.learning_rate=3e-4
gpt2-jax train --config=finetune:lora --workdir=runs/mine --config.init_from=gpt2

With --config.init_from a new run starts from any checkpoint: a published name, a path of any
format, or WORKDIR@STEP. Its architecture and vocabulary are the checkpoint's.

On TPU hosts, slices and GKE the same command on every host is one run. Elsewhere each process is
told its rank: --coordinator=HOST:PORT --processes=N --process=I, with HOST the one of process 0,
and PORT and PORT + 1 open.

Exit status: 0 done, or stopped and saved after SIGTERM or SIGINT; 2 an error that the line
explains; 75 a process of the run was lost: start the same command again on every host.
"""

from absl import flags
from ml_collections import config_flags

from gpt2_jax.cli import process_flags, shell

_CONFIG = config_flags.DEFINE_config_file(
  "config", None, "A config: a name that is listed below, or a path."
)
_WORKDIR = flags.DEFINE_string(
  "workdir", None, "Where checkpoints, metrics.jsonl, TensorBoard and traces go; local or gs://."
)
_PROCESS = process_flags.add_flags()


def main() -> None:
  from gpt2_jax import train

  with _PROCESS.initialize():
    train.run(_CONFIG.value, _WORKDIR.value)


def run() -> None:
  flags.mark_flags_as_required(["config", "workdir"])
  shell.run(
    main,
    __doc__,
    imports=("gpt2_jax.train",),
    exit_process=process_flags.exit_process,
  )
