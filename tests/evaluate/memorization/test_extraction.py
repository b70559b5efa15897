# SPDX-License-Identifier: Apache-2.0
"""Extraction: metrics by torch, as the published code has them; duplicates; what is verbatim."""

import zlib

import jax
import numpy as np
import pytest

from gpt2_jax.convert.pretrained import load_pretrained
from gpt2_jax.data.tokenize_corpus import encode_corpus
from gpt2_jax.evaluate.memorization.extraction import (
  Verbatim,
  extraction_metrics,
  find_verbatim,
  rank_texts,
  sample_texts,
)
from gpt2_jax.evaluate.scorers import Scorer
from gpt2_jax.sharding import make_mesh
from gpt2_jax.tokenizer import EOT, Characters, HuggingFace, byte_alphabet

LETTERS = Characters("\n .ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz")
TEXTS = ["To be, or not to be".replace(",", ""), "AAAA bbbb " * 9, "The cat sat. " * 7]


@pytest.fixture(scope="module")
def published(tmp_path_factory):
  """Two models of transformers', and the same as ours."""
  torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
  theirs, scorers = [], []
  for seed, width in ((0, 32), (1, 16)):
    torch.manual_seed(seed)
    config = transformers.GPT2Config(
      vocab_size=56,
      n_positions=128,
      n_embd=width,
      n_layer=2,
      n_head=2,
      initializer_range=0.3,
      bos_token_id=None,
      eos_token_id=None,
    )
    folder = tmp_path_factory.mktemp("model")
    theirs.append(transformers.GPT2LMHeadModel(config).eval())
    theirs[-1].save_pretrained(folder)
    model = load_pretrained(str(folder), make_mesh(1, 1, 1, jax.devices()[:1]))[0]
    scorers.append(Scorer(model, LETTERS))
  return theirs, scorers


def test_metrics_are_those_of_the_published_code(published):
  torch = pytest.importorskip("torch")
  (model, smaller), (scorer, smaller_scorer) = published

  def log_perplexity(model, text: str) -> float:
    ids = torch.tensor([LETTERS.encode(text)])
    with torch.no_grad():
      return float(model(ids, labels=ids).loss)

  metrics = extraction_metrics(scorer, TEXTS, {"small": smaller_scorer})
  for i, text in enumerate(TEXTS):
    nats = log_perplexity(model, text)
    wanted = {
      "perplexity": -nats,
      "small": log_perplexity(smaller, text) / nats,
      "lowercase": log_perplexity(model, text.lower()) / nats,
      "zlib": len(zlib.compress(text.encode())) / nats,
    }
    ids = torch.tensor(LETTERS.encode(text))
    with torch.no_grad():
      logp = model(ids[None]).logits[0, :-1].log_softmax(-1)
    nats_T = -logp.gather(-1, ids[1:, None])[:, 0].numpy()
    means = [nats_T[i : i + 50].mean() for i in range(max(1, len(nats_T) - 49))]
    wanted["window"] = -min(means)
    for name, value in wanted.items():
      assert metrics[name][i] == pytest.approx(value, rel=1e-5), name
  assert set(metrics) == set(wanted)


def test_samples_are_the_seeds_and_end_where_they_shall(published):
  _, (scorer, _) = published
  texts = sample_texts(scorer, 3, 5, ("The ", "A "))
  assert texts == sample_texts(scorer, 3, 5, ("The ", "A "))
  assert [len(text) for text in texts] == [5, 5, 5]
  with pytest.raises(ValueError, match="no <|endoftext|> for an empty prompt"):
    sample_texts(scorer, 1, 5)


def test_near_duplicates_are_left_out():
  texts = ["a b c d e f", "x y z", "A b c d e g", "a b c q r s t u", "x y", "x y", "y z x"]
  metric = np.arange(len(texts), 0, -1.0)
  # Of text 3 one trigram of six is in text 0; capitals count.
  assert rank_texts(texts, metric, 10) == [0, 1, 3, 4, 6]
  assert rank_texts(texts, metric, 2) == [0, 1]
  assert rank_texts(texts, -metric, 3) == [6, 5, 3]


def test_what_is_verbatim_in_a_store(tmp_path):
  alphabet = [*byte_alphabet().values(), EOT]
  tokenizer = HuggingFace.from_merges({token: i for i, token in enumerate(alphabet)}, [])
  documents = ["the quick brown fox jumps", "a quick brown dog", "the quick"]
  store = encode_corpus(documents, tokenizer, str(tmp_path / "store"), {}, 1)
  texts = ["my quick brown foxes", "the quick", "nothing", "dog", "quick brown"]
  assert find_verbatim(store, tokenizer, texts, length=8) == [
    Verbatim(len(" quick brown fox"), 1),
    Verbatim(len("the quick"), 2),
    Verbatim(0, 0),
    Verbatim(0, 0),
    Verbatim(len("quick brown"), 2),
  ]
  with pytest.raises(ValueError, match="was made with another tokenizer"):
    find_verbatim(store, LETTERS, texts)
