# SPDX-License-Identifier: Apache-2.0
"""Evaluates GPT-2s on the tasks of the GPT-2 paper, and on others: one table, with error bars.

  # tasks, protocols, and where their data come from
  gpt2-jax evaluate --list

  # one task: its data are fetched, and its first 100 items are scored
  gpt2-jax evaluate --model=gpt2 --task=lambada --data=data --download --limit=100 --out=runs/try

  # all checkpoints of a run beside a published model, with overlapping windows
  gpt2-jax evaluate --model=gpt2 --model=runs/117M@all --tasks=lambada,wikitext2:raw \\
    --data=data --out=runs/zero_shot --config.stride=512 --config.batch_size=64

  # all that configs/zero_shot.py lists
  gpt2-jax evaluate --data=data --out=runs/paper

  # detection, bias and memorization on one page, as configs/responsible.py lists them
  gpt2-jax evaluate --config=responsible --data=data --skip_missing --out=runs/responsible

  # a task of your own: a Python file, which is run; --template prints one to begin with
  gpt2-jax evaluate --template > my_task.py
  gpt2-jax evaluate --include=my_task.py --list

The same command resumes a sweep after a kill: a finished cell, a model on a task, is never computed
again. --out then holds

  cells/           what each item contributed, one file a cell
  results.jsonl    the scores, one line a cell
  table.md         what is printed at the end
  plots/           scores over the number of parameters, and over the steps of a run
  report.md        with --config.page: the table, and a picture of each task's metrics
  computed.jsonl   a line for each cell, in the order in which they were computed

On TPU hosts, slices and GKE the same command on every host is one sweep: each host computes its
part of the cells on its own devices, and process 0 writes the report. --out is then on gs://, or on
a disk that all share. Elsewhere each process is told its rank: --coordinator=HOST:PORT
--processes=N --process=I.

Exit status: 0 done; 1 a cell could not be computed; 2 an error that the line explains; 75 a process
of the sweep was lost: start the same command again on every host. `python launch/evaluate.py` is
the same command.
"""

import os
import pathlib
import sys

from absl import flags
from ml_collections import ConfigDict, config_flags

from gpt2_jax.cli import process_flags, shell
from gpt2_jax.files import local_path, user_path

_CONFIG = config_flags.DEFINE_config_file(
  "config",
  None,
  "The sweep (default: configs/zero_shot.py): all knobs. --config.KNOB=VALUE changes one.",
)
_MODEL = flags.DEFINE_multi_string(
  "model",
  [],
  "A model, in place of the config's: a published name, a checkpoint's path, or the workdir of a "
  "run as WORKDIR[@STEP|@best|@all]; +FOLDER behind it is an adapter of peft's. random:MODEL@SEED "
  "is a null model: random weights in the shape of a size or a checkpoint. May be given many "
  "times.",
)
_MODELS = flags.DEFINE_list("models", [], "Several models, with commas between them.")
_TASK = flags.DEFINE_multi_string(
  "task",
  [],
  "A task, in place of the config's: task[:protocol[:shots]], as --list shows them. A * stands for "
  "any letters. May be given many times, or as --tasks.",
)
_TASKS = flags.DEFINE_list("tasks", [], "Several tasks, with commas between them.")
_LIMIT = flags.DEFINE_integer(
  "limit", None, "Score the first LIMIT items of each task alone; 0 is all.", lower_bound=0
)
_INCLUDE = flags.DEFINE_multi_string(
  "include",
  [],
  "A Python file with tasks of your own. It is a program, and is run: include what you trust.",
)
_TEMPLATE = flags.DEFINE_bool("template", False, "Print a file for --include, and exit.")
_DATA = flags.DEFINE_string(
  "data", None, "Folder of the datasets, in place of the config's, local or gs://; or one file."
)
_DOWNLOAD = flags.DEFINE_bool(
  "download",
  False,
  "Fetch the datasets that are not in --data from where they are published. Without --out, nothing "
  "else is done.",
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
  "A file of `gpt2-jax contamination`: scores items that the training corpus holds apart from the "
  "others.",
)
_LIST = flags.DEFINE_bool("list", False, "Print the tasks with their protocols, and exit.")
_PROCESS = process_flags.add_flags()

# How to say here what other commands have these flags for, lm-evaluation-harness's above all.
HINTS = {
  "num_fewshot": "--task=NAME::5 puts 5 solved examples before each item",
  "output_path": "--out=FOLDER",
  "model_args": "--model=NAME_OR_PATH",
  "include_path": "--include=FILE",
  "data_dir": "--data=FOLDER",
}


def main() -> None:
  # 1. What only prints. A user's tasks are in the list, too.
  if _TEMPLATE.value:
    return print(_template(), end="")
  _include()
  if _LIST.value:
    return print(_listing())

  if not _OUT.value and not _DOWNLOAD.value:
    raise ValueError("give --out, the folder for what comes out; --list shows the tasks")

  # 2. Flags take the place of the config's knobs. Datasets come before anything else is looked at.
  # The processes have met by then: a mesh is held against the devices.
  with _PROCESS.initialize():
    config = _config()
    if _DOWNLOAD.value:
      _download(config)
    has_failed = bool(_OUT.value) and _sweep(config)
  if has_failed:
    sys.exit(1)


def _template() -> str:
  """The text of a file that --include takes."""
  path = pathlib.Path(__file__).resolve().parents[1] / "evaluate" / "template.py"
  return path.read_text(encoding="utf-8")


def _include() -> None:
  if _INCLUDE.value:
    from gpt2_jax.evaluate.include import include

    for path in _INCLUDE.value:
      include(path)


def _listing() -> str:
  from gpt2_jax.evaluate.sweep import report
  from gpt2_jax.evaluate.tasks import TASKS

  return report.task_listing(TASKS)


def _config() -> ConfigDict:
  """The config with what the flags change. Raises ValueError for a knob that makes no sense."""
  from gpt2_jax.evaluate import tasks
  from gpt2_jax.evaluate.sweep import compute

  config = _CONFIG.value
  if not isinstance(config, ConfigDict):
    raise ValueError("the config is no ConfigDict; begin with configs/zero_shot.py")
  compute.check_knobs(config)

  # A path may have a comma, and no task's name has one.
  for model in _MODEL.value:
    if "," in model and not os.path.exists(user_path(model.partition("@")[0])):
      raise ValueError(f"{model[:80]!r} is no path; several models are --models={model[:80]}")
  models = _MODEL.value + _MODELS.value
  names = ",".join(_TASK.value + _TASKS.value).split(",")
  names = [name.strip() for name in names if name.strip()]
  if (_TASK.value or _TASKS.value) and not names:
    raise ValueError("--task names no task; --list shows them all")
  with config.unlocked():
    if models:
      config.models = tuple(models)
    config.tasks = tuple(tasks.matching(names or config.tasks))
    if _LIMIT.value is not None:
      config.limit = _LIMIT.value
    if _DATA.value is not None:
      config.data = _DATA.value
  return config


def _download(config: ConfigDict) -> None:
  """Fetches the datasets that are not there. Those without an address are left to the sweep."""
  from gpt2_jax.evaluate import downloads
  from gpt2_jax.evaluate.sweep import compute

  if not config.data:
    raise ValueError("--download fetches into a folder; give --data=FOLDER")
  fetched = downloads.download_missing(compute.requested_sources(config), config.data)
  if not fetched:
    print(f"nothing to fetch into {config.data}", file=sys.stderr)


def _sweep(config: ConfigDict) -> bool:
  """Scores the models on the tasks and reports; returns whether a cell could not be computed."""
  from gpt2_jax import distributed
  from gpt2_jax.evaluate import contamination
  from gpt2_jax.evaluate.sweep import cells, compute, page, report
  from gpt2_jax.runs.workdir import Workdir

  # 1. All that can be wrong is found before the sweep, a damaged overlap, too.
  overlaps = list(map(contamination.read_overlap, _OVERLAP.value))
  sweep = compute.prepare(config, _OUT.value, _SKIP_MISSING.value)
  report.check_overlaps(overlaps, sweep)

  # 2. Nobody else writes into the folder until the report is whole. Process 0 writes it.
  with cells.lock_folder(sweep.folder):
    outcome = compute.run(sweep)
    if distributed.is_primary():
      with Workdir(_OUT.value) as workdir:
        table, plots = report.write(outcome, workdir.path, config, overlaps)
        if config.page:
          plots += page.write_page(outcome.cells, table, local_path(workdir.path))
      print(table, end="")
      written = f"table.md, results.jsonl, cells{', plots' if plots else ''}"
      written += f", {page.PAGE}" if config.page else ""
      print(f"\nwritten to {_OUT.value}: {written}", file=sys.stderr)
    distributed.barrier("the report", compute.UNTIL_ALL_END)
  return bool(outcome.failed)


def run() -> None:
  shell.run(
    main,
    __doc__,
    imports=("gpt2_jax.evaluate.sweep.report",),
    exit_process=process_flags.exit_process,
    config="zero_shot",
    hints=HINTS,
  )
