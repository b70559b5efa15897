# SPDX-License-Identifier: Apache-2.0
"""Exact search of a token store against a naive one."""

import os
import tempfile

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpt2_jax.data.tokenize_corpus import encode_corpus
from gpt2_jax.evaluate.memorization import search
from gpt2_jax.evaluate.memorization.search import (
  check_store,
  find_texts,
  find_tokens,
  tokenized_ways,
)
from gpt2_jax.tokenizer import EOT, Characters, HuggingFace, byte_alphabet, load_tokenizer

# Two letters: sequences occur often, begin alike, and overlap.
LETTERS = HuggingFace.from_merges({"a": 0, "b": 1, EOT: 2}, [])
BYTES = HuggingFace.from_merges(
  {token: i for i, token in enumerate([*byte_alphabet().values(), EOT])}, []
)


def naive(tokens: list[int], sequence: list[int], eot: int) -> search.Occurrences:
  n = len(sequence)
  places = [i for i in range(len(tokens) - n + 1) if tokens[i : i + n] == sequence]
  documents = {tokens[:place].count(eot) for place in places}
  return search.Occurrences(len(places), len(documents), tuple(places[: search.MOST_PLACES]))


@settings(max_examples=30)
@given(data=st.data())
def test_search_equals_a_naive_one(data):
  """Sequences of all lengths, over the ends of blocks, of parts and of documents."""
  documents = data.draw(st.lists(st.text("ab", max_size=30), min_size=1, max_size=6))
  token = st.integers(0, 2)
  sequences = data.draw(st.lists(st.lists(token, min_size=1, max_size=20), min_size=1, max_size=8))
  tokens = [i for document in documents for i in [*LETTERS.encode(document), LETTERS.eot]]
  # Some that are there, and one of a token that the store's dtype cannot hold.
  begin = data.draw(st.integers(0, len(tokens) - 1))
  sequences += [tokens[begin : begin + n] for n in (1, 7, 8, 9, 17)] + [[65_536]]
  block = data.draw(st.integers(1, 40))

  with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
    store = encode_corpus(documents, LETTERS, folder, {}, 1, data.draw(st.integers(1, 3)))
    patch.setattr(search, "BLOCK_TOKENS", block)
    assert find_tokens(store, sequences) == [naive(tokens, s, LETTERS.eot) for s in sequences]


def test_equal_hashes_are_no_finds(tmp_path, monkeypatch):
  """Where all windows have one hash, the tokens alone decide."""
  monkeypatch.setattr(search, "FACTORS", np.zeros(4, np.uint32))
  store = encode_corpus(["abba" * 9], LETTERS, str(tmp_path / "store"), {}, 1)
  counts = [found.count for found in find_tokens(store, [[0, 1, 1, 0], [1, 0, 1], [0, 0, 1]])]
  assert counts == [9, 0, 8]


@pytest.mark.skipif("TIKTOKEN_CACHE_DIR" not in os.environ, reason="TIKTOKEN_CACHE_DIR is not set")
def test_texts_are_found_wherever_a_word_or_a_line_begins(tmp_path):
  gpt2 = load_tokenizer("gpt2")
  documents = [
    "Hello there. I said: Hello there.\nHello there",
    "unrelated",
    "Hello there",
    "hello",
  ]
  documents.append("So: Othello there")  # it begins inside a word, and that is missed
  store = encode_corpus(documents, gpt2, str(tmp_path / "store"), {}, 1)
  assert len(tokenized_ways(gpt2, "Hello there")) == 2
  [hello, nothing] = find_texts(store, ["Hello there", "good bye"])
  assert (hello.count, hello.documents) == (4, 2)
  assert (nothing.count, nothing.documents, nothing.places) == (0, 0, ())


def test_a_character_is_a_token_and_no_text_counts_twice(tmp_path):
  """No token ends a document of characters; how many have the text is not known then."""
  characters = Characters("\n abc")
  store = encode_corpus(["abc abc", "cab abc"], characters, str(tmp_path / "store"), {}, 1)
  assert tokenized_ways(Characters("abc"), "ab") == [[0, 1]]
  [found] = find_texts(store, ["abc"])
  assert (found.count, found.documents) == (3, None)
  assert [tuple(store.read([place], 3)[0]) for place in found.places] == [(2, 3, 4)] * 3


def test_bad_inputs_are_one_line(tmp_path):
  store = encode_corpus(["abc"], BYTES, str(tmp_path / "store"), {}, 1)
  check_store(store, BYTES)
  with pytest.raises(ValueError, match="was made with another tokenizer") as error:
    check_store(store, LETTERS)
  assert "\n" not in str(error.value) and len(str(error.value)) < 400
  with pytest.raises(ValueError, match="text 1 is empty"):
    find_texts(store, ["a", ""])
  with pytest.raises(ValueError, match="sequence 0 is "):
    find_tokens(store, [[]])
  assert find_tokens(store, []) == []
