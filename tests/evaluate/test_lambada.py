# SPDX-License-Identifier: Apache-2.0
"""LAMBADA under its protocols, by hand, against lm-evaluation-harness, and on the published
file."""

import json
import math
import os
import re

import numpy as np
import pytest

from gpt2_jax.evaluate import runner, sources
from gpt2_jax.evaluate.scorers import Scorer
from gpt2_jax.evaluate.task import Likelihood, Loglikelihood, NextWords, Words
from gpt2_jax.evaluate.tasks import lambada
from gpt2_jax.model import ModelConfig
from gpt2_jax.tokenizer import load_tokenizer

TASKS = {task.protocol: task for task in lambada.TASKS}
ROW = {"text": "  “It’s ``you’’ ''again'',”\n\nsaid ‘the’ Old  man"}
STRAIGHT = '\n"It\'s "you" "again","\n\nsaid \'the\' Old '
needs_data = pytest.mark.skipif(
  "GPT2_JAX_TEST_DATA" not in os.environ, reason="GPT2_JAX_TEST_DATA is not set"
)


@pytest.fixture(scope="module")
def published() -> sources.DatasetRows:
  return sources.load(TASKS["last_word"].source, os.environ["GPT2_JAX_TEST_DATA"])


def words(*likely: str) -> Words:
  return Words(likely, tuple(range(1, len(likely) + 1)), False)


def test_the_last_word_follows_the_rest():
  whole_word, last_token = TASKS["last_word"].requests(ROW), TASKS["last_piece"].requests(ROW)
  assert whole_word == [Loglikelihood(ROW["text"].removesuffix(" man"), " man")]
  assert last_token == [
    Loglikelihood(ROW["text"].removesuffix(" man"), " man", last_token_only=True)
  ]
  assert TASKS["stop_words"].requests(ROW) == [
    *whole_word,
    NextWords(whole_word[0].context, lambada.N_WORDS),
  ]


def test_openai_s_text_has_straight_quotes_after_a_newline():
  [request] = TASKS["openai_last_word"].requests(ROW)
  assert request == Loglikelihood(STRAIGHT, " man")
  assert TASKS["openai_last_piece"].requests(ROW) == [
    Loglikelihood(STRAIGHT, " man", last_token_only=True)
  ]
  assert TASKS["openai_stop_words"].requests(ROW) == [request, NextWords(STRAIGHT, lambada.N_WORDS)]
  assert not re.search("[‘’“”]", "".join(lambada.as_openai_fed_it(ROW["text"])))


def test_nats_and_greedy_choices_count_as_they_are():
  for protocol in (
    "last_word",
    "last_piece",
    "openai_last_word",
    "original_last_word",
    "original_last_piece",
  ):
    for greedy in (False, True):
      assert TASKS[protocol].sums(ROW, [Likelihood(2.5, 2, greedy, False)]) == {
        "nats": 2.5,
        "words": 1,
        "correct": greedy,
      }


@pytest.mark.parametrize(
  ("likely", "correct"),
  [
    (("man",), True),
    (("the", "Her", "You've", '"', "", "man", "woman"), True),
    (("woman", "man"), False),
    (("Man",), False),
    (("the", "of"), False),
    ((), False),
  ],
)
def test_the_likeliest_word_that_is_no_stop_word_counts(likely, correct):
  for protocol in ("stop_words", "openai_stop_words", "original_stop_words"):
    answers = [Likelihood(2.5, 2, not correct, False), words(*likely)]
    assert TASKS[protocol].sums(ROW, answers) == {"nats": 2.5, "words": 1, "correct": correct}


def test_a_word_is_compared_as_it_stands_in_the_text_that_was_asked():
  row = {"text": "she said, “‘army"}
  for protocol, right in (("stop_words", "“‘army"), ("openai_stop_words", "\"'army")):
    answers = [Likelihood(1.0, 1, False, False), words(right)]
    assert TASKS[protocol].sums(row, answers)["correct"] == 1


def test_perplexity_is_per_word_and_accuracy_in_per_cent():
  task, answers = (
    TASKS["last_word"],
    [Likelihood(nats, 3, nats < 2, False) for nats in (1.0, 2.0, 6.0)],
  )
  items = [task.sums(ROW, [answer]) | {"items": 1.0} for answer in answers]
  sums = {key: np.array(sum(each[key] for each in items)) for key in items[0]}
  scores = {name: float(metric.value(sums)) for name, metric in task.metrics.items()}
  assert scores == pytest.approx({"accuracy": 100 / 3, "perplexity": math.exp(3)})


def test_the_stop_words_are_nltk_s():
  assert len(lambada.STOP_WORDS) == 179
  assert {"i", "the", "yourselves", "you'll", "don", "shan't", "wouldn't"} <= lambada.STOP_WORDS
  assert lambada.STOP_WORDS.isdisjoint(("man", "said", "us", "would", "could", "back", "one"))


@pytest.mark.parametrize("text", ["", "word", " word", "the end ", "no\nspaces"])
def test_a_passage_without_a_last_word_is_named(text, tmp_path):
  path = tmp_path / "lambada_test.jsonl"
  path.write_text("".join(json.dumps({"text": each}) + "\n" for each in ("a good one", text)))
  with pytest.raises(
    ValueError, match="lambada_test.jsonl:2 is malformed: its text has no last word"
  ):
    sources.load(TASKS["openai_stop_words"].source, str(path))


def test_tfds_has_the_passages_of_the_authors_file(tmp_path, prepare):
  path = tmp_path / "lambada" / "lambada_test_plain_text.txt"
  path.parent.mkdir()
  path.write_text("`` come , '' he said to mary\nshe did n't look at the café \n", "utf-8")
  source = TASKS["original_last_word"].source
  from_file = sources.load(source, str(tmp_path))
  assert [row["text"] for row in from_file] == [
    "`` come , '' he said to mary",
    "she did n't look at the café",
  ]
  from_tfds = sources.load(source, None, prepare("lambada", "test", filepath=str(path)))
  assert sorted(map(repr, from_tfds)) == sorted(map(repr, from_file))
  with pytest.raises(FileNotFoundError, match="lambada_test.jsonl not found"):
    sources.load(TASKS["openai_stop_words"].source, str(tmp_path))


def test_requests_and_scores_of_the_whole_word_are_the_harness_s(harness_task):
  rows = [ROW, {"text": "A b\n\nc d"}, {"text": 'he said "Army'}]
  for path, protocol in (
    ("lambada_openai", "last_word"),
    ("lambada_standard", "original_last_word"),
  ):
    theirs = harness_task(f"lambada/{path}.yaml", rows)
    for row, document in zip(rows, theirs.eval_docs, strict=True):
      request = theirs.construct_requests(
        document, theirs.fewshot_context(document, 0), metadata=("", 0, 1)
      )
      [ours] = TASKS[protocol].requests(row)
      assert request.arguments == (ours.context, ours.continuation)
      score = theirs.process_results(document, [(-2.5, True)])
      sums = TASKS[protocol].sums(row, [Likelihood(2.5, 1, True, False)])
      assert (score["perplexity"], score["acc"]) == (-sums["nats"], sums["correct"])


@needs_data
def test_all_5153_passages_are_asked_whole(published):
  assert len(published) == 5153
  for row in published:
    [request] = TASKS["last_word"].requests(row)
    assert request.context + request.continuation == row["text"] == TASKS["last_word"].example(row)
    assert (
      request.continuation[0] == " "
      and " " not in request.continuation[1:]
      and request.continuation[1:]
    )
    fed = TASKS["openai_stop_words"].requests(row)
    assert (
      len(fed) == 2
      and fed[0].context == fed[1].context
      and fed[0].context[0] == "\n" != fed[0].context[1]
    )
    assert not re.search("[‘’“”]|``|''", fed[0].context + fed[0].continuation)


@needs_data
def test_of_a_uniform_model_perplexity_per_word_follows_from_counts(
  published, mesh, parameters, place
):
  tokenizer = load_tokenizer("gpt2")
  config = ModelConfig(
    n_vocab=tokenizer.vocab_size, n_ctx=256, n_embd=8, n_head=2, n_layer=1, dtype="float32"
  )
  rows = published[:6]
  token_counts = [len(tokenizer.encode(" " + row["text"].rpartition(" ")[2])) for row in rows]
  with mesh(1, 1, 1):
    model = place(config, {name: 0 * array for name, array in parameters(config).items()})
  scorer = Scorer(model, tokenizer, batch_size=8)
  for protocol, scored in (("last_piece", 6), ("stop_words", sum(token_counts))):
    sums = runner.totals(runner.run(TASKS[protocol], rows, scorer))
    assert sums["nats"] == pytest.approx(scored * math.log(tokenizer.vocab_size), rel=1e-6)
    assert (sums["items"], sums["correct"], sums["truncated"]) == (6, 0, 0)
    score = (
      TASKS[protocol]
      .metrics["perplexity"]
      .value({key: np.array(value) for key, value in sums.items()})
    )
    assert score == pytest.approx(tokenizer.vocab_size ** (scored / 6), rel=1e-5)
