# SPDX-License-Identifier: Apache-2.0
"""Trains a GPT-2, or goes on with one: the same command starts, continues and finishes a run.

python launch/train.py --config=configs/gpt2.py:117M --workdir=runs/117M --config.learning_rate=3e-4
"""

import os
import sys

if __name__ == "__main__":  # the root in place of launch/, whose tokenize.py would hide the standard library's
  sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

from absl import flags
from ml_collections import config_flags

from gpt2_jax import train
from launch import shell

_CONFIG = config_flags.DEFINE_config_file("config", None, "A file of configs/, with :SIZE where it takes one.")
_WORKDIR = flags.DEFINE_string("workdir", None, "Where checkpoints, metrics.jsonl, TensorBoard and traces go.")


def main() -> None:
  train.run(_CONFIG.value, _WORKDIR.value)


if __name__ == "__main__":
  flags.mark_flags_as_required(["config", "workdir"])
  shell.run(main)
