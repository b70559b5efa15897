# SPDX-License-Identifier: Apache-2.0
"""Losses, next tokens and attention weights, against transformers."""

import dataclasses

import jax
import numpy as np
import pytest

import gpt2_jax
from gpt2_jax.evaluate.scorers import Scorer
from gpt2_jax.model import ModelConfig
from gpt2_jax.tokenizer import EOT, Characters, HuggingFace, byte_alphabet

CONFIG = ModelConfig(n_vocab=257, n_ctx=48, n_embd=32, n_head=4, n_layer=3, dtype="float32")
TEXT = "Naïve café:\n\t$5 – 日本."
LONG = TEXT * 5


@pytest.fixture(scope="module")
def tokenizer():
  """The bytes, and `<|endoftext|>` behind them."""
  vocab = {character: byte for byte, character in byte_alphabet().items()}
  return HuggingFace.from_merges(vocab | {EOT: 256}, [])


@pytest.fixture(scope="module", params=[(1, 1, 1), (2, 2, 2)], ids=str)
def model(request, mesh, parameters, place):
  arrays = parameters(CONFIG)
  with mesh(*request.param):
    return place(CONFIG, arrays)


@pytest.fixture(scope="module")
def oracle(mesh, parameters, place, tokenizer, tmp_path_factory):
  """transformers' model of the same parameters: from ids to logits [T, V] and attentions."""
  torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
  path = tmp_path_factory.mktemp("oracle") / "hf"
  with mesh(1, 1, 1):
    gpt2_jax.save_pretrained(place(CONFIG, parameters(CONFIG)), tokenizer, str(path))
  theirs = transformers.GPT2LMHeadModel.from_pretrained(path, attn_implementation="eager").eval()

  def run(ids):
    with torch.no_grad():
      outputs = theirs(torch.tensor([ids]), output_attentions=True)
    logprobs_TV = outputs.logits[0].log_softmax(-1).numpy()
    return logprobs_TV, np.stack([layer[0].numpy() for layer in outputs.attentions])

  return run


def test_scores_are_transformers_losses(model, tokenizer, oracle):
  scores = gpt2_jax.score(model, tokenizer, TEXT)
  ids = tokenizer.encode(TEXT)
  assert scores.tokens == ids and len(scores.labels) == len(scores.nats) == len(ids) > 20
  logprobs_TV, _ = oracle([256, *ids])
  wanted = -logprobs_TV[np.arange(len(ids)), ids]
  np.testing.assert_allclose(scores.nats, wanted, atol=2e-5)
  np.testing.assert_array_equal(scores.is_first_choice, logprobs_TV[:-1].argmax(-1) == ids)
  assert scores.loss == pytest.approx(wanted.mean(), abs=1e-5)
  assert scores.perplexity == pytest.approx(np.exp(wanted.mean()), rel=1e-4)
  assert "perplexity" in repr(scores)


@pytest.mark.parametrize("stride", [None, 7])
def test_a_long_text_is_scored_as_the_evaluation_scores_it(stride, model, tokenizer):
  scores = gpt2_jax.score(model, tokenizer, LONG, stride=stride)
  assert len(scores.nats) > 2 * CONFIG.n_ctx
  [answer] = Scorer(model, tokenizer, 4, stride).rolling_loglikelihoods([tokenizer.encode(LONG)])
  assert scores.nats.sum(dtype=np.float64) == pytest.approx(answer.nats, rel=1e-6)


@pytest.mark.parametrize("length", [1, 2, 31, 32, 33, 47, 48, 49])
def test_every_length_has_a_score_for_each_token(length, model, tokenizer, oracle):
  text = ("The quick brown fox. " * 3)[:length]
  scores = gpt2_jax.score(model, tokenizer, text)
  assert len(scores.nats) == length and np.isfinite(scores.nats).all()
  logprobs_TV, _ = oracle([256, *tokenizer.encode(text)][: CONFIG.n_ctx])
  some = min(length, CONFIG.n_ctx)
  wanted = -logprobs_TV[np.arange(some), scores.tokens[:some]]
  np.testing.assert_allclose(scores.nats[:some], wanted, atol=2e-5)


def test_without_an_end_of_text_the_first_token_has_no_score(mesh, parameters, place):
  config = dataclasses.replace(CONFIG, n_vocab=4)
  with mesh(1, 1, 1):
    model = place(config, parameters(config))
  scores = gpt2_jax.score(model, Characters("abcd"), "abca")
  assert np.isnan(scores.nats[0]) and np.isfinite(scores.nats[1:]).all()
  assert scores.loss == pytest.approx(scores.nats[1:].mean())
  for text in ("", "a"):
    with pytest.raises(ValueError, match="leaves none to score"):
      gpt2_jax.score(model, Characters("abcd"), text)


def test_next_tokens_are_transformers_distribution(model, tokenizer, oracle):
  every = gpt2_jax.next_tokens(model, tokenizer, TEXT, n=CONFIG.n_vocab)
  assert every.probabilities.sum() == pytest.approx(1, abs=1e-5)
  assert sorted(every.tokens) == list(range(CONFIG.n_vocab))
  assert (np.diff(every.probabilities) <= 0).all()
  logprobs_TV, _ = oracle(tokenizer.encode(TEXT))
  np.testing.assert_allclose(every.probabilities, np.exp(logprobs_TV[-1])[every.tokens], atol=2e-6)

  some = gpt2_jax.next_tokens(model, tokenizer, TEXT)
  assert some.tokens == every.tokens[:10] and some.labels[0] in repr(some)


def test_next_tokens_after_more_than_the_context_and_after_nothing(model, tokenizer, oracle):
  for text, ids in ((LONG, tokenizer.encode(LONG)[-CONFIG.n_ctx :]), ("", [256])):
    prediction = gpt2_jax.next_tokens(model, tokenizer, text, n=257)
    logprobs_TV, _ = oracle(ids)
    wanted = np.exp(logprobs_TV[-1])[prediction.tokens]
    np.testing.assert_allclose(prediction.probabilities, wanted, atol=2e-6)


@pytest.mark.parametrize("text", [TEXT, "a", "x" * CONFIG.n_ctx])
def test_attention_weights_are_transformers(text, model, tokenizer, oracle):
  attention = gpt2_jax.attention_weights(model, tokenizer, text)
  T = len(attention.tokens)
  assert attention.weights_LHTS.shape == (3, 4, T, T)
  np.testing.assert_allclose(attention.weights_LHTS.sum(-1), 1, atol=1e-6)
  assert not np.triu(attention.weights_LHTS, 1).any()
  np.testing.assert_allclose(attention.weights_LHTS, oracle(attention.tokens)[1], atol=1e-5)


def test_padded_heads_are_left_out(mesh, parameters, place, tokenizer):
  config = dataclasses.replace(CONFIG, n_embd=24, n_head=3, pad_heads=True)
  arrays, weights = parameters(config), []
  for sizes in ((1, 1, 1), (1, 2, 2)):
    with mesh(*sizes):
      model = place(config, arrays)
    weights.append(gpt2_jax.attention_weights(model, tokenizer, TEXT).weights_LHTS)
  assert weights[0].shape[1] == 3
  np.testing.assert_allclose(*weights, atol=1e-6)


def test_quantized_models_are_looked_into_too(model, tokenizer):
  int8 = gpt2_jax.quantize(model)
  assert gpt2_jax.score(int8, tokenizer, TEXT).loss == pytest.approx(
    gpt2_jax.score(model, tokenizer, TEXT).loss, rel=0.05
  )
  rows = gpt2_jax.attention_weights(int8, tokenizer, TEXT).weights_LHTS.sum(-1)
  np.testing.assert_allclose(rows, 1, atol=1e-6)


@pytest.mark.parametrize(
  "call, rule",
  [
    (lambda m, t: gpt2_jax.next_tokens(m, t, "a", n=0), "0 next tokens of a vocabulary of 257"),
    (lambda m, t: gpt2_jax.next_tokens(m, t, "a", n=258), "give 1 to that many"),
    (lambda m, t: gpt2_jax.score(m, t, ""), "leaves none to score"),
    (lambda m, t: gpt2_jax.score(m, t, "a", stride=49), "not from 1 to the context's 48"),
    (lambda m, t: gpt2_jax.score(m, None, "a"), "there is no tokenizer"),
    (lambda m, t: gpt2_jax.score(m, t, [1, 2]), "a text is a str, and this is a list"),
    (lambda m, t: gpt2_jax.score(gpt2_jax.for_inference(m), t, "a"), "give the model itself"),
    (lambda m, t: gpt2_jax.next_tokens(gpt2_jax.for_inference(m), t, "a"), "the model itself"),
    (lambda m, t: gpt2_jax.attention_weights(gpt2_jax.for_inference(m), t, ""), "the model itself"),
    (lambda m, t: gpt2_jax.attention_weights(m, t, ""), "no empty prompt"),
    (lambda m, t: gpt2_jax.attention_weights(m, t, "a" * 49), "49 tokens exceed the context of 48"),
    (lambda m, t: gpt2_jax.next_tokens(m, Characters("a"), ""), "no empty prompt"),
  ],
)
def test_what_cannot_be_looked_into_is_refused(call, rule, model, tokenizer):
  with pytest.raises((ValueError, TypeError), match=rule):
    call(model, tokenizer)


def test_weights_that_are_no_numbers_are_told(mesh, parameters, place, tokenizer):
  arrays = parameters(CONFIG)
  arrays["ln_f.g"] = arrays["ln_f.g"] * np.nan
  with mesh(1, 1, 1):
    model = place(CONFIG, arrays)
  for look in (gpt2_jax.score, gpt2_jax.next_tokens, gpt2_jax.attention_weights):
    with pytest.raises(FloatingPointError, match="logits are not"):
      look(model, tokenizer, TEXT)


def test_weights_of_more_than_a_gigabyte_are_refused_before_they_are_made(tokenizer):
  """Two layers of 256 heads at 1,024 tokens: 2 x 256 x 1,024 x 1,024 x 4 bytes."""
  config = dataclasses.replace(CONFIG, n_ctx=1024, n_embd=256, n_head=256, n_layer=2)
  with jax.set_mesh(gpt2_jax.make_mesh(1, 1, 1, devices=jax.devices()[:1])):
    model = jax.jit(gpt2_jax.GPT2, static_argnums=0)(config, jax.random.key(0))
  with pytest.raises(ValueError, match=r"weights of 1,024 tokens take 2.1 GB, and 1.1 GB is the"):
    gpt2_jax.attention_weights(model, tokenizer, "a" * 1024)


def test_plots_of_a_text_are_figures_of_its_numbers(model, tokenizer):
  surprise = gpt2_jax.plot_surprise(model, tokenizer, TEXT)
  assert f"loss {gpt2_jax.score(model, tokenizer, TEXT).loss:.3f}" in surprise.texts[0].get_text()

  bars = gpt2_jax.plot_next_tokens(model, tokenizer, TEXT, n=5).axes[0].patches
  wanted = gpt2_jax.next_tokens(model, tokenizer, TEXT, n=5).probabilities
  np.testing.assert_allclose([bar.get_width() for bar in bars], 100 * wanted)

  panel = gpt2_jax.plot_attention(model, tokenizer, TEXT, layer=-1, head=2).axes[0]
  weights_LHTS = gpt2_jax.attention_weights(model, tokenizer, TEXT).weights_LHTS
  np.testing.assert_array_equal(panel.images[0].get_array().filled(0), weights_LHTS[2, 2])
