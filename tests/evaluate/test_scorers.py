# SPDX-License-Identifier: Apache-2.0
import dataclasses
import math

import numpy as np
import pytest

from gpt2_jax.decoding import Sample, TopK, complete, generate
from gpt2_jax.evaluate.generation import MAX_WORD_TOKENS
from gpt2_jax.evaluate.loglikelihood import score_rows, sliding_windows
from gpt2_jax.evaluate.scorers import Scorer
from gpt2_jax.evaluate.task import (
  Generated,
  GenerateUntil,
  Likelihood,
  Loglikelihood,
  NextWords,
  RollingLoglikelihood,
  Words,
)
from gpt2_jax.model import ModelConfig
from gpt2_jax.tokenizer import EOT, Characters, HuggingFace, byte_alphabet

TOKENS = [*byte_alphabet().values(), "ab", "abc", "\u0120a", EOT]
SPACE, AB, ABC, SPACE_A, END = TOKENS.index("\u0120"), 256, 257, 258, 259
TINY = ModelConfig(n_vocab=260, n_ctx=32, n_embd=16, n_head=4, n_layer=2, dtype="float32")


@pytest.fixture(scope="module")
def tokenizer() -> HuggingFace:
  vocab = {token: i for i, token in enumerate(TOKENS)}
  return HuggingFace.from_merges(vocab, [("a", "b"), ("ab", "c"), ("\u0120", "a")])


@pytest.fixture(scope="module")
def weights(parameters):
  """Loud tokens of one length, so that different texts go on differently."""
  arrays = parameters(TINY, scale=0.5)
  length_V1 = np.linalg.norm(arrays["wte"], axis=1, keepdims=True)
  return arrays | {"wte": 3 * arrays["wte"] / length_V1, "wpe": 4 * arrays["wpe"]}


@pytest.fixture(scope="module")
def model(mesh, weights, place):
  with mesh(1, 1, 1):
    return place(TINY, weights)


@pytest.fixture(scope="module")
def flat(mesh, weights, place):
  with mesh(1, 1, 1):
    return place(TINY, {name: np.zeros_like(array) for name, array in weights.items()})


@pytest.fixture(scope="module")
def scorer(model, tokenizer):
  return Scorer(model, tokenizer, batch_size=4)


def same(found, wanted) -> bool:
  """Equal but for the nats, and those to 1e-5 a token."""
  for answer, other in zip(found, wanted, strict=True):
    tokens = MAX_WORD_TOKENS if isinstance(answer, Words) else max(1, answer.tokens)
    np.testing.assert_allclose(answer.nats, other.nats, rtol=0, atol=1e-5 * tokens)
    nothing = () if isinstance(answer, Words) else 0.0
    assert dataclasses.replace(answer, nats=nothing) == dataclasses.replace(other, nats=nothing)
  return True


# ---- log-likelihoods


def test_counts_by_hand(flat, tokenizer):
  """All tokens are equally likely, so nats count them; of equals the model's choice is token 0,
  which is "!"."""
  cases = [
    (Loglikelihood("ab", " ab"), 2),  # a space, "ab"
    (Loglikelihood("ab ", "ab"), 2),  # the same
    (Loglikelihood("", "abc"), 1),
    (Loglikelihood("ab", "cab"), 1),  # "abc", "ab": the context has one token, which leaves one
    (Loglikelihood("ab", " abab", last_token_only=True), 1),
    (Loglikelihood("ab", "!!"), 2),
    (RollingLoglikelihood("ab abc"), 3),
  ]
  found = Scorer(flat, tokenizer).answers([request for request, _ in cases])
  for answer, (request, n) in zip(found, cases, strict=True):
    greedy = request == Loglikelihood("ab", "!!")
    assert answer == Likelihood(pytest.approx(n * math.log(260), rel=3e-7), n, greedy, False)


def test_whitespace_at_the_end_of_a_context_begins_the_continuation(scorer):
  wanted = scorer.loglikelihoods(
    [
      ([AB], [SPACE_A]),
      ([AB], [SPACE, AB]),
      ([END], [SPACE, TOKENS.index("\u010a"), AB]),
      ([AB], [AB]),
    ],
    [1, 1, 3, 1],
  )
  requests = [
    Loglikelihood("ab ", "a"),
    Loglikelihood("ab", " ab", last_token_only=True),
    Loglikelihood(" \n", "ab"),
  ]
  assert scorer.answers([*requests, Loglikelihood("ab", "cab")]) == wanted


def test_a_context_too_long_loses_its_beginning(scorer):
  context, ending = "abc" * 40, "ab!"
  found, short = scorer.answers([Loglikelihood(context, ending), Loglikelihood("abc" * 31, ending)])
  assert found == dataclasses.replace(short, truncated=True) and not short.truncated
  assert short.tokens == 2
  whole = scorer.answers([Loglikelihood("a", "!" * 32)])[0]
  assert whole.tokens == 32 and not whole.truncated


def test_what_has_nothing_to_score_is_refused(scorer, model):
  for context, ending in (("a", "b"), ("ab", ""), ("ab", "c")):
    with pytest.raises(
      ValueError, match=f"the continuation '{ending}' has no tokens of its own after '{context}'"
    ):
      scorer.answers([Loglikelihood("ab", "ab"), Loglikelihood(context, ending)])
  with pytest.raises(ValueError, match="a continuation has no tokens"):
    scorer.loglikelihoods([([1], [])])
  with pytest.raises(
    ValueError, match="a continuation of 33 tokens exceeds the context of 32; shorten it"
  ):
    scorer.answers([Loglikelihood("a", "!" * 33)])
  letters = Scorer(model, Characters("ab"))
  with pytest.raises(
    ValueError, match="no token before it; give a context, or a tokenizer with <.endoftext.>"
  ):
    letters.answers([Loglikelihood("", "ab")])
  with pytest.raises(ValueError, match="no <.endoftext.> for an empty prompt"):
    letters.answers([GenerateUntil("", 3)])


def test_knobs_out_of_range_are_refused(model, tokenizer):
  for stride in (0, 33):
    with pytest.raises(ValueError, match=f"a stride of {stride} is not from 1 to the context's 32"):
      Scorer(model, tokenizer, stride=stride)
  with pytest.raises(ValueError, match="a batch of 0 rows"):
    Scorer(model, tokenizer, batch_size=0)
  with pytest.raises(ValueError, match="there is no tokenizer"):
    Scorer(model, None)


def test_choices_with_a_shared_prefix_score_as_each_alone(model, scorer):
  """Together where the context is most of it, and does not lose its beginning."""
  long, short, cut = [5] * 9 + [7] * 3, [9, 8], [3] * 31
  pairs = [(context, [i, *range(i)]) for i in (1, 2, 4) for context in (long, short, cut)]
  assert scorer._group_by_context(pairs) == ([1, 4, 7, 2, 5, 8], [[0, 3, 6]])
  counts = [1, 2, 2, 3, 1, 3, 2, 5, 1]
  found = scorer.loglikelihoods(pairs, counts)
  assert same(
    found, [scorer.loglikelihoods([pair], [n])[0] for pair, n in zip(pairs, counts, strict=True)]
  )
  assert [answer.tokens for answer in found] == counts and [
    answer.truncated for answer in found
  ].count(True) == 2


# ---- rolling log-likelihoods


@pytest.mark.parametrize("stride", [None, 1, 9])
def test_rolling_loglikelihoods_slide_their_windows(model, tokenizer, stride):
  text = "abc ab!" * 12
  ids = np.array([END, *tokenizer.encode(text)], np.int32)
  wanted = sum(
    nats.sum() for nats, _ in score_rows(model, sliding_windows(ids, 32, stride or 32), 4)
  )
  [found, empty] = Scorer(model, tokenizer, 4, stride).answers(
    [RollingLoglikelihood(text), RollingLoglikelihood("")]
  )
  assert found == Likelihood(pytest.approx(wanted, abs=1e-4), len(ids) - 1, False, False)
  assert empty == Likelihood(0.0, 0, True, False)


def test_without_an_end_of_text_the_first_token_is_not_scored(model):
  letters = Scorer(model, Characters("ab"), 4)
  [found] = letters.answers([RollingLoglikelihood("abba")])
  [wanted] = letters.answers([Loglikelihood("a", "bba")])
  assert same([found], [dataclasses.replace(wanted, unscored="a")]) and found.tokens == 3


def test_contiguous_texts_are_one_text_in_parts(model, tokenizer):
  """A token belongs where it begins: "abc" to "ab", and each byte of a character to the character's
  part."""
  texts = ["ab", "cab", "", "a \u20ac", "b!"]
  found = Scorer(model, tokenizer, 4).answers(
    [RollingLoglikelihood(text) for text in texts], contiguous=True
  )
  assert tokenizer.encode("".join(texts))[:3] == [ABC, AB, TOKENS.index("a")]
  assert [answer.tokens for answer in found] == [1, 1, 0, 5, 2]
  assert not any(answer.unscored for answer in found)
  assert same(
    [sum_of(found)], Scorer(model, tokenizer, 4).answers([RollingLoglikelihood("".join(texts))])
  )
  letters = Scorer(model, Characters("ab"), 4)
  parts = letters.answers(
    [RollingLoglikelihood("a"), RollingLoglikelihood("ab"), RollingLoglikelihood("b")],
    contiguous=True,
  )
  assert [part.tokens for part in parts] == [0, 2, 1]
  assert [part.unscored for part in parts] == ["a", "", ""]
  assert same([sum_of(parts)], letters.answers([RollingLoglikelihood("aabb")]))


def test_the_unscored_token_may_reach_over_several_parts(model):
  """The first token is "abc", without a score; nothing else is left out."""
  vocab = {token: i for i, token in enumerate(TOKENS[:-1])}
  merges = [("a", "b"), ("ab", "c"), ("\u0120", "a")]
  scorer = Scorer(model, HuggingFace.from_merges(vocab, merges), 4)
  assert scorer.tokenizer.eot is None
  texts = ["ab", "", "cab", "b!"]
  answers = scorer.answers([RollingLoglikelihood(text) for text in texts], contiguous=True)
  assert [answer.unscored for answer in answers] == ["ab", "", "c", ""]
  alone = scorer.answers([RollingLoglikelihood(text) for text in ("abc!", "abc", "", "b")])
  assert [answer.unscored for answer in alone] == ["abc", "abc", "", "b"]
  assert [answer.tokens for answer in alone] == [1, 0, 0, 0]


def sum_of(parts: list[Likelihood]) -> Likelihood:
  return Likelihood(
    sum(p.nats for p in parts),
    sum(p.tokens for p in parts),
    all(p.greedy for p in parts),
    False,
    "".join(p.unscored for p in parts),
  )


# ---- generate until


def test_greedy_generation_is_that_of_complete(model, tokenizer, scorer):
  texts = ["ab", "abc ab", " a!", "", "cab" * 30]
  found = scorer.answers([GenerateUntil(text, 10) for text in texts])
  cut = [*texts[:4], tokenizer.decode(tokenizer.encode(texts[4])[-22:])]
  assert [answer.text for answer in found] == complete(model, tokenizer, cut, 10, greedy=True)
  assert [answer.truncated for answer in found] == [False] * 4 + [True]
  ids = [tokenizer.encode(text) or [END] for text in cut]
  for answer, row in zip(found, generate(model, ids, 10, eot=END, logprobs=True), strict=True):
    assert answer.tokens == len(row.tokens) and answer.nats == pytest.approx(
      -sum(row.logprobs), abs=1e-4
    )


def test_a_stop_string_ends_a_text_and_its_nats(model, tokenizer, scorer):
  [row] = generate(model, [tokenizer.encode("abc ab")], 10, logprobs=True)
  text = tokenizer.decode(row.tokens)
  end = next(i for i in range(2, len(text)) if text[i] not in text[:i])
  stop = text[end : end + 2]
  n = next(n for n in range(11) if len(tokenizer.decode(row.tokens[:n])) >= end)
  request = GenerateUntil("abc ab", 10, stop=("no such text", stop))
  [found] = scorer.answers([request])
  assert 0 < n < 10 and found == Generated(
    text[:end], pytest.approx(-sum(row.logprobs[:n]), abs=1e-4), n, False
  )
  [nothing] = scorer.answers([dataclasses.replace(request, stop=(text[:2],))])
  assert nothing == Generated("", 0.0, 0, False)


def test_draws_depend_on_the_request_and_the_seed_alone(model, tokenizer):
  texts = ["ab", "abc ab", "ab", " a!", "a"]
  requests = [GenerateUntil(text, 8, top_k=3) for text in texts]
  first = Scorer(model, tokenizer, 64, seed=5).answers(requests)
  assert same(Scorer(model, tokenizer, 1, seed=5).answers(requests), first)
  rows = generate(
    model, [tokenizer.encode(text) for text in texts], 8, Sample((TopK(3),)), seed=5, eot=END
  )
  assert [answer.text for answer in first] == [tokenizer.decode(row.tokens) for row in rows]
  assert first[0].text != first[2].text, "each request draws its own numbers"
  assert [a.text for a in Scorer(model, tokenizer, 64, seed=6).answers(requests)] != [
    a.text for a in first
  ]
  mixed = Scorer(model, tokenizer, 64, seed=5).answers([RollingLoglikelihood("ab"), *requests[1:]])
  assert same(mixed[1:], first[1:])


def test_nothing_is_decoded_after_the_last_row_has_stopped(model, tokenizer, monkeypatch):
  from gpt2_jax.evaluate import generation

  portions = []
  advance = generation.advance
  monkeypatch.setattr(
    generation, "advance", lambda *args: portions.append(args[2]) or advance(*args)
  )
  scorer = Scorer(model, tokenizer, 64)
  [long] = scorer.answers([GenerateUntil("ab", 30)])
  assert sum(portions) == 30 and long.tokens == 30
  portions.clear()
  scorer.answers([GenerateUntil("ab", 30, stop=(long.text[1],))])
  assert sum(portions) <= 7


def test_a_prompt_needs_room(scorer):
  with pytest.raises(
    ValueError, match="32 new tokens leave no room for a prompt in a context of 32; ask for fewer"
  ):
    scorer.answers([GenerateUntil("ab", 32)])


# ---- all of them


@pytest.mark.parametrize("sizes", [(1, 1, 1), (1, 4, 2)], ids=str)
def test_order_batches_and_mesh_never_change_an_answer(
  sizes, mesh, model, weights, place, tokenizer
):
  texts = [
    "ab",
    "c",
    "\u20ac",
    "a!a",
    "!ab!",
  ]  # of one token or of three, for each length is compiled
  requests = [Loglikelihood(text, ending) for text in texts for ending in ("!ab", "!", "ca")]
  requests += [RollingLoglikelihood(text * 2) for text in texts]
  requests += [GenerateUntil(text, 6, ("a",)) for text in texts] + [
    NextWords(text, 3) for text in texts
  ]
  wanted = Scorer(model, tokenizer).answers(requests)
  with mesh(*sizes):
    placed = place(TINY, weights)
  order = np.random.default_rng(0).permutation(len(requests))
  for batch_size in (1, 64):
    found = Scorer(placed, tokenizer, batch_size).answers([requests[i] for i in order])
    assert same(found, [wanted[i] for i in order])
