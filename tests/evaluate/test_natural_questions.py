# SPDX-License-Identifier: Apache-2.0
import math

import numpy as np
import pytest

from gpt2_jax.evaluate.sources import decoded
from gpt2_jax.evaluate.task import Generated
from gpt2_jax.evaluate.tasks.natural_questions import TASKS, bin_of, calibration, read

TASK, _ = TASKS
ROW = {"question": "who wrote hamlet", "answers": ["William Shakespeare", "Shakespeare"]}


def sums(text: str, probability: float = 0.5) -> dict[str, float]:
  return TASK.sums(ROW, [Generated(text, -math.log(probability), 2, False)])


def items_of(pairs) -> dict[str, np.ndarray]:
  """What items with these (confidence, correct) contribute."""
  items = [
    sums("shakespeare" if correct else "x", confidence) | {"items": 1.0}
    for confidence, correct in pairs
  ]
  return {key: np.array([item[key] for item in items]) for key in items[0]}


def test_prompt_and_example():
  [prompt] = TASK.requests(ROW)
  assert (prompt.text, prompt.stop, prompt.top_k) == ("Q: who wrote hamlet?\nA:", ("\n",), 1)
  assert TASK.requests(ROW | {"question": "who wrote hamlet ?"}) == [prompt]
  assert TASK.example(ROW) + TASK.separator == "Q: who wrote hamlet?\nA: William Shakespeare\n"


@pytest.mark.parametrize(
  ("text", "correct"),
  [(" The  shakespeare.", 1), (" william Shakespeare", 1), ("William", 0), ("", 0)],
)
def test_an_answer_is_right_if_it_is_one_of_them_normalized(text, correct):
  assert sums(text)["correct"] == correct


def test_confidence_is_the_probability_of_the_answer_and_an_empty_one_has_none():
  assert sums("x", 0.25)["confidence"] == pytest.approx(0.25)
  assert TASK.sums(ROW, [Generated(" ", 0.0, 0, False)])["confidence"] == 0


def test_bins_are_tenths():
  assert bin_of([0, 0.05, 0.1, 0.95, 1.0]).tolist() == [0, 0, 1, 9, 9]


def test_calibration_error_of_a_hand_computed_case():
  # The tenth from 0.2: confidence 0.25 on average, accuracy 0.5; the last: 0.9 and 1. (2 x 0.25 + 1
  # x 0.1) / 3.
  items = items_of([(0.22, True), (0.28, False), (0.9 + 1e-9, True)])
  totals = {key: values.sum() for key, values in items.items()}
  assert TASK.metrics["calibration_error"].value(totals) == pytest.approx(100 * 0.6 / 3)
  assert TASK.metrics["exact_match"].value(totals) == pytest.approx(200 / 3)
  bins = calibration(items)["bins"]
  assert [item["count"] for item in bins] == [0, 0, 2, 0, 0, 0, 0, 0, 0, 1]
  assert bins[2] == {"count": 2, "confidence": pytest.approx(25), "accuracy": 50}
  assert bins[0] == {"count": 0, "confidence": None, "accuracy": None}


def test_calibration_error_of_a_calibrated_model_is_small_and_of_a_boastful_one_large():
  rng = np.random.default_rng(0)
  confidence = rng.uniform(0.01, 1, 4000)
  value = TASK.metrics["calibration_error"].value
  honest = items_of(zip(confidence, rng.uniform(size=4000) < confidence, strict=True))
  boastful = items_of(zip(confidence, rng.uniform(size=4000) < confidence / 2, strict=True))
  assert value({key: values.sum() for key, values in honest.items()}) < 3
  assert value({key: values.sum() for key, values in boastful.items()}) == pytest.approx(25, abs=2)


def test_accuracy_where_the_model_is_surest():
  confidence = np.random.default_rng(0).permutation(np.linspace(0.01, 0.99, 200))
  most_confident = calibration(items_of((c, c > 0.986) for c in confidence))["most_confident"]
  assert most_confident == {"count": 2, "accuracy": 50}  # of 0.99 and 0.985
  assert calibration(items_of([(0.1, True)]))["most_confident"] == {"count": 1, "accuracy": 100}


def test_published_lines_and_tfds_give_the_same_rows(tmp_path):
  path = tmp_path / "NQ-open.dev.jsonl"
  path.write_text(
    '{"question": "who wrote hamlet", "answer": ["William Shakespeare", "Shakespeare"]}\n'
  )
  assert list(read(path)) == [ROW]
  record = {"question": b"who wrote hamlet", "answer": [b"William Shakespeare", b"Shakespeare"]}
  assert TASK.source.row(decoded(record)) == ROW


@pytest.mark.parametrize(
  "line",
  [
    '{"question": "q"}',
    '{"question": "q", "answer": []}',
    '{"question": "q", "answer": "a"}',
    '{"answer": ["a"]}',
  ],
)
def test_a_malformed_line_is_refused_with_its_number(tmp_path, line):
  path = tmp_path / "NQ-open.dev.jsonl"
  path.write_text(f'{{"question": "q", "answer": ["a"]}}\n{line}\n')
  with pytest.raises(ValueError, match=r"NQ-open.dev.jsonl:2 is malformed: "):
    list(read(path))
