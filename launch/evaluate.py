# SPDX-License-Identifier: Apache-2.0
"""Scores GPT-2s on the tasks of the GPT-2 paper, and on others, with error bars: one table at the end.

python launch/evaluate.py --list                                  # tasks, protocols, and where their data come from
python launch/evaluate.py --model=gpt2 --task=lambada --data=data --out=runs/zero_shot
python launch/evaluate.py --model=gpt2 --model=runs/117M@all --task=lambada --task=wikitext2:raw \
  --data=data --out=runs/zero_shot --config.stride=512 --config.batch_size=64
python launch/evaluate.py --data=data --out=runs/paper            # all that configs/zero_shot.py lists

The same command goes on after a kill: a finished cell is never computed again. --out then holds cells/, with what each
item contributed; results.jsonl, table.md and plots/; and computed.jsonl, a line for each cell in the order in which
they were computed. The exit status is 1 where a cell could not be computed.
"""

import os
import sys

if __name__ == "__main__":  # the root in place of launch/, whose tokenize.py would hide the standard library's
  sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

import pathlib

from absl import flags
from ml_collections import config_flags

from gpt2_jax.evaluate import contamination, report, sweep
from gpt2_jax.evaluate.tasks import TASKS
from launch import shell

_ZERO_SHOT = str(pathlib.Path(__file__).resolve().parents[1] / "configs" / "zero_shot.py")
_CONFIG = config_flags.DEFINE_config_file("config", _ZERO_SHOT, "All knobs; a file of the form of this one.")
_MODEL = flags.DEFINE_multi_string("model", [], "In place of the config's: a name, a path, or WORKDIR[@STEP|best|all].")
_TASK = flags.DEFINE_multi_string("task", [], "In place of the config's: task[:protocol[:shots]].")
_DATA = flags.DEFINE_string("data", None, "In place of the config's: the folder of the datasets.")
_OUT = flags.DEFINE_string("out", None, "Where cells, results, table and plots go.")
_SKIP_MISSING = flags.DEFINE_bool("skip_missing", False, "Go on without the datasets that are not there.")
_OVERLAP = flags.DEFINE_multi_string("overlap", [], "Files of launch/contamination.py: clean and seen items apart.")
_LIST = flags.DEFINE_bool("list", False, "Print the tasks, and do nothing.")


def main() -> None:
  if _LIST.value:
    return print(report.listing(TASKS))
  if not _OUT.value:
    raise ValueError("give --out, the folder for what comes out; --list shows the tasks")
  config = _CONFIG.value
  with config.unlocked():
    config.models = tuple(_MODEL.value) or config.models
    config.tasks = tuple(_TASK.value) or config.tasks
    config.data = config.data if _DATA.value is None else _DATA.value
  overlaps = [contamination.read_overlap(path) for path in _OVERLAP.value]
  outcome = sweep.run(config, _OUT.value, _SKIP_MISSING.value)
  print(report.write(outcome, _OUT.value, config, overlaps), end="")
  print(f"\nwritten to {_OUT.value}: table.md, results.jsonl, plots, cells", file=sys.stderr)
  if outcome.failed:
    sys.exit(1)


if __name__ == "__main__":
  shell.run(main)
