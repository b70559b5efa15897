# SPDX-License-Identifier: Apache-2.0
"""Plans a run on TPUs without a TPU: does it fit the HBM, how long is a step, what does it cost?

  gpt2-jax plan --config=gpt2:1542M --topology=v5e:8x8 --config.mesh.replica=2 \\
    --config.mesh.data=32 --config.model.remat=attention --usd_per_chip_hour=1.2
  gpt2-jax plan --config=gpt2:1542M --topology=v5e:8x8 --search
  gpt2-jax plan --config=gpt2:117M --topology=v5e:1x1 --decode --batch=1,8 --dtype=bfloat16,int8

It compiles the training step that gpt2-jax train runs with that config, with libtpu (pip install
'.[plan]'). It prints what HBM holds, what fills a step, and how long all steps of the config take.
With --decode it compiles a step of text generation instead, with --evaluate the scoring of a batch
of LAMBADA. All times are estimates.
"""

from __future__ import annotations

import itertools
import math
import os
import pathlib

from absl import flags
from ml_collections import ConfigDict, config_flags

from gpt2_jax import chips
from gpt2_jax.cli import shell
from gpt2_jax.files import local_path, progress
from gpt2_jax.runs import knobs

_LIST_PRICES = ", ".join(f"{name} {tpu.usd_per_chip_hour:.2f}" for name, tpu in chips.TPUS.items())

_CONFIG = config_flags.DEFINE_config_file(
  "config", None, "A config: a name that is listed below, or a path."
)
_TOPOLOGY = flags.DEFINE_string(
  "topology", None, "v5e:8x8 or v5e-64 (v6e alike), v4:4x4x4 (v5p alike)."
)
_SLICES = flags.DEFINE_integer(
  "slices",
  1,
  "Slices of that topology, joined by the data-center network.",
  lower_bound=1,
  upper_bound=4096,
)
_SEARCH = flags.DEFINE_bool(
  "search",
  False,
  "Try meshes, microbatches, remat, kernels and unroll; print the best as flags. With --out, a "
  "search that was cut off resumes.",
)
_COMPILED = flags.DEFINE_integer(
  "compiled",
  10,
  "Of a search, how many candidates are compiled at most, a minute or more each.",
  lower_bound=1,
)
_DECODE = flags.DEFINE_bool(
  "decode", False, "Plan text generation in place of training: tokens/s beside the HBM bound."
)
_EVALUATE = flags.DEFINE_bool(
  "evaluate", False, "Plan the scoring of LAMBADA in place of training: tokens/s beside a bound."
)
_BATCH = flags.DEFINE_list(
  "batch", None, "With --decode or --evaluate: numbers of rows; 1,8,64 or 32 if not given."
)
_DTYPE = flags.DEFINE_list(
  "dtype", None, "With --decode or --evaluate: bfloat16, float32, int8; the first if not given."
)
_TOKENS = flags.DEFINE_float(
  "tokens", None, "Tokens to train on; all of the config's steps if not given."
)
_PRICE = flags.DEFINE_float(
  "usd_per_chip_hour", None, f"For the price of the run. On demand, about: {_LIST_PRICES}."
)
_OUT = flags.DEFINE_string("out", None, "A folder for plan.json and plan.png.")


def main() -> None:
  from gpt2_jax.plan import compiling, report, trials
  from gpt2_jax.runs.origin import resolve_planned

  # 1. A compilation takes minutes: what can be known is said before.
  config = _CONFIG.value
  knobs.check(config)
  config = resolve_planned(config)
  topology = chips.parse_topology(_TOPOLOGY.value, _SLICES.value)
  for flag in (_TOKENS, _PRICE):
    if flag.value is not None and not 0 < flag.value < math.inf:
      raise ValueError(f"--{flag.name}={flag.value} is not a finite number above 0")
  out = None if _OUT.value is None else _writable_folder(_OUT.value)
  _check_modes()

  # 2. Plan.
  if _DECODE.value or _EVALUATE.value:
    return _plan_inference(config, topology, out)

  def compile_plan(config: ConfigDict) -> report.Plan:
    return report.Plan.of(config, topology, _TOKENS.value, _PRICE.value)

  if _SEARCH.value:
    # Before the ranking, which takes a while and needs no libtpu.
    compiling.check_installed()
    plan = trials.fastest_plan(config, topology, compile_plan, _COMPILED.value, out)
    print(plan.table())
    print(f"\nthe best, to paste after --config:\n{report.flags(plan)}")
  else:
    plan = compile_plan(config)
    print(plan.table())

  if out is not None:
    report.save(plan, str(out))


def _check_modes() -> None:
  """Raises ValueError for flags that do not belong together."""
  modes = {"decode": _DECODE.value, "evaluate": _EVALUATE.value, "search": _SEARCH.value}
  named = [f"--{name}" for name, is_given in modes.items() if is_given]
  if len(named) > 1:
    raise ValueError(f"{' and '.join(named)} exclude each other: give one of them")
  for flag in (_BATCH, _DTYPE):
    if flag.value is not None and not (_DECODE.value or _EVALUATE.value):
      raise ValueError(f"--{flag.name} is for --decode and --evaluate; give one of them with it")


def _plan_inference(config: ConfigDict, topology: chips.Topology, out: pathlib.Path | None) -> None:
  """Plans text generation or scoring: prints a row for each dtype and batch size."""
  from gpt2_jax.plan import compiling, decoding

  # 1. A compilation takes minutes: what can be known is said before.
  default = ["32"] if _EVALUATE.value else ["1", "8", "64"]
  batches = decoding.parse_batches(_BATCH.value or default)
  dtypes = decoding.parse_dtypes(_DTYPE.value or ["bfloat16"])
  compiling.check_installed()

  # 2. Plan.
  workload = decoding.Workload(config, topology, scores=_EVALUATE.value)
  rows = []
  for dtype, batch in progress(list(itertools.product(dtypes, batches)), "compiling"):
    rows.append(workload.throughput(dtype, batch))
  print(decoding.throughput_table(workload, rows))
  if out is not None:
    decoding.save(workload, rows, str(out))


def _writable_folder(flag: str) -> pathlib.Path:
  """The folder of --out, which may not be there yet. Raises ValueError or OSError if it cannot."""
  path = local_path(flag)
  there = path.absolute()
  while not there.exists():
    there = there.parent
  if not there.is_dir() or not os.access(there, os.W_OK):
    raise OSError(f"--out={path} cannot be written: {there} is no folder that this user may write")
  return path


def run() -> None:
  # libtpu only compiles: nothing is run on a TPU, even if there is one.
  os.environ["JAX_PLATFORMS"] = "cpu"
  flags.mark_flags_as_required(["config", "topology"])
  shell.run(main, __doc__, imports=("gpt2_jax.plan.report",))
