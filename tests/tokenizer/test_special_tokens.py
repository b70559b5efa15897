# SPDX-License-Identifier: Apache-2.0
"""Special tokens in a text: plain text unless they are named, and parsed as transformers does."""

import json
import random

import pytest
import tokenizers

from gpt2_jax.tokenizer import (
  EOT,
  Characters,
  Gpt2Bpe,
  HuggingFace,
  SentencePiece,
  train_sentencepiece,
)
from gpt2_jax.tokenizer.interface import split_at_tokens

USER = tokenizers.AddedToken("<|user|>", normalized=False)
# Flags say how the spaces and letters beside a token are read.
SPECIALS = (
  USER,
  tokenizers.AddedToken("<left>", lstrip=True, normalized=False),
  tokenizers.AddedToken("<right>", rstrip=True, normalized=False),
  tokenizers.AddedToken("WORD", single_word=True, normalized=False),
  tokenizers.AddedToken("<Case>", normalized=True),
  tokenizers.AddedToken("<|user|>2", normalized=False),
)


@pytest.fixture(scope="module")
def library() -> tokenizers.Tokenizer:
  """Byte-level BPE that folds case, with special tokens of all flags and an ordinary added one."""
  tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
  tokenizer.normalizer = tokenizers.normalizers.Lowercase()
  tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
  tokenizer.decoder = tokenizers.decoders.ByteLevel()
  trainer = tokenizers.trainers.BpeTrainer(
    vocab_size=280,
    special_tokens=[EOT],
    initial_alphabet=sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()),
    show_progress=False,
  )
  tokenizer.train_from_iterator(["hello world the cat sat"] * 20, trainer)
  tokenizer.add_special_tokens(list(SPECIALS))
  tokenizer.add_tokens(["<plain>"])
  return tokenizer


@pytest.fixture(scope="module")
def ours(library) -> HuggingFace:
  return HuggingFace(library.to_str())


@pytest.fixture(scope="module")
def pieces() -> SentencePiece:
  return train_sentencepiece(["the quick brown fox jumps over the lazy dog\n" * 20], 300)


def texts(tokens, count: int):
  """Random texts of tokens, parts of them, words and spaces."""
  choose = random.Random(0)
  parts = [*tokens, " ", "  ", "\n", "hello", "word", "WORDy", "é", "<case>", "<|user", ">"]
  for _ in range(count):
    yield "".join(choose.choices(parts, k=choose.randint(0, 8)))


def test_special_tokens_are_those_of_transformers(library, ours):
  transformers = pytest.importorskip("transformers")
  theirs = transformers.PreTrainedTokenizerFast(tokenizer_object=library, eos_token=EOT)
  assert ours.special_tokens == (EOT, *(str(token.content) for token in SPECIALS), "<plain>")
  for text in texts(ours.special_tokens, 1000):
    assert ours.encode(text, special=True) == theirs.encode(text, add_special_tokens=False), text
    assert ours.encode(text, special=ours.special_tokens) == ours.encode(text, special=True)


def test_a_special_token_that_is_not_named_is_text(library, ours):
  """Against a file that has only the named ones: of the others, no id may come."""
  named = ("<|user|>", "<left>", "<Case>")
  names = {token.content: library.token_to_id(token.content) for token in SPECIALS}
  payload = json.loads(library.to_str())
  payload["added_tokens"] = [
    token for token in payload["added_tokens"] if token["content"] in (*named, "<plain>")
  ]
  # The ids of a file without some tokens are others: compare how the tokens are written.
  fewer = tokenizers.Tokenizer.from_str(json.dumps(payload))

  used = set()
  for text in texts([token for token in ours.special_tokens if token != "<|user|>2"], 500):
    ids = ours.encode(text, special=named)
    theirs = fewer.encode(text, add_special_tokens=False).ids
    assert list(map(library.id_to_token, ids)) == list(map(fewer.id_to_token, theirs))
    used |= set(ids)
  assert used & set(names.values()) == {names[token] for token in named}


def test_text_is_text_by_default(ours, pieces):
  for tokenizer in (ours, pieces):
    text = f"hello{EOT}fox"
    assert tokenizer.eot not in tokenizer.encode(text)
    assert tokenizer.encode(text) == tokenizer.encode(text, special=False)
    once = [*tokenizer.encode("hello"), tokenizer.eot, *tokenizer.encode("fox")]
    assert tokenizer.encode(text, special=True) == tokenizer.encode(text, special=[EOT]) == once
    assert tokenizer.encode(text, allow_eot=True) == once


def test_gpt2s_only_special_token():
  tokenizer = Gpt2Bpe()
  try:
    tokenizer.encode("")
  except ValueError as error:
    pytest.skip(f"{error}, TIKTOKEN_CACHE_DIR")
  assert tokenizer.special_tokens == (EOT,)
  assert tokenizer.encode(f"Hi{EOT}", special=True) == [17250, 50256]
  assert tokenizer.encode(f"Hi{EOT}") == [17250, 27, 91, 437, 1659, 5239, 91, 29]


def test_sentencepieces_special_tokens_are_its_control_pieces(pieces):
  assert pieces.special_tokens == ("<unk>", EOT)
  assert pieces.encode("<unk>fox", special=["<unk>"]) == [0, *pieces.encode("fox")]
  assert 0 not in pieces.encode("<unk>fox", special=[EOT])


def test_an_end_of_text_that_the_file_does_not_mark_is_special_too():
  vocab = {token: i for i, token in enumerate([*map(chr, range(33, 127)), EOT])}
  payload = json.loads(HuggingFace.from_merges(vocab, []).payload)
  payload["added_tokens"] = []
  tokenizer = HuggingFace(json.dumps(payload))
  assert tokenizer.special_tokens == (EOT,) and tokenizer.eot == 94
  assert tokenizer.encode(f"a{EOT}", special=True) == [vocab["a"], 94]


def test_a_token_that_is_none_is_one_line_with_the_nearest_names(ours, pieces):
  with pytest.raises(ValueError, match="'<user>' is none of the tokenizer's 8 special tokens; the"):
    ours.encode("x", special=["<user>"])
  with pytest.raises(ValueError, match="nearest are '<unk>'"):
    pieces.encode("x", special=("<unk",))
  with pytest.raises(ValueError, match="'<s>' is none of the tokenizer's 0 special tokens$"):
    Characters("x").encode("x", special=("<s>",))
  with pytest.raises(ValueError) as error:
    ours.encode("x", special=["y" * 10**6])
  assert len(str(error.value)) < 300
  for special in ("<|user|>", 5, None, [1]):
    with pytest.raises(ValueError, match=r"give several tokens, as \('<|user|>',\), or True"):
      ours.encode("x", special=special)


def test_of_tokens_that_begin_alike_the_longer_counts():
  assert list(split_at_tokens("a<x>y<x>", ["<x>", "<x>y"])) == [
    ("a", False),
    ("<x>y", True),
    ("<x>", True),
  ]
  assert list(split_at_tokens("a", [])) == [("a", False)] and list(split_at_tokens("", [])) == []
