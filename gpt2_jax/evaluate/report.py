# SPDX-License-Identifier: Apache-2.0
"""Finished cells to JSON lines, one Markdown table beside the paper's figures, and plots.

Nothing here depends on when or how fast a cell was computed: the same scores are the same bytes.
"""

import functools
import json
import math
import pathlib
import re
from collections.abc import Iterable, Mapping, Sequence

import matplotlib.figure
import numpy as np
from ml_collections import ConfigDict

from gpt2_jax.convert.names import shapes
from gpt2_jax.evaluate import bootstrap, tasks
from gpt2_jax.evaluate.bootstrap import Difference
from gpt2_jax.evaluate.sweep import Outcome
from gpt2_jax.evaluate.task import Task
from gpt2_jax.evaluate.tasks import questions
from gpt2_jax.model import SIZES

NONE = "–"


def write(outcome: Outcome, out: str, config: ConfigDict, overlaps: Sequence[dict] = ()) -> str:
  """Writes `out`/results.jsonl, table.md and plots/, and returns the table.

  `overlaps` are what contamination.read_overlap reads: scores of clean and seen items apart; one that fits no cell is
  a line of the table.
  """
  folder = pathlib.Path(out).expanduser()
  parts = [_heading(config), _scores(outcome.cells), _pairs(outcome.cells, config)]
  parts += [_split(outcome.cells, overlaps, config)] if overlaps else []
  parts += [_without(outcome)] if outcome.failed or outcome.missing else []
  table = "\n".join("\n".join(lines) + "\n" for lines in parts if lines)
  lines = [json.dumps(_result(cell), allow_nan=False) + "\n" for cell in outcome.cells]
  (folder / "results.jsonl").write_text("".join(lines), encoding="utf-8")
  (folder / "table.md").write_text(table, encoding="utf-8")
  _plots(outcome.cells, folder / "plots")
  return table


def listing(found: Mapping[str, Mapping[str, Task]]) -> str:
  """What can be asked for: each task's protocols, what they score, the metrics, and where the data come from."""
  lines = []
  for protocols in found.values():
    for task in protocols.values():
      lines += [f"{task.name}:{task.protocol}  ({', '.join(task.metrics)})", f"    {task.about}"]
    for source in dict.fromkeys(task.source for task in protocols.values()):
      tfds = f"; or TFDS {source.tfds}, {source.split}" if source.tfds else ""
      lines.append(f"    data: {source.name}/ with {', '.join(source.files)} from {source.url}{tfds}")
  return "\n".join(lines)


# ---- the paper's figures


@functools.cache
def paper() -> dict:
  """The figures of Radford et al. 2019: for each the task, the metric, where it stands and the score of each size."""
  return json.loads(pathlib.Path(__file__).with_name("paper.json").read_text(encoding="utf-8"))


def figure(task: str, protocol: str, metric: str) -> dict[str, float]:
  """The paper's scores by size; none where it has no such figure, or came to it by another protocol."""
  for one in paper()["figures"]:
    if (one["task"], one["metric"]) == (task, metric) and protocol in one.get("protocols", [protocol]):
      return one["sizes"]
  return {}


def drift(found: dict, reference: float) -> float | None:
  """How far a score is from a reference, in half widths of its interval; None where that has no width."""
  if None in (found["value"], found["low"], found["high"]) or found["high"] == found["low"]:
    return None
  return (found["value"] - reference) / ((found["high"] - found["low"]) / 2)


def _reference(cell: dict, metric: str) -> float | None:
  return figure(cell["identity"]["task"], cell["identity"]["protocol"], metric).get(cell["size"])


def _result(cell: dict) -> dict:
  """A line of results.jsonl: all but what the items contributed."""
  found = {key: value for key, value in cell.items() if key not in ("sums", "metrics")}
  metrics = {}
  for name, one in cell["metrics"].items():
    reference = _reference(cell, name)
    metrics[name] = one if reference is None else one | {"paper": reference, "drift": drift(one, reference)}
  told = {"calibration": questions.calibration(cell["sums"])} if "confidence" in cell["sums"] else {}
  return found | {"metrics": metrics} | told


# ---- the table


def _heading(config: ConfigDict) -> list[str]:
  items = f"The first {config.limit:,} items of each task." if config.limit else "All items."
  stride = f"windows over long texts slide by {config.stride or 'the whole context'}"
  return [
    "# Zero-shot scores",
    "",
    f"{items} {config.dtype}, seed {config.seed}, {stride}. In brackets 95 % intervals, a bootstrap over items with "
    f"{config.resamples:,} resamples. Paper: {paper()['source']}, for models of its four sizes whatever their weights; "
    "drift: score minus paper, in half widths of the interval. Truncated: items whose context was cut to fit. An "
    "interval without width says only that all items are alike.",
  ]


def _scores(cells: Sequence[dict]) -> list[str]:
  """A row for each metric of each task, a column for each model, with the paper's where it has figures of that size."""
  models = _models(cells)
  compared = {
    name for name in models for cell in cells if _of(cell) == name for m in cell["metrics"] if _reference(cell, m)
  }
  columns = ["task", "metric", "items", "truncated"]
  for name, size in models.items():
    columns += [name, f"paper {size}", "drift"] if name in compared else [name]
  rows = []
  for row, of_row in _rows(cells).items():
    for metric, one in next(iter(of_row.values()))["metrics"].items():
      line = [row, _metric(metric, one), _items(of_row), _same(f"{cell['truncated']:,}" for cell in of_row.values())]
      for name in models:
        line += _entry(of_row.get(name), metric, name in compared)
      rows.append(line)
  return _markdown(columns, rows) if rows else []


def _entry(cell: dict | None, metric: str, compared: bool) -> list[str]:
  if cell is None:
    return [NONE] * (3 if compared else 1)
  found, reference = cell["metrics"][metric], _reference(cell, metric)
  if not compared:
    return [_interval(found)]
  apart = None if reference is None else drift(found, reference)
  return [_interval(found), _number(reference), NONE if apart is None else f"{apart:+.1f}"]


def compare(a: dict, b: dict, resamples: int, seed: int) -> dict[str, Difference]:
  """Each metric of a cell minus that of another. Raises ValueError unless they are of the same items."""
  for part in ("task", "protocol", "shots", "rows", "limit"):
    if a["identity"][part] != b["identity"][part]:
      raise ValueError(f"cells of other items do not pair: {part} {a['identity'][part]} and {b['identity'][part]}")
  return bootstrap.paired(_task(a).metrics, a["sums"], b["sums"], resamples, seed)


def _pairs(cells: Sequence[dict], config: ConfigDict) -> list[str]:
  """Each model minus the one before it, on the same items."""
  models = list(_models(cells))
  neighbours = list(zip(models, models[1:], strict=False))
  rows = []
  for row, of_row in _rows(cells).items():
    found = [
      compare(of_row[b], of_row[a], config.resamples, config.seed) if a in of_row and b in of_row else {}
      for a, b in neighbours
    ]
    for metric, one in next(iter(of_row.values()))["metrics"].items() if any(found) else ():
      rows.append([row, _metric(metric, one), *(_difference(pair.get(metric)) for pair in found)])
  if not rows:
    return []
  columns = ["task", "metric", *(f"{b} − {a}" for a, b in neighbours)]
  return ["## Differences on the same items", "", *_markdown(columns, rows)]


def _split(cells: Sequence[dict], overlaps: Sequence[dict], config: ConfigDict) -> list[str]:
  """Scores of the items that the corpus does not hold, and of those of which it holds a part."""
  rows, unused = [], []
  for overlap in overlaps:
    fitting = [cell for cell in cells if _fits(overlap, cell)]
    if not fitting:
      unused.append(f"- An overlap of {overlap['task']} fits no score here: it is of another task or of other rows.")
    for row, of_row in _rows(fitting).items():
      rows += _split_rows(row, of_row, overlap, list(_models(cells)), config)
  about = (
    f"An item is seen if more than {config.seen_above:g} of its n-grams are in the corpus, and clean otherwise; "
    "one too short for an n-gram is clean."
  )
  return [
    "## Clean and seen items",
    "",
    about,
    "",
    *(_markdown(["task", "metric", "part", "items", *_models(cells)], rows) if rows else []),
    *unused,
  ]


def _fits(overlap: dict, cell: dict) -> bool:
  same = (overlap["task"], overlap["fingerprint"]) == (cell["identity"]["task"], cell["identity"]["rows"])
  return same and len(overlap["ngrams"]) == cell["of"]


def _split_rows(row: str, of_row: dict[str, dict], overlap: dict, models: list[str], config: ConfigDict) -> list:
  first = next(iter(of_row.values()))
  ngrams, found = (np.asarray(overlap[key][: first["items"]]) for key in ("ngrams", "found"))
  seen = found > config.seen_above * ngrams
  rows = []
  for part, chosen in (("clean", ~seen), ("seen", seen)):
    n = int(chosen.sum())
    scores = {name: _subset(cell, chosen, config) for name, cell in of_row.items() if n}
    for metric, one in first["metrics"].items():
      shown = [_interval(scores[name][metric]) if name in scores else NONE for name in models]
      rows.append([row, _metric(metric, one), part, f"{n:,}", *shown])
  return rows


def _subset(cell: dict, chosen: np.ndarray, config: ConfigDict) -> dict[str, dict]:
  sums = {key: values[chosen] for key, values in cell["sums"].items()}
  found = bootstrap.intervals(_task(cell).metrics, sums, config.resamples, config.seed)
  return {name: one._asdict() for name, one in found.items()}


def _without(outcome: Outcome) -> list[str]:
  lines = [f"- {name}: not run: {text}" for name, text in outcome.missing.items()]
  lines += [f"- {name}: failed: {text}" for name, text in outcome.failed.items()]
  return ["## Without a score", "", *lines]


def _rows(cells: Iterable[dict]) -> dict[str, dict[str, dict]]:
  """For each task, protocol and number of shots the cells by model."""
  rows = {}
  for cell in cells:
    rows.setdefault(_name(cell), {})[_of(cell)] = cell
  return rows


def _models(cells: Iterable[dict]) -> dict[str, str | None]:
  """The models in their order, with the paper's name of their size."""
  return {_of(cell): cell["size"] for cell in cells}


def _of(cell: dict) -> str:
  return cell["identity"]["model"]


def _name(cell: dict) -> str:
  return "{task}:{protocol}:{shots}".format(**cell["identity"])


def _task(cell: dict) -> Task:
  return tasks.get(cell["identity"]["task"], cell["identity"]["protocol"])


def _metric(name: str, one: dict) -> str:
  """Its name, its unit where that is not in the name, and which way is better."""
  spoken, unit = name.replace("_", " "), one["unit"]
  shown = unit if unit.startswith(spoken) else f"{spoken} ({unit})" if unit and unit.lower() != spoken else spoken
  return f"{shown} {'↑' if one['higher'] else '↓'}"


def _items(of_row: dict[str, dict]) -> str:
  return _same(
    f"{cell['items']:,}" + (f" of {cell['of']:,}" if cell["items"] < cell["of"] else "") for cell in of_row.values()
  )


def _same(values: Iterable[str]) -> str:
  """One value where all models share it."""
  values = list(values)
  return values[0] if len(set(values)) == 1 else " / ".join(values)


def _number(x: float | None) -> str:
  if x is None or not math.isfinite(x):
    return NONE
  return f"{x:,.0f}" if abs(x) >= 10_000 else f"{x:,.2f}" if abs(x) >= 10 else f"{x:.3f}"


def _interval(found: dict) -> str:
  return f"{_number(found['value'])} [{_number(found['low'])}, {_number(found['high'])}]"


def _difference(found: Difference | None) -> str:
  if found is None:
    return NONE
  return f"{_interval(found._asdict())}, p {'<' if found.p < 1e-4 else '='} {max(found.p, 1e-4):.4f}"


def _markdown(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
  ruled = [[text.replace("|", r"\|") for text in line] for line in (columns, *rows)]
  lines = ["| " + " | ".join(line) + " |" for line in ruled]
  return [lines[0], "|" + "---|" * len(columns), *lines[1:]]


# ---- plots


def _plots(cells: Sequence[dict], folder: pathlib.Path) -> None:
  """One PNG for each task and way to look at it: against the size of the models, against the step of a run."""
  for row, of_row in _rows(cells).items():
    metric = next(iter(next(iter(of_row.values()))["metrics"]))
    newest = {cell["run"] or name: cell for name, cell in sorted(of_row.items(), key=lambda x: x[1]["step"] or 0)}
    sized = sorted(newest.values(), key=lambda cell: cell["parameters"])
    if len({cell["parameters"] for cell in sized}) > 1:
      _plot(sized, "parameters", row, metric, folder)
    for run in dict.fromkeys(cell["run"] for cell in of_row.values() if cell["run"]):
      steps = sorted((cell for cell in of_row.values() if cell["run"] == run), key=lambda cell: cell["step"])
      if len(steps) > 1:
        _plot(steps, "step", row, metric, folder, run)


def _plot(cells: Sequence[dict], x: str, row: str, metric: str, folder: pathlib.Path, run: str = "") -> None:
  canvas = matplotlib.figure.Figure(figsize=(6, 4), layout="constrained")
  axes = canvas.subplots()
  scored = [cell for cell in cells if cell["metrics"][metric]["value"] is not None]
  found = [cell["metrics"][metric] for cell in scored]
  reach = [[_reach(one, end) for one in found] for end in ("low", "high")]
  values = [one["value"] for one in found]
  axes.errorbar([cell[x] for cell in scored], values, reach, marker="o", capsize=3, label=run or "95 % intervals")
  identity = cells[0]["identity"]
  reference = figure(identity["task"], identity["protocol"], metric)
  if reference and x == "parameters" and any(cell["size"] for cell in cells):
    sizes = [sum(map(math.prod, shapes(SIZES[name]).values())) for name in reference]
    axes.plot(sizes, list(reference.values()), "s--", mfc="none", color="0.4", label="the paper")
  if x == "parameters":
    axes.set_xscale("log")
  if cells[0]["metrics"][metric]["unit"].startswith("perplexity"):
    axes.set_yscale("log")
  axes.set(xlabel=x, ylabel=_metric(metric, cells[0]["metrics"][metric]), title=row)
  axes.legend()
  folder.mkdir(parents=True, exist_ok=True)
  name = re.sub(r"[^\w.-]+", "_", f"{row}.{x}.{run}").strip("_.")
  canvas.savefig(folder / f"{name}.png", dpi=120)


def _reach(one: dict, end: str) -> float:
  """How far an interval's end is from the score, on its side; nothing where there is no end."""
  if one[end] is None:
    return 0.0
  return max(0.0, one["value"] - one["low"] if end == "low" else one["high"] - one["value"])
