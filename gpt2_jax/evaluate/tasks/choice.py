# SPDX-License-Identifier: Apache-2.0
"""HellaSwag, PIQA and ARC: which of a few texts is likeliest after a context? And what such tasks have in common.

Contexts, continuations and scores are those of lm-evaluation-harness 0.4 (the folder of each task's name in
lm_eval/tasks): a space goes before each choice, the likeliest one is the answer, and the first of those that tie.
`accuracy_norm`, its acc_norm, divides each log-likelihood by the choice's characters.
"""

import dataclasses
import pathlib
import re
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from gpt2_jax.evaluate.metric import Metric, percent
from gpt2_jax.evaluate.sources import Row, Source, at_place, json_lines
from gpt2_jax.evaluate.task import Continuation, Likelihood, Task

Pair = tuple[str, str]  # a context, and what follows it after a space
ACCURACY = {"accuracy": percent("correct")}
NORMALIZED = {"accuracy_norm": percent("correct_norm")}


def chosen(answers: Sequence[Likelihood], lengths: Sequence[int] | None = None) -> int:
  """The number of the likeliest choice, or of the likeliest per unit of length; the first of those that tie."""
  nats = np.array([answer.nats for answer in answers])
  return int(np.argmin(nats if lengths is None else nats / np.array(lengths)))


def one_of(choices: Sequence[str], label: int) -> int:
  """The label, if there is such a choice. Raises ValueError."""
  if not 0 <= label < len(choices):
    raise ValueError(f"it has {len(choices)} choices, and number {label} is said to be right")
  return label


def choice(
  name: str, about: str, source: Source, pairs: Callable[[Row], list[Pair]], metrics: dict[str, Metric]
) -> Task:
  """A task whose rows have a `label`, the number of the right one of their `pairs`."""

  def requests(row: Row) -> list[Continuation]:
    asked = pairs(row)
    if not all(continuation.strip() for _, continuation in asked):
      raise ValueError("one of its choices is empty")
    return [Continuation(context, f" {continuation}") for context, continuation in asked]

  def sums(row: Row, answers: list[Likelihood]) -> dict[str, float]:
    counts = {"correct": float(chosen(answers) == row["label"])}
    if "accuracy_norm" in metrics:
      lengths = [len(continuation) for _, continuation in pairs(row)]
      counts["correct_norm"] = float(chosen(answers, lengths) == row["label"])
    return counts

  def example(row: Row) -> str:
    return " ".join(pairs(row)[row["label"]])

  return Task(name, "lm_eval", about, source, requests, sums, metrics, example)


def lines(row: Callable[[dict], Row]) -> Callable[[pathlib.Path], Iterator[Row]]:
  """A reader of JSON lines."""
  return lambda path: json_lines(path, row)


def with_training(source: Source, file: str, split: str = "train") -> Source:
  """The source with examples from its training set."""
  return dataclasses.replace(source, examples=dataclasses.replace(source, files=(file,), split=split))


# ---- HellaSwag


def _hellaswag_row(record: dict) -> Row:
  row = {key: record[key] for key in ("activity_label", "ctx_a", "ctx_b", "endings")}
  return row | {"label": one_of(row["endings"], int(record["label"]))}


def _hellaswag(row: Row) -> list[Pair]:
  context = _without_marks(f"{row['activity_label']}: {row['ctx_a']} {row['ctx_b'].capitalize()}")
  return [(context, _without_marks(ending)) for ending in row["endings"]]


def _without_marks(text: str) -> str:
  """WikiHow's part has marks in brackets: [header], [title], [step], [substeps]."""
  return re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". ")).replace("  ", " ")


# TFDS keeps only `ctx`, in which it is lost where ctx_b begins, and that gets a capital letter.
HELLASWAG = Source(
  "hellaswag",
  ("hellaswag_val.jsonl",),
  lines(_hellaswag_row),
  "https://github.com/rowanz/hellaswag/tree/master/data",
)

# ---- PIQA


def _piqa_row(record: dict) -> Row:
  row = {key: record[key] for key in ("goal", "sol1", "sol2")}
  return row | {"label": one_of((row["sol1"], row["sol2"]), int(record["label"]))}


def _read_piqa(path: pathlib.Path) -> Iterator[Row]:
  """Questions of NAME.jsonl with the labels of NAME-labels.lst, which lies beside it."""
  beside = path.with_name(f"{path.stem}-labels.lst")
  if not beside.is_file():
    raise FileNotFoundError(f"{beside} is not there, with the labels of {path}; get it from {PIQA.url}")
  questions, labels = list(json_lines(path)), beside.read_text(encoding="utf-8").split()
  if len(questions) != len(labels):
    raise ValueError(f"{path} has {len(questions):,} questions, and {beside} has {len(labels):,} labels")
  for i, (question, label) in enumerate(zip(questions, labels, strict=True)):
    yield at_place(f"{path}: question {i:,}", lambda record=question | {"label": label}: _piqa_row(record))


def _piqa(row: Row) -> list[Pair]:
  return [(f"Question: {row['goal']}\nAnswer:", row[key]) for key in ("sol1", "sol2")]


PIQA = Source(
  "piqa", ("valid.jsonl",), _read_piqa, "https://yonatanbisk.com/piqa/data", "piqa", "validation", _piqa_row
)

# ---- ARC


def _arc_row(record: dict) -> Row:
  question, choices = record["question"]["stem"], record["question"]["choices"]
  labels = [choice["label"] for choice in choices]
  label = labels.index(record["answerKey"])
  return {"question": question, "choices": [choice["text"] for choice in choices], "label": label}


def _arc_tfds_row(record: dict) -> Row:
  label = record["choices"]["label"].index(record["answerKey"])
  return {"question": record["question"], "choices": record["choices"]["text"], "label": label}


def _arc(row: Row) -> list[Pair]:
  return [(f"Question: {row['question']}\nAnswer:", choice) for choice in row["choices"]]


def _arc_source(name: str) -> Source:
  url = "https://allenai.org/data/arc"
  source = Source("arc", (f"{name}-Test.jsonl",), lines(_arc_row), url, f"ai2_arc/{name}", "test", _arc_tfds_row)
  return with_training(source, f"{name}-Train.jsonl")


TASKS = (
  choice(
    "hellaswag",
    "which of four endings follows; validation set",
    with_training(HELLASWAG, "hellaswag_train.jsonl"),
    _hellaswag,
    NORMALIZED | ACCURACY,
  ),
  choice(
    "piqa",
    "which of two solutions reaches a goal; validation set",
    with_training(PIQA, "train.jsonl"),
    _piqa,
    ACCURACY | NORMALIZED,
  ),
  choice("arc_easy", "school science questions; test set", _arc_source("ARC-Easy"), _arc, ACCURACY | NORMALIZED),
  choice(
    "arc_challenge",
    "harder school science questions; test set",
    _arc_source("ARC-Challenge"),
    _arc,
    NORMALIZED | ACCURACY,
  ),
)
