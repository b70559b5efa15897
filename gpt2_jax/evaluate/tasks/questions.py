# SPDX-License-Identifier: Apache-2.0
"""Natural Questions without their documents (section 3.8 of the GPT-2 paper; 4.1 % at 1542M).

The paper "seeds" the context with question-answer pairs, decodes greedily and counts exact matches, as SQuAD does. It
says neither which pairs nor how many: they are drawn from the training questions here, and the sweep says how many.
The rows are the open-domain form of the set, NQ-open (Lee et al., 2019), whose 3,610 validation questions have short
answers; the paper's figure is from before it. Confidence is the probability of the whole generated answer, as the paper
has it: long answers have less. An empty answer has none.
"""

import math
from collections.abc import Mapping

import numpy as np

from gpt2_jax.evaluate.metric import Metric, Sums, percent
from gpt2_jax.evaluate.sources import Row, Source, json_lines
from gpt2_jax.evaluate.task import Generated, Prompt, Task
from gpt2_jax.evaluate.tasks.coqa import normalized

N_NEW = 32  # tokens of an answer at most; NQ-open keeps answers of up to five words
BINS = 10
PUBLISHED = "https://github.com/google-research-datasets/natural-questions (nq_open)"


def read(path):
  """Rows of the published JSON lines."""
  return json_lines(path, _row)


def _row(record: dict) -> Row:
  question, answers = record["question"].strip(), record["answer"]
  if not isinstance(answers, list) or not answers:
    raise ValueError(f"its answer is {answers!r}, where a list of at least one should be")
  return {"question": question, "answers": answers}


def _question(row: Row) -> str:
  return f"Q: {row['question'].removesuffix('?').rstrip()}?\nA:"  # the published questions have no question mark


def requests(row: Row) -> list[Prompt]:
  return [Prompt(_question(row), N_NEW, stop=("\n",))]


def example(row: Row) -> str:
  return f"{_question(row)} {row['answers'][0].strip()}"


def sums(row: Row, answers: list[Generated]) -> dict[str, float]:
  """Whether the answer is right, how sure the model is, and the difference in the bin of that confidence."""
  [answer] = answers
  given = normalized(answer.text)
  correct = float(given in [normalized(wanted) for wanted in row["answers"]])
  confidence = math.exp(-answer.nats) if answer.text.strip() else 0.0
  gaps = dict.fromkeys((f"gap{i}" for i in range(BINS)), 0.0)
  gaps[f"gap{bin_of(confidence)}"] = confidence - correct
  return {"correct": correct, "confidence": confidence} | gaps


def bin_of(confidence):
  """The tenth in which a confidence lies, or an array of them; 1.0 belongs to the last."""
  return np.minimum(BINS - 1, np.floor(np.asarray(confidence) * BINS)).astype(int)


def calibration_error(sums: Sums) -> np.ndarray:
  """How far confidence and accuracy are apart in a bin, averaged over items, in per cent (Naeini et al., 2015)."""
  return 100 * sum(abs(sums[f"gap{i}"]) for i in range(BINS)) / sums["items"]


def calibration(items: Mapping[str, np.ndarray], share: float = 0.01) -> dict:
  """Accuracy of the `share` of items with the highest confidence, and count, confidence and accuracy of each bin.

  `items` holds what each item contributes. Published for 1542M: 63.1 % of the most confident 1 %. Shares in per cent.
  """
  confidence_N, correct_N = np.asarray(items["confidence"]), np.asarray(items["correct"])
  most = np.argsort(-confidence_N, kind="stable")[: math.ceil(share * len(confidence_N))]
  bins = []
  for i in range(BINS):
    of_bin = bin_of(confidence_N) == i
    means = [100 * float(values[of_bin].mean()) if of_bin.any() else None for values in (confidence_N, correct_N)]
    bins.append({"count": int(of_bin.sum()), "confidence": means[0], "accuracy": means[1]})
  return {"most_confident": {"count": len(most), "accuracy": 100 * float(correct_N[most].mean())}, "bins": bins}


TASKS = (
  Task(
    name="natural_questions",
    protocol="exact_match",
    about="exact match (SQuAD's normalization) of the greedy line after Q: and A:, NQ-open (paper, 3.8)",
    source=Source(
      name="natural_questions",
      files=("NQ-open.dev.jsonl",),
      read=read,
      url=PUBLISHED,
      tfds="natural_questions_open",
      split="validation",
      row=_row,
      examples=Source(
        "natural_questions", ("NQ-open.train.jsonl",), read, PUBLISHED, "natural_questions_open", "train", _row
      ),
    ),
    requests=requests,
    sums=sums,
    metrics={
      "exact_match": percent("correct"),
      "calibration_error": Metric(
        calibration_error, ("items", *(f"gap{i}" for i in range(BINS))), higher=False, unit="%"
      ),
    },
    example=example,
    separator="\n",
  ),
)
