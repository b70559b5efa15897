# SPDX-License-Identifier: Apache-2.0
"""Every decoder at its limits: weights that are not numbers, and a context that is full."""

import numpy as np
import pytest

from gpt2_jax.decoding import SlidingWindow, for_inference, generate
from gpt2_jax.decoding.beam import beam_search
from gpt2_jax.decoding.contrastive import contrastive_search
from gpt2_jax.decoding.speculative import speculative
from gpt2_jax.evaluate.generation import next_words
from gpt2_jax.model import ModelConfig
from gpt2_jax.tokenizer import Characters

TINY = ModelConfig(n_vocab=40, n_ctx=32, n_embd=8, n_head=2, n_layer=1, dtype="float32")
ALPHABET = "".join(sorted("abcdefghijklmnopqrstuvwxyz .,!?'\n;:-0123"))
PROMPTS = [[1, 2, 3], [4] * 9]

# Each decoder completes prompts with `model`; those that need a second model get a healthy one.
DECODERS = {
  "generate": lambda model, healthy, prompts, n: generate(model, prompts, n),
  "one token": lambda model, healthy, prompts, n: generate(model, prompts, 1),
  "beam": lambda model, healthy, prompts, n: beam_search(model, prompts, n, beams=2),
  "contrastive": lambda model, healthy, prompts, n: contrastive_search(model, prompts, n),
  "target": lambda model, healthy, prompts, n: speculative(model, healthy, prompts, n, 2),
  "draft": lambda model, healthy, prompts, n: speculative(healthy, model, prompts, n, 2),
}

# Broken in the middle, where NaN spreads to all logits; in the last norm and in the head, where Inf
# reaches the logits as Inf, or only one of them; and where minus Inf makes a token unlikely.
FAULTS = {
  "NaN within": ("h.mlp.c_fc.w", (0, 3, 5), np.nan),
  "Inf within": ("h.attn.c_attn.b", (0, 7), np.inf),
  "Inf in the last norm": ("ln_f.b", (3,), np.inf),
  "NaN in one row of the head": ("wte", (38, 2), np.nan),
  "-Inf in one row of the head": ("wte", (38, 2), -np.inf),
}


@pytest.fixture(scope="module")
def weights(parameters):
  return parameters(TINY, scale=0.5)


@pytest.fixture(scope="module")
def healthy(mesh, weights, place):
  with mesh(1, 1, 1):
    return place(TINY, weights)


@pytest.fixture
def broken(mesh, weights, place):
  """broken(fault): the model with one entry of one weight that is not a number."""

  def make(fault):
    name, index, value = FAULTS[fault]
    array = weights[name].copy()
    array[index] = value
    with mesh(1, 1, 1):
      return place(TINY, weights | {name: array})

  return make


@pytest.mark.parametrize("name", DECODERS)
def test_no_decoder_makes_tokens_of_weights_that_are_not_numbers(name, broken, healthy):
  """Whatever is broken, and however few of the logits it reaches."""
  whose = {"target": "the target", "draft": "the draft"}.get(name, "the model")
  for fault in FAULTS:
    with pytest.raises(FloatingPointError, match=f"{whose}'s logits are not numbers"):
      DECODERS[name](broken(fault), healthy, PROMPTS, 4)
      pytest.fail(f"{fault}: {name} generated on")


def test_no_word_is_made_of_weights_that_are_not_numbers(broken):
  for fault in FAULTS:
    with pytest.raises(FloatingPointError, match="logits are not numbers"):
      next_words(for_inference(broken(fault)), Characters(ALPHABET), PROMPTS, 2, (2, 16))
      pytest.fail(fault)


@pytest.mark.parametrize("length, n", [(32, 1), (29, 4)])
def test_the_last_new_token_may_lie_behind_the_context(length, n, healthy, tokens):
  """It is predicted, and never read: all decoders make the tokens of one that has more room."""
  [prompt] = tokens(1, 32, 40)[:, :length].tolist()
  roomy = generate(healthy, [prompt], n, window=SlidingWindow(8))[0].tokens
  assert len(roomy) == n

  for decode in (DECODERS["generate"], DECODERS["target"]):
    done = decode(healthy, healthy, [[1], prompt], n)
    row = getattr(done, "completions", done)[1]
    assert row.tokens == roomy
  assert beam_search(healthy, [prompt], n, beams=1)[0][0].tokens == roomy

  # One token more is refused by each; so is a last token that contrastive search would read.
  for decode in (DECODERS["generate"], DECODERS["beam"], DECODERS["target"]):
    with pytest.raises(ValueError, match="exceed the context of 32 and the one token behind it"):
      decode(healthy, healthy, [prompt], n + 1)
  with pytest.raises(ValueError, match="exceed the context of 32; ask for fewer"):
    contrastive_search(healthy, [prompt], n)
