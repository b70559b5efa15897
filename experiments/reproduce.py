# SPDX-License-Identifier: Apache-2.0
"""The four sizes at the paper's batch of 512 x 1,024 tokens, on paper: mesh, memory, hours and chip-hours by topology.

COMMAND   python experiments/reproduce.py --out=runs/reproduce    all rows; a finished row is not computed again
          python experiments/reproduce.py --only=1542M            rows whose name has this in it
          python experiments/reproduce.py --commands              the commands that would train them; compiles nothing
HARDWARE  any machine with the extra [plan], no TPU; 1 to 3 minutes a row on two cores
EXPECT    README.md, "On paper". Estimates by the TPU's compiler; nobody has trained any of these with this code yet.

600,000 steps are 315 billion tokens, nanoGPT's length; the paper does not say how long GPT-2 was trained. The meshes
are those that `launch/plan.py --search` and a few trials found: `data` along one side of the torus, and whole layers
computed again, since by the compiler's estimate that is faster than to keep them.
"""

import dataclasses
import json
import os
import pathlib
import sys

if __name__ == "__main__":
  sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
  os.environ["JAX_PLATFORMS"] = "cpu"  # libtpu compiles; nothing is run

from absl import flags
from tqdm import tqdm

from configs import gpt2
from gpt2_jax.chips import GIB, topology
from gpt2_jax.plan.report import Plan, save
from launch import shell


@dataclasses.dataclass(frozen=True)
class Run:
  size: str
  topology: str
  mesh: tuple[int, int, int]
  microbatches: int = 1
  remat: str = "full"
  slices: int = 1

  @property
  def name(self) -> str:
    return f"{self.size} {self.slices if self.slices > 1 else ''}{'x ' if self.slices > 1 else ''}{self.topology}"

  def knobs(self) -> dict:
    replica, data, model = self.mesh
    knobs = {"mesh.replica": replica, "mesh.data": data, "mesh.model": model, "microbatches": self.microbatches}
    return knobs | {"model.remat": self.remat}

  def command(self) -> str:
    knobs = " ".join(f"--config.{name}={value}" for name, value in self.knobs().items())
    return (
      f"launch/tpu_vm.sh train --project=PROJECT --zone=ZONE --topology={self.topology} --slices={self.slices} "
      f"--workdir=gs://BUCKET/{self.size} -- --config=configs/gpt2.py:{self.size} "
      f"--config.data.train=gs://BUCKET/train --config.data.validation=gs://BUCKET/validation {knobs}"
    )


RUNS = (
  Run("117M", "v5e:2x4", (8, 1, 1), 8, "none"),
  Run("117M", "v6e:2x4", (8, 1, 1), 4, "full"),
  Run("345M", "v5e:4x4", (4, 4, 1), 4, "none"),
  Run("345M", "v6e:4x4", (4, 4, 1), 2, "full"),
  Run("762M", "v5e:4x8", (4, 8, 1), 2, "full"),
  Run("762M", "v6e:4x8", (4, 8, 1), 1, "full"),
  Run("1542M", "v5e:8x8", (8, 8, 1)),
  Run("1542M", "v5e:16x16", (16, 16, 1)),
  Run("1542M", "v4:4x4x4", (4, 16, 1)),
  Run("1542M", "v5p:4x4x4", (4, 16, 1)),
  Run("1542M", "v6e:8x8", (8, 8, 1)),
  Run("1542M", "v5e:8x8", (16, 8, 1), slices=2),
)

_OUT = flags.DEFINE_string("out", "runs/reproduce", "A folder for plan.json and plan.png of each row, and table.md.")
_ONLY = flags.DEFINE_string("only", "", "Rows whose name has this in it.")
_COMMANDS = flags.DEFINE_bool("commands", False, "Print the command that would train each row, and end.")


def facts(run: Run, out: pathlib.Path) -> dict:
  """What plan.json says of a run; computed where it is not there yet."""
  folder = out / run.name.replace(" ", "_").replace(":", "_")
  path = folder / "plan.json"
  if not (path.exists() and is_of(run, json.loads(path.read_text()))):
    config = gpt2.get_config(run.size)
    config.update_from_flattened_dict(run.knobs())
    save(Plan.of(config, topology(run.topology, run.slices)), str(folder))
  return json.loads(path.read_text())


def is_of(run: Run, found: dict) -> bool:
  """Whether a plan is this run's, and not one of earlier knobs."""
  had = tuple(found["mesh"].values()), found["microbatches"], found["model"]["remat"]
  return had == (run.mesh, run.microbatches, run.remat)


def row(run: Run, found: dict) -> str:
  """One line of the table: ranges are from the fast to the slow end."""
  times, hbm = found["estimates"], found["hbm_per_chip"]
  step, mfu, hours, chip_hours = (times[name] for name in ("step_seconds", "mfu", "hours", "chip_hours"))
  cells = (
    run.size,
    found["topology"],
    " x ".join(map(str, run.mesh)),
    str(run.microbatches),
    run.remat,
    f"{hbm['needed'] / GIB:.1f} of {hbm['available'] / GIB:.1f}",
    f"{1e3 * step[0]:,.0f}-{1e3 * step[1]:,.0f}",
    f"{1e3 * times['communication_exposed_seconds']:,.0f} of {1e3 * times['communication_seconds']:,.0f}",
    f"{100 * mfu[0]:.0f}-{100 * mfu[1]:.0f} %",
    f"{100 * times['mfu_of_the_slow_end_without_communication']:.1f} %",
    f"{hours[0]:,.0f}-{hours[1]:,.0f}",
    f"{chip_hours[0]:,.0f}-{chip_hours[1]:,.0f}",
  )
  return f"| {' | '.join(cells)} |"


COLUMNS = ("size", "topology", "mesh", "micro", "remat", "HBM, GiB", "step, ms", "exposed, ms", "MFU")
COLUMNS += ("slow end, no comm.", "hours", "chip-hours")
HEAD = f"| {' | '.join(COLUMNS)} |\n{'|---' * len(COLUMNS)}|"


def main() -> None:
  runs = [run for run in RUNS if _ONLY.value in run.name]
  if not runs:
    raise ValueError(f"--only={_ONLY.value} is in no name; there are {', '.join(run.name for run in RUNS)}")
  if _COMMANDS.value:
    print("\n".join(run.command() for run in runs))
    return
  out = pathlib.Path(_OUT.value)
  rows = []
  for run in (bar := tqdm(runs, unit="row", disable=None)):
    bar.set_description(run.name)
    rows.append(row(run, facts(run, out)))
  table = "\n".join([HEAD, *rows])
  if len(runs) == len(RUNS):
    (out / "table.md").write_text(table + "\n")
  print(table)


if __name__ == "__main__":
  shell.run(main)
