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

On TPU hosts, slices and GKE the same command on every host is one sweep: each host computes its
part of the cells on its own devices, and process 0 writes the report. --out is then on gs://, or on
a disk that all share. Elsewhere each process is told its rank: --coordinator=HOST:PORT
--processes=N --process=I.

Exit status: 0 done; 1 a cell could not be computed; 2 an error that the line explains; 75 a process
of the sweep was lost: start the same command again on every host.
"""

import sys

from absl import flags
from ml_collections import ConfigDict, config_flags

from gpt2_jax.cli import process_flags, shell

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
  "out",
  None,
  "Folder for cells, results, table and plots; local or gs://. A sweep that is there is resumed.",
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
_PROCESS = process_flags.add_flags()


def main() -> None:
  from gpt2_jax.evaluate.sweep import report
  from gpt2_jax.evaluate.tasks import TASKS

  if _LIST.value:
    return print(report.task_listing(TASKS))
  if not _OUT.value:
    raise ValueError("give --out, the folder for what comes out; --list shows the tasks")
  with _PROCESS.initialize():
    has_failed = evaluate()
  if has_failed:
    sys.exit(1)


def evaluate() -> bool:
  """Runs or resumes the sweep; returns whether a cell could not be computed."""
  from gpt2_jax import distributed
  from gpt2_jax.evaluate import contamination
  from gpt2_jax.evaluate.sweep import cells, compute, report
  from gpt2_jax.runs.workdir import Workdir

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

  # 3. Nobody else writes into the folder until the report is whole. Process 0 writes it.
  with cells.lock_folder(sweep.folder):
    outcome = compute.run(sweep)
    if distributed.is_primary():
      with Workdir(_OUT.value) as workdir:
        table = report.write(outcome, workdir.path, config, overlaps)
      print(table, end="")
      print(f"\nwritten to {_OUT.value}: table.md, results.jsonl, plots, cells", file=sys.stderr)
    distributed.barrier("the report", compute.UNTIL_ALL_END)
  return bool(outcome.failed)


def run() -> None:
  shell.run(
    main,
    __doc__,
    imports=("gpt2_jax.evaluate.sweep.report",),
    exit_process=process_flags.exit_process,
    config="zero_shot",
  )
