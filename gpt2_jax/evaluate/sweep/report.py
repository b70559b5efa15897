# SPDX-License-Identifier: Apache-2.0
"""Report of a sweep: JSON lines, a Markdown table with the GPT-2 paper's figures, and plots.

Nothing here depends on when or how fast a cell was computed: the same scores are the same bytes.
"""

import json
import math
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from ml_collections import ConfigDict

from gpt2_jax.evaluate import tasks
from gpt2_jax.evaluate.sweep import bootstrap
from gpt2_jax.evaluate.sweep.bootstrap import Difference
from gpt2_jax.evaluate.sweep.cells import PLOTS, RESULTS, TABLE, Outcome, Sweep
from gpt2_jax.evaluate.sweep.paper import paper, paper_references, paper_scores
from gpt2_jax.evaluate.sweep.plots import draw, metric_label
from gpt2_jax.evaluate.task import Task
from gpt2_jax.evaluate.tasks import natural_questions
from gpt2_jax.files import atomic_write, local_path, summarize

NONE = "–"
SAME_ITEMS = ("task", "protocol", "shots", "rows", "limit")  # of two identities that pair

# A cell is the content of its file. Cells by model are those of one row of the table: of one task,
# protocol and number of shots.
CellsByModel = Mapping[str, dict]


def write(
  outcome: Outcome, out: str, config: ConfigDict, overlaps: Sequence[dict] = ()
) -> tuple[str, list[str]]:
  """Writes `out`/results.jsonl, table.md and plots/; returns the table, and the names of the plots.

  `overlaps` are what contamination.read_overlap reads: clean and seen items then have scores of
  their own. An overlap that fits no cell is a line of the table.
  """
  # 1. The table. A section without lines is left out.
  sections = [
    _heading(config, outcome.cells),
    _score_table(outcome.cells),
    _reference_lines(outcome.cells),
    _difference_table(outcome.cells, config),
  ]
  if overlaps:
    sections.append(_contamination_table(outcome.cells, overlaps, config))
  if outcome.failed or outcome.missing:
    sections.append(_cells_without_score(outcome))
  table = "\n".join("\n".join(lines) + "\n" for lines in sections if lines)

  # 2. The files. JSON has no NaN: what is no number must be null by now.
  folder = local_path(out)
  results = [json.dumps(_result(cell), allow_nan=False) + "\n" for cell in outcome.cells]
  for name, text in ((RESULTS, "".join(results)), (TABLE, table)):
    # Those of the sweep before are kept until these are whole.
    with atomic_write(folder / name, overwrite=True) as partial:
      partial.write_text(text, encoding="utf-8")
  return table, draw(_by_task(outcome.cells), folder / PLOTS)


def task_listing(listed: Mapping[str, Mapping[str, Task]]) -> str:
  """Lists tasks for --list: each protocol, its metrics and description, and where the data are."""
  lines = []
  for protocols in listed.values():
    for task in protocols.values():
      lines.append(f"{task.name}:{task.protocol}  ({', '.join(task.metrics)})")
      lines.append(f"    {task.description}")

    # protocols may share a source
    for source in dict.fromkeys(task.source for task in protocols.values()):
      files = summarize(source.files, 2)
      fetched = " (--download)" if source.downloads else ""
      tfds = f"; or TFDS {source.tfds}, {source.split}" if source.tfds else ""
      lines.append(f"    data: {source.name}/ with {files} from {source.url}{fetched}{tfds}")
  return "\n".join(lines)


# ---- the paper's figures


def drift(score: dict, reference: float) -> float | None:
  """How far a score is from a reference, in half widths of its interval.

  None if the interval has no width.
  """
  value, low, high = score["value"], score["low"], score["high"]
  if None in (value, low, high) or high == low:
    return None
  return (value - reference) / ((high - low) / 2)


def _paper_score(cell: dict, metric: str) -> float | None:
  """The paper's score of a model of the cell's size."""
  return paper_scores(cell["identity"], metric).get(cell["size"])


# ---- results.jsonl


def _result(cell: dict) -> dict:
  """A line of results.jsonl: all but what the items contributed."""
  result = {key: value for key, value in cell.items() if key not in ("sums", "metrics")}

  result["metrics"] = {}
  for name, score in cell["metrics"].items():
    reference = _paper_score(cell, name)
    if reference is not None:
      score = score | {"paper": reference, "drift": drift(score, reference)}
    chance = _task(cell).chance.get(name)
    if chance is not None:
      score = score | {"chance": chance}
    references = paper_references(cell["identity"], name)
    if references:
      score = score | {"references": references}
    result["metrics"][name] = score

  # Natural Questions alone has a confidence.
  if "confidence" in cell["sums"]:
    result["calibration"] = natural_questions.calibration(cell["sums"])
  return result


# ---- the table of scores


def _heading(config: ConfigDict, cells: Sequence[dict]) -> list[str]:
  items = "All items."
  # A limit within which all items are is none.
  if config.limit and any(cell["items"] < cell["of"] for cell in cells):
    items = f"**The first {config.limit:,} items of each task, and no others.**"
  stride = config.stride or "the whole context"
  return [
    "# Scores",
    "",
    f"{items} {config.dtype}, seed {config.seed}, windows over long texts slide by {stride}. In "
    f"brackets 95 % intervals, a bootstrap over items with {config.resamples:,} resamples: "
    "bias-corrected and accelerated (BCa), or percentiles where a † stands. Paper: "
    f"{paper()['source']}, for models of its four sizes whatever their weights; drift: score minus "
    "paper, in half widths of the interval. Truncated: items whose context was cut to fit. An "
    "interval without width says only that all items are alike.",
  ]


def _score_table(cells: Sequence[dict]) -> list[str]:
  """A row for each metric of each task, a column for each model.

  Models of the paper's sizes have two more: the paper's score, and the drift.
  """
  # 1. The columns.
  models = _models(cells)
  in_paper = set()
  for cell in cells:
    if any(_paper_score(cell, metric) for metric in cell["metrics"]):
      in_paper.add(_model_name(cell))
  columns = ["task", "metric", "items", "truncated"]
  for name, size in models.items():
    columns.append(name)
    if name in in_paper:
      columns += [f"paper {size}", "drift"]

  # 2. The rows. All metrics of a task are of the same items.
  rows = []
  for task_name, by_model in _by_task(cells).items():
    items = _shared(map(_item_count, by_model.values()))
    truncated = _shared(f"{cell['truncated']:,}" for cell in by_model.values())
    for metric, score in _metrics(by_model).items():
      row = [task_name, metric_label(metric, score), items, truncated]
      for name in models:
        row += _entries(by_model.get(name), metric, name in in_paper)
      rows.append(row)

  # a table of no rows would be a heading alone
  return _markdown(columns, rows) if rows else []


def _entries(cell: dict | None, metric: str, in_paper: bool) -> list[str]:
  """A model's entries in a row: the score, and if it is of a size in the paper two more."""
  if cell is None:
    return [NONE] * (3 if in_paper else 1)

  score = cell["metrics"][metric]
  if not in_paper:
    return [_interval(score)]

  reference = _paper_score(cell, metric)
  distance = None if reference is None else drift(score, reference)
  shown_distance = NONE if distance is None else f"{distance:+.1f}"
  return [_interval(score), _number(reference), shown_distance]


def _reference_lines(cells: Sequence[dict]) -> list[str]:
  """The paper's scores of methods that are no language model, a line for each metric."""
  lines = []
  for task_name, by_model in _by_task(cells).items():
    identity = next(iter(by_model.values()))["identity"]
    for metric, score in _metrics(by_model).items():
      references = paper_references(identity, metric)
      if references:
        shown = ", ".join(f"{name} {_number(value)}" for name, value in references.items())
        lines.append(f"- {task_name}, {metric_label(metric, score)}: {shown}")
  if not lines:
    return []
  return [f"## Reference lines ({paper()['source']})", "", *lines]


# ---- the table of differences


def compare_cells(a: dict, b: dict, resamples: int, seed: int) -> dict[str, Difference]:
  """Each metric of a cell minus that of another, paired by item.

  Raises ValueError unless both are of the same items.
  """
  for key in SAME_ITEMS:
    of_a, of_b = a["identity"][key], b["identity"][key]
    if of_a != of_b:
      raise ValueError(f"cells of other items do not pair: {key} {of_a} and {of_b}")
  return bootstrap.paired_differences(_task(a).metrics, a["sums"], b["sums"], resamples, seed)


def _difference_table(cells: Sequence[dict], config: ConfigDict) -> list[str]:
  """Each model minus the one before it, on the same items."""
  models = list(_models(cells))
  neighbors = list(zip(models, models[1:], strict=False))

  # All metrics of a pair come from the same resamples, so that a pair is compared once.
  rows = []
  for task_name, by_model in _by_task(cells).items():
    differences = []
    for first, second in neighbors:
      if first in by_model and second in by_model:
        pair = compare_cells(by_model[second], by_model[first], config.resamples, config.seed)
      else:
        pair = {}
      differences.append(pair)
    # a task on which no two neighbors were scored
    if not any(differences):
      continue

    for metric, score in _metrics(by_model).items():
      entries = [_difference(pair.get(metric)) for pair in differences]
      rows.append([task_name, metric_label(metric, score), *entries])

  if not rows:
    return []
  columns = ["task", "metric"]
  columns += [f"{second} − {first}" for first, second in neighbors]
  return ["## Differences on the same items", "", *_markdown(columns, rows)]


# ---- the table of clean and seen items


def _contamination_table(
  cells: Sequence[dict], overlaps: Sequence[dict], config: ConfigDict
) -> list[str]:
  """Scores of the items that the training corpus does not hold, and of those that it does."""
  models = list(_models(cells))
  rows, unused = [], []
  for overlap in overlaps:
    fitting = [cell for cell in cells if _fits(overlap, cell)]
    if not fitting:
      unused.append(
        f"- An overlap of {overlap['task']} fits no score here: it is of another task or of other "
        "rows."
      )
    for task_name, by_model in _by_task(fitting).items():
      rows += _contamination_rows(task_name, by_model, overlap, models, config)

  # The rule in words, so that a reader of the table alone knows what a seen item is.
  lines = [
    "## Clean and seen items",
    "",
    f"An item is seen if more than {config.seen_above:g} of its n-grams are in the corpus, and "
    "clean otherwise; one too short for an n-gram is clean.",
    "",
  ]
  if rows:
    lines += _markdown(["task", "metric", "part", "items", *models], rows)
  return lines + unused


def check_overlaps(overlaps: Sequence[dict], sweep: Sweep) -> None:
  """Raises ValueError, before anything is computed, for an overlap that fits no task of a sweep."""
  known = []
  for cell in sweep.cells[0]:
    rows = sweep.datasets[cell.task.rows_source]
    known.append({"identity": cell.identity, "of": len(rows)})

  for overlap in overlaps:
    if not any(_fits(overlap, cell) for cell in known):
      raise ValueError(
        f"an overlap of {overlap['task'][:80]} with {len(overlap['ngrams']):,} items fits no task "
        "here: it is of another task or of other rows; measure it again, or leave it out"
      )


def _fits(overlap: dict, cell: dict) -> bool:
  """Whether an overlap is of the very rows that a cell is of."""
  identity = cell["identity"]
  same_task = overlap["task"] == identity["task"]
  same_rows = overlap["fingerprint"] == identity["rows"]
  return same_task and same_rows and len(overlap["ngrams"]) == cell["of"]


def _contamination_rows(
  task_name: str, by_model: CellsByModel, overlap: dict, models: list[str], config: ConfigDict
) -> list[list[str]]:
  # 1. The items that were scored: a limit takes the first rows only.
  n = next(iter(by_model.values()))["items"]
  ngrams = np.asarray(overlap["ngrams"][:n])
  in_corpus = np.asarray(overlap["found"][:n])
  seen = in_corpus > config.seen_above * ngrams

  # 2. Scores of each part. A part without items has none.
  rows = []
  for part, mask in (("clean", ~seen), ("seen", seen)):
    count = int(mask.sum())
    scores = {}
    if count:
      scores = {name: _subset_scores(cell, mask, config) for name, cell in by_model.items()}

    for metric, score in _metrics(by_model).items():
      row = [task_name, metric_label(metric, score), part, f"{count:,}"]
      for name in models:
        row.append(_interval(scores[name][metric]) if name in scores else NONE)
      rows.append(row)
  return rows


def _subset_scores(cell: dict, mask: np.ndarray, config: ConfigDict) -> dict[str, dict]:
  """Each metric of some of a cell's items."""
  sums = {key: values[mask] for key, values in cell["sums"].items()}
  scores = bootstrap.intervals(_task(cell).metrics, sums, config.resamples, config.seed)
  return {name: interval._asdict() for name, interval in scores.items()}


# ---- the list of cells without a score


def _cells_without_score(outcome: Outcome) -> list[str]:
  lines = ["## Without a score", ""]
  for name, text in outcome.missing.items():
    lines.append(f"- {name}: not run: {text}")
  for name, text in outcome.failed.items():
    lines.append(f"- {name}: failed: {text}")
  return lines


# ---- what a cell is of


def _by_task(cells: Iterable[dict]) -> dict[str, dict[str, dict]]:
  """The cells by task, protocol and number of shots, and then by model."""
  rows = {}
  for cell in cells:
    task_name = "{task}:{protocol}:{shots}".format(**cell["identity"])
    rows.setdefault(task_name, {})[_model_name(cell)] = cell
  return rows


def _models(cells: Iterable[dict]) -> dict[str, str | None]:
  """The models in their order, with the paper's name of their size."""
  return {_model_name(cell): cell["size"] for cell in cells}


def _model_name(cell: dict) -> str:
  return cell["identity"]["model"]


def _task(cell: dict) -> Task:
  return tasks.get(cell["identity"]["task"], cell["identity"]["protocol"])


def _metrics(by_model: CellsByModel) -> dict[str, dict]:
  """The metrics, with units: any model's, as all cells of a task have the same."""
  return next(iter(by_model.values()))["metrics"]


# ---- how things are written


def _item_count(cell: dict) -> str:
  if cell["items"] < cell["of"]:
    return f"{cell['items']:,} of {cell['of']:,}"
  return f"{cell['items']:,}"


def _shared(values: Iterable[str]) -> str:
  """One value if all models share it, otherwise all of them."""
  values = list(values)
  return values[0] if len(set(values)) == 1 else " / ".join(values)


def _number(x: float | None) -> str:
  """About four digits."""
  if x is None or not math.isfinite(x):
    return NONE
  if abs(x) >= 10_000:
    return f"{x:,.0f}"
  if abs(x) >= 10:
    return f"{x:,.2f}"
  return f"{x:.3f}"


def _interval(score: dict) -> str:
  ends = f"[{_number(score['low'])}, {_number(score['high'])}]"
  # Where all items are alike, no method would come to other ends.
  is_percentile = score["method"] == bootstrap.PERCENTILE and score["low"] != score["high"]
  return f"{_number(score['value'])} {ends}{'†' if is_percentile else ''}"


def _difference(difference: Difference | None) -> str:
  if difference is None:
    return NONE
  # four digits of p: less is said to be less
  sign = "<" if difference.p < 1e-4 else "="
  return f"{_interval(difference._asdict())}, p {sign} {max(difference.p, 1e-4):.4f}"


def _markdown(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
  lines = []
  for row in (columns, *rows):
    # a pipe in a name would end its column
    escaped = [entry.replace("|", r"\|") for entry in row]
    lines.append("| " + " | ".join(escaped) + " |")
  return [lines[0], "|" + "---|" * len(columns), *lines[1:]]
