# SPDX-License-Identifier: Apache-2.0
"""Plots of a sweep: scores over the models' sizes and over the steps of a run, with intervals.

Each names its models, the paper's curve where there is one, and what guessing would score.
"""

import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from gpt2_jax.evaluate import tasks
from gpt2_jax.evaluate.sweep.paper import paper_references, paper_scores
from gpt2_jax.files import atomic_write, summarize
from gpt2_jax.sizes import SIZES

if TYPE_CHECKING:
  from matplotlib.axes import Axes
  from matplotlib.axis import Axis
  from matplotlib.figure import Figure

MARKERS = "osD^vP*X<>"
COLORS = 10  # of Matplotlib's default cycle
NAME_LENGTH = 36  # of a model in a legend

# The content of cells' files by task, protocol and shots, and then by model.
Rows = Mapping[str, Mapping[str, dict]]


def draw(rows: Rows, folder: pathlib.Path) -> list[str]:
  """Draws each task's first metric, a PNG a curve; returns the names of the files.

  Against the number of parameters if models differ in it, and against the step of each run.
  """
  figures = {}
  for task_name, by_model in rows.items():
    in_order = sorted(by_model.values(), key=lambda cell: cell["step"] or 0)

    # 1. Sizes. A run has one point, that of its last step.
    newest = {cell["run"] or _model_name(cell): cell for cell in in_order}
    by_size = sorted(newest.values(), key=lambda cell: cell["parameters"])
    if len({cell["parameters"] for cell in by_size}) > 1:
      figures[f"{task_name}.parameters"] = size_figure(by_size)

    # 2. Steps. One checkpoint is no curve.
    runs = {}
    for cell in in_order:
      if cell["run"]:
        runs.setdefault(cell["run"], []).append(cell)
    for run, steps in runs.items():
      if len(steps) > 1:
        # The end of a run's path says more than its beginning, and a file's name has a length.
        figures[f"{task_name}.step.{run[-80:]}"] = step_figure(steps)

  # 3. Nothing is drawn before all figures could be made.
  names = []
  for name, figure in figures.items():
    file = re.sub(r"[^\w.-]+", "_", name).strip("_.") + ".png"
    with atomic_write(folder / file, overwrite=True) as partial:
      figure.savefig(partial, dpi=120)
    names.append(file)
  return names


# ---- the two figures


def size_figure(cells: Sequence[dict]) -> "Figure":
  """A task's first metric over the number of parameters, one point a model, in their order."""
  import matplotlib.figure
  from matplotlib.ticker import FuncFormatter

  figure = matplotlib.figure.Figure(figsize=(8, 4.5), layout="constrained")
  axes = figure.subplots()
  axes.set_xscale("log")

  # 1. The paper's curve, its reference lines, and chance lie behind the points.
  metric = _first_metric(cells)
  identity = cells[0]["identity"]
  reference = paper_scores(identity, metric)
  if reference and any(cell["size"] for cell in cells):
    sizes = [SIZES[name].n_params for name in reference]
    scores = list(reference.values())
    axes.plot(sizes, scores, "--", marker="s", mfc="none", color="0.55", label="the paper")
  for number, (name, score) in enumerate(paper_references(identity, metric).items()):
    style = ("-.", (0, (1, 3)))[number % 2]
    axes.axhline(score, linestyle=style, color="0.55", label=f"{name} (paper), {score:g}")
  _draw_chance(axes, cells)

  # 2. The models.
  for i, cell in enumerate(cells):
    style = {"color": f"C{i % COLORS}", "marker": MARKERS[i % len(MARKERS)], "linestyle": "none"}
    _draw_scores(axes, [cell], [cell["parameters"]], _model_name(cell), style)

  # 3. Scales and labels.
  _label(axes, cells, "parameters")
  _set_ticks(axes.xaxis, axes.get_xlim())
  axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: _short_count(x)))
  figure.legend(loc="outside right upper", fontsize="small")
  return figure


def step_figure(cells: Sequence[dict]) -> "Figure":
  """A task's first metric over the steps of one run, in their order."""
  import matplotlib.figure

  figure = matplotlib.figure.Figure(figsize=(8, 4.5), layout="constrained")
  axes = figure.subplots()
  _draw_chance(axes, cells)
  steps = [cell["step"] for cell in cells]
  _draw_scores(axes, cells, steps, cells[0]["run"], {"color": "C0", "marker": "o"})

  _label(axes, cells, "step")
  axes.legend(fontsize="small")
  return figure


def _draw_scores(
  axes: "Axes", cells: Sequence[dict], x: Sequence[float], name: str, style: dict
) -> None:
  """Draws the scores that are numbers, with their intervals, under a model's name."""
  metric = _first_metric(cells)
  points = [(at, cell["metrics"][metric]) for at, cell in zip(x, cells, strict=True)]
  points = [(at, score) for at, score in points if score["value"] is not None]

  # errorbar takes distances from the value, not ends
  lengths = [interval_lengths(score) for _, score in points]
  axes.errorbar(
    [at for at, _ in points],
    [score["value"] for _, score in points],
    [[low for low, _ in lengths], [high for _, high in lengths]],
    capsize=3,
    label=summarize([name], each=NAME_LENGTH),
    **style,
  )


def _draw_chance(axes: "Axes", cells: Sequence[dict]) -> None:
  """Draws what guessing scores, if that is known."""
  identity = cells[0]["identity"]
  task = tasks.get(identity["task"], identity["protocol"])
  chance = task.chance.get(_first_metric(cells))
  if chance is not None:
    axes.axhline(chance, linestyle=":", color="0.4", label=f"chance, {chance:g}")


def interval_lengths(score: dict) -> tuple[float, float]:
  """How far the ends of a score's interval are below and above it; 0 where there is no end."""
  low = score["value"] if score["low"] is None else score["low"]
  high = score["value"] if score["high"] is None else score["high"]
  return max(0.0, score["value"] - low), max(0.0, high - score["value"])


# ---- labels and scales


def _label(axes: "Axes", cells: Sequence[dict], x: str) -> None:
  """Says what is drawn, of how many items, and on which scale."""
  cell = cells[0]
  metric = _first_metric(cells)
  score = cell["metrics"][metric]
  title = "{task}:{protocol}:{shots}".format(**cell["identity"])
  if cell["items"] < cell["of"]:
    title += f", the first {cell['items']:,} of {cell['of']:,} items"
  axes.set(xlabel=x, ylabel=f"{metric_label(metric, score)}, 95 % intervals")
  axes.set_title(title, fontsize="medium")

  # Perplexity over size is nearly a power law, straight on logarithmic axes.
  if score["unit"].startswith("perplexity"):
    axes.set_yscale("log")
    _set_ticks(axes.yaxis, axes.get_ylim())
    axes.yaxis.set_major_formatter("{x:g}")
  axes.grid(alpha=0.25)


def _set_ticks(axis: "Axis", limits: tuple[float, float]) -> None:
  """Ticks of a logarithmic axis at round numbers: within a decade, it would have one or none."""
  from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

  low, high = limits
  if high / low < 10:
    axis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
  else:
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
  axis.set_minor_locator(NullLocator())


def _short_count(n: float) -> str:
  """A number of parameters in few characters: 200K, 124M, 1.5B."""
  for power, letter in ((9, "B"), (6, "M"), (3, "K")):
    if n >= 10**power:
      return f"{n / 10**power:g}{letter}"
  return f"{n:g}"


def metric_label(name: str, score: dict) -> str:
  """The metric's name, its unit if that is not in the name, and which way is better."""
  # perplexity has the unit "perplexity per word", and BLEU the unit "BLEU"
  label, unit = name.replace("_", " "), score["unit"]
  if unit.startswith(label):
    label = unit
  elif unit and unit.lower() != label:
    label = f"{label} ({unit})"
  return f"{label} {'↑' if score['higher'] else '↓'}"


def _first_metric(cells: Sequence[dict]) -> str:
  return next(iter(cells[0]["metrics"]))


def _model_name(cell: dict) -> str:
  return cell["identity"]["model"]
