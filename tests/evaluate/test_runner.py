# SPDX-License-Identifier: Apache-2.0
import collections
import string

import numpy as np
import pytest

from gpt2_jax.decoding import complete
from gpt2_jax.evaluate import runner
from gpt2_jax.evaluate.metric import mean
from gpt2_jax.evaluate.scorers import Scorer
from gpt2_jax.evaluate.sources import Source
from gpt2_jax.evaluate.task import (
  Generated,
  GenerateUntil,
  Loglikelihood,
  NextWords,
  RollingLoglikelihood,
  Task,
)
from gpt2_jax.evaluate.tasks import coqa, natural_questions, summarization, translation
from gpt2_jax.model import ModelConfig
from gpt2_jax.tokenizer import Characters

NOWHERE = Source("toy", ("toy.txt",), lambda path: iter(()), "https://example.org")
ROWS = [{"words": "a b c", "label": "A"}, {"words": "", "label": "B"}, {"words": "d", "label": "C"}]
MANY = [{"words": f"w{i}", "label": f"L{i}"} for i in range(9)]
CHARACTERS = Characters(
  "".join(sorted("\n " + string.ascii_letters + string.digits + string.punctuation))
)
TINY = ModelConfig(
  n_vocab=CHARACTERS.vocab_size, n_ctx=384, n_embd=16, n_head=2, n_layer=1, dtype="float32"
)
GENERATION = [*coqa.TASKS, *summarization.TASKS, *translation.TASKS, *natural_questions.TASKS]
# a protocol with examples of its own asks what another asks after as many
ZERO_SHOT = [task for task in GENERATION if not task.shots]


class Echo:
  """Answers each request with its own text; what lacks an x was cut."""

  def answers(self, requests, contiguous=False):
    self.requests, self.contiguous = list(requests), contiguous
    return [
      Generated(request.text, 1.0, len(request.text), "x" not in request.text)
      for request in requests
    ]


def toy(**changes) -> Task:
  """Each word of a row is a prompt; counts what was answered."""
  fields = {
    "name": "toy",
    "protocol": "count",
    "description": "",
    "source": NOWHERE,
    "requests": lambda row: [
      GenerateUntil(f"{word}:{row['label']}", 1) for word in row["words"].split()
    ],
    "sums": lambda row, answers: {
      "texts": len(answers),
      "own": sum(row["label"] in a.text for a in answers),
    },
    "metrics": {"own": mean("own", over="texts")},
    "example": lambda row: f"{row['words']}={row['label']}",
    "separator": "; ",
  }
  return Task(**fields | changes)


def request_texts(task: Task, rows, shots: int, seed: int = 0, pool=None) -> list[str]:
  scorer = Echo()
  runner.run(task, rows, scorer, shots, seed, pool)
  return [request.text for request in scorer.requests]


def test_every_row_is_an_item_and_gets_the_answers_to_its_requests():
  scorer = Echo()
  items = runner.run(toy(), ROWS, scorer)
  assert [request.text for request in scorer.requests] == ["a:A", "b:A", "c:A", "d:C"]
  assert {key: values.tolist() for key, values in items.items()} == {
    "items": [1, 1, 1],
    "truncated": [1, 0, 1],
    "texts": [3, 0, 1],
    "own": [3, 0, 1],
  }
  assert all(values.dtype == np.float64 for values in items.values())
  assert runner.totals(items) == {"items": 3, "truncated": 2, "texts": 4, "own": 4}


def test_one_truncated_request_marks_the_item():
  rows = [{"words": "x y", "label": ""}, {"words": "x x", "label": ""}]
  assert runner.run(toy(), rows, Echo())["truncated"].tolist() == [1, 0]


def test_contiguous_is_passed_on():
  for contiguous in (True, False):
    scorer = Echo()
    runner.run(toy(contiguous=contiguous), ROWS, scorer)
    assert scorer.contiguous == contiguous


def test_examples_are_other_rows_each_once():
  for shots in (1, 4, 8):
    for i, text in enumerate(request_texts(toy(), MANY, shots)):
      *examples, own = text.split("; ")
      assert own == f"w{i}:L{i}"
      drawn = [int(example.partition("=L")[2]) for example in examples]
      assert examples == [f"w{j}=L{j}" for j in drawn]
      assert len(set(drawn)) == len(drawn) == shots and i not in drawn


def test_the_first_of_many_rows_have_the_examples_that_they_have_among_all():
  assert request_texts(toy(), MANY[:3], 4, pool=MANY) == request_texts(toy(), MANY, 4)[:3]


def test_all_requests_of_an_item_have_the_same_examples():
  first, second, third, fourth = (
    text.rpartition("; ")[0] for text in request_texts(toy(), ROWS, 2)
  )
  assert first == second == third != fourth


def test_examples_are_drawn_by_the_seed_and_the_item():
  assert (
    request_texts(toy(), MANY, 3, seed=1)
    == request_texts(toy(), MANY, 3, seed=1)
    != request_texts(toy(), MANY, 3, seed=2)
  )
  assert len({text.rpartition("; ")[0] for text in request_texts(toy(), MANY, 3)}) > 6
  drawn = collections.Counter(
    text.partition("=")[0] for seed in range(200) for text in request_texts(toy(), MANY, 1, seed)
  )
  assert (
    min(drawn.values()) > 150 and max(drawn.values()) < 250
  )  # each of 9 rows about 200 times; sigma 13


def test_examples_come_from_the_pool_where_there_is_one():
  pool = [{"words": "p", "label": "P"}, {"words": "q", "label": "Q"}]
  for text in request_texts(toy(), MANY, 2, pool=pool):
    assert sorted(text.split("; ")[:2]) == ["p=P", "q=Q"]
  few = request_texts(toy(), MANY, 2, pool=pool * 10)
  assert (
    request_texts(toy(), MANY[:4], 2, pool=pool * 10) == few[:4]
  )  # fewer items are the same items


def test_examples_stand_before_contexts_of_every_kind():
  for request in (Loglikelihood("c", "x"), NextWords("c", 2), Loglikelihood("", "x")):
    task = toy(requests=lambda row, request=request: [request])
    [first, *_] = [runner._requests(task, ROWS, i, 1, 0, None)[0] for i in range(3)]
    assert first.context in (f"=B; {request.context}", f"d=C; {request.context}")
    assert type(first) is type(request) and getattr(first, "continuation", "x") == "x"
  with pytest.raises(ValueError, match="a whole text has no context"):
    runner.run(toy(requests=lambda row: [RollingLoglikelihood("x")]), ROWS, Echo(), shots=1)


@pytest.mark.parametrize(
  ("changes", "rows", "more", "problem"),
  [
    ({}, [], {}, "toy: there are no rows"),
    ({}, [*ROWS, {"words": "a"}], {}, "toy: row 3 is malformed: it has no 'label'"),
    (
      {"requests": lambda row: [GenerateUntil("", 1)]},
      ROWS,
      {},
      "toy: row 0 has nothing to score: its prompt is empty",
    ),
    (
      {"requests": lambda row: [Loglikelihood("c", row["words"])]},
      ROWS,
      {},
      "row 1 has nothing to score: its contin",
    ),
    (
      {"sums": lambda row, answers: {"own": 1 / len(row["none"])}},
      ROWS,
      {},
      "toy: row 0 is malformed: it has no 'none'",
    ),
    ({"example": None}, ROWS, {"shots": 1}, "toy takes no examples"),
    ({}, ROWS, {"shots": 3}, "toy: 3 examples are asked for, and there are 2 rows to draw from"),
    (
      {},
      ROWS,
      {"shots": 2, "pool": [dict(ROWS[0])]},
      "2 examples are asked for, and there are 1 rows",
    ),
    (
      {},
      ROWS,
      {"shots": 1, "pool": [{"words": "w"}]},
      "toy: example 0 is malformed: it has no 'label'",
    ),
  ],
)
def test_what_cannot_be_scored_is_refused_and_never_dropped(changes, rows, more, problem):
  with pytest.raises(ValueError, match=problem):
    runner.run(toy(**changes), rows, Echo(), **more)


# ---- the generation tasks, with a model


def rows_of(task: Task) -> list[dict]:
  pairs = [
    ("What is it", "A cat."),
    ("Who", "Nobody at all."),
    ("Where was the cat that they saw", "At home"),
  ]
  match task.name:
    case "coqa":
      questions, answers = (
        [question for question, _ in pairs],
        [[answer, answer.lower()] for _, answer in pairs],
      )
      return [
        {"story": "A story. " * 3, "questions": questions[:n], "answers": answers[:n]}
        for n in (1, 2, 3)
      ]
    case "cnn_dailymail":
      return [
        {"article": f"{a} {q}. It ended. The end. No." * 2, "highlights": f"{a}\nIt ends."}
        for q, a in pairs
      ]
    case "natural_questions":
      return [{"question": question, "answers": [answer]} for question, answer in pairs]
  return [{"en": english, "fr": french} for english, french in pairs]


def solved_by(task: Task, row: dict, text: str) -> dict:
  """The row for which `text` is right."""
  match task.name:
    case "coqa":
      return row | {"answers": [*row["answers"][:-1], [text]]}
    case "cnn_dailymail":
      return row | {"highlights": "\n".join(summarization.sentences(text)[:3])}
    case "natural_questions":
      return row | {"answers": [text]}
  clean = translation.cut_at_line if task.protocol == "first_line" else translation.cut_at_sentence
  return row | {task.name[-2:]: clean(text)}


@pytest.fixture(scope="module")
def model(mesh, parameters, place):
  """What it writes depends on all that came before: sharp attention, loud positions, no character
  likely everywhere."""
  arrays = parameters(TINY, scale=0.5)
  scales = {
    "h.attn.c_attn.w": 4,
    "wpe": 4,
    "wte": 4 / np.linalg.norm(arrays["wte"], axis=1, keepdims=True),
  }
  scales |= {name: 0.3 for name in arrays if name.endswith(".b")} | {"ln_f.b": 0}
  with mesh(1, 1, 1):
    return place(TINY, {name: array * scales.get(name, 1) for name, array in arrays.items()})


@pytest.mark.parametrize("task", ZERO_SHOT, ids=lambda task: f"{task.name}-{task.protocol}")
def test_what_the_model_writes_is_what_is_scored(model, task):
  rows, scorer = rows_of(task), Scorer(model, CHARACTERS, batch_size=8)
  *_, metric = [metric for metric in task.metrics.values() if metric.higher]
  items = runner.run(task, rows, scorer)
  assert items["items"].tolist() == [1, 1, 1]
  assert 0 <= metric.value(runner.totals(items)) < 100
  written = [
    answer.text
    for answer in scorer.answers([request for row in rows for request in task.requests(row)])
  ]
  if not written:
    return
  requests = task.requests(rows[-1])
  if requests[-1].top_k == 1:
    assert written[-1] == complete(
      model, CHARACTERS, requests[-1].text, requests[-1].n_new, stop=requests[-1].stop, greedy=True
    )
  items = runner.run(task, [*rows[:-1], solved_by(task, rows[-1], written[-1])], scorer)
  score = metric.value({key: values[-1] for key, values in items.items()})
  assert score == pytest.approx(100 / len(requests))  # full marks for the one that is right


@pytest.mark.parametrize(
  "task", [coqa.TASKS[0], natural_questions.TASKS[0]], ids=lambda task: task.name
)
def test_neither_the_order_of_rows_nor_the_batch_changes_a_greedy_item(model, task):
  rows, order = rows_of(task), [2, 0, 1]
  items = runner.run(task, rows, Scorer(model, CHARACTERS, batch_size=8))
  shuffled = runner.run(task, [rows[i] for i in order], Scorer(model, CHARACTERS, batch_size=1))
  for key, values in items.items():
    np.testing.assert_allclose(shuffled[key], values[order], atol=1e-5, err_msg=key)


def test_too_long_a_few_shot_context_is_cut_and_counted(model):
  task = natural_questions.TASKS[0]
  rows, scorer = rows_of(task), Scorer(model, CHARACTERS, batch_size=8)
  pool = [{"question": "q" * 100, "answers": ["a" * 50]}] * 3
  assert runner.run(task, rows, scorer, shots=1, pool=pool)["truncated"].tolist() == [0, 0, 0]
  assert runner.run(task, rows, scorer, shots=3, pool=pool)["truncated"].tolist() == [1, 1, 1]


def test_examples_change_what_the_model_is_asked_and_no_count(model):
  task = translation.TASKS[0]
  rows, scorer = rows_of(task), Scorer(model, CHARACTERS, batch_size=8)
  none, some = runner.run(task, rows, scorer), runner.run(task, rows, scorer, shots=2)
  assert none["reference_length"].tolist() == some["reference_length"].tolist()
  assert any((none[key] != some[key]).any() for key in none)
