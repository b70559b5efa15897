# SPDX-License-Identifier: Apache-2.0
"""The plan's estimate beside step times that others measured on TPUs and published.

COMMAND   python experiments/calibrate.py --out=runs/calibrate
              all rows; a finished row is not computed again; --only=v5e takes some;
              --quick compiles one and two layers where they are no loop, for all of them
HARDWARE  any machine with the extra [plan], no TPU; some minutes a row on two cores
EXPECT    README.md, "Estimates against measurements"

The v5e rows tuned one number, ALLOWANCE of gpt2_jax/plan/estimate.py. The others are held out.
Under the table stands how far the estimates lean, and how much that differs between the rows.
"""

import dataclasses
import json
import os
import pathlib
import statistics
import sys

if __name__ == "__main__":
  sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
  os.environ["JAX_PLATFORMS"] = "cpu"  # libtpu only compiles

import jax
from absl import flags

from experiments.benchmarks.decoder import BLOCK, Decoder, lower_step
from gpt2_jax.chips import parse_topology
from gpt2_jax.cli import shell
from gpt2_jax.files import atomic_write, check_folder, local_path, read_json_object
from gpt2_jax.plan.compiling import compile_lowered, open_topology
from gpt2_jax.plan.estimate import ALLOWANCE, KERNELS, estimate_program
from gpt2_jax.sharding import make_mesh


@dataclasses.dataclass(frozen=True)
class Measured:
  """A published measurement: seconds of a step, or the TFLOP/s of a chip that its authors count."""

  name: str
  topology: str
  source: str
  decoder: Decoder
  seconds: tuple[float, float] | None = None  # the range that was published
  teraflops: float | None = None
  options: tuple[tuple[str, bool | int], ...] = ()  # of the compiler

  @property
  def generation(self) -> str:
    return self.topology.partition(":")[0]

  def measured(self) -> tuple[float, float]:
    """The published range of seconds of a step."""
    if self.seconds:
      return self.seconds
    # MaxText counts 6 x parameters a token, and the attention of all pairs.
    shape = self.decoder
    of_token = 6 * shape.parameters + 12 * shape.layers * shape.heads * shape.head * shape.context
    tokens = shape.rows * shape.microbatches * shape.context  # of a chip
    seconds = of_token * tokens / (self.teraflops * 1e12)
    return seconds, seconds


# 163.6M parameters: a small chat model, all of it in bfloat16.
TPUCHAT = Decoder(
  layers=8,
  width=1024,
  heads=4,
  kv_heads=1,
  head=256,
  mlp=3072,
  vocabulary=32768,
  context=2048,
  rows=4,
  microbatches=16,
  dtype="bfloat16",
  logit_chunks=4,
  softcap=15.0,
)
TPUCHAT_SOURCE = "vorushin/tpuchat, 08_tpu_ablations"


def maxtext(width: int, layers: int, heads: int, mlp: int, rows: int, **more) -> Decoder:
  """A model of MaxText's `global_parameter_scale`, whose head is 128 wide."""
  sizes = {"layers": layers, "width": width, "heads": heads, "kv_heads": heads, "mlp": mlp}
  options = {"remat": "full"} | more
  return Decoder(**sizes, head=128, vocabulary=32768, context=2048, rows=rows, **options)


MAXTEXT_SOURCE = "MaxText, configs/v5e/README.md"
MAXTEXT_V5P_SOURCE = "MaxText, configs/tpu/v5p/README.md and 32b.sh"
LLAMA_70B = Decoder(
  layers=80,
  width=8192,
  heads=64,
  kv_heads=8,
  head=128,
  mlp=28672,
  vocabulary=32000,
  context=4096,
  rows=4,
  remat="full",
)
# What MaxText sets for it, so that all-gathers run beside matmuls.
TRILLIUM_OPTIONS = (
  ("xla_tpu_scoped_vmem_limit_kib", 98304),
  ("xla_enable_async_all_gather", True),
  ("xla_tpu_overlap_compute_collective_tc", True),
  ("xla_tpu_enable_async_collective_fusion", True),
  ("xla_tpu_enable_async_collective_fusion_fuse_all_gather", True),
  ("xla_tpu_enable_async_collective_fusion_multiple_steps", True),
)
# Those of 32b.sh that a compiler takes as its options; of options given twice the last.
V5P_OPTIONS = (
  ("xla_tpu_megacore_fusion_allow_ags", False),
  ("xla_enable_async_collective_permute", True),
  ("xla_tpu_enable_ag_backward_pipelining", True),
  ("xla_tpu_enable_data_parallel_all_reduce_opt", True),
  ("xla_tpu_data_parallel_opt_different_sized_ops", True),
  ("xla_tpu_enable_async_collective_fusion", True),
  ("xla_tpu_enable_async_collective_fusion_multiple_steps", True),
  ("xla_tpu_overlap_compute_collective_tc", True),
  ("xla_enable_async_all_gather", True),
  ("xla_tpu_use_tc_device_shape_on_sc", True),
  ("xla_tpu_enable_sparse_core_collective_offload_all_gather", True),
  ("xla_tpu_enable_async_collective_fusion_fuse_all_gather", False),
)
MEASURED = (
  Measured("tpuchat 163.6M", "v5e:1x1", TPUCHAT_SOURCE, TPUCHAT, seconds=(0.881, 0.881)),
  Measured(
    "MaxText 16B", "v5e:16x16", MAXTEXT_SOURCE, maxtext(4096, 32, 64, 28672, 6), teraflops=120
  ),
  Measured(
    "MaxText 32B", "v5e:16x16", MAXTEXT_SOURCE, maxtext(8192, 32, 64, 28672, 4), teraflops=132
  ),
  Measured(
    "MaxText 64B", "v5e:16x16", MAXTEXT_SOURCE, maxtext(8192, 64, 64, 28672, 2), teraflops=118
  ),
  Measured("tpuchat 163.6M", "v6e:1x1", TPUCHAT_SOURCE, TPUCHAT, seconds=(0.275, 0.302)),
  Measured(
    "Llama 2 70B",
    "v6e:16x16",
    "AI-Hypercomputer/tpu-recipes, training/trillium/Llama2-70B-MaxText",
    LLAMA_70B,
    seconds=(17.373, 17.373),
    options=TRILLIUM_OPTIONS,
  ),
  Measured(
    "MaxText 32B",
    "v5p:4x4x4",
    MAXTEXT_V5P_SOURCE,
    maxtext(8192, 32, 64, 28672, 6, remat="minimal", tensor=4),
    teraflops=328,
    options=V5P_OPTIONS,
  ),
)


def estimated(row: Measured, out: pathlib.Path, quick: bool = False) -> dict:
  """The estimate of a row; compiled unless its file is there already."""
  is_quick = quick and not row.decoder.remat
  name = f"{row.name}_{row.topology}{'_quick' if is_quick else ''}"
  path = out / f"{name}.json".replace(" ", "_").replace(":", "_")
  if not path.exists():
    depths = (1, 2) if is_quick else (row.decoder.layers,)
    result = extrapolate([estimate_of(row, depth) for depth in depths], row.decoder.layers)
    with atomic_write(path) as partial:
      partial.write_text(json.dumps(result, indent=1) + "\n")
  result = read_json_object(path)
  if KERNELS not in result["work"]:
    raise ValueError(f"{path} is of an older version of this script: choose another --out")
  return result


def estimate_of(row: Measured, layers: int) -> dict:
  """Seconds of a row's step with so many layers: its work by kind, and exposed communication."""
  topology = parse_topology(row.topology)
  tensor = row.decoder.tensor
  mesh = make_mesh(1, topology.chips // tensor, tensor, devices=open_topology(topology))
  # The compiler decides about all shardings but those of the arguments.
  mesh = jax.sharding.Mesh(mesh.devices, mesh.axis_names)
  shape = dataclasses.replace(row.decoder, layers=layers)
  scheduled, _ = compile_lowered(lower_step(shape, mesh, dict(row.options)), topology, mesh)
  times = estimate_program(scheduled, 0.0, 0)
  return {"work": times.fast, "exposed": times.exposed}


def extrapolate(results: list[dict], layers: int) -> dict:
  """The result for so many layers from that of one layer and that of two; one alone is it."""
  if len(results) == 1:
    return results[0]
  one, two = results
  work = {}
  for name, seconds in one["work"].items():
    work[name] = seconds + (layers - 1) * (two["work"][name] - seconds)
  exposed = one["exposed"] + (layers - 1) * (two["exposed"] - one["exposed"])
  return {"work": work, "exposed": exposed}


def ends_of(row: Measured, result: dict) -> tuple[float, float]:
  """Both ends of the estimate of a step, seconds.

  The instructions of the attention kernel are counted for all blocks of its grid. It skips those
  above the diagonal, which are taken off here.
  """
  blocks = row.decoder.context // BLOCK
  of_diagonal = (blocks + 1) / (2 * blocks)
  work = sum(result["work"].values()) - (1 - of_diagonal) * result["work"][KERNELS]
  return work + result["exposed"], work * (1 + ALLOWANCE) + result["exposed"]


def leans_of(row: Measured, result: dict) -> list[float]:
  """Both ends, relative to the middle of what was published: 0.1 is 10 % too slow."""
  middle = sum(row.measured()) / 2
  return [end / middle - 1 for end in ends_of(row, result)]


def line(row: Measured, result: dict) -> str:
  """One line of the table."""
  low, high = row.measured()
  published = f"{1e3 * low:,.0f}" if low == high else f"{1e3 * low:,.0f}-{1e3 * high:,.0f}"
  cells = (
    row.name,
    row.topology,
    published,
    "-".join(f"{1e3 * end:,.0f}" for end in ends_of(row, result)),
    " to ".join(f"{100 * lean:+.0f} %" for lean in leans_of(row, result)),
    f"{1e3 * result['exposed']:,.0f}",
    row.source,
  )
  return f"| {' | '.join(cells)} |"


def summary(generation: str, leans: list[list[float]]) -> str:
  """The mean of the leans of a generation's rows and their standard deviation, at both ends."""
  ends = []
  for name, values in zip(("fast", "slow"), zip(*leans, strict=True), strict=True):
    spread = f", sd {100 * statistics.stdev(values):.0f} %" if len(values) > 1 else ""
    ends.append(f"{name} end {100 * statistics.mean(values):+.0f} %{spread}")
  return f"{generation}, {len(leans)} rows: {'; '.join(ends)}"


COLUMNS = ("model", "topology", "measured, ms", "estimate", "lean", "exposed", "source")


def add_flags() -> None:
  """Not where the module is imported: its functions are tested beside commands with such flags."""
  flags.DEFINE_string("out", "runs/calibrate", "A folder for a JSON file of each row.")
  flags.DEFINE_string("only", "", "Rows whose name and topology have this in them.")
  flags.DEFINE_bool(
    "quick", False, "Layers that are no loop: one and two are compiled, and the others taken alike."
  )


def main() -> None:
  only = flags.FLAGS.only
  rows = [row for row in MEASURED if only in f"{row.name} {row.topology}"]
  if not rows:
    raise ValueError(f"--only={only} is in no row; there are {len(MEASURED)}, see --help")
  out = local_path(flags.FLAGS.out)
  check_folder(out.parent)
  out.mkdir(exist_ok=True)
  print(f"| {' | '.join(COLUMNS)} |\n{'|---' * len(COLUMNS)}|")
  leans = {}
  for row in rows:
    result = estimated(row, out, flags.FLAGS.quick)
    leans.setdefault(row.generation, []).append(leans_of(row, result))
    print(line(row, result), flush=True)
  print()
  for generation, values in leans.items():
    print(summary(generation, values))


if __name__ == "__main__":
  add_flags()
  shell.run(main, __doc__)
