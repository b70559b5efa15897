# SPDX-License-Identifier: Apache-2.0
"""A prefix of keys and values in front of every text is as good as the tokens that left them."""

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from gpt2_jax.decoding import SlidingWindow, for_inference, generate
from gpt2_jax.decoding.kv_cache import prefill, with_prefix
from gpt2_jax.model import ModelConfig

TINY = ModelConfig(n_vocab=97, n_ctx=64, n_embd=16, n_head=4, n_layer=2, dtype="float32")
LENGTH = 11


@pytest.fixture(scope="module")
def weights(parameters):
  """Sharp attention and loud positions: what comes next depends on all that came before."""
  arrays = parameters(TINY, scale=0.5)
  arrays["wte"] *= 4 / np.linalg.norm(arrays["wte"], axis=1, keepdims=True)
  return arrays | {"wpe": arrays["wpe"] * 4}


@pytest.fixture(scope="module")
def rows(tokens):
  """A prefix of tokens, and prompts of several lengths."""
  ids = tokens(5, 40, 97)
  lengths = (1, 7, 20, 40)
  return ids[4, :LENGTH].tolist(), [ids[row, :n].tolist() for row, n in enumerate(lengths)]


def prefix_of(decoder, ids):
  """Keys and values [L, P, H, K] of tokens that are read alone."""
  with jax.set_mesh(decoder.mesh):
    row = np.repeat(np.array([ids]), 4, 0)
    _, caches = jax.jit(lambda decoder, ids: prefill(decoder, ids, LENGTH))(decoder, row)
  caches = jax.device_get(caches)
  return [np.stack([cache[n][0].swapaxes(0, 1) for cache in caches]) for n in (0, 1)]


@pytest.fixture(scope="module")
def model(mesh, weights, place):
  with mesh(1, 1, 1):
    return place(TINY, weights)


def test_texts_after_a_prefix_are_those_after_its_tokens(model, rows):
  """With a window, which forgets text and never the prefix, as one that keeps its tokens."""
  prefix, prompts = rows
  decoder = for_inference(model)
  prefixed = with_prefix(decoder, prefix_of(decoder, prefix))
  options = {"n_new": 40, "logprobs": True}
  texts = generate(prefixed, prompts, window=SlidingWindow(8), **options)

  window = SlidingWindow(8, keep=LENGTH)
  expected = generate(decoder, [prefix + prompt for prompt in prompts], window=window, **options)
  for ours, theirs in zip(texts, expected, strict=True):
    assert ours.tokens == theirs.tokens
    np.testing.assert_allclose(ours.logprobs, theirs.logprobs, atol=1e-4)


def test_the_heads_of_a_prefix_are_split_like_the_model_s(model, rows, mesh, weights, place):
  prefix, prompts = rows
  with mesh(1, 1, 2):
    split = for_inference(place(TINY, weights))
  kv = prefix_of(for_inference(model), prefix)
  outputs = []
  for decoder in (for_inference(model), split):
    decoder = with_prefix(decoder, kv)
    with jax.set_mesh(decoder.mesh):
      ids = np.array(prompts[2:3])
      outputs.append(jax.jit(lambda decoder, ids: prefill(decoder, ids, 20)[0])(decoder, ids))
  assert decoder.prefixes[1][0].sharding.spec == P(None, "model", None)
  np.testing.assert_allclose(outputs[1], outputs[0], atol=1e-4)


def test_a_prefix_takes_its_room_from_the_context(model, rows):
  prefix, prompts = rows
  decoder = for_inference(model)
  kv = prefix_of(decoder, prefix)
  with pytest.raises(ValueError, match=f"exceed the context of {TINY.n_ctx - LENGTH}"):
    generate(with_prefix(decoder, kv), prompts, 30)
  long = [np.zeros((2, 64, 4, 4), np.float32)] * 2
  with pytest.raises(ValueError, match="a prefix of 64 leaves nothing of a context of 64"):
    with_prefix(decoder, long)
