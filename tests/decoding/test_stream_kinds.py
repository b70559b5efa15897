# SPDX-License-Identifier: Apache-2.0
"""Streaming with every kind of tokenizer equals decoding at once."""

import io
import json

import numpy as np
import pytest
import sentencepiece
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from gpt2_jax.decoding.stream import CONTEXT, StreamDecoder, decoding_tail
from gpt2_jax.tokenizer import (
  Gpt2Bpe,
  HuggingFace,
  SentencePiece,
  train_characters,
  train_sentencepiece,
)

TEXT = "hello world the cat sat, don't. It's naïve! 日本語のテキスト 한국어 🦊🏳️‍🌈 tab\tline\n  two"
LATIN = ["hello world the cat sat"] * 20
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
PARTS = [*"abcdehlorstw.,'!", *[" "] * 6, "\n", "\t", "hello", " cat", "don't", "é", "\u0300"]
PARTS += ["日", "本", "語", "한", "🦊", "🏳️‍🌈", "𝄞", "\u2581", "\ufffd"]


def trained(model, pre_tokenizer, decoder, trainer, normalizer=None) -> HuggingFace:
  tokenizer = tokenizers.Tokenizer(model)
  tokenizer.pre_tokenizer = pre_tokenizer
  if normalizer is not None:
    tokenizer.normalizer = normalizer
  if decoder is not None:
    tokenizer.decoder = decoder
  tokenizer.train_from_iterator([TEXT] * 20, trainer)
  return HuggingFace(tokenizer.to_str())


def byte_level() -> HuggingFace:
  alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
  trainer = trainers.BpeTrainer(vocab_size=330, initial_alphabet=alphabet, show_progress=False)
  before = pre_tokenizers.ByteLevel(add_prefix_space=False)
  return trained(models.BPE(), before, decoders.ByteLevel(), trainer)


def unigram() -> HuggingFace:
  trainer = trainers.UnigramTrainer(
    vocab_size=100, unk_token="<unk>", special_tokens=["<unk>", "</s>"], show_progress=False
  )
  return trained(models.Unigram(), pre_tokenizers.Metaspace(), decoders.Metaspace(), trainer)


def word_piece(**options) -> HuggingFace:
  """BERT's, as the Chinese GPT-2s have it."""
  specials = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
  trainer = trainers.WordPieceTrainer(vocab_size=150, special_tokens=specials, show_progress=False)
  model, decoder = models.WordPiece(unk_token="[UNK]"), decoders.WordPiece(**options)
  before = pre_tokenizers.BertPreTokenizer()
  return trained(model, before, decoder, trainer, normalizers.BertNormalizer(lowercase=True))


def suffixes() -> HuggingFace:
  """BPE whose tokens say where a word ends, as GPT-1's."""
  model = models.BPE(unk_token="<unk>", end_of_word_suffix="</w>")
  trainer = trainers.BpeTrainer(
    vocab_size=150, special_tokens=["<unk>"], end_of_word_suffix="</w>", show_progress=False
  )
  return trained(model, pre_tokenizers.BertPreTokenizer(), decoders.BPEDecoder(), trainer)


def words() -> HuggingFace:
  """Without a decoder: spaces between tokens."""
  trainer = trainers.WordLevelTrainer(special_tokens=["[UNK]"], show_progress=False)
  model = models.WordLevel(unk_token="[UNK]")
  return trained(model, pre_tokenizers.Whitespace(), None, trainer)


def byte_fallback_bpe() -> HuggingFace:
  """As Llama's tokenizer.json: bytes for characters that the vocabulary lacks."""
  specials = ["<unk>", "<s>", "</s>"]
  tokenizer = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
  tokenizer.normalizer = normalizers.Sequence(
    [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
  )
  tokenizer.decoder = decoders.Sequence(
    [
      decoders.Replace("\u2581", " "),
      decoders.ByteFallback(),
      decoders.Fuse(),
      decoders.Strip(" ", 1, 0),
    ]
  )
  trainer = trainers.BpeTrainer(
    vocab_size=330, special_tokens=specials + BYTES, show_progress=False
  )
  tokenizer.train_from_iterator(LATIN, trainer)

  # The trainer knows bytes as special tokens only; in the file they are none.
  payload = json.loads(tokenizer.to_str())
  payload["added_tokens"] = [
    token for token in payload["added_tokens"] if token["content"] in specials
  ]
  return HuggingFace(json.dumps(payload), 2)


def byte_fallback_unigram() -> HuggingFace:
  pieces = ["<unk>", "<s>", "</s>", *BYTES, "\u2581", "a", "b", "\ufffd"]
  scores = [(piece, -float(i) / 100) for i, piece in enumerate(pieces)]
  tokenizer = tokenizers.Tokenizer(models.Unigram(scores, unk_id=0, byte_fallback=True))
  tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
  tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
  return HuggingFace(tokenizer.to_str(), 2)


def pieces(**options) -> SentencePiece:
  """SentencePiece as others train it: spaces are added and dropped at the beginning."""
  proto = io.BytesIO()
  sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter(LATIN), model_writer=proto, minloglevel=4, num_threads=1, **options
  )
  return SentencePiece(proto.getvalue())


def gpt2() -> Gpt2Bpe:
  tokenizer = Gpt2Bpe()
  try:
    tokenizer.encode("")
  except ValueError as error:
    pytest.skip(f"{error}, TIKTOKEN_CACHE_DIR")
  return tokenizer


KINDS = {
  "gpt2": gpt2,
  "byte-level BPE": byte_level,
  "BPE with suffixes": suffixes,
  "unigram with metaspaces": unigram,
  "WordPiece": word_piece,
  "WordPiece without cleanup": lambda: word_piece(cleanup=False),
  "words without a decoder": words,
  "byte-fallback BPE": byte_fallback_bpe,
  "byte-fallback unigram": byte_fallback_unigram,
  "characters": lambda: train_characters(["".join(PARTS)]),
  "SentencePiece": lambda: pieces(vocab_size=30, model_type="unigram", hard_vocab_limit=False),
  "SentencePiece with bytes": lambda: pieces(vocab_size=300, model_type="bpe", byte_fallback=True),
  "SentencePiece that keeps spaces": lambda: pieces(
    vocab_size=300, model_type="bpe", byte_fallback=True, remove_extra_whitespaces=False
  ),
  "lossless SentencePiece": lambda: train_sentencepiece([TEXT] * 20, 380),
}


def streamed(tokenizer, prompt, ids, rng, most: int) -> str:
  """The text of a stream whose tokens come in portions of 0 to `most`."""
  decoder = StreamDecoder(tokenizer, prompt)
  sent, at = "", 0
  while True:
    size = int(rng.integers(0, most + 1))
    sent += decoder.push(ids[at : at + size], at + size >= len(ids))
    at += size
    if at >= len(ids):
      return sent


def cases(tokenizer, rng, count: int):
  """Ids of random texts, and as many lists of random ids; each with a place where a prompt ends."""
  for n in range(2 * count):
    if n % 2:
      ids = tokenizer.encode("".join(rng.choice(PARTS, int(rng.integers(1, 40)))))
    else:
      # Low ids are single bytes in most vocabularies.
      highest = tokenizer.vocab_size if n % 4 else min(300, tokenizer.vocab_size)
      ids = rng.integers(0, highest, int(rng.integers(1, 60))).tolist()
    yield ids, int(rng.integers(0, len(ids) + 1)) if n % 3 else 0


@pytest.mark.parametrize("kind", KINDS)
def test_a_stream_is_the_text_decoded_at_once(kind):
  tokenizer, rng = KINDS[kind](), np.random.default_rng(0)
  for n, (ids, cut) in enumerate(cases(tokenizer, rng, 200)):
    prompt = tokenizer.decode(ids[:cut])
    text = tokenizer.decode(ids)[len(prompt) :]
    assert streamed(tokenizer, ids[:cut], ids[cut:], rng, (1, 3, 20)[n % 3]) == text


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_sent_is_never_taken_back(kind):
  """One token at a time: and a text of whole characters is there as soon as it can be."""
  tokenizer, rng = KINDS[kind](), np.random.default_rng(1)
  for ids, _ in cases(tokenizer, rng, 10):
    text, sent, decoder = tokenizer.decode(ids), "", StreamDecoder(tokenizer)
    for n, token in enumerate(ids):
      sent += decoder.push([token])
      assert text.startswith(sent)
      held_back = tokenizer.decode(ids[: n + 1])[len(sent) :]
      if token not in tokenizer.byte_run_ids:
        assert held_back.strip("\ufffd") == ""


def test_a_bad_byte_spoils_its_run_only():
  """A run of bytes is one text or none: so it is held back until another token ends it."""
  tokenizer = byte_fallback_bpe()
  fox = [tokenizer.special_id(f"<0x{byte:02X}>") for byte in "🦊".encode()]
  word = tokenizer.encode("cat")
  assert len(tokenizer.byte_run_ids) == 256
  assert tokenizer.token_bytes(fox[0]) == b"\xf0"

  decoder = StreamDecoder(tokenizer, word)
  sent = [decoder.push([token]) for token in [*fox, *fox, word[0]]]
  assert "".join(sent) == "🦊🦊" + tokenizer.decode([word[0], word[0]])[-len(sent[-1]) + 2 :]
  assert sent[:-1] == [""] * 8
  assert decoder.push(fox) == "" and decoder.push(fox[:2], last=True) == "\ufffd" * 6


def test_spaces_at_the_beginning_are_dropped_as_at_once():
  """However many of them there are before the first word."""
  tokenizer, rng = KINDS["SentencePiece"](), np.random.default_rng(0)
  word = tokenizer.encode("cat")
  ids = [tokenizer.special_id("\u2581")] * 40 + word
  assert tokenizer.decode(ids) == "cat"
  for cut in (0, 3, 20, 40):
    assert streamed(tokenizer, ids[:cut], ids[cut:], rng, 3) == "cat"


@pytest.mark.parametrize("kind", KINDS)
def test_few_tokens_are_decoded_again(kind):
  """However long a text of words is: a stream costs time in proportion to its length."""
  tokenizer = KINDS[kind]()
  ids = tokenizer.encode("hello cat " * 200)
  assert len(decoding_tail(tokenizer, ids)) <= 4 * CONTEXT
