# SPDX-License-Identifier: Apache-2.0
"""One page of a sweep, report.md: a picture of each task, by what the tasks measure, and the table.

A picture has a line for each metric and a point for each model, with intervals and chance. So many
metrics of few models are seen at once, as those of the bias tasks are.
"""

import pathlib
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from gpt2_jax.evaluate import tasks
from gpt2_jax.evaluate.sweep.cells import PLOTS
from gpt2_jax.evaluate.sweep.plots import COLORS, MARKERS, NAME_LENGTH, interval_lengths
from gpt2_jax.files import atomic_write, summarize

if TYPE_CHECKING:
  from matplotlib.axes import Axes
  from matplotlib.figure import Figure

PAGE = "report.md"

# What tasks measure besides language modeling.
DETECTION, BIAS, MEMORIZATION = "Detection of machine text", "Bias", "Memorization"
LANGUAGE = "Language modeling and tasks"
KINDS = {
  DETECTION: ("machine_text",),
  BIAS: ("crows_pairs", "winobias", "winogender", "bold"),
  MEMORIZATION: ("memorization",),
  LANGUAGE: (),
}
NOTES = {
  DETECTION: "How well the model's statistics tell a machine's texts from people's. A score is no "
  "proof of who wrote a text.",
  BIAS: "Random weights have a score, too: a score is bias beyond the null model's, the length "
  "predictor's and chance.",
  MEMORIZATION: "Training text that the model continues word for word. A low share is no proof "
  "that nothing can be extracted.",
  LANGUAGE: "",
}

# A metric of a task as a line of a picture: its label, and its score by model.
Line = tuple[str, dict[str, dict]]


def kind_of(task: str) -> str:
  """What a task measures: one of KINDS."""
  kinds = [kind for kind, names in KINDS.items() if task in names]
  return kinds[0] if kinds else LANGUAGE


def write_page(cells: Sequence[dict], table: str, folder: pathlib.Path) -> list[str]:
  """Writes report.md and its pictures; returns their names. `table` is that of report.write."""
  # 1. The pictures, all protocols of a task in one.
  by_task: dict[str, list[dict]] = {}
  for cell in cells:
    by_task.setdefault(cell["identity"]["task"], []).append(cell)
  names = {}
  for task, of_task in by_task.items():
    names[task] = re.sub(r"[^\w.-]+", "_", f"{task}.metrics") + ".png"
    with atomic_write(folder / PLOTS / names[task], overwrite=True) as partial:
      metrics_figure(of_task).savefig(partial, dpi=120)

  # 2. The page.
  models = dict.fromkeys(cell["identity"]["model"] for cell in cells)
  lines = ["# Measured", "", f"{len(models)} models, {len(by_task)} tasks. Scores: below.", ""]
  for kind, note in NOTES.items():
    pictures = [task for task in by_task if kind_of(task) == kind]
    if pictures:
      lines += [f"## {kind}", "", note, ""]
    for task in pictures:
      lines += [f"![{task}]({PLOTS}/{names[task]})", ""]
  page = "\n".join(lines) + "\n" + table.replace("# Scores", "## Scores", 1)
  with atomic_write(folder / PAGE, overwrite=True) as partial:
    partial.write_text(page, encoding="utf-8")
  return list(names.values())


# ---- the picture


def metrics_figure(cells: Sequence[dict]) -> "Figure":
  """All metrics of a task under all its protocols, a line each; axes for each unit."""
  import matplotlib.figure

  # 1. What is drawn.
  by_unit = _lines_by_unit(cells)
  models = list(dict.fromkeys(cell["identity"]["model"] for cell in cells))
  most = max(map(len, by_unit.values()))

  # 2. A column of axes for each unit. Few lines are close, and many models make a line higher.
  height = 1.6 + 0.18 * len(models) + most * (0.24 + 0.05 * len(models))
  size = (3.0 + 4.2 * len(by_unit), height)
  figure = matplotlib.figure.Figure(figsize=size, layout="constrained")
  all_axes = figure.subplots(1, len(by_unit), squeeze=False)[0]
  for axes, (unit, lines) in zip(all_axes, by_unit.items(), strict=True):
    _draw_lines(axes, lines, models)
    # Lines are as far apart in all axes, and begin at the top.
    axes.set_ylim(most - 0.5, -0.5)
    axes.set_xlabel(f"{unit}, 95 % intervals".removeprefix(", "))
  # A unit may have no chance, and a model no metric of it: the legend is that of all axes.
  handles = {}
  for axes in all_axes:
    of_axes, labels = axes.get_legend_handles_labels()
    handles |= dict(zip(labels, of_axes, strict=True))
  figure.legend(handles.values(), handles, loc="outside lower center", ncols=3, fontsize="small")
  figure.suptitle(_title(cells), fontsize="medium")
  return figure


def _lines_by_unit(cells: Sequence[dict]) -> dict[str, list[Line]]:
  """The metrics of a task by unit. A protocol is in the label where there are several."""
  protocols = {(cell["identity"]["protocol"], cell["identity"]["shots"]) for cell in cells}
  lines: dict[tuple[str, str], dict[str, dict]] = {}
  for cell in cells:
    identity = cell["identity"]
    task = tasks.get(identity["task"], identity["protocol"])
    prefix = f"{identity['protocol']}: " if len(protocols) > 1 else ""
    shots = f" ({identity['shots']} shots)" if identity["shots"] else ""
    for name, score in cell["metrics"].items():
      label = f"{prefix}{name.replace('_', ' ')}{shots} {'↑' if score['higher'] else '↓'}"
      scores = lines.setdefault((score["unit"], label), {})
      scores[identity["model"]] = score | {"chance": task.chance.get(name)}

  by_unit: dict[str, list[Line]] = {}
  for (unit, label), scores in lines.items():
    by_unit.setdefault(unit, []).append((label, scores))
  return by_unit


def _draw_lines(axes: "Axes", lines: Sequence[Line], models: Sequence[str]) -> None:
  """Draws the first line at the top; models are below one another within it."""
  # 1. Chance, a mark for each line that has one.
  chances = []
  for i, (_, scores) in enumerate(lines):
    chance = next(iter(scores.values()))["chance"]
    chances += [] if chance is None else [(chance, i)]
  if chances:
    style = {"marker": "|", "markersize": 16, "color": "0.4", "linestyle": "none"}
    axes.plot(*zip(*chances, strict=True), label="chance", **style)

  # 2. The models.
  for number, model in enumerate(models):
    shift = 0.7 * ((number + 0.5) / len(models) - 0.5)
    points = []
    for i, (_, scores) in enumerate(lines):
      score = scores.get(model)
      if score is not None and score["value"] is not None:
        points.append((score["value"], i + shift, *interval_lengths(score)))
    x, y, low, high = zip(*points, strict=True) if points else ((),) * 4
    style = {"color": f"C{number % COLORS}", "marker": MARKERS[number % len(MARKERS)]}
    label = summarize([model], each=NAME_LENGTH)
    axes.errorbar(x, y, xerr=(low, high), linestyle="none", label=label, markersize=4, **style)

  axes.set_yticks(range(len(lines)), [label for label, _ in lines], fontsize="small")
  axes.grid(alpha=0.25, axis="x")


def _title(cells: Sequence[dict]) -> str:
  """The task, and of how many items a limit left some."""
  counts = {(cell["items"], cell["of"]) for cell in cells}
  title = cells[0]["identity"]["task"]
  if any(items < of for items, of in counts):
    items, of = max(counts)
    title += f", the first {items:,} of {of:,} items"
  return title
