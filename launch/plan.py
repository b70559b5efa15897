# SPDX-License-Identifier: Apache-2.0
"""Does a run fit a TPU that is not here, how long is a step, and what does it cost? Compiled on this machine; no TPU.

  python launch/plan.py --config=configs/gpt2.py:1542M --topology=v5e:8x8 --config.mesh.replica=8 \\
    --config.mesh.data=8 --config.model.remat=full --usd_per_chip_hour=1.2
  python launch/plan.py --config=configs/gpt2.py:1542M --topology=v5e:8x8 --search

It compiles the very step that launch/train.py runs with that config, with libtpu (pip install '.[plan]'), and says what
HBM holds, what a step is made of, and how long all of the config's steps take. All times are estimates.
"""

import os
import sys

if __name__ == "__main__":  # the root in place of launch/, whose tokenize.py would hide the standard library's
  sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
  os.environ["JAX_PLATFORMS"] = "cpu"  # libtpu compiles; nothing is run on a TPU, even where there is one

from absl import flags
from ml_collections import config_flags
from tqdm import tqdm

from gpt2_jax import chips
from gpt2_jax.plan import compiling, report, search
from launch import shell

_CONFIG = config_flags.DEFINE_config_file("config", None, "A file of configs/, with :SIZE where it takes one.")
_TOPOLOGY = flags.DEFINE_string("topology", None, "v5e:8x8 or v5e-64 (v6e alike), v4:4x4x4 (v5p alike).")
_SLICES = flags.DEFINE_integer("slices", 1, "Slices of that topology, joined by the data center's network.")
_SEARCH = flags.DEFINE_bool("search", False, "Try meshes, microbatches, remat and kernels; print the best as flags.")
_COMPILED = flags.DEFINE_integer("compiled", 4, "Of a search, how many of the best on paper are compiled.", 1)
_TOKENS = flags.DEFINE_float("tokens", None, "Tokens to train on; all of the config's steps if not given.")
_PRICE = flags.DEFINE_float("usd_per_chip_hour", None, "For the price of the run.")
_OUT = flags.DEFINE_string("out", None, "A folder for plan.json and plan.png.")


def main() -> None:
  config, topology = _CONFIG.value, chips.topology(_TOPOLOGY.value, _SLICES.value)
  best = _search(config, topology) if _SEARCH.value else _plan(config, topology)
  print(best.table())
  if _SEARCH.value:
    print(f"\nthe best, to paste after --config:\n{report.flags(best)}")
  if _OUT.value:
    report.save(best, _OUT.value)


def _plan(config, topology: chips.Topology) -> report.Plan:
  return report.Plan.of(config, topology, _TOKENS.value, _PRICE.value)


def _search(config, topology: chips.Topology) -> report.Plan:
  """The fastest of the best on paper, each told as it is compiled. Raises ValueError if none of them fits."""
  compiling.check_installed()
  found = search.candidates(config, topology)
  tried = search.leading(found, _COMPILED.value)
  print(f"{len(found)} candidates divide and fit on paper; compiling {len(tried)}", file=sys.stderr)
  plans = []
  for one in tqdm(tried, unit="compile", disable=None):
    try:
      plans.append(_plan(one.apply(config), topology))
    except compiling.DoesNotFit as error:
      tqdm.write(f"{one}: {error}")
      continue
    low, high = (1e3 * seconds for seconds in plans[-1].estimate.step)
    tqdm.write(f"{one}: {low:,.0f} to {high:,.0f} ms, {plans[-1].compiled.hbm_needed / chips.GIB:.2f} GiB")
  if not plans:
    raise ValueError(f"none of the {len(tried)} compiled fits {topology}; take more with --compiled")
  return min(plans, key=lambda plan: sum(plan.estimate.step))


if __name__ == "__main__":
  flags.mark_flags_as_required(["config", "topology"])
  shell.run(main)
