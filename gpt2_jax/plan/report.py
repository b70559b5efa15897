# SPDX-License-Identifier: Apache-2.0
"""Reports a plan: HBM, step time, MFU, hours and cost, as a table, as JSON and as a picture.

Every time in it is an estimate.
"""

import dataclasses
import json
import pathlib

from ml_collections import ConfigDict

from gpt2_jax.chips import GIB, Topology
from gpt2_jax.files import atomic_write
from gpt2_jax.plan.compiling import Compiled, compile_step
from gpt2_jax.plan.estimate import (
  ALLOWANCE,
  KERNELS,
  MATMULS,
  MEMORY_BOUND,
  Estimate,
  estimate,
  hours,
)

# What bounds each kind of work; the slow end adds ALLOWANCE.
_BOUNDS = {
  MATMULS: "instructions, multiply-adds at peak, or the compiler's count",
  KERNELS: "instructions, HBM traffic, or multiply-adds at peak",
  MEMORY_BOUND: "HBM traffic at full bandwidth, or instructions",
}


@dataclasses.dataclass(frozen=True)
class Plan:
  """A compiled step, its estimate, and the run that it is for."""

  compiled: Compiled
  estimate: Estimate
  tokens: float  # of the whole run
  usd_per_chip_hour: float | None = None

  @classmethod
  def of(
    cls, config: ConfigDict, topology: Topology, tokens: float | None = None, usd_per_chip_hour=None
  ) -> "Plan":
    """Compiles and estimates the run of `config`, as compile_step does.

    `tokens` are those of all its steps unless given.
    """
    compiled = compile_step(config, topology)
    tokens = tokens or config.steps * config.batch_size * config.model.n_ctx
    return cls(compiled, estimate(compiled), tokens, usd_per_chip_hour)

  def facts(self) -> dict:
    """Everything as plain values: bytes, seconds, FLOP/s; per chip if the key says so."""
    # The keys are those of plan.json, which experiments/reproduce.py reads.
    compiled = self.compiled
    chip = compiled.topology.chip
    available = {"needed": compiled.hbm_needed, "available": chip.hbm}
    return {
      "topology": str(compiled.topology),
      "chips": compiled.topology.chips,
      "mesh": compiled.mesh,
      "batch_size": compiled.batch_size,
      "microbatches": compiled.microbatches,
      "model": dataclasses.asdict(compiled.model),
      "teacher": compiled.teacher and dataclasses.asdict(compiled.teacher),
      "compiler_options": compiled.options,
      "compile_seconds": compiled.seconds,
      "hbm_per_chip": compiled.hbm | available,
      "estimates": self._estimates(),
    }

  def _estimates(self) -> dict:
    """The estimated part of the facts; a pair is the range, its smaller number first."""
    times = self.estimate
    chip = self.compiled.topology.chip
    fast, slow = times.step

    # Chip-hours are what is billed.
    run_hours = hours(times, self.tokens)
    chip_hours = [h * self.compiled.topology.chips for h in run_hours]

    estimates = {
      "step_seconds": times.step,
      "tokens_per_second": [times.tokens / slow, times.tokens / fast],
      "mfu": [times.mfu(slow), times.mfu(fast)],
      "mfu_of_the_slow_end_without_communication": times.mfu(sum(times.slow.values())),
      "seconds_at_peak_flops": times.mfu(1.0),
      "seconds_of_elementwise_at_full_bandwidth": times.moved / chip.hbm_bandwidth,
      "hbm_bytes": times.hbm_bytes,
      "seconds_by_kind": {work: [times.fast[work], times.slow[work]] for work in times.slow},
      "communication_seconds": times.communication,
      "communication_exposed_seconds": times.exposed,
      "collectives": list(map(dataclasses.asdict, times.collectives)),
      "hours": list(run_hours),
      "chip_hours": chip_hours,
    }
    if self.usd_per_chip_hour:
      estimates["usd"] = [h * self.usd_per_chip_hour for h in chip_hours]
    return estimates

  def table(self) -> str:
    """The facts as text for a terminal."""
    facts = self.facts()
    # The order of the questions: does it fit, how long is a step, why, and what does the run cost?
    parts = (
      self._head_text(facts),
      _hbm_text(facts),
      _time_text(facts),
      _collectives_text(facts),
      self._run_text(facts),
    )
    return "\n\n".join(parts)

  def _head_text(self, facts: dict) -> str:
    """The model, the topology, the mesh and the knobs."""
    compiled, model = self.compiled, self.compiled.model
    mesh = " x ".join(f"{name} {n}" for name, n in compiled.mesh.items())
    teacher = compiled.teacher
    learns = "" if teacher is None else f", learns from {teacher.n_layer} x {teacher.n_embd}"

    return (
      f"{model.n_layer} layers x {model.n_embd}, {model.n_head} heads, {model.n_ctx} tokens, "
      f"on {facts['topology']} ({facts['chips']} chips){learns}\n"
      f"mesh {mesh}, batch {compiled.batch_size} in {compiled.microbatches}, "
      f"remat {model.remat}, attention {model.attention}, unroll {model.unroll}; "
      f"compiled in {compiled.seconds:.0f} s"
    )

  def _run_text(self, facts: dict) -> str:
    """MFU, throughput, hours and price of the whole run."""
    times = facts["estimates"]
    mfu_low, mfu_high = times["mfu"]
    tokens_low, tokens_high = times["tokens_per_second"]
    without = times["mfu_of_the_slow_end_without_communication"]

    price = ""
    if "usd" in times:
      price = f", {_range(times['usd'])} USD at {self.usd_per_chip_hour} a chip-hour"

    lines = [
      f"MFU {mfu_low:.1%} to {mfu_high:.1%} "
      f"(slow end without communication: {without:.1%}); "
      f"{tokens_low:,.0f} to {tokens_high:,.0f} tokens/s",
      f"{self.tokens:.3g} tokens: {_range(times['hours'])} hours, "
      f"{_range(times['chip_hours'])} chip-hours{price}",
      "All times are estimates; nothing ran on a TPU.",
    ]
    return "\n".join(lines)


def _range(pair: list[float]) -> str:
  """`1.2 to 3.4`; without decimals from 100 on."""
  low, high = pair
  return f"{low:,.1f} to {high:,.1f}" if high < 100 else f"{low:,.0f} to {high:,.0f}"


def _time_text(facts: dict) -> str:
  """What fills a step, in ms."""
  times = facts["estimates"]

  # 1. Work.
  rows = []
  for work, (fast, slow) in times["seconds_by_kind"].items():
    rows.append((work, fast, slow, _BOUNDS[work]))

  # 2. Communication that nothing hides; the same at both ends.
  exposed = times["communication_exposed_seconds"]
  communication = 1e3 * times["communication_seconds"]
  note = f"of {communication:,.1f} ms; links at their full bandwidth"
  rows.append(("communication, exposed", exposed, exposed, note))
  rows.append(("a step", *times["step_seconds"], ""))

  head = f"ms; the slow end adds {ALLOWANCE:.0%} to work: DMA ramps, waits, shared HBM, dispatch"
  lines = [f"time, an estimate      fast end   slow end   {head}"]
  for name, fast, slow, note in rows:
    lines.append(f"  {name:22.22}{1e3 * fast:9,.1f}{1e3 * slow:11,.1f}   {note}")

  # 3. A lower bound to compare with.
  at_peak = 1e3 * times["seconds_at_peak_flops"]
  note = "6 N (frozen weights: 4 N) + attention, no recomputation, 100 % of the peak"
  lines.append(f"  {'matmuls at peak':22}{at_peak:9,.1f}{'':11}   {note}")
  gibibytes = times["hbm_bytes"] / GIB
  lines.append(
    f"  {'HBM traffic, GiB':22}{gibibytes:9,.1f}{'':11}   a chip, of all work and copies"
  )
  return "\n".join(lines)


def _hbm_text(facts: dict) -> str:
  """HBM by what it holds, and the room that is left."""
  hbm = dict(facts["hbm_per_chip"])
  needed, available = hbm.pop("needed"), hbm.pop("available")
  lines = ["HBM a chip, GiB"]
  for name, nbytes in hbm.items():
    lines.append(f"  {name:27.27}{nbytes / GIB:9.2f}")

  # The room may be below zero although the step compiled: the compiler lets some of these share
  # memory.
  room = (available - needed) / GIB
  lines.append(f"  {'all':27}{needed / GIB:9.2f}   of {available / GIB:.2f}: it fits, {room:+.2f}")
  return "\n".join(lines)


def _collectives_text(facts: dict) -> str:
  """The collectives that move 1 MiB or more in a step."""
  lines = ["collectives in a step             count     MiB each   ms in all    exposed"]
  for collective in facts["estimates"]["collectives"]:
    count, nbytes = collective["count"], collective["bytes"]
    # Most of the others are scalars: norms, sums of losses.
    if nbytes * count < 2**20:
      continue

    name = f"{collective['kind']} over {collective['axes']}"
    milliseconds = 1e3 * collective["seconds"]
    exposed = 1e3 * collective["exposed"]
    lines.append(
      f"  {name:30.30}{count:8,}{nbytes / 2**20:13,.2f}{milliseconds:12,.2f}{exposed:11,.2f}"
    )
  return "\n".join(lines)


def save(plan: Plan, folder: str) -> None:
  """Writes plan.png, then plan.json (atomically)."""
  path = pathlib.Path(folder)
  path.mkdir(parents=True, exist_ok=True)
  plot(plan, str(path / "plan.png"))

  # A folder with a plan.json is a finished one.
  with atomic_write(path / "plan.json", overwrite=True) as partial:
    partial.write_text(json.dumps(plan.facts(), indent=1) + "\n")


def plot(plan: Plan, path: str) -> None:
  """Plots HBM by what it holds, and the step by what fills it, as a PNG."""
  from matplotlib.backends.backend_agg import FigureCanvasAgg
  from matplotlib.figure import Figure

  compiled, times = plan.compiled, plan.estimate
  figure = Figure(figsize=(9, 5), layout="constrained")
  memory_axes, time_axes = figure.subplots(1, 2)

  # 1. HBM against what there is.
  gibibytes = {name: nbytes / GIB for name, nbytes in compiled.hbm.items()}
  _stack(memory_axes, {"": gibibytes})
  available = compiled.topology.chip.hbm / GIB
  memory_axes.axhline(available, color="black", linestyle="--", label="available")
  memory_axes.set(ylabel="GiB a chip", title="HBM")

  # 2. The two ends of the estimate.
  ends = {}
  for name, seconds in (("fast end", times.fast), ("slow end", times.slow)):
    parts = seconds | {"communication": times.exposed}
    ends[name] = {part: 1e3 * s for part, s in parts.items()}

  _stack(time_axes, ends)
  time_axes.set(ylabel="ms", title="a step, an estimate")

  # 3. What it is of.
  for axes in (memory_axes, time_axes):
    axes.legend(fontsize=8)
  mesh = " x ".join(map(str, compiled.mesh.values()))
  model = f"{compiled.model.n_layer} x {compiled.model.n_embd}"
  figure.suptitle(f"{model} on {compiled.topology}, mesh {mesh}")
  FigureCanvasAgg(figure).print_png(path)


def _stack(axes, bars: dict[str, dict[str, float]]) -> None:
  """Draws stacked bars; all have the same parts."""
  names = list(bars)
  bottom = [0.0] * len(bars)
  for part in bars[names[0]]:
    heights = [parts[part] for parts in bars.values()]
    axes.bar(names, heights, 0.5, bottom=bottom, label=part)
    bottom = [low + height for low, height in zip(bottom, heights, strict=True)]


def flags(plan: Plan) -> str:
  """The plan's mesh and knobs as flags to paste after `--config`."""
  compiled, model = plan.compiled, plan.compiled.model

  # Only what a search chooses; all else is in the config.
  knobs = {f"mesh.{name}": n for name, n in compiled.mesh.items()}
  knobs["microbatches"] = compiled.microbatches
  knobs["model.remat"] = model.remat
  knobs["model.attention"] = model.attention
  knobs["model.pad_heads"] = model.pad_heads
  knobs["model.unroll"] = model.unroll
  return " ".join(f"--config.{name}={value}" for name, value in knobs.items())
