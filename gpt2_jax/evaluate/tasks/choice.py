# SPDX-License-Identifier: Apache-2.0
"""Multiple choice (HellaSwag, PIQA, ARC): the likeliest of a few texts after a context.

Contexts, continuations and scores are those of lm-evaluation-harness 0.4 (the folder of each task's
name in lm_eval/tasks). A space goes before each choice. The likeliest choice is the answer, and of
those that tie the first. `accuracy_norm`, the harness's acc_norm, divides each log-likelihood by
the choice's number of characters. pairs.py has more tasks of this kind.
"""

import dataclasses
import pathlib
import re
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from gpt2_jax.evaluate.metric import Metric, percent
from gpt2_jax.evaluate.sources import (
  Download,
  Row,
  Source,
  at_place,
  json_lines,
  text_field,
  text_list,
  whole_number,
)
from gpt2_jax.evaluate.task import Likelihood, Loglikelihood, Task
from gpt2_jax.files import summarize

Pair = tuple[str, str]  # a context, and what follows it after a space
ACCURACY = {"accuracy": percent("correct")}
NORMALIZED = {"accuracy_norm": percent("correct_norm")}


# ---- what tasks of this kind share


def likeliest_choice(answers: Sequence[Likelihood], lengths: Sequence[int] | None = None) -> int:
  """Index of the likeliest choice, by its log-likelihood or by that per unit of length.

  The first of those that tie, as np.argmax in the harness.
  """
  nats = np.array([answer.nats for answer in answers])
  if lengths is not None:
    nats = nats / np.array(lengths)
  return int(np.argmin(nats))


def shortest_choice(answers: Sequence[Likelihood], label: int) -> float:
  """Length predictor: 1 if choice `label` has the fewest tokens, and of those that tie its share.

  Random weights find each token about as likely as any other, and so prefer fewer of them.
  """
  tokens = [answer.tokens for answer in answers]
  fewest = min(tokens)
  return float(tokens[label] == fewest) / tokens.count(fewest)


def checked_label(choices: Sequence[str], label: int) -> int:
  """The label, if there is such a choice. Raises ValueError."""
  if not 0 <= label < len(choices):
    raise ValueError(f"it has {len(choices)} choices, and number {label} is said to be right")
  return label


def choice_task(
  name: str,
  description: str,
  source: Source,
  pairs: Callable[[Row], list[Pair]],
  metrics: dict[str, Metric],
  n_choices: int = 2,
) -> Task:
  """A multiple-choice task; a row's `label` is the number of the right one of its `pairs`.

  `n_choices` is what guessing is measured by; a few rows may have more or fewer.
  """

  def requests(row: Row) -> list[Loglikelihood]:
    choices = pairs(row)
    # Of an empty choice only the space would be scored, and often win.
    if not all(continuation.strip() for _, continuation in choices):
      raise ValueError("one of its choices is empty")
    return [Loglikelihood(context, f" {continuation}") for context, continuation in choices]

  def sums(row: Row, answers: list[Likelihood]) -> dict[str, float]:
    label = row["label"]
    counts = {"correct": float(likeliest_choice(answers) == label)}

    if "accuracy_norm" in metrics:
      # the harness counts characters, without the space before them
      lengths = [len(continuation) for _, continuation in pairs(row)]
      counts["correct_norm"] = float(likeliest_choice(answers, lengths) == label)
    return counts

  def example(row: Row) -> str:
    return " ".join(pairs(row)[row["label"]])

  chance = dict.fromkeys(metrics, 100 / n_choices)
  return Task(name, "lm_eval", description, source, requests, sums, metrics, example, chance=chance)


def json_lines_reader(row: Callable[[dict], Row]) -> Callable[[pathlib.Path], Iterator[Row]]:
  """A reader of JSON lines that makes each record a row."""
  return lambda path: json_lines(path, row)


def with_training(
  source: Source, file: str, split: str = "train", download: Download | None = None
) -> Source:
  """The source with few-shot examples from its training set, which `download` fetches."""
  downloads = (download,) if download else ()
  training = dataclasses.replace(
    source, files=(file,), split=split, downloads=downloads, alternatives=()
  )
  return dataclasses.replace(source, examples=training)


# ---- HellaSwag


def _hellaswag_row(record: dict) -> Row:
  row = {key: text_field(record, key) for key in ("activity_label", "ctx_a", "ctx_b")}
  row["endings"] = text_list(record, "endings")
  return row | {"label": checked_label(row["endings"], whole_number(record, "label"))}


def _hellaswag_pairs(row: Row) -> list[Pair]:
  context = _without_marks(f"{row['activity_label']}: {row['ctx_a']} {row['ctx_b'].capitalize()}")
  return [(context, _without_marks(ending)) for ending in row["endings"]]


def _without_marks(text: str) -> str:
  """Without the marks of WikiHow's part: [header], [title], [step], [substeps]."""
  text = text.strip().replace(" [title]", ". ")
  return re.sub(r"\[.*?\]", "", text).replace("  ", " ")


# All SHA-256 in this file are TFDS's.
HELLASWAG_RAW = "https://raw.githubusercontent.com/rowanz/hellaswag/master/data"

# Not from TFDS: it keeps only `ctx`, which does not say where ctx_b begins, and the harness gives
# ctx_b a capital letter.
HELLASWAG = Source(
  name="hellaswag",
  files=("hellaswag_val.jsonl",),
  read=json_lines_reader(_hellaswag_row),
  url="https://github.com/rowanz/hellaswag/tree/master/data",
  downloads=(
    Download(
      f"{HELLASWAG_RAW}/hellaswag_val.jsonl",
      "0aa3b88843990f3f10a97b9575c94d7b71fb2205240ba04ae4884d9e9c992588",
    ),
  ),
)
HELLASWAG_TRAINING = Download(
  f"{HELLASWAG_RAW}/hellaswag_train.jsonl",
  "dae5e69249868cb9fe4e23ff925c60b66169564cfb7072d793cd7356a2b69f8d",
)

# ---- PIQA


def _piqa_row(record: dict) -> Row:
  row = {key: text_field(record, key) for key in ("goal", "sol1", "sol2")}
  label = whole_number(record, "label")
  return row | {"label": checked_label((row["sol1"], row["sol2"]), label)}


def _read_piqa(path: pathlib.Path) -> Iterator[Row]:
  """Reads the questions of NAME.jsonl, with the labels of NAME-labels.lst in the same folder."""
  labels_path = path.with_name(f"{path.stem}-labels.lst")
  if not labels_path.is_file():
    raise FileNotFoundError(
      f"{labels_path} is not there, with the labels of {path}; get it from {PIQA.url}"
    )

  questions = list(json_lines(path))
  labels = labels_path.read_text(encoding="utf-8").split()
  if len(questions) != len(labels):
    raise ValueError(
      f"{path} has {len(questions):,} questions, and {labels_path} has {len(labels):,} labels"
    )

  for i, (question, label) in enumerate(zip(questions, labels, strict=True)):
    record = question | {"label": label}
    yield at_place(f"{path}: question {i:,}", lambda record=record: _piqa_row(record))


def _piqa_pairs(row: Row) -> list[Pair]:
  context = f"Question: {row['goal']}\nAnswer:"
  return [(context, row["sol1"]), (context, row["sol2"])]


PIQA_ARCHIVE = Download(
  "https://storage.googleapis.com/ai2-mosaic/public/physicaliqa/physicaliqa-train-dev.zip",
  "54d32a04f59a7e354396f321723c8d7ec35cc6b08506563d8d1ffcc15ce98ddd",
)


def _piqa_download(split: str) -> Download:
  folder = "physicaliqa-train-dev"
  members = (f"{folder}/{split}.jsonl", f"{folder}/{split}-labels.lst")
  return dataclasses.replace(PIQA_ARCHIVE, members=members)


PIQA = Source(
  name="piqa",
  files=("valid.jsonl",),
  alternatives=("dev.jsonl",),
  read=_read_piqa,
  url="https://yonatanbisk.com/piqa/data",
  tfds="piqa",
  split="validation",
  row=_piqa_row,
  downloads=(_piqa_download("dev"),),
)

# ---- ARC


def _arc_row(record: dict) -> Row:
  question = record["question"]
  # labels are A to E, or 1 to 5
  labels = [text_field(choice, "label") for choice in question["choices"]]
  texts = [text_field(choice, "text") for choice in question["choices"]]
  label = _index(labels, text_field(record, "answerKey"))
  return {"question": text_field(question, "stem"), "choices": texts, "label": label}


def _arc_tfds_row(record: dict) -> Row:
  choices = record["choices"]
  texts = text_list(choices, "text")
  # TFDS has numbers in place of the letters.
  label = checked_label(texts, _index(list(choices["label"]), record["answerKey"]))
  return {"question": text_field(record, "question"), "choices": texts, "label": label}


def _index(labels: list, answer: object) -> int:
  if answer not in labels:
    raise ValueError(f"its answer {str(answer)[:80]!r} is none of {summarize(labels, each=20)}")
  return labels.index(answer)


def _arc_pairs(row: Row) -> list[Pair]:
  context = f"Question: {row['question']}\nAnswer:"
  return [(context, choice) for choice in row["choices"]]


def _arc_download(name: str, split: str) -> Download:
  # 681 MB: the archive has a corpus of texts besides the questions.
  return Download(
    "https://ai2-public-datasets.s3-us-west-2.amazonaws.com/arc/ARC-V1-Feb2018.zip",
    "6d2d5ab50b2ceec6ba5f79c921be77cf2de712ea25a2b3f4fff3acc101cecfa0",
    (f"{name}/{name}-{split}.jsonl",),
  )


def _arc_source(name: str) -> Source:
  source = Source(
    name="arc",
    files=(f"{name}-Test.jsonl",),
    read=json_lines_reader(_arc_row),
    url="https://allenai.org/data/arc",
    tfds=f"ai2_arc/{name}",
    split="test",
    row=_arc_tfds_row,
    downloads=(_arc_download(name, "Test"),),
  )
  return with_training(source, f"{name}-Train.jsonl", download=_arc_download(name, "Train"))


# ---- the tasks; the metric that the harness's users report comes first

TASKS = (
  choice_task(
    "hellaswag",
    "which of four endings follows; validation set",
    with_training(HELLASWAG, "hellaswag_train.jsonl", download=HELLASWAG_TRAINING),
    _hellaswag_pairs,
    NORMALIZED | ACCURACY,
    n_choices=4,
  ),
  choice_task(
    "piqa",
    "which of two solutions reaches a goal; validation set",
    with_training(PIQA, "train.jsonl", download=_piqa_download("train")),
    _piqa_pairs,
    ACCURACY | NORMALIZED,
  ),
  choice_task(
    "arc_easy",
    "school science questions; test set",
    _arc_source("ARC-Easy"),
    _arc_pairs,
    ACCURACY | NORMALIZED,
    n_choices=4,
  ),
  choice_task(
    "arc_challenge",
    "harder school science questions; test set",
    _arc_source("ARC-Challenge"),
    _arc_pairs,
    NORMALIZED | ACCURACY,
    n_choices=4,
  ),
)
