# SPDX-License-Identifier: Apache-2.0
"""The Children's Book Test: its file, its de-tokenizer, and its requests."""

import pytest

from gpt2_jax.evaluate import sources
from gpt2_jax.evaluate.task import Likelihood
from gpt2_jax.evaluate.tasks import cbt

TASKS = {(task.name, task.protocol): task for task in cbt.TASKS}

CANDIDATES = "fox hen owl cat dog elk ape bee ram yak".split()
CONTEXT = [f"Line {i} is told ." for i in range(1, 20)] + ["`` I wo n't , '' she said ."]
QUESTION = "-LRB- The XXXXX 's tail was red . -RRB-"


def block(
  question: str = QUESTION, answer: str = "cat", candidates=CANDIDATES, context=CONTEXT
) -> str:
  lines = [f"{i} {sentence} " for i, sentence in enumerate(context, 1)]
  return "\n".join([*lines, f"21 {question}\t{answer}\t\t{'|'.join(candidates)}"]) + "\n\n"


def load(tmp_path, text: str) -> sources.DatasetRows:
  path = tmp_path / "cbt" / "cbtest_CN_valid_2000ex.txt"
  path.parent.mkdir()
  path.write_text(text, "utf-8")
  return sources.load(TASKS["cbt_cn", "paper"].source, str(tmp_path))


def test_a_question_is_twenty_sentences_one_with_a_blank_and_ten_candidates(tmp_path):
  rows = load(tmp_path, block() + block("He saw XXXXX ", "yak"))
  assert rows[0] == {
    "sentences": CONTEXT,
    "question": QUESTION,
    "candidates": CANDIDATES,
    "label": 3,
  }
  assert rows[1]["question"] == "He saw XXXXX" and rows[1]["label"] == 9 and len(rows) == 2


def test_each_candidate_is_scored_with_the_rest_of_the_sentence(tmp_path):
  [row] = load(tmp_path, block())
  detokenized = " ".join(f"Line {i} is told." for i in range(1, 20))
  paper, raw = (TASKS["cbt_cn", protocol].requests(row) for protocol in ("paper", "raw"))
  assert len(paper) == len(raw) == 10
  assert (
    paper[3].context == f'{detokenized} "I won\'t," she said. (The'
    and paper[3].continuation == " cat's tail was red.)"
  )
  assert (
    raw[3].context == f"{' '.join(CONTEXT)} -LRB- The"
    and raw[3].continuation == " cat 's tail was red . -RRB-"
  )
  for requests in (paper, raw):
    assert {request.context for request in requests} == {requests[0].context}
    assert [request.continuation.split("'")[0].strip() for request in requests] == CANDIDATES


def test_a_word_that_opens_a_quotation_has_no_space_before_it(tmp_path):
  [row] = load(tmp_path, block("`` XXXXX ! '' he called to the XXXXX ."))
  request = TASKS["cbt_cn", "paper"].requests(row)[0]
  assert (
    request.context.endswith(' she said. "')
    and request.continuation == 'fox!" he called to the fox.'
  )


def test_the_right_one_must_be_the_likeliest_and_of_a_tie_the_first(tmp_path):
  [row] = load(tmp_path, block())
  for task in TASKS.values():
    for nats, correct in (
      ({3: 1.0}, 1),
      ({4: 1.0}, 0),
      ({3: 1.0, 4: 1.0}, 1),
      ({2: 1.0, 3: 1.0}, 0),
    ):
      answers = [Likelihood(nats.get(i, 9.0), 1, False, False) for i in range(10)]
      assert task.sums(row, answers) == {"correct": correct}


def test_an_example_is_the_passage_filled_in(tmp_path):
  [row] = load(tmp_path, block())
  assert TASKS["cbt_cn", "raw"].example(row) == " ".join(
    [*CONTEXT, QUESTION.replace("XXXXX", "cat")]
  )
  assert TASKS["cbt_cn", "paper"].example(row).endswith("she said. (The cat's tail was red.)")


@pytest.mark.parametrize(
  ("tokens", "text"),
  [
    (
      "`` Do n't , '' said he ; `` I 'm -LRB- nearly -RRB- there ! ''",
      '"Don\'t," said he; "I\'m (nearly) there!"',
    ),
    (
      "She 'd gone , they 'll go , we 've been , you 're off .",
      "She'd gone, they'll go, we've been, you're off.",
    ),
    (
      "The boys ' hats and Tom 's cost $ 5 : a lot ...",
      "The boys' hats and Tom's cost $5: a lot...",
    ),
    (
      "` Yes , ' he said -- and CAN NOT go -LSB- now -RSB- ?",
      "'Yes,' he said -- and CANNOT go [now]?",
    ),
    ("I 'm gon na try , gim me that , 't was 'T IS .", "I'm gonna try, gimme that, 'twas 'TIS."),
    ("WO N'T IT 'S A well-known one , o'clock 'em", "WON'T IT'S A well-known one, o'clock 'em"),
    ("", ""),
  ],
)
def test_detokenized_by_hand(tokens, text):
  assert cbt.detokenized(tokens) == text


@pytest.mark.parametrize(
  ("text", "message"),
  [
    (block(answer="cow"), ":21 is malformed: its answer 'cow' is none of its candidates fox, hen"),
    (block(candidates=CANDIDATES[:9]), ":21 is malformed: it has 9 candidates, not 10"),
    (block(candidates=[*CANDIDATES[:9], ""]), ":21 is malformed: it has 9 candidates, not 10"),
    (block("No blank here ."), ":21 is malformed: its question has no blank XXXXX"),
    (
      block(context=CONTEXT[:19]),
      ":20 is malformed: it begins with '21', where line 20 of 21 is due",
    ),
    (
      block() + block(context=CONTEXT[5:]),
      ":38 is malformed: it begins with '21', where line 16 of 21 is due",
    ),
    (block().split("\t")[0], ":21 is malformed: it has no answer and candidates"),
    (block()[:64], "2000ex.txt ends after line 4 of a question's 21"),
  ],
)
def test_a_malformed_question_is_named(text, message, tmp_path):
  with pytest.raises(ValueError, match=message) as error:
    load(tmp_path, text)
  assert "\n" not in str(error.value)


def test_the_validation_set_of_each_kind_is_a_task():
  assert {(name, task.source.files) for (name, _), task in TASKS.items()} == {
    ("cbt_cn", ("cbtest_CN_valid_2000ex.txt",)),
    ("cbt_ne", ("cbtest_NE_valid_2000ex.txt",)),
  }
  assert [task.protocol for task in cbt.TASKS] == ["paper", "raw"] * 2
