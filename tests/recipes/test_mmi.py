# SPDX-License-Identifier: Apache-2.0
"""MMI reranking: log p(T | S) and log p(S | T) as sums over rows that are written here by hand."""

import dataclasses

import numpy as np
import pytest

from gpt2_jax.cli.turns import Answering, Ranking
from gpt2_jax.data.templates import DIALOGPT, DIALOGPT_REVERSE, Message
from gpt2_jax.decoding import Generation, Sample, TopK, for_inference
from gpt2_jax.decoding.mmi import log_probs, rank_answers, rerank
from tests.recipes.tiny import CONFIG

SMALL = dataclasses.replace(CONFIG, n_ctx=32, n_embd=16, n_layer=2)
SAID = [Message("user", "hi"), Message("assistant", "yo"), Message("user", "ok?")]
TEXTS = ["ja", "no", "maybe"]


@pytest.fixture(scope="module")
def models(mesh, parameters, place):
  """A forward and a backward model, and the plain logits of each, by NumPy."""
  made = []
  with mesh(1, 1, 1):
    for seed in (1, 2):
      made.append(place(SMALL, parameters(SMALL, scale=0.5, seed=seed)))
  return made


def by_hand(model, ids, first: int) -> float:
  """log p of ids[first:] after those before them: the plain forward pass, the rest in float64."""
  logits_TV = np.asarray(model(np.array([ids[:-1]], np.int32))[0], np.float64)[:, : SMALL.n_vocab]
  log_p_TV = logits_TV - np.log(np.exp(logits_TV).sum(-1, keepdims=True))
  return sum(log_p_TV[i - 1, ids[i]] for i in range(first, len(ids)))


def test_the_score_is_the_formula(models, bytes_tokenizer):
  model, reverse = models
  encode, end = bytes_tokenizer.encode, [bytes_tokenizer.eot]
  source = [*encode("hi"), *end, *encode("yo"), *end, *encode("ok?"), *end]
  source_backwards = [*encode("ok?"), *end, *encode("yo"), *end, *encode("hi"), *end]
  expected = {}
  for text in TEXTS:
    answer = [*encode(text), *end]
    expected[text] = (
      by_hand(model, source + answer, len(source)),
      by_hand(reverse, answer + source_backwards, len(answer)),
    )

  for weight in (0.0, 0.4, 1.0):
    ranked = rank_answers(
      for_inference(model), for_inference(reverse), bytes_tokenizer, DIALOGPT, SAID, TEXTS, weight
    )
    scores = {t: (1 - weight) * f + weight * b for t, (f, b) in expected.items()}
    assert [answer.text for answer in ranked] == sorted(TEXTS, key=lambda text: -scores[text])
    for answer in ranked:
      # Sums of some ten terms of float32, of a size of a few nats each.
      assert abs(answer.score - scores[answer.text]) < 1e-4
      assert abs(answer.backward - expected[answer.text][1]) < 1e-4
      assert answer.forward is None if weight == 1 else answer.forward < 0


def test_answers_are_drawn_once_each_and_the_best_is_said(models, bytes_tokenizer):
  generation = Generation(3, Sample((TopK(5),)), seed=4, samples=6)
  ranked = rerank(*models, bytes_tokenizer, DIALOGPT, SAID, generation)
  texts = [answer.text for answer in ranked]
  assert 1 < len(texts) == len(set(texts)) <= 6
  assert ranked == sorted(ranked, key=lambda answer: -answer.backward)

  # A session answers with the best one, and its turns are the source.
  answering = Answering(DIALOGPT, ranking=Ranking(for_inference(models[1]), 6))
  decoder = for_inference(models[0])
  plain = dataclasses.replace(generation, samples=1)
  chunks = answering.chunks(decoder, bytes_tokenizer, [("hi", "yo")], "ok?", [0], plain)
  assert [text for text, _ in chunks] == texts[:1]


def test_what_has_no_room_is_cut_alike_for_all_answers(models):
  """The end of the source, which are its oldest turns, and the front of an answer."""
  tokens = np.arange(90) % SMALL.n_vocab
  model = for_inference(models[0])
  rows = [
    (tokens[:5].tolist(), tokens[5:60].tolist()),
    (tokens[:9].tolist(), tokens[5:60].tolist()),
  ]
  room = SMALL.n_ctx + 1 - 9
  cut = [(context, continuation[:room]) for context, continuation in rows]
  assert log_probs(model, rows) == log_probs(model, cut)

  long = [(tokens[:60].tolist(), tokens[60:70].tolist())]
  kept = SMALL.n_ctx + 1 - 10
  assert log_probs(model, long) == log_probs(model, [(long[0][0][-kept:], long[0][1])])


def test_a_reversed_template_is_its_own_inverse_and_a_weight_is_a_share(models, bytes_tokenizer):
  assert DIALOGPT_REVERSE.name == "dialogpt_reverse" and DIALOGPT_REVERSE.reverse
  assert dataclasses.replace(DIALOGPT_REVERSE.backward(), name="dialogpt") == DIALOGPT
  with pytest.raises(ValueError, match=r"a weight of 1.5 is not in \[0, 1\]"):
    rerank(*models, bytes_tokenizer, DIALOGPT, SAID, Generation(2), 1.5)


def test_a_mesh_changes_no_score(models, mesh, parameters, place, bytes_tokenizer):
  expected = rank_answers(*map(for_inference, models), bytes_tokenizer, DIALOGPT, SAID, TEXTS, 0.5)
  arrays = [parameters(SMALL, scale=0.5, seed=seed) for seed in (1, 2)]
  with mesh(2, 2, 2):
    pair = [for_inference(place(SMALL, of_one)) for of_one in arrays]
  ranked = rank_answers(*pair, bytes_tokenizer, DIALOGPT, SAID, TEXTS, 0.5)
  assert [answer.text for answer in ranked] == [answer.text for answer in expected]
  for ours, theirs in zip(ranked, expected, strict=True):
    assert abs(ours.score - theirs.score) < 1e-4
