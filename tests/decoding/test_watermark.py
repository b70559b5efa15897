# SPDX-License-Identifier: Apache-2.0
"""Watermarks: the hash against published numbers, the distributions, and generation on any mesh."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend import random as extend_random

from gpt2_jax.decoding import Sample, TopK, generate, stream
from gpt2_jax.decoding.samplers import History
from gpt2_jax.decoding.speculative import speculative
from gpt2_jax.decoding.watermark import (
  GreenListWatermark,
  GumbelWatermark,
  SynthIdWatermark,
  parse_watermark,
  threefry,
)
from gpt2_jax.model import ModelConfig
from gpt2_jax.tokenizer import Characters

TINY = ModelConfig(n_vocab=97, n_ctx=64, n_embd=16, n_head=4, n_layer=1, dtype="float32")
KEY = 0x0123_4567_89AB_CDEF
WATERMARKS = {
  "green": GreenListWatermark(KEY, gamma=0.5, context=2),
  "selfhash": GreenListWatermark(KEY, gamma=0.5, context=2, self_hash=True),
  "gumbel": GumbelWatermark(KEY, context=2),
  "synthid": SynthIdWatermark(KEY, depth=40, context=2),
}


def test_the_hash_is_threefry():
  """The known answers of Random123, its authors' library; and JAX's own."""
  zero, ones = np.zeros(1, np.uint32), np.full(1, 0xFFFFFFFF, np.uint32)
  pi = np.array([0x243F6A88], np.uint32), np.array([0x85A308D3], np.uint32)
  for key, counts, words in (
    (0, (zero, zero), (0x6B200159, 0x99BA4EFE)),
    (2**64 - 1, (ones, ones), (0x1CB996FC, 0xBB002BE7)),
    (0x03707344_13198A2E, pi, (0xC4923A9C, 0x483DF7A0)),
  ):
    assert [int(word[0]) for word in threefry(key, *counts)] == list(words)

  counts = np.random.default_rng(0).integers(0, 2**32, (2, 1000), np.uint32)
  halves = jnp.array([KEY & 0xFFFFFFFF, KEY >> 32], jnp.uint32)
  theirs = extend_random.threefry_2x32(halves, jnp.asarray(counts))
  np.testing.assert_array_equal(np.stack(threefry(KEY, *counts)), theirs)


def contexts(n: int, width: int = 2, seed: int = 0) -> np.ndarray:
  return np.random.default_rng(seed).integers(0, 50_257, (n, width))


def filtered(watermark, logits_V, context_NC, n_vocab: int):
  """The logits after contexts that are the whole prompt, [N, V]."""

  def after(context_C):
    return watermark(logits_V, History(context_C, 0, len(context_C), len(context_C)))

  return jax.jit(jax.vmap(after))(jnp.asarray(context_NC, jnp.int32))[:, :n_vocab]


@pytest.mark.parametrize("name", ["green", "selfhash"])
def test_lists_on_the_device_are_those_of_detection(name):
  context_NC = contexts(50)
  logits_NV = np.asarray(filtered(WATERMARKS[name], jnp.zeros(300), context_NC, 300))
  token_NV = np.broadcast_to(np.arange(300, dtype=np.uint32), (50, 300))
  columns = [column[:, None] for column in context_NC.astype(np.uint32).T]
  is_green_NV = WATERMARKS[name].is_green(columns, token_NV)
  np.testing.assert_array_equal(logits_NV == 2.0, is_green_NV)
  assert (logits_NV[~is_green_NV] == 0).all()
  assert is_green_NV.mean() == pytest.approx(0.5, abs=4 * 0.5 / np.sqrt(50 * 300))


def test_an_edit_of_a_token_that_does_not_count_leaves_a_self_hash_as_it_is():
  """Of n tokens that count one decides: an edit of another changes 1 / n of the bits at most."""
  a, b = np.random.default_rng(0).integers(0, 50_257, (2, 4000, 5)).astype(np.uint32)
  b[:, 1:] = a[:, 1:]
  watermark = GreenListWatermark(KEY, gamma=0.5, context=4, self_hash=True)
  bits = [watermark.is_green(list(x[:, :4].T), x[:, 4]) for x in (a, b)]
  assert 0.05 < (bits[0] != bits[1]).mean() < 0.25
  left = GreenListWatermark(KEY, gamma=0.5, context=4)
  bits = [left.is_green(list(x[:, :4].T), x[:, 4]) for x in (a, b)]
  assert 0.45 < (bits[0] != bits[1]).mean() < 0.55


def chi_square(counts, p) -> float:
  """Standard deviations by which chi-square lies above what draws from p have."""
  expected = p * counts.sum()
  freedom = len(p) - 1
  return (((counts - expected) ** 2 / expected).sum() - freedom) / np.sqrt(2 * freedom)


@pytest.mark.parametrize("name", ["gumbel", "synthid"])
def test_over_contexts_the_draws_are_the_models(name):
  logits_V = jnp.asarray(np.random.default_rng(1).normal(size=20) * 1.5, jnp.float32)
  logits_NV = filtered(WATERMARKS[name], logits_V, contexts(40_000), 20)
  draws_N = jax.random.categorical(jax.random.key(0), logits_NV)
  counts = np.bincount(draws_N, minlength=20)
  assert abs(chi_square(counts, np.asarray(jax.nn.softmax(logits_V), float))) < 4

  # Each context alone leaves little to chance.
  entropy = float(-jnp.sum(jax.nn.softmax(logits_V) * jax.nn.log_softmax(logits_V)))
  p_NV = np.asarray(jax.nn.softmax(logits_NV), float)
  left = -np.sum(p_NV * np.log(np.maximum(p_NV, 1e-30))) / len(p_NV)
  assert left < entropy / 4


def test_the_tournament_is_that_of_pairs_of_draws():
  """One layer: of two draws that with g = 1 wins, and among equals either."""
  logits_V = np.random.default_rng(1).normal(size=6).astype(np.float32)
  p_V = np.exp(logits_V) / np.exp(logits_V).sum()
  one = SynthIdWatermark(KEY, depth=1, context=2)
  context_NC = contexts(4)
  columns = [column[:, None] for column in context_NC.astype(np.uint32).T]
  g_NV = one.bits(columns, np.broadcast_to(np.arange(6, dtype=np.uint32), (4, 6)))[..., 0]
  for logits, g_V in zip(filtered(one, jnp.asarray(logits_V), context_NC, 6), g_NV, strict=True):
    expected = np.zeros(6)
    for a in range(6):
      for b in range(6):
        winner = a if g_V[a] >= g_V[b] else b
        expected[winner] += p_V[a] * p_V[b]
    np.testing.assert_allclose(np.exp(logits), expected, rtol=1e-5)


@pytest.mark.parametrize("name", ["gumbel", "synthid"])
def test_a_context_that_has_come_before_is_left_to_chance(name):
  logits_V = jnp.zeros(7)
  repeated, fresh = History.of([1, 2, 3, 1], [2]), History.of([1, 2, 3, 4], [2])
  assert jnp.array_equal(WATERMARKS[name](logits_V, repeated), logits_V)
  assert not jnp.array_equal(WATERMARKS[name](logits_V, fresh), logits_V)


@pytest.mark.parametrize("name", WATERMARKS)
def test_a_row_that_is_shorter_than_a_context_is_left_as_it_is(name):
  assert jnp.array_equal(WATERMARKS[name](jnp.arange(7.0), History.of([3])), jnp.arange(7.0))


FILTERS = (TopK(30), WATERMARKS["gumbel"])


@pytest.fixture(scope="module")
def arrays(loud_parameters):
  return loud_parameters(TINY)


@pytest.fixture(scope="module")
def prompts(tokens):
  return [row[:n].tolist() for row, n in zip(tokens(2, 9, 97), (5, 9), strict=True)]


def test_a_row_is_what_it_is_alone_and_on_any_mesh(prompts, arrays, mesh, place):
  sampler = Sample((WATERMARKS["synthid"],))
  rows = []
  for sizes, n_rows in (((1, 1, 1), 1), ((2, 2, 2), 2)):
    with mesh(*sizes):
      rows.append(generate(place(TINY, arrays), prompts[:n_rows], 12, sampler)[0])
  assert rows[0] == rows[1] and len(set(rows[0].tokens)) > 4


@pytest.mark.parametrize("name", ["selfhash", "synthid"])
def test_a_stream_is_the_text_of_generate(name, prompts, arrays, mesh, place):
  """A portion begins where the one before ended: contexts reach over its border."""
  tokenizer = Characters("".join(map(chr, range(0x4E00, 0x4E00 + 97))))
  sampler, prompt = Sample((TopK(30), WATERMARKS[name])), prompts[0]
  with mesh(1, 1, 1):
    model = place(TINY, arrays)
    (completion,) = generate(model, [prompt], 20, sampler, seed=3)
    (plain,) = generate(model, [prompt], 20, Sample((TopK(30),)), seed=3)
  chunks = list(stream(model, tokenizer, tokenizer.decode(prompt), 20, sampler, seed=3))
  assert "".join(chunks) == tokenizer.decode(completion.tokens)
  assert len(chunks) > 4 and completion != plain


def test_gumbel_and_speculative_decoding(prompts, arrays, mesh, place):
  """The same token whatever the seed; and what a draft proposes changes nothing."""
  with mesh(1, 1, 1):
    model, draft = (place(TINY, x) for x in (arrays, arrays | {"wpe": np.ones((64, 16))}))
    drawn = generate(model, prompts, 12, Sample(FILTERS), seed=5)
    found = speculative(model, draft, prompts, 12, 2, Sample(FILTERS))
  assert found.completions == drawn and 0 < found.acceptance < 1


def test_what_cannot_be_is_refused():
  for make, message in (
    (lambda: GreenListWatermark(-1), "key of a watermark is -1; it is a number of 64 bits"),
    (lambda: GumbelWatermark(True), "key of a watermark is True"),
    (lambda: GreenListWatermark(1, gamma=1.0), "gamma is between 0 and 1"),
    (lambda: GreenListWatermark(1, delta=0.0), "delta is in"),
    (lambda: GumbelWatermark(1, context=0), "0 tokens of context"),
    (lambda: SynthIdWatermark(1, depth=65), "depth is from 1 to 64"),
    (lambda: parse_watermark("gumbel"), "has no key; give KIND:KEY"),
    (lambda: parse_watermark("gumble:7"), "no watermark 'gumble'"),
    (lambda: parse_watermark("gumbel:" + "9" * 20), "a number of 64 bits"),
  ):
    with pytest.raises(ValueError, match=message):
      make()
  assert parse_watermark("7") == parse_watermark("green:7") == GreenListWatermark(7)
