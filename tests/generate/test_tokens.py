# SPDX-License-Identifier: Apache-2.0
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from gpt2_jax.generate import Greedy, Sample, Temperature, TopK, TopP, generate
from gpt2_jax.model import ModelConfig

TINY = ModelConfig(n_vocab=97, n_ctx=96, n_embd=16, n_head=4, n_layer=2, dtype="float32")
N_NEW = 12
LENGTHS = (1, 7, 30, 63, 64, 65, 84)  # 84 + 12 fills the context


@pytest.fixture(scope="module")
def prompts(tokens):
  return [row[:length].tolist() for row, length in zip(tokens(len(LENGTHS), 96, 97), LENGTHS, strict=True)]


@pytest.fixture(scope="module")
def weights(parameters):
  """Sharp attention, loud positions, small biases and no token that is likely everywhere: what comes next depends on
  all that came before."""
  arrays = parameters(TINY, scale=0.5)
  scales = {"h.attn.c_attn.w": 4, "wpe": 4, "wte": 4 / np.linalg.norm(arrays["wte"], axis=1, keepdims=True)}
  scales |= {name: 0.3 for name in arrays if name.endswith(".b")} | {"ln_f.b": 0}
  return {name: array * scales.get(name, 1) for name, array in arrays.items()}


@pytest.fixture(scope="module")
def greedy(mesh, weights, place, prompts):
  """The continuations of all prompts in one batch, on one device."""
  with mesh(1, 1, 1):
    return generate(place(TINY, weights), prompts, N_NEW)


def test_cached_decoding_is_the_full_forward_pass(mesh, weights, place, prompts, greedy):
  tokens_BT = np.zeros((len(prompts), TINY.n_ctx), np.int32)
  for row, prompt in enumerate(prompts):
    tokens_BT[row, : len(prompt)] = prompt
  rows, lengths = np.arange(len(prompts)), np.array(LENGTHS)
  with mesh(1, 1, 1):
    model, forward = place(TINY, weights), jax.jit(lambda model, tokens: model(tokens))
    for n in range(N_NEW):
      logits = np.array(forward(model, tokens_BT))[rows, lengths + n - 1]
      tokens_BT[rows, lengths + n] = logits.argmax(-1)
  expected = [tokens_BT[row, length : length + N_NEW].tolist() for row, length in enumerate(LENGTHS)]
  assert greedy == expected
  assert len({token for row in greedy for token in row}) > 20  # not one token over and over


def test_a_prompt_alone_is_continued_as_in_company(mesh, weights, place, prompts, greedy):
  with mesh(1, 1, 1):
    model = place(TINY, weights)
    for prompt, expected in zip(prompts, greedy, strict=True):
      assert generate(model, [prompt], N_NEW) == [expected]


@pytest.mark.parametrize("sizes", [(1, 4, 2), (2, 2, 2)], ids=str)
def test_every_mesh_generates_the_same(sizes, mesh, weights, place, prompts, greedy):
  """Also 7 prompts on 4 rows of devices."""
  with mesh(*sizes):
    assert generate(place(TINY, weights), prompts, N_NEW) == greedy


def test_eot_ends_its_row_and_is_left_out(mesh, weights, place, prompts, greedy):
  def until(row, eot):
    return row[: row.index(eot)] if eot in row else row

  with mesh(1, 1, 1):
    model = place(TINY, weights)
    for eot in (greedy[2][5], greedy[0][0], greedy[3][-1]):
      expected = [until(row, eot) for row in greedy]
      assert expected != greedy
      assert generate(model, prompts, N_NEW, eot=eot) == expected


def test_what_cannot_be_continued_is_refused(mesh, weights, place):
  with mesh(1, 1, 1):
    model = place(TINY, weights)
    with pytest.raises(ValueError, match="90 prompt and 7 new tokens exceed the context of 96"):
      generate(model, [[1], [1] * 90], 7)
    for prompts, n_new in (([], 3), ([[]], 3), ([[1], []], 3), ([[1]], 0)):
      with pytest.raises(ValueError, match="no empty prompt"):
        generate(model, prompts, n_new)


def test_padding_of_the_vocabulary_is_never_predicted(mesh, weights, place, put, prompts, greedy):
  """Not even when its rows are loud."""
  for sizes in ((1, 1, 1), (2, 2, 2)):
    with mesh(*sizes):
      model = place(TINY, weights)
      loud = np.full((128, 16), 100, np.float32)
      loud[:97] = weights["wte"]
      model.wte[...] = put(loud, P(("model", "data"), None))
      assert generate(model, prompts, N_NEW) == greedy


def test_padded_heads_generate_the_same(mesh, parameters, place, prompts):
  config = dataclasses.replace(TINY, n_embd=40, n_head=5, pad_heads=True)
  arrays, found = parameters(config, scale=0.3), []
  for sizes in ((1, 1, 1), (1, 1, 2)):
    with mesh(*sizes):
      found.append(generate(place(config, arrays), prompts, N_NEW))
  assert found[0] == found[1]


def test_sampling_is_seeded(mesh, weights, place, prompts):
  """A row's tokens depend on the seed and its place, not on its company or the mesh."""
  sampler = Sample((Temperature(2.0), TopP(0.95)))
  with mesh(1, 1, 1):
    sample = functools.partial(generate, place(TINY, weights), n_new=N_NEW, sampler=sampler)
    one, same, other = (sample(prompts, seed=seed) for seed in (0, 0, 1))
    twins = sample([prompts[1]] * 7)
    assert sample(prompts[:1]) == one[:1]
    even = generate(place(TINY, weights | {"wte": weights["wte"] * 0}), prompts, N_NEW, sampler=sampler)
  assert all(len(set(row)) > 6 for row in even), "each position draws its own number, even where nothing else differs"
  assert one == same
  assert all(a != b for a, b in zip(one, other, strict=True))
  assert len({tuple(row) for row in twins}) == 7, "rows draw their own numbers"
  assert twins[1] == one[1]
  with mesh(2, 2, 2):
    assert generate(place(TINY, weights), prompts, N_NEW, sampler=sampler) == one


LOGITS = np.random.default_rng(0).normal(size=40).astype(np.float32) * 2


def softmax(x):
  x = np.exp(np.asarray(x, np.float64) - np.max(x))
  return x / x.sum()


@pytest.mark.parametrize("value", [0.2, 1.0, 3.0])
def test_temperature_divides(value):
  np.testing.assert_allclose(softmax(Temperature(value)(LOGITS)), softmax(LOGITS.astype(np.float64) / value), atol=1e-6)


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


def test_filters_apply_in_their_order():
  """Top-p of the heated logits is not the heat of the top-p: and draws follow the distribution (chi-square)."""
  p = softmax(LOGITS.astype(np.float64) / 2)
  order = np.argsort(-p)
  p[order[np.searchsorted(np.cumsum(p[order]), 0.7) + 1 :]] = 0
  p /= p.sum()
  draw = jax.vmap(Sample((Temperature(2.0), TopP(0.7))), (0, None))
  n = 4000
  counts = np.bincount(draw(jax.random.split(jax.random.key(0), n), jnp.asarray(LOGITS)), minlength=40)
  kept = p > 0
  assert not counts[~kept].any()
  chi2, freedom = ((counts - n * p)[kept] ** 2 / (n * p[kept])).sum(), kept.sum() - 1
  assert chi2 < freedom + 4 * np.sqrt(2 * freedom)  # four standard deviations, and the draws are seeded


def test_greedy_takes_the_likeliest():
  assert Greedy()(jax.random.key(0), jnp.asarray(LOGITS)) == LOGITS.argmax()
  assert Sample((TopK(1),))(jax.random.key(0), jnp.asarray(LOGITS)) == LOGITS.argmax()


@pytest.mark.parametrize(
  "make, rule",
  [
    (lambda: Temperature(0.0), "temperature of 0.0 is not above 0"),
    (lambda: Temperature(float("nan")), "temperature of nan is not above 0"),
    (lambda: TopK(0), "top-k of 0 keeps nothing"),
    (lambda: TopP(0.0), r"top-p of 0.0 is not in \(0, 1\]"),
    (lambda: TopP(1.1), "top-p of 1.1"),
  ],
)
def test_samplers_refuse_what_cannot_be(make, rule):
  with pytest.raises(ValueError, match=rule):
    make()
