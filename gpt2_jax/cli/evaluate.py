# SPDX-License-Identifier: Apache-2.0
"""Evaluates GPT-2s on the tasks of the GPT-2 paper, and on others: one table, with error bars.

  # tasks, protocols, and where their data come from
  python launch/evaluate.py --list

  # one task
  python launch/evaluate.py --model=gpt2 --task=lambada --data=data --out=runs/zero_shot

  # all checkpoints of a run beside a published model, with overlapping windows
  python launch/evaluate.py --model=gpt2 --model=runs/117M@all --task=lambada \\
    --task=wikitext2:raw --data=data --out=runs/zero_shot --config.stride=512 \\
    --config.batch_size=64

  # all that configs/zero_shot.py lists
  python launch/evaluate.py --data=data --out=runs/paper

The same command resumes a sweep after a kill: a finished cell, a model on a task, is never computed
again. --out then holds

  cells/           what each item contributed, one file a cell
  results.jsonl    the scores, one line a cell
  table.md         what is printed at the end
  plots/           scores over the number of parameters, and over the steps of a run
  computed.jsonl   a line for each cell, in the order in which they were computed

The exit status is 1 if a cell could not be computed.
"""

import pathlib
import sys

from absl import flags
from ml_collections import ConfigDict, config_flags

from gpt2_jax.cli import shell

_ZERO_SHOT = str(pathlib.Path(__file__).resolve().parents[2] / "configs" / "zero_shot.py")
_CONFIG = config_flags.DEFINE_config_file(
  "config",
  None,
  "The sweep (default: configs/zero_shot.py): all knobs. --config.KNOB=VALUE changes one.",
)
_MODEL = flags.DEFINE_multi_string(
  "model",
  [],
  "A model, in place of the config's: a published name, a checkpoint's path, or the workdir of a "
  "run as WORKDIR[@STEP|@best|@all].",
)
_TASK = flags.DEFINE_multi_string(
  "task",
  [],
  "A task, in place of the config's: task[:protocol[:shots]], as --list shows them.",
)
_DATA = flags.DEFINE_string(
  "data", None, "Folder of the datasets, in place of the config's; or one dataset's file."
)
_OUT = flags.DEFINE_string(
  "out", None, "Folder for cells, results, table and plots. A sweep that is there is resumed."
)
_SKIP_MISSING = flags.DEFINE_bool(
  "skip_missing", False, "Leave out the tasks whose datasets are not there."
)
_OVERLAP = flags.DEFINE_multi_string(
  "overlap",
  [],
  "A file of launch/contamination.py: scores items that the training corpus holds apart from the "
  "others.",
)
_LIST = flags.DEFINE_bool("list", False, "Print the tasks with their protocols, and exit.")


def main() -> None:
  from gpt2_jax.evaluate import contamination
  from gpt2_jax.evaluate.sweep import cells, compute, report
  from gpt2_jax.evaluate.tasks import TASKS

  if _LIST.value:
    return print(report.task_listing(TASKS))
  if not _OUT.value:
    raise ValueError("give --out, the folder for what comes out; --list shows the tasks")

  # 1. Flags take the place of the config's lists.
  config = _CONFIG.value
  if not isinstance(config, ConfigDict):
    raise ValueError("the config is no ConfigDict; begin with configs/zero_shot.py")
  compute.check_knobs(config)
  with config.unlocked():
    if _MODEL.value:
      config.models = tuple(_MODEL.value)
    if _TASK.value:
      config.tasks = tuple(_TASK.value)
    if _DATA.value is not None:
      config.data = _DATA.value

  # 2. All that can be wrong is found before the sweep, a damaged overlap, too.
  overlaps = list(map(contamination.read_overlap, _OVERLAP.value))
  sweep = compute.prepare(config, _OUT.value, _SKIP_MISSING.value)
  report.check_overlaps(overlaps, sweep)

  # 3. Nobody else writes into the folder until the report is whole.
  with cells.lock_folder(sweep.folder):
    outcome = compute.run(sweep)
    table = report.write(outcome, _OUT.value, config, overlaps)
  print(table, end="")
  print(f"\nwritten to {_OUT.value}: table.md, results.jsonl, plots, cells", file=sys.stderr)
  if outcome.failed:
    sys.exit(1)


def run() -> None:
  shell.run(main, __doc__, imports=("gpt2_jax.evaluate.sweep.report",), config=_ZERO_SHOT)
