# SPDX-License-Identifier: Apache-2.0
"""Natural Questions, closed book: exact match and calibration of generated answers.

Section 3.8 of the GPT-2 paper: 4.1 % at 1542M. The paper "seeds" the context with question-answer
pairs, decodes greedily and counts exact matches, as SQuAD does. It says neither which pairs nor how
many. Here they are drawn from the training questions. The protocol `paper_prompt` has five of them;
`exact_match` has as many as the sweep asks for, none by default.

The rows are the open-domain form of the set, NQ-open (Lee et al., 2019), whose 3,610 validation
questions have short answers. The paper's figure is from before it. Confidence is the probability of
the whole generated answer, as in the paper: long answers have less, and an empty answer has none.
"""

import math
import pathlib
from collections.abc import Iterator, Mapping

import numpy as np

from gpt2_jax.evaluate.metric import Metric, Sums, percent
from gpt2_jax.evaluate.sources import Download, Row, Source, json_lines, text_field, text_list
from gpt2_jax.evaluate.task import Generated, GenerateUntil, Task
from gpt2_jax.evaluate.tasks.coqa import normalized

N_NEW = 32  # an answer's most tokens; NQ-open keeps answers of up to five words
PAPER_SHOTS = 5  # pairs of paper_prompt; the paper does not say how many it took
BINS = 10  # of confidence
GAPS = tuple(f"gap{i}" for i in range(BINS))  # each bin's sum of confidence minus correctness
PUBLISHED = "https://github.com/google-research-datasets/natural-questions (nq_open)"
RAW = (
  "https://raw.githubusercontent.com/google-research-datasets/natural-questions/"
  "a7a113c9fdc2d9986d624bd43b8a18d6d5779eaa/nq_open/NQ-open.{}.jsonl"
)
# Of TFDS, with its commit of the repository.
SHA256 = {
  "dev": "f15567f38099f3615f5b8a685c0aef449c11ad90d3da3735e8d1b98115b40616",
  "train": "0c93aaf13b12f855628489665e4ef85ffb8573ad444646f11f4fabdc57a0aabf",
}

# ---- files to rows


def read(path: pathlib.Path) -> Iterator[Row]:
  """Reads the rows of the published JSON lines."""
  return json_lines(path, _row)


def _row(record: dict) -> Row:
  question = text_field(record, "question").strip()
  answers = text_list(record, "answer")
  if not answers:
    raise ValueError("its answer is an empty list, where a list of at least one should be")
  return {"question": question, "answers": answers}


# ---- rows to requests and sums


def _prompt(row: Row) -> str:
  # the published questions have no question mark
  return f"Q: {row['question'].removesuffix('?').rstrip()}?\nA:"


def _requests(row: Row) -> list[GenerateUntil]:
  return [GenerateUntil(_prompt(row), N_NEW, stop=("\n",))]


def _example(row: Row) -> str:
  return f"{_prompt(row)} {row['answers'][0].strip()}"


def _sums(row: Row, answers: list[Generated]) -> dict[str, float]:
  """Correctness, the model's confidence, and their difference in the confidence's bin."""
  [answer] = answers
  references = map(normalized, row["answers"])
  correct = float(normalized(answer.text) in references)
  confidence = math.exp(-answer.nats) if answer.text.strip() else 0.0

  gaps = dict.fromkeys(GAPS, 0.0)
  gaps[GAPS[bin_of(confidence)]] = confidence - correct
  return {"correct": correct, "confidence": confidence} | gaps


# ---- calibration


def bin_of(confidence):
  """The tenth in which a confidence lies, or an array of them; 1.0 belongs to the last."""
  return np.minimum(BINS - 1, np.floor(np.asarray(confidence) * BINS)).astype(int)


def calibration_error(sums: Sums) -> np.ndarray:
  """Expected calibration error, in per cent (Naeini et al., 2015).

  How far confidence and accuracy are apart in a bin, averaged over items.
  """
  return 100 * sum(abs(sums[gap]) for gap in GAPS) / sums["items"]


def calibration(items: Mapping[str, np.ndarray], share: float = 0.01) -> dict:
  """Accuracy of the `share` of items with the highest confidence, and a calibration table.

  `items` holds what each item contributes. The table has count, confidence and accuracy of each
  bin; shares are in per cent. Published for 1542M: 63.1 % of the most confident 1 %.
  """
  confidence_N = np.asarray(items["confidence"])
  correct_N = np.asarray(items["correct"])

  # 1. The most confident items; of those that tie the first.
  count = math.ceil(share * len(confidence_N))
  most_confident = np.argsort(-confidence_N, kind="stable")[:count]
  accuracy = 100 * float(correct_N[most_confident].mean())

  # 2. The table. An empty bin has no means.
  bins = []
  for i in range(BINS):
    in_bin = bin_of(confidence_N) == i
    means = {"confidence": None, "accuracy": None}
    if in_bin.any():
      means["confidence"] = 100 * float(confidence_N[in_bin].mean())
      means["accuracy"] = 100 * float(correct_N[in_bin].mean())
    bins.append({"count": int(in_bin.sum())} | means)

  return {"most_confident": {"count": len(most_confident), "accuracy": accuracy}, "bins": bins}


# ---- the task


def _source(split: str, tfds_split: str, examples: Source | None = None) -> Source:
  return Source(
    name="natural_questions",
    files=(f"NQ-open.{split}.jsonl",),
    read=read,
    url=PUBLISHED,
    tfds="natural_questions_open",
    split=tfds_split,
    row=_row,
    examples=examples,
    downloads=(Download(RAW.format(split), SHA256[split]),),
  )


def _task(protocol: str, prompt: str, shots: int = 0) -> Task:
  return Task(
    name="natural_questions",
    protocol=protocol,
    description="exact match (SQuAD's normalization) of the greedy line after "
    f"{prompt}Q: and A:, NQ-open (paper, 3.8)",
    source=_source("dev", "validation", examples=_source("train", "train")),
    requests=_requests,
    sums=_sums,
    metrics={
      "exact_match": percent("correct"),
      "calibration_error": Metric(calibration_error, ("items", *GAPS), higher=False, unit="%"),
    },
    example=_example,
    separator="\n",
    shots=shots,
  )


TASKS = (
  _task("exact_match", ""),
  _task("paper_prompt", f"{PAPER_SHOTS} pairs (count not published), ", PAPER_SHOTS),
)
