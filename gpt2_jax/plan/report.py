# SPDX-License-Identifier: Apache-2.0
"""What a plan says: a table to read, the same as JSON, and one picture. Every time in it is an estimate."""

import dataclasses
import json
import pathlib

from ml_collections import ConfigDict

from gpt2_jax.chips import GIB, Topology
from gpt2_jax.plan.compiling import Compiled, compile_step
from gpt2_jax.plan.estimate import Estimate, estimate, hours


@dataclasses.dataclass(frozen=True)
class Plan:
  """A compiled step, its estimate, and the run that it is for."""

  compiled: Compiled
  estimate: Estimate
  tokens: float  # of the whole run
  usd_per_chip_hour: float | None = None

  @classmethod
  def of(cls, config: ConfigDict, topology: Topology, tokens: float | None = None, usd_per_chip_hour=None) -> "Plan":
    """Compiles and estimates the run of `config`, as compile_step does; `tokens` if not those of all its steps."""
    compiled = compile_step(config, topology)
    tokens = tokens or config.steps * config.batch_size * config.model.n_ctx
    return cls(compiled, estimate(compiled), tokens, usd_per_chip_hour)

  def facts(self) -> dict:
    """Everything as plain values; bytes, seconds, FLOP/s, per chip where it says so."""
    compiled, one = self.compiled, self.estimate
    low, high = hours(one, self.tokens)
    chip_hours = [h * compiled.topology.chips for h in (low, high)]
    facts = {
      "topology": str(compiled.topology),
      "chips": compiled.topology.chips,
      "mesh": compiled.mesh,
      "batch_size": compiled.batch_size,
      "microbatches": compiled.microbatches,
      "model": dataclasses.asdict(compiled.model),
      "compile_seconds": compiled.seconds,
      "hbm_per_chip": compiled.hbm | {"needed": compiled.hbm_needed, "available": compiled.topology.chip.hbm},
      "estimates": {
        "step_seconds": one.step,
        "tokens_per_second": [one.tokens / seconds for seconds in one.step[::-1]],
        "mfu": [one.mfu(seconds) for seconds in one.step[::-1]],
        "mfu_of_the_slow_end_without_communication": one.mfu(sum(one.slow.values())),
        "seconds_at_peak_flops": one.mfu(1.0),
        "seconds_of_elementwise_at_full_bandwidth": one.moved / compiled.topology.chip.hbm_bandwidth,
        "seconds_by_kind": {kind: [one.fast[kind], one.slow[kind]] for kind in one.slow},
        "communication_seconds": one.communication,
        "communication_exposed_seconds": one.exposed,
        "collectives": [dataclasses.asdict(x) for x in one.collectives],
        "hours": [low, high],
        "chip_hours": chip_hours,
      },
    }
    if self.usd_per_chip_hour:
      facts["estimates"]["usd"] = [h * self.usd_per_chip_hour for h in chip_hours]
    return facts

  def table(self) -> str:
    """The facts for a terminal."""
    facts = self.facts()
    return "\n\n".join((self._head(facts), _memory(facts), self._time(facts), _links(facts), self._run(facts)))

  def _head(self, facts) -> str:
    compiled, model = self.compiled, self.compiled.model
    mesh = " x ".join(f"{name} {n}" for name, n in compiled.mesh.items())
    return (
      f"{model.n_layer} layers x {model.n_embd}, {model.n_head} heads, {model.n_ctx} tokens, on {facts['topology']} "
      f"({facts['chips']} chips)\n"
      f"mesh {mesh}, batch {compiled.batch_size} in {compiled.microbatches}, remat {model.remat}, "
      f"attention {model.attention}, unroll {model.unroll}; compiled in {compiled.seconds:.0f} s"
    )

  def _time(self, facts) -> str:
    times, kinds = facts["estimates"], facts["estimates"]["seconds_by_kind"]
    notes = dict(
      zip(
        kinds,
        (
          "cycles by the compiler's count",
          "instructions of the kernel, a bundle a cycle",
          "full HBM bandwidth; the compiler's count, about 40 % of it",
        ),
        strict=True,
      )
    )
    rows = [(kind, *pair, notes[kind]) for kind, pair in kinds.items()]
    exposed, whole = times["communication_exposed_seconds"], times["communication_seconds"]
    rows.append(
      ("communication, exposed", exposed, exposed, f"of {1e3 * whole:,.1f} ms; links at their full bandwidth")
    )
    rows.append(("a step", *times["step_seconds"], ""))
    lines = ["time, an estimate      fast end   slow end   ms; what each end assumes"]
    lines += [f"  {name:22.22}{1e3 * low:9,.1f}{1e3 * high:11,.1f}   {note}" for name, low, high, note in rows]
    at_peak = 1e3 * times["seconds_at_peak_flops"]
    lines.append(
      f"  products at peak      {at_peak:9,.1f}              6 N + attention, no recomputation, 100 % of the peak"
    )
    return "\n".join(lines)

  def _run(self, facts) -> str:
    times = facts["estimates"]
    low, high = times["mfu"]
    slow, fast = times["tokens_per_second"]
    without = times["mfu_of_the_slow_end_without_communication"]
    lines = [
      f"MFU {low:.1%} to {high:.1%} (slow end without communication: {without:.1%}); "
      f"{slow:,.0f} to {fast:,.0f} tokens/s",
      f"{self.tokens:.3g} tokens: {_range(times['hours'])} hours, {_range(times['chip_hours'])} chip-hours"
      + (f", {_range(times['usd'])} USD at {self.usd_per_chip_hour} a chip-hour" if "usd" in times else ""),
      "All times are estimates; nothing ran on a TPU.",
    ]
    return "\n".join(lines)


def _range(pair) -> str:
  return f"{pair[0]:,.1f} to {pair[1]:,.1f}" if pair[1] < 100 else f"{pair[0]:,.0f} to {pair[1]:,.0f}"


def _memory(facts) -> str:
  hbm = dict(facts["hbm_per_chip"])
  needed, available = hbm.pop("needed"), hbm.pop("available")
  room = (available - needed) / GIB  # below zero where the compiler lets some of these share room: it took the step
  lines = ["HBM a chip, GiB"] + [f"  {name:27.27}{n / GIB:9.2f}" for name, n in hbm.items()]
  lines.append(f"  {'all':27}{needed / GIB:9.2f}   of {available / GIB:.2f}: it fits, {room:+.2f}")
  return "\n".join(lines)


def _links(facts) -> str:
  lines = ["collectives in a step             count     MiB each   ms in all    exposed"]
  for one in facts["estimates"]["collectives"]:
    if one["bytes"] * one["count"] >= 2**20:
      name = f"{one['kind']} over {one['axes']}"
      lines.append(
        f"  {name:30.30}{one['count']:8,}{one['bytes'] / 2**20:13,.2f}{1e3 * one['seconds']:12,.2f}"
        f"{1e3 * one['exposed']:11,.2f}"
      )
  return "\n".join(lines)


def save(plan: Plan, folder: str) -> None:
  """plan.json and plan.png."""
  path = pathlib.Path(folder)
  path.mkdir(parents=True, exist_ok=True)
  plot(plan, str(path / "plan.png"))
  fresh = path / "plan.json.tmp"
  fresh.write_text(json.dumps(plan.facts(), indent=1) + "\n")
  fresh.replace(path / "plan.json")


def plot(plan: Plan, path: str) -> None:
  """HBM by class against what is there, and the step by what fills it, as a PNG."""
  from matplotlib.backends.backend_agg import FigureCanvasAgg
  from matplotlib.figure import Figure

  compiled, one = plan.compiled, plan.estimate
  figure = Figure(figsize=(9, 5), layout="constrained")
  memory, time = figure.subplots(1, 2)
  _stack(memory, [("", {name: n / GIB for name, n in compiled.hbm.items()})])
  memory.axhline(compiled.topology.chip.hbm / GIB, color="black", linestyle="--", label="available")
  memory.set(ylabel="GiB a chip", title="HBM")
  ends = [("fast end", one.fast), ("slow end", one.slow)]
  _stack(time, [(end, {k: 1e3 * s for k, s in (x | {"communication": one.exposed}).items()}) for end, x in ends])
  time.set(ylabel="ms", title="a step, an estimate")
  for axes in (memory, time):
    axes.legend(fontsize=8)
  mesh = " x ".join(map(str, compiled.mesh.values()))
  figure.suptitle(f"{compiled.model.n_layer} x {compiled.model.n_embd} on {compiled.topology}, mesh {mesh}")
  FigureCanvasAgg(figure).print_png(path)


def _stack(axes, bars: list[tuple[str, dict[str, float]]]) -> None:
  names = [name for name, _ in bars]
  below = [0.0] * len(bars)
  for part in bars[0][1]:
    heights = [parts[part] for _, parts in bars]
    axes.bar(names, heights, 0.5, bottom=below, label=part)
    below = [a + b for a, b in zip(below, heights, strict=True)]


def flags(plan: Plan) -> str:
  """What the plan chose, as flags to paste after `--config`."""
  compiled, model = plan.compiled, plan.compiled.model
  knobs = {f"mesh.{name}": n for name, n in compiled.mesh.items()} | {"microbatches": compiled.microbatches}
  knobs |= {f"model.{name}": getattr(model, name) for name in ("remat", "attention", "pad_heads")}
  return " ".join(f"--config.{name}={value}" for name, value in knobs.items())
