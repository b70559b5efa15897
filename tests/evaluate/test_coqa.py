# SPDX-License-Identifier: Apache-2.0
import json

import pytest

from gpt2_jax.evaluate.sources import decoded
from gpt2_jax.evaluate.task import Generated
from gpt2_jax.evaluate.tasks.coqa import TASKS, f1, f1_of_references, normalized, read

[TASK] = TASKS


def turns(*texts: str, first: int = 1) -> list[dict]:
  return [{"input_text": text, "turn_id": turn} for turn, text in enumerate(texts, first)]


def story(**changes) -> dict:
  people = {"0": turns("white", "in a barn"), "1": turns("White cat", "barn")}
  made = {
    "story": "Cotton was a white cat.\nShe lived in a barn.",
    "questions": turns("What color?", "Where?"),
  }
  return made | {"answers": turns("white", "in the barn"), "additional_answers": people} | changes


@pytest.fixture
def published(tmp_path):
  """published(*stories): a file of them."""

  def write(*stories):
    path = tmp_path / "coqa-dev-v1.0.json"
    path.write_text(json.dumps({"version": "1.0", "data": stories}))
    return path

  return write


def answers(*texts: str) -> list[Generated]:
  return [Generated(text, 1.0, 1, False) for text in texts]


def test_each_question_follows_the_story_and_people_s_own_answers_before_it(published):
  [row] = read(published(story()))
  first, second = TASK.requests(row)
  assert first.text == "Cotton was a white cat.\nShe lived in a barn.\nQ: What color?\nA:"
  assert second.text == first.text + " white\nQ: Where?\nA:"
  assert (first.stop, first.top_k) == (("\n",), 1)
  assert TASK.example(row) == second.text + " in the barn"


@pytest.mark.parametrize(
  ("answer", "reference", "score"),
  [
    (" The White CAT!", "white cat", 1),
    ("white", "a white cat", 2 / 3),  # precision 1, recall 1/2
    ("cat cat", "cat", 2 / 3),  # the second one is wrong
    ("dog", "cat", 0),
    ("", "cat", 0),
    ("the", "a.", 1),  # nothing is left of both
    ("theatre", "atre", 0),  # articles are whole words
  ],
)
def test_f1_of_hand_computed_cases(answer, reference, score):
  assert f1(answer, reference) == pytest.approx(score)
  assert f1(reference, answer) == pytest.approx(score)


def test_normalization_is_squad_s():
  assert normalized(" An  answer-phone's\tthe BEST?") == "answerphones best"


def test_several_references_are_left_out_in_turn():
  assert f1_of_references("b", ["b"]) == 1
  assert f1_of_references("b", ["b", "c"]) == 1 / 2  # without "b" nothing is right
  assert f1_of_references("b", ["b", "b", "c"]) == 1
  assert f1_of_references("b", ["b", "c", "d", "e"]) == 3 / 4


def test_a_story_is_one_item_and_its_questions_count(published):
  [row] = read(published(story()))
  sums = TASK.sums(row, answers(" white", "barn"))
  # "in barn" twice, and "barn"
  assert sums == {"f1": pytest.approx(1 + (1 + 1 + 2 / 3) / 3), "questions": 2}
  metric = TASK.metrics["f1"]
  assert metric.value({"f1": 1.5, "questions": 2}) == 75


def test_tfds_gives_the_same_rows_with_one_answer_each(published):
  record = {
    "source": b"mctest",
    "story": story()["story"].encode(),
    "questions": [b"What color?", b"Where?"],
  }
  record["answers"] = {
    "input_text": [b"white", b"in the barn"],
    "answer_start": [1, 2],
    "answer_end": [3, 4],
  }
  [row] = read(published(story(additional_answers={})))
  assert TASK.source.row(decoded(record)) == row
  assert row["answers"] == [["white"], ["in the barn"]]


@pytest.mark.parametrize(
  "changes",
  [
    {"answers": turns("white")},
    {"answers": turns("white", "barn", first=2)},
    {"additional_answers": {"0": turns("white")}},
    {"questions": [], "answers": [], "additional_answers": {}},
    {"questions": None},
  ],
)
def test_a_malformed_story_is_refused_with_its_number(published, changes):
  path = published(story(), story(**changes))
  with pytest.raises(ValueError, match=r"coqa-dev-v1.0.json: story 1 is malformed: "):
    list(read(path))


def test_what_is_no_such_file_is_refused(tmp_path):
  path = tmp_path / "coqa-dev-v1.0.json"
  for content in ("", "[]", "{}"):
    path.write_text(content)
    with pytest.raises(ValueError, match=r"coqa-dev-v1.0.json is malformed: "):
      list(read(path))
