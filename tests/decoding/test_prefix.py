# SPDX-License-Identifier: Apache-2.0
"""Virtual tokens that are a text's embeddings, or its keys and values, are as good as the text."""

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from gpt2_jax.decoding import SlidingWindow, for_inference, generate
from gpt2_jax.decoding.kv_cache import prefill
from gpt2_jax.finetune.prefix import PrefixTuned, PromptTuned
from gpt2_jax.model import ModelConfig

TINY = ModelConfig(n_vocab=97, n_ctx=64, n_embd=16, n_head=4, n_layer=2, dtype="float32")
LENGTH = 11


@pytest.fixture(scope="module")
def weights(loud_parameters):
  return loud_parameters(TINY)


@pytest.fixture(scope="module")
def model(mesh, weights, place):
  with mesh(1, 1, 1):
    return place(TINY, weights)


@pytest.fixture(scope="module")
def rows(tokens):
  """A text, and prompts of several lengths that follow it."""
  ids = tokens(5, 40, 97)
  lengths = (1, 7, 20, 40)
  return ids[4, :LENGTH].tolist(), [ids[row, :n].tolist() for row, n in enumerate(lengths)]


@pytest.fixture(scope="module")
def arrays(model, weights, rows):
  """The text as virtual tokens of each kind: its embeddings, and its keys and values."""
  decoder, text = for_inference(model), rows[0]
  with jax.set_mesh(decoder.mesh):
    fill = jax.jit(lambda decoder, ids: prefill(decoder, ids, LENGTH))
    _, caches = jax.device_get(fill(decoder, np.array([text])))
  layers = [np.concatenate(cache, axis=-1)[0].swapaxes(0, 1) for cache in caches]
  return {PromptTuned: np.float32(weights["wte"][text]), PrefixTuned: np.stack(layers)}


def tuned(kind, model, arrays):
  spec = P(None, "data") if kind is PromptTuned else P(None, None, "model", None)
  sharding = jax.sharding.NamedSharding(model.mesh, spec)
  return kind(model, jax.device_put(arrays[kind], sharding))


@pytest.mark.parametrize("kind", [PromptTuned, PrefixTuned])
def test_texts_after_virtual_tokens_are_those_after_the_text(kind, model, rows, arrays, expected):
  """With a window, which forgets text and never the virtual tokens, as one that keeps the text."""
  decoder = for_inference(tuned(kind, model, arrays))
  options = {"n_new": 40, "logprobs": True, "window": SlidingWindow(8)}
  for ours, theirs in zip(generate(decoder, rows[1], **options), expected, strict=True):
    assert ours.tokens == theirs.tokens
    np.testing.assert_allclose(ours.logprobs, theirs.logprobs, atol=1e-4)
  with pytest.raises(ValueError, match=f"exceed the context of {TINY.n_ctx - LENGTH}"):
    generate(decoder, rows[1], 30)


@pytest.fixture(scope="module")
def expected(model, rows):
  text, prompts = rows
  window = SlidingWindow(8, keep=LENGTH)
  return generate(model, [text + row for row in prompts], 40, window=window, logprobs=True)


@pytest.mark.parametrize("kind", [PromptTuned, PrefixTuned])
def test_on_a_mesh_each_device_has_its_own_heads(kind, model, rows, arrays, mesh, weights, place):
  with mesh(1, 2, 2):
    split = place(TINY, weights)
  ids, outputs = np.array(rows[1][2:3] * 2), []
  for whole in (model, split):
    decoder = for_inference(tuned(kind, whole, arrays))
    with jax.set_mesh(decoder.mesh):
      outputs.append(jax.jit(lambda decoder, ids: prefill(decoder, ids, 20)[0])(decoder, ids))
  assert decoder.prefixes[1][0].sharding.spec == P(None, "model", None)
  np.testing.assert_allclose(outputs[1], outputs[0], atol=1e-4)
