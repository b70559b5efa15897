# SPDX-License-Identifier: Apache-2.0
"""Scores of a model card: lines of a sweep's results.jsonl, as rows and as the Hub's EvalResult."""

import dataclasses
import re
from collections.abc import Iterator

from huggingface_hub import EvalResult

from gpt2_jax.evaluate.card_sources import CardSource, Row, plain
from gpt2_jax.evaluate.sweep.page import kind_of
from gpt2_jax.evaluate.sweep.plots import metric_label

# A metric's name is a part of a key, and is in a table.
METRIC = re.compile(r"[\w .:@+%=-]{1,100}")
NUMBERS = ("value", "low", "high")


@dataclasses.dataclass(frozen=True)
class CardScore:
  """The scores of a model on a task: one line of results.jsonl, which holds all of them."""

  source: CardSource
  line: str  # its number

  @classmethod
  def of(cls, source: CardSource, line: str) -> "CardScore":
    """Raises ValueError for a line that no sweep wrote."""
    score = cls(source, line)
    metrics = score.get("metrics")
    texts = [score.get(f"identity/{key}") for key in ("task", "protocol", "rows", "weights")]
    counts = [score.get(key) for key in ("items", "of", "identity/shots")]
    are_metrics = isinstance(metrics, dict) and all(map(_is_metric, metrics.items()))
    are_texts = all(isinstance(text, str) for text in texts)
    if not are_metrics or not are_texts or not all(type(count) is int for count in counts):
      raise ValueError(f"{source.place}, line {line}, is no result of gpt2-jax evaluate")
    return score

  def get(self, key: str) -> object:
    return self.source.get(f"{self.line}/{key}")

  @property
  def task(self) -> str:
    return self.get("identity/task")

  @property
  def config(self) -> str:
    return f"{self.get('identity/protocol')}:{self.get('identity/shots')}"

  @property
  def kind(self) -> str:
    return kind_of(self.task)

  def with_numbers(self) -> Iterator[tuple[str, dict]]:
    """The metrics that have a value: a perplexity may be infinite, an area undefined."""
    for name, metric in self.get("metrics").items():
      if metric["value"] is not None:
        yield name, metric

  def rows(self) -> list[Row]:
    """A row for each metric, with its interval, and what chance has, where that is known."""
    rows = []
    for name, metric in self.with_numbers():
      keys, form = ["value"], "{}"
      if metric["low"] is not None and metric["high"] is not None:
        keys, form = list(NUMBERS), "{} [{}, {}]"
      if "chance" in metric:
        keys, form = [*keys, "chance"], form + ", chance {}"
      title = f"{plain(f'{self.task}:{self.config}')}, {plain(metric_label(name, metric))}"
      rows += self.source.row(title, f"{self.line}/metrics/{name}/{{{', '.join(keys)}}}", form)
    return rows

  def data_rows(self) -> list[Row]:
    """The items that were scored of how many, their SHA-256, and the commit that scored them."""
    title = plain(f"{self.task}:{self.config}")
    rows = self.source.row(
      f"{title}, items, and the SHA-256 of all rows",
      f"{self.line}/{{items, of, identity/rows}}",
      "{} of {}, {}",
    )
    # An installed package knows no commit.
    if self.get("commit"):
      rows += self.source.row(f"{title}, commit", f"{self.line}/commit")
    return rows

  def eval_results(self) -> list[EvalResult]:
    results = []
    for name, metric in self.with_numbers():
      interval = {key: metric.get(key) for key in ("low", "high", "method")}
      numbers = {key: value for key, value in interval.items() if value is not None}
      result = EvalResult(
        task_type="text-generation",
        dataset_type=self.task,
        dataset_name=self.task,
        dataset_config=self.config,
        dataset_revision=self.get("identity/rows"),
        metric_type=name,
        metric_name=metric_label(name, metric),
        metric_value=metric["value"],
        metric_args=numbers | {"items": self.get("items"), "of": self.get("of")},
      )
      results.append(result)
    return results


def read_scores(source: CardSource, weights: str) -> list[CardScore]:
  """The scores of the model of these weights. Raises ValueError for lines that are none."""
  scores = [CardScore.of(source, line) for line in source.content]
  return [score for score in scores if score.get("identity/weights") == weights]


def _is_metric(entry: tuple[str, object]) -> bool:
  name, metric = entry
  if not METRIC.fullmatch(name) or not isinstance(metric, dict):
    return False
  numbers = [metric.get(key, "") for key in NUMBERS]
  are_numbers = all(type(x) in (int, float, type(None)) for x in numbers)
  return are_numbers and isinstance(metric.get("unit"), str) and "higher" in metric
