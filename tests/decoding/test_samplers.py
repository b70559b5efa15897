# SPDX-License-Identifier: Apache-2.0
import collections
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gpt2_jax.decoding import (
  FrequencyPenalty,
  Greedy,
  History,
  LogitBias,
  MinNewTokens,
  MinP,
  NoRepeatNgram,
  PresencePenalty,
  RepetitionPenalty,
  Sample,
  Temperature,
  TopK,
  TopP,
  TypicalP,
  make_sampler,
)

LOGITS = np.random.default_rng(0).normal(size=40).astype(np.float32) * 2
PROMPT, NEW = np.split(
  np.random.default_rng(1).integers(0, 12, 30), [14]
)  # few different tokens, so that they repeat
NEW = np.array([*NEW[2:], *PROMPT[3:5]])
# Junk before the row begins and after its end, which no filter may read.
HISTORY = History(
  jnp.asarray([*range(12, 25), *PROMPT, *NEW, *range(25, 40)], jnp.int32), 13, 27, 43
)


def softmax(x):
  x = np.exp(np.asarray(x, np.float64) - np.max(x))
  return x / x.sum()


@pytest.mark.parametrize("value", [0.2, 1.0, 3.0])
def test_temperature_divides(value):
  np.testing.assert_allclose(
    softmax(Temperature(value)(LOGITS)), softmax(LOGITS.astype(np.float64) / value), atol=1e-6
  )


@pytest.mark.parametrize("k", [1, 3, 39, 40, 1000])
def test_top_k_keeps_the_k_likeliest(k):
  p = softmax(LOGITS)
  p[np.argsort(-p)[k:]] = 0
  np.testing.assert_allclose(softmax(TopK(k)(LOGITS)), p / p.sum(), atol=1e-7)


@pytest.mark.parametrize("top_p", [1e-9, 0.3, 0.5, 0.9, 0.999, 1.0])
def test_top_p_keeps_the_fewest_that_hold_p(top_p):
  p = softmax(LOGITS)
  order = np.argsort(-p)
  count = next(n for n in range(1, 41) if n == 40 or p[order[:n]].sum() >= top_p)
  p[order[count:]] = 0
  found = softmax(TopP(top_p)(LOGITS))
  assert (found > 0).sum() == count >= 1
  np.testing.assert_allclose(found, p / p.sum(), atol=1e-7)


@pytest.mark.parametrize("min_p", [1e-6, 0.02, 0.3, 1.0])
def test_min_p_keeps_what_is_p_times_as_likely_as_the_likeliest(min_p):
  p = softmax(LOGITS)
  p[p < min_p * p.max()] = 0
  np.testing.assert_allclose(softmax(MinP(min_p)(LOGITS)), p / p.sum(), atol=1e-7)


@pytest.mark.parametrize("mass", [1e-9, 0.2, 0.7, 0.95, 1.0])
def test_typical_p_keeps_the_fewest_of_typical_surprisal(mass):
  p = softmax(LOGITS)
  order = np.argsort(np.abs(-np.log(p) + (p * np.log(p)).sum()))
  count = next(n for n in range(1, 41) if n == 40 or p[order[:n]].sum() >= mass)
  p[order[count:]] = 0
  np.testing.assert_allclose(softmax(TypicalP(mass)(LOGITS)), p / p.sum(), atol=1e-7)


@pytest.mark.parametrize("value", [0.5, 1.0, 1.3])
def test_repetition_penalty_divides_what_occurred(value):
  expected = LOGITS.astype(np.float64)
  for token in {*PROMPT, *NEW}:
    expected[token] *= value if expected[token] < 0 else 1 / value
  np.testing.assert_allclose(RepetitionPenalty(value)(LOGITS, HISTORY), expected, rtol=1e-6)


@pytest.mark.parametrize("frequency, presence", [(0.0, 0.0), (0.7, 0.0), (0.0, 1.1), (-0.4, 0.3)])
def test_frequency_and_presence_penalties_count_new_tokens(frequency, presence):
  counts = collections.Counter(NEW.tolist())
  assert set(PROMPT.tolist()) - set(counts), "some tokens of the prompt do not come again"
  expected = [
    x - counts[i] * frequency - (counts[i] > 0) * presence for i, x in enumerate(LOGITS.tolist())
  ]
  for filters in (
    (FrequencyPenalty(frequency), PresencePenalty(presence)),
    (PresencePenalty(presence), FrequencyPenalty(frequency)),
  ):
    found = functools.reduce(lambda logits, f: f(logits, HISTORY), filters, jnp.asarray(LOGITS))
    np.testing.assert_allclose(found, expected, atol=1e-6)


@pytest.mark.parametrize("n", [1, 2, 3, 31])
def test_no_run_of_n_tokens_comes_twice(n):
  text = [*PROMPT, *NEW]
  runs = {tuple(text[i : i + n]) for i in range(len(text) - n + 1)}
  end = text[len(text) - n + 1 :]
  banned = {token for token in range(40) if (*end, token) in runs}
  assert bool(banned) == (n < 31)
  found = np.asarray(NoRepeatNgram(n)(jnp.asarray(LOGITS), HISTORY))
  np.testing.assert_array_equal(
    found, np.where(np.isin(np.arange(40), list(banned)), -np.inf, LOGITS)
  )


def test_no_run_comes_twice_at_the_beginning():
  for prompt, banned in (([5], {5}), ([5, 5], {5}), ([5, 6], {5, 6})):
    for n in (1, 2, 3):
      found = np.asarray(NoRepeatNgram(n)(jnp.asarray(LOGITS), History.of(prompt)))
      expected = banned if n == 1 else {5} if n == 2 and prompt == [5, 5] else set()
      assert set(np.flatnonzero(np.isneginf(found))) == expected


def test_logit_bias_adds_and_bans():
  found = LogitBias({3: 2.5, 0: -np.inf, 39: -1.0})(LOGITS)
  expected = LOGITS.copy()
  expected[[0, 3, 39]] += [-np.inf, 2.5, -1]
  np.testing.assert_array_equal(found, expected)
  assert hash(LogitBias({3: 1.0, 5: 2.0})) == hash(LogitBias(((5, 2.0), (3, 1.0))))
  with pytest.raises(ValueError, match="bias for token 40, where the vocabulary has 40 tokens"):
    LogitBias({40: 1.0})(LOGITS)


@pytest.mark.parametrize("n", [0, 16, 17, 30])
def test_eot_waits_for_n_new_tokens(n):
  expected = np.where((np.arange(40) == 7) & (len(NEW) < n), -np.inf, LOGITS)
  np.testing.assert_array_equal(MinNewTokens(n, 7)(LOGITS, HISTORY), expected)


@pytest.mark.parametrize(
  "ours, name, arguments",
  [
    (Temperature(0.7), "Temperature", (0.7,)),
    (TopK(5), "TopK", (5,)),
    (TopP(0.8), "TopP", (0.8,)),
    (MinP(0.05), "MinP", (0.05,)),
    (TypicalP(0.6), "Typical", (0.6,)),
    (RepetitionPenalty(1.2), "RepetitionPenalty", (1.2,)),
    (NoRepeatNgram(1), "NoRepeatNGram", (1,)),
    (NoRepeatNgram(3), "NoRepeatNGram", (3,)),
    (LogitBias({3: 2.5, 4: -np.inf}), "SequenceBias", ({(3,): 2.5, (4,): -np.inf},)),
    (MinNewTokens(17, 3), "MinNewTokensLength", (14, 17, 3)),
    (MinNewTokens(16, 3), "MinNewTokensLength", (14, 16, 3)),
  ],
  ids=lambda value: value if isinstance(value, str) else None,
)
def test_filters_are_those_of_transformers(ours, name, arguments):
  torch = pytest.importorskip("torch")
  transformers = pytest.importorskip("transformers")
  processors = transformers.generation.logits_process
  kind = getattr(processors, name + "LogitsWarper", None) or getattr(
    processors, name + "LogitsProcessor"
  )
  text = torch.tensor([[*PROMPT, *NEW]])
  for seed in range(5):
    logits = np.random.default_rng(seed).normal(size=40).astype(np.float32) * 2
    theirs = kind(*arguments)(text, torch.from_numpy(logits)[None])[0].numpy()
    np.testing.assert_allclose(ours(jnp.asarray(logits), HISTORY), theirs, rtol=1e-6)


ALL = (
  LogitBias({3: -np.inf}),
  RepetitionPenalty(1.3),
  FrequencyPenalty(0.5),
  PresencePenalty(0.5),
  NoRepeatNgram(2),
  MinNewTokens(30, 5),
  Temperature(1.5),
  TopK(30),
  TypicalP(0.95),
  MinP(0.001),
  TopP(0.95),
)


def test_filters_compose_in_any_order():
  """What one has banned, the others leave banned, and none makes NaN of it."""
  for filters in (ALL, ALL[::-1], ALL[6:] + ALL[:6]):
    left = functools.reduce(lambda logits, f: f(logits, HISTORY), filters, jnp.asarray(LOGITS))
    banned = np.isneginf(left)
    assert not np.isnan(left).any() and banned[[3, 5]].all() and 2 < (~banned).sum() < 30
    kept = ~np.isneginf(np.asarray(TopP(0.5)(left)))
    assert not (kept & banned).any()


def test_one_token_is_always_left():
  best = LOGITS.argmax()
  for filters in (
    (LogitBias(dict.fromkeys(range(40), -np.inf)),),
    (TopK(1), LogitBias({best: -np.inf}), *ALL),
  ):
    for pick in (Greedy(filters), Sample(filters)):
      assert pick(jax.random.key(0), jnp.asarray(LOGITS), HISTORY) == best


def counts_of(sampler, n):
  draw = jax.vmap(sampler, (0, None, None))
  return np.bincount(
    draw(jax.random.split(jax.random.key(0), n), jnp.asarray(LOGITS), HISTORY), minlength=40
  )


def expect_draws(counts, p):
  """Chi-square; four standard deviations, and the draws are seeded."""
  kept, n = p > 0, counts.sum()
  assert not counts[~kept].any()
  chi2, freedom = ((counts - n * p)[kept] ** 2 / (n * p[kept])).sum(), kept.sum() - 1
  assert chi2 < freedom + 4 * np.sqrt(2 * freedom)


def test_filters_apply_in_their_order():
  """Top-p of the heated logits is not the heat of the top-p: and draws follow the distribution."""
  p = softmax(LOGITS.astype(np.float64) / 2)
  order = np.argsort(-p)
  p[order[np.searchsorted(np.cumsum(p[order]), 0.7) + 1 :]] = 0
  expect_draws(counts_of(Sample((Temperature(2.0), TopP(0.7))), 4000), p / p.sum())


def test_draws_follow_the_penalties():
  """No ban, so every token keeps its share."""
  counts = collections.Counter(NEW.tolist())
  logits = np.array([x - counts[i] * 0.5 for i, x in enumerate(LOGITS.tolist())])
  expect_draws(
    counts_of(Sample((FrequencyPenalty(0.5), Temperature(2.0))), 4000),
    softmax(logits / 2),
  )


def test_greedy_takes_the_likeliest():
  assert Greedy()(jax.random.key(0), jnp.asarray(LOGITS)) == LOGITS.argmax()
  assert Sample((TopK(1),))(jax.random.key(0), jnp.asarray(LOGITS)) == LOGITS.argmax()
  second = np.argsort(LOGITS)[-2]
  assert (
    Greedy((LogitBias({LOGITS.argmax(): -np.inf}),))(jax.random.key(0), jnp.asarray(LOGITS))
    == second
  )


@pytest.mark.parametrize(
  "make, rule",
  [
    (lambda: Temperature(0.0), "temperature of 0.0 is not above 0"),
    (lambda: Temperature(float("nan")), "temperature of nan is not above 0"),
    (lambda: TopK(0), "top-k of 0 keeps nothing"),
    (lambda: TopP(0.0), r"top-p of 0.0 is not in \(0, 1\]"),
    (lambda: TopP(1.1), "top-p of 1.1"),
    (lambda: MinP(0.0), r"min-p of 0.0 is not in \(0, 1\]"),
    (lambda: TypicalP(1.5), "typical-p of 1.5"),
    (lambda: RepetitionPenalty(0.0), r"repetition penalty of 0.0 is not in \(0, 1e9\]"),
    (lambda: RepetitionPenalty(float("inf")), "repetition penalty of inf"),
    (lambda: PresencePenalty(float("nan")), "presence penalty of nan: at most 1e9 either way"),
    (lambda: FrequencyPenalty(1e39), r"frequency penalty of 1e\+39: at most 1e9 either way"),
    (lambda: LogitBias({4: 1e39}), "a bias is within 1e9 or is -inf"),
    (lambda: Sample((TopK(3), 5)), "5 is no filter"),
    (lambda: Greedy(Sample()), "is no filter"),
    (lambda: NoRepeatNgram(0), "runs of 0 tokens cannot repeat"),
    (lambda: LogitBias({3: float("inf")}), "bias of inf for token 3"),
    (lambda: LogitBias({3: float("nan")}), "bias of nan for token 3"),
    (lambda: LogitBias({-1: 0.0}), "for token -1"),
    (lambda: MinNewTokens(-1, 0), "at least -1 new tokens"),
  ],
)
def test_samplers_refuse_what_cannot_be(make, rule):
  with pytest.raises(ValueError, match=rule):
    make()


def test_one_filter_or_a_list_will_do():
  assert Sample(TopK(3)) == Sample([TopK(3)]) == Sample((TopK(3),))
  assert hash(Greedy([TopK(3)])) == hash(Greedy(TopK(3)))


def test_keywords_make_filters_in_their_order():
  """Penalties, temperature, what is kept; a keyword that is None leaves its filter out."""
  assert make_sampler() == Sample() and make_sampler(greedy=True) == Greedy()
  assert make_sampler(top_k=40, temperature=0.8) == Sample((Temperature(0.8), TopK(40)))
  everything = make_sampler(
    greedy=True,
    typical_p=0.7,
    min_p=0.1,
    top_p=0.9,
    top_k=40,
    temperature=0.8,
    no_repeat_ngram=3,
    repetition_penalty=1.2,
    presence_penalty=0.5,
    frequency_penalty=0.25,
  )
  assert everything == Greedy(
    (
      FrequencyPenalty(0.25),
      PresencePenalty(0.5),
      RepetitionPenalty(1.2),
      NoRepeatNgram(3),
      Temperature(0.8),
      TopK(40),
      TopP(0.9),
      MinP(0.1),
      TypicalP(0.7),
    )
  )
  with pytest.raises(ValueError, match=r"temperature of 0 is not above 0; greedy=True"):
    make_sampler(temperature=0)
