# SPDX-License-Identifier: Apache-2.0
"""Estimates GPT-2 training at the paper's batch, all four sizes: mesh, HBM, MFU, hours, chip-hours.

COMMAND   python experiments/reproduce.py --out=runs/reproduce
              all rows; a finished row is not computed again
          python experiments/reproduce.py --only=1542M
              rows whose name has this in it
          python experiments/reproduce.py --commands
              prints the commands that would train them; compiles nothing
HARDWARE  any machine with the extra [plan], no TPU; 1 to 6 minutes a row on two cores
EXPECT    README.md, the tables of estimates. They are made by the TPU's compiler; nobody has
          trained any of these with this code yet.

The batch is 512 x 1,024 tokens. 600,000 steps are 315 billion tokens, nanoGPT's length; the paper
does not say how long GPT-2 was trained. The meshes and knobs were found by `launch/plan.py
--search` and a few trials. A chip keeps what its HBM has room for in place of computing it again
(`remat`), and most rows unroll all layers. That saves copies, and compiling takes 1 to 2 minutes up
to 36 layers, 3 to 6 for 48; with unroll=1 it takes one, and the step 5 to 20 % longer.
"""

import dataclasses
import os
import pathlib
import sys

if __name__ == "__main__":
  sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
  os.environ["JAX_PLATFORMS"] = "cpu"  # libtpu only compiles

from absl import flags
from tqdm import tqdm

from configs import gpt2
from gpt2_jax.chips import GIB, parse_topology
from gpt2_jax.cli import shell
from gpt2_jax.files import atomic_write, check_folder, local_path, read_json_object
from gpt2_jax.plan.report import Plan, save


@dataclasses.dataclass(frozen=True)
class Run:
  """One row of the table: a model size on a topology, with the knobs that suit it."""

  size: str
  topology: str
  mesh: tuple[int, int, int]  # replica, data, model
  microbatches: int = 1
  remat: str = "full"
  unroll: int = 1
  slices: int = 1

  @property
  def name(self) -> str:
    slices = f"{self.slices}x " if self.slices > 1 else ""
    return f"{self.size} {slices}{self.topology}"

  def knobs(self) -> dict:
    replica, data, model = self.mesh

    # Names as in the config; all other knobs have their defaults.
    return {
      "mesh.replica": replica,
      "mesh.data": data,
      "mesh.model": model,
      "microbatches": self.microbatches,
      "model.remat": self.remat,
      "model.unroll": self.unroll,
    }

  def command(self) -> str:
    """The command that would train it."""
    # In capitals what only the reader can fill in.
    knobs = " ".join(f"--config.{name}={value}" for name, value in self.knobs().items())
    return (
      f"launch/tpu_vm.sh train --project=PROJECT --zone=ZONE --topology={self.topology} "
      f"--slices={self.slices} "
      f"--workdir=gs://BUCKET/{self.size} -- --config=configs/gpt2.py:{self.size} "
      f"--config.data.train=gs://BUCKET/train --config.data.validation=gs://BUCKET/validation "
      f"{knobs}"
    )


RUNS = (
  Run("117M", "v5e:2x4", (8, 1, 1), 8, "none", unroll=12),
  Run("117M", "v6e:2x4", (8, 1, 1), 2, "none", unroll=12),
  Run("345M", "v5e:4x4", (2, 8, 1), 2, "dots", unroll=24),
  Run("345M", "v6e:4x4", (4, 4, 1), 2, "none", unroll=24),
  Run("762M", "v5e:4x8", (1, 32, 1), remat="attention"),
  Run("762M", "v6e:4x8", (4, 8, 1), 1, "dots", unroll=36),
  Run("1542M", "v5e:8x8", (2, 32, 1), remat="attention"),
  Run("1542M", "v5e:16x16", (4, 64, 1), remat="dots"),
  Run("1542M", "v4:4x4x4", (1, 64, 1), remat="dots"),
  Run("1542M", "v5p:4x4x4", (1, 64, 1), remat="none", unroll=48),
  Run("1542M", "v6e:8x8", (4, 16, 1), remat="none", unroll=48),
  Run("1542M", "v5e:8x8", (4, 32, 1), remat="attention", slices=2),
)

_OUT = flags.DEFINE_string(
  "out", "runs/reproduce", "A folder for plan.json and plan.png of each row, and table.md."
)
_ONLY = flags.DEFINE_string("only", "", "Rows whose name has this in it.")
_COMMANDS = flags.DEFINE_bool(
  "commands", False, "Print the command that would train each row, and end."
)


def facts(run: Run, out: pathlib.Path) -> dict:
  """The content of a run's plan.json; compiled unless it is there already."""
  folder = out / run.name.replace(" ", "_").replace(":", "_")
  path = folder / "plan.json"

  # A row takes minutes, so a finished one is not compiled again.
  if not (path.exists() and is_of(run, read_json_object(path), path)):
    config = gpt2.get_config(run.size)
    config.update_from_flattened_dict(run.knobs())
    plan = Plan.of(config, parse_topology(run.topology, run.slices))
    save(plan, str(folder))

  return read_json_object(path)


def is_of(run: Run, plan: dict, path: pathlib.Path) -> bool:
  """Whether a plan.json is this run's, and not one of earlier knobs.

  Raises ValueError if it is no plan.
  """
  try:
    mesh = tuple(plan["mesh"].values())
    model = plan["model"]
    knobs = mesh, plan["microbatches"], model["remat"], model["unroll"]
  except (KeyError, TypeError, AttributeError) as error:
    raise ValueError(f"{path} is no plan; remove it, and it will be made again") from error
  return knobs == (run.mesh, run.microbatches, run.remat, run.unroll)


def row(run: Run, plan: dict) -> str:
  """One line of the table. Ranges are from the fast to the slow end of the estimate."""
  # 1. Numbers; a pair is a range.
  times, hbm = plan["estimates"], plan["hbm_per_chip"]
  fast, slow = times["step_seconds"]
  exposed, communication = (
    times["communication_exposed_seconds"],
    times["communication_seconds"],
  )
  mfu_low, mfu_high = times["mfu"]
  without = times["mfu_of_the_slow_end_without_communication"]
  hours_low, hours_high = times["hours"]
  chip_hours_low, chip_hours_high = times["chip_hours"]

  # 2. Text, in the order of COLUMNS.
  cells = (
    run.size,
    plan["topology"],
    " x ".join(map(str, run.mesh)),
    str(run.microbatches),
    run.remat,
    str(run.unroll),
    f"{hbm['needed'] / GIB:.1f} of {hbm['available'] / GIB:.1f}",
    f"{1e3 * fast:,.0f}-{1e3 * slow:,.0f}",
    f"{1e3 * exposed:,.0f} of {1e3 * communication:,.0f}",
    f"{100 * mfu_low:.0f}-{100 * mfu_high:.0f} %",
    f"{100 * without:.1f} %",
    f"{hours_low:,.0f}-{hours_high:,.0f}",
    f"{chip_hours_low:,.0f}-{chip_hours_high:,.0f}",
  )
  return f"| {' | '.join(cells)} |"


COLUMNS = (
  "size",
  "topology",
  "mesh",
  "micro",
  "remat",
  "unroll",
  "HBM, GiB",
  "step, ms",
  "exposed, ms",
  "MFU",
  "slow end, no comm.",
  "hours",
  "chip-hours",
)
HEAD = f"| {' | '.join(COLUMNS)} |\n{'|---' * len(COLUMNS)}|"


def main() -> None:
  runs = [run for run in RUNS if _ONLY.value in run.name]
  if not runs:
    names = ", ".join(run.name for run in RUNS)
    raise ValueError(f"--only={_ONLY.value} is in no name; there are {names}")
  if _COMMANDS.value:
    print("\n".join(run.command() for run in runs))
    return

  # As rows are compiled they are saved, so that a run which is interrupted resumes.
  out = local_path(_OUT.value)
  check_folder(out)
  rows = []
  for run in (bar := tqdm(runs, unit="row", disable=None)):
    bar.set_description(run.name)
    rows.append(row(run, facts(run, out)))

  # table.md has all rows or is left as it was.
  table = "\n".join([HEAD, *rows])
  if len(runs) == len(RUNS):
    with atomic_write(out / "table.md", overwrite=True) as partial:
      partial.write_text(table + "\n")
  print(table)


if __name__ == "__main__":
  shell.run(main, __doc__)
