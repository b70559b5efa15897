# SPDX-License-Identifier: Apache-2.0
"""Canaries: the scores of the whole space against the model's own logits, ranks against SciPy's."""

import collections
import dataclasses
import re

import jax
import numpy as np
import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st

from gpt2_jax.evaluate.memorization.canaries import (
  CanarySpace,
  draw_secrets,
  exposure,
  mean_exposure,
  plant,
  score_space,
)
from gpt2_jax.evaluate.scorers import Scorer
from gpt2_jax.model import ModelConfig
from gpt2_jax.tokenizer import EOT, Characters, HuggingFace, byte_alphabet

TINY = ModelConfig(n_vocab=128, n_ctx=64, n_embd=32, n_head=2, n_layer=2, dtype="float32")
CHARACTERS = Characters("".join(map(chr, range(128))))
# Numbers of one and two tokens, as in GPT-2's BPE; one joins the space before the secret.
ALPHABET = [*byte_alphabet().values(), "12", "34", byte_alphabet()[ord(" ")] + "5", EOT]
PAIRS = [("1", "2"), ("3", "4"), (byte_alphabet()[ord(" ")], "5")]
BPE = HuggingFace.from_merges({token: i for i, token in enumerate(ALPHABET)}, PAIRS)


@pytest.mark.parametrize(
  ("tokenizer", "n_ctx"), [(BPE, 64), (CHARACTERS, 14)], ids=["bpe", "short"]
)
def test_the_whole_space_is_scored_as_the_model_says(tokenizer, n_ctx, mesh, parameters, place):
  """Whether neighbours share the row of their context, or there is no room for it."""
  config = dataclasses.replace(TINY, n_vocab=tokenizer.vocab_size, n_ctx=n_ctx)
  with mesh(1, 1, 1):
    model = place(config, parameters(config))
  space = CanarySpace("My ID is {}.", 2, "123456")
  nats_R = score_space(Scorer(model, tokenizer), space)

  ids = [tokenizer.encode(space.text(number)) for number in range(len(space))]
  assert len({tuple(row) for row in ids}) == len(space)
  wanted = np.zeros(len(space))
  for length in set(map(len, ids)):
    of_length = [number for number, row in enumerate(ids) if len(row) == length]
    rows = np.array([ids[number] for number in of_length])
    with jax.set_mesh(model.mesh):
      logits = np.asarray(model(rows[:, :-1]), np.float64)[..., : config.n_vocab]
    logp = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    wanted[of_length] = -np.take_along_axis(logp, rows[:, 1:, None], -1).sum((1, 2))
  np.testing.assert_allclose(nats_R, wanted, rtol=1e-5)


@given(st.lists(st.integers(0, 20), min_size=1, max_size=50))
def test_exposure_is_log_2_of_the_space_over_the_rank(nats):
  wanted = np.log2(len(nats) / scipy.stats.rankdata(nats))
  np.testing.assert_allclose(exposure(np.array(nats, float), range(len(nats))), wanted, atol=1e-12)


def test_secrets_that_nobody_saw_have_an_exposure_of_log_2_e():
  nats_R = np.random.default_rng(0).normal(size=100_000)
  bits_R = exposure(nats_R, range(len(nats_R)))
  assert bits_R.mean() == pytest.approx(np.log2(np.e), abs=1e-3)
  assert exposure(nats_R, [nats_R.argmin()]) == [pytest.approx(np.log2(100_000))]
  # A share q of them has -log2 q or more.
  for q in (0.5, 0.01):
    assert (bits_R >= -np.log2(q)).mean() == pytest.approx(q)
  mean, low, high, _ = mean_exposure(bits_R[:10])
  assert mean == pytest.approx(bits_R[:10].mean()) and low < mean < high


def test_planting_is_a_function_of_the_seed_and_keeps_the_documents_order():
  space = CanarySpace("secret {}", 3)
  secrets = draw_secrets(space, (0, 1, 2, 64), 10, seed=3)
  assert secrets == draw_secrets(space, (0, 1, 2, 64), 10, seed=3)
  assert secrets != draw_secrets(space, (0, 1, 2, 64), 10, seed=4)
  assert collections.Counter(secrets.values()) == {0: 10, 1: 10, 2: 10, 64: 10}

  documents = [f"document {i}" for i in range(500)]
  planted = plant(documents, space, secrets, seed=3)
  assert planted == plant(documents, space, secrets, seed=3) != plant(documents, space, secrets, 4)
  assert [text for text in planted if text.startswith("document")] == documents
  found = [re.fullmatch(r"secret (\d{3})", text) for text in planted if text not in documents]
  counts = collections.Counter(int(match[1]) for match in found)
  assert counts == {number: repeats for number, repeats in secrets.items() if repeats}


def test_bad_inputs_are_one_line(mesh, parameters, place):
  for arguments, message in (
    (("My ID is",), "has to have one {}"),
    (("{}", 2, "00"), "two characters or more, each of them once"),
    (("x{}", 8), "at most 10,000,000 are scored; give 1 to 7"),
    (("x{}", 10**9), "give 1 to 7"),
  ):
    with pytest.raises(ValueError, match=message):
      CanarySpace(*arguments)
  with pytest.raises(ValueError, match="80 canaries do not fit a space of 10"):
    draw_secrets(CanarySpace("x{}", 1), range(8), 10, 0)

  with mesh(1, 1, 1):
    model = place(TINY, parameters(TINY))
  scorer = Scorer(model, CHARACTERS)
  for template, message in (
    ("ID {}", "cannot hold the canary 'ID 0': it reads character '0'"),
    ("{} is it", "begin with different tokens"),
    ("x" * 70 + "{}", "a canary of 72 tokens exceeds the model's context of 64"),
  ):
    tokenizer = Characters(" DIistx") if template == "ID {}" else CHARACTERS
    with pytest.raises(ValueError, match=message) as error:
      score_space(dataclasses.replace(scorer, tokenizer=tokenizer), CanarySpace(template, 2))
    assert "\n" not in str(error.value) and len(str(error.value)) < 400
