# SPDX-License-Identifier: Apache-2.0
"""The published samples of GPT-2 XL, and which of them a token store has."""

import os
import pathlib

import pytest

from experiments.published_samples import read_published_samples
from gpt2_jax.data.tokenize_corpus import encode_corpus
from gpt2_jax.evaluate.memorization.extraction import find_verbatim
from gpt2_jax.evaluate.memorization.search import find_texts
from gpt2_jax.tokenizer import load_tokenizer


def test_what_is_planted_is_found_and_nothing_else(tmp_path):
  """Every third memorized part is in a corpus, two documents each."""
  data = os.environ.get("GPT2_JAX_TEST_DATA")
  if not data:
    pytest.skip("GPT2_JAX_TEST_DATA has extracted_samples.md")
  samples = read_published_samples(pathlib.Path(data, "memorization", "extracted_samples.md"))
  assert len(samples) == 46
  assert {sample.sampling for sample in samples} == {"Top-k", "Internet", "Temperature"}
  assert sum(sample.metric == "Zlib" for sample in samples) >= 5
  parts = list(dict.fromkeys(part for sample in samples for part in sample.parts))
  assert any(part.startswith("It was the best of times") for part in parts)

  # What is planted lies between other words, and no part is in another one.
  tokenizer = load_tokenizer("gpt2")
  planted = parts[::3]
  documents = [f"{before} {part} and so on" for part in planted for before in ("First:", "Then")]
  store = encode_corpus(documents, tokenizer, str(tmp_path / "store"), {}, 1)
  counts = [found.documents for found in find_texts(store, parts)]
  assert counts == [2 * (part in planted) for part in parts]
  for part, found in zip(parts, find_verbatim(store, tokenizer, parts, 20), strict=True):
    n_tokens = len(tokenizer.encode(part))
    if part in planted and n_tokens > 25:
      assert found.tokens >= n_tokens - 2
