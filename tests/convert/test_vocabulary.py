# SPDX-License-Identifier: Apache-2.0
import json
import os

import pytest

from gpt2_jax.convert.vocabulary import default_tokenizer, read_vocabulary, write_vocabulary
from gpt2_jax.tokenizer import Characters, Gpt2Bpe, HuggingFace, train_sentencepiece

PIECES = {character: i for i, character in enumerate(["a", "b", "c", "ab", "abc", "<|endoftext|>"])}
MERGES = [("a", "b"), ("ab", "c")]


@pytest.fixture
def small():
  return HuggingFace.from_merges(PIECES, MERGES)


def test_what_is_written_is_read_again(small, tmp_path):
  texts = [f"line {i} of some text, to learn from\n" * 20 for i in range(20)]
  for name, tokenizer in {
    "bpe": small,
    "chars": Characters("abc"),
    "sp": train_sentencepiece(texts, 300),
  }.items():
    (tmp_path / name).mkdir()
    write_vocabulary(tokenizer, tmp_path / name, 16)
    found = read_vocabulary(tmp_path / name, tokenizer.vocab_size)
    assert (found.fingerprint, found.vocab_size, found.eot) == (
      tokenizer.fingerprint,
      tokenizer.vocab_size,
      tokenizer.eot,
    )
    assert found.encode("abcab") == tokenizer.encode("abcab")
  (tmp_path / "none").mkdir()
  write_vocabulary(None, tmp_path / "none", 16)
  assert not list((tmp_path / "none").iterdir())


def test_transformers_adds_no_token_of_its_own(small, tmp_path):
  """To a vocabulary with <|endoftext|>, and to one without, whose model has no row for it."""
  transformers = pytest.importorskip("transformers")
  without = HuggingFace.from_merges({piece: i for piece, i in PIECES.items() if i < 5}, MERGES)
  for name, tokenizer in (("with", small), ("without", without)):
    (tmp_path / name).mkdir()
    write_vocabulary(tokenizer, tmp_path / name, 16)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / name)
    assert (len(theirs), theirs.eos_token_id) == (tokenizer.vocab_size, tokenizer.eot)
    assert theirs("abcab")["input_ids"] == tokenizer.encode("abcab")


@pytest.mark.parametrize("files", [("vocab.json", "merges.txt"), ("encoder.json", "vocab.bpe")])
@pytest.mark.parametrize("head", ["#version: 0.2\n", ""])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_a_vocabulary_and_its_merges(files, head, end, small, tmp_path):
  (tmp_path / files[0]).write_text(json.dumps(PIECES))
  (tmp_path / files[1]).write_bytes((head + "a b\nab c\n").replace("\n", end).encode())
  found = read_vocabulary(tmp_path, 6)
  assert found.encode("abcabb") == [4, 3, 1] == small.encode("abcabb")
  assert (found.eot, found.vocab_size) == (5, 6)


def test_gpt2s_tokenizer_is_the_default_for_its_vocabulary_size(tmp_path):
  assert [default_tokenizer(n) for n in (50257, 50304, 50258, 65)] == [
    Gpt2Bpe(),
    Gpt2Bpe(),
    None,
    None,
  ]
  assert read_vocabulary(tmp_path, 50257) == Gpt2Bpe()


@pytest.mark.parametrize(
  ("files", "message"),
  [
    ({"tokenizer.json": "{"}, "cannot be used"),
    ({"tokenizer.json": ""}, "cannot be used"),
    ({"tokenizer.json": '{"model": {"type": "BPE"}}'}, "cannot be used"),
    ({"tokenizer.json": b"\xff\xfe"}, "cannot be used"),
    ({"vocab.json": "[]", "merges.txt": "a b"}, "cannot be used .*vocab.json"),
    ({"vocab.json": '{"a": 0}', "merges.txt": "a b c"}, "cannot be used"),
    ({"vocab.json": '{"a": 0}', "merges.txt": "a b"}, "cannot be used"),
    ({"vocab.json": '{"a": "x"}', "merges.txt": ""}, "cannot be used"),
    ({"encoder.json": "{", "vocab.bpe": "a b"}, "cannot be used .*encoder.json"),
    ({"gpt2_jax_tokenizer.json": '{"kind": "words"}'}, "cannot be used .no tokenizer in"),
    (
      {"gpt2_jax_tokenizer.json": '{"kind": "characters", "alphabet": "ba"}'},
      "cannot be used .an alphabet is sorted",
    ),
    ({"gpt2_jax_tokenizer.json": '{"kind": "sentencepiece", "proto": "AAAA"}'}, "cannot be used"),
    (
      {"vocab.json": json.dumps(PIECES), "merges.txt": "a b\nab c"},
      "has 6 tokens, and the model 5",
    ),
    (
      {"vocab.json": '{"a": 0, "b": 5}', "merges.txt": ""},
      "has a token with id 5, and the model 5",
    ),
    ({"vocab.json": '{"a": 0, "b": 0}', "merges.txt": ""}, "'a' and 'b' have one id"),
    ({"vocab.json": '{"a\\ud800": 0}', "merges.txt": ""}, "cannot be used"),
    ({"vocab.json": "[" * 100_000, "merges.txt": ""}, "cannot be used .*nested too deep"),
    ({"tokenizer.json": "[" * 100_000}, "cannot be used"),
    ({"tokenizer.json": b"\xff"}, "cannot be used .*tokenizer.json is not UTF-8 at byte 0"),
    ({"gpt2_jax_tokenizer.json": '{"kind": "huggingface", "payload": 3}'}, "no tokenizer in"),
    ({"gpt2_jax_tokenizer.json": '{"kind": "sentencepiece", "proto": ""}'}, "of 0 bytes"),
  ],
)
def test_an_invalid_vocabulary_is_one_line(files, message, tmp_path):
  for name, content in files.items():
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
  with pytest.raises(ValueError, match=f"the vocabulary in .*{message}") as error:
    read_vocabulary(tmp_path, 5)
  assert "\n" not in str(error.value)


@pytest.mark.skipif(
  "TIKTOKEN_CACHE_DIR" not in os.environ, reason="TIKTOKEN_CACHE_DIR is not set: no vocabulary"
)
def test_the_files_of_gpt2_are_openais(tmp_path):
  """Token for token and merge for merge what tiktoken fetched from OpenAI, in its cache by the hash
  of the address."""
  write_vocabulary(Gpt2Bpe(), tmp_path, 1024)
  cache = os.environ["TIKTOKEN_CACHE_DIR"]
  theirs = {}
  for file in os.listdir(cache):
    with open(os.path.join(cache, file), encoding="utf-8") as opened:
      theirs["encoder" if opened.read(1) == "{" else "merges"] = os.path.join(cache, file)
  with (
    open(theirs["encoder"], encoding="utf-8") as encoder,
    open(theirs["merges"], encoding="utf-8") as merges,
  ):
    assert json.loads((tmp_path / "vocab.json").read_text("utf-8")) == json.load(encoder)
    assert (tmp_path / "merges.txt").read_text("utf-8").split("\n")[1:] == merges.read().split(
      "\n"
    )[1:]
