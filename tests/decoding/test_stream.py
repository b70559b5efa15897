# SPDX-License-Identifier: Apache-2.0
import codecs
import io
import sys

import numpy as np
import pytest
import sentencepiece
import tokenizers

from gpt2_jax.decoding import (
  Generation,
  Greedy,
  LogitBias,
  Sample,
  SlidingWindow,
  Temperature,
  complete,
  generate,
  make_sampler,
  stream,
  stream_rows,
)
from gpt2_jax.decoding.stream import Stopper, StreamDecoder, stream_counted
from gpt2_jax.model import ModelConfig
from gpt2_jax.tokenizer import Characters, Gpt2Bpe, HuggingFace, SentencePiece, train_sentencepiece

AWKWARD = "naïve 🦊🏳️‍🌈 日本語のテキスト 한국어 \ufffd Ω≈ç√ \U0001f9d1\u200d\U0001f680 end"
ALPHABET = Characters("".join(sorted("abcdefghijklmnopqrstuvwxyz ,.\n🦊日")))


def gpt2() -> Gpt2Bpe:
  tokenizer = Gpt2Bpe()
  try:
    tokenizer.encode("")
  except ValueError as error:
    pytest.skip(f"{error}, TIKTOKEN_CACHE_DIR")
  return tokenizer


def lossless() -> SentencePiece:
  return train_sentencepiece(["the quick brown fox jumps over the lazy dog\n" * 20], 300)


def foreign() -> SentencePiece:
  """With what other makers' models do: a space is added before the text, and dropped from what is
  decoded."""
  proto = io.BytesIO()
  texts = iter(["the quick brown fox jumps over the lazy dog"] * 20)
  options = {
    "vocab_size": 310,
    "model_type": "bpe",
    "byte_fallback": True,
    "minloglevel": 4,
    "num_threads": 1,
  }
  sentencepiece.SentencePieceTrainer.train(sentence_iterator=texts, model_writer=proto, **options)
  return SentencePiece(proto.getvalue())


def byte_level() -> HuggingFace:
  made = tokenizers.Tokenizer(tokenizers.models.BPE())
  made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
  made.decoder = tokenizers.decoders.ByteLevel()
  alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
  trainer = tokenizers.trainers.BpeTrainer(
    vocab_size=300, initial_alphabet=alphabet, show_progress=False
  )
  made.train_from_iterator(["the quick brown fox", AWKWARD] * 20, trainer)
  return HuggingFace(made.to_str())


MAKERS = {
  "gpt2": gpt2,
  "lossless": lossless,
  "foreign": foreign,
  "bytes": byte_level,
  "chars": lambda: ALPHABET,
}


def portions(items, rng, most: int):
  """The items in their order, in portions of 0 to `most`, and whether each is the last."""
  at = 0
  while at < len(items):
    size = int(rng.integers(0, most + 1))
    yield items[at : at + size], at + size >= len(items)
    at += size


# ---- characters


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("most", [1, 4, 40])
def test_chunks_are_the_decoded_text_whatever_the_tokens(name, most):
  """Also tokens that are no text at all: many single bytes in any order."""
  tokenizer, rng = MAKERS[name](), np.random.default_rng(most)
  some = (
    sorted(set(tokenizer.encode(AWKWARD)))
    if tokenizer is not ALPHABET
    else range(tokenizer.vocab_size)
  )
  for size in (1, 2, 7, 100, 400):
    ids = rng.choice(list(some), size).tolist()
    decoder, whole = StreamDecoder(tokenizer), tokenizer.decode(ids)
    sent, made = "", 0
    for part, last in portions(ids, rng, most):
      sent += decoder.push(part, last)
      made += len(part)
      assert whole.startswith(sent), "what was sent is never taken back"
      assert len(tokenizer.decode(ids[:made])) - len(sent) <= 3, (
        "no more is held back than may change"
      )
    assert sent == whole


def test_chunks_are_those_of_an_incremental_decoder():
  """Python's own, over the tokens' bytes: as late as it must be, and never later where no character
  is begun."""
  tokenizer = gpt2()
  text = AWKWARD.replace("\ufffd", "")
  decoder, oracle = StreamDecoder(tokenizer), codecs.getincrementaldecoder("utf-8")("replace")
  ids = tokenizer.encode(text)
  pieces = [decoder.push([token]) for token in ids]
  assert pieces == [
    oracle.decode(tokenizer._encoding.decode_single_token_bytes(token)) for token in ids
  ]
  assert "".join(pieces) == text and pieces.count("") > 10


def test_what_is_left_at_the_end_is_replaced():
  tokenizer = gpt2()
  begun = tokenizer.encode("🦊")[:1]
  decoder = StreamDecoder(tokenizer)
  assert [decoder.push(begun), decoder.push([], last=True)] == ["", "\ufffd"]


def test_a_space_after_the_prompt_is_kept():
  """SentencePiece models of others drop it at the beginning of a text, and a continuation is
  none."""
  tokenizer, text = foreign(), "the quick brown fox jumps over the lazy dog"
  ids = tokenizer.encode(text)
  assert any(
    tokenizer.decode(ids[:n]) + tokenizer.decode(ids[n:]) != text for n in range(1, len(ids))
  )
  for n in range(1, len(ids)):
    prompt = tokenizer.decode(ids[:n])
    decoder = StreamDecoder(tokenizer, ids[:n])
    assert prompt + "".join(decoder.push([token]) for token in ids[n:]) == text


# ---- stop strings


def test_texts_end_where_a_stop_string_begins():
  """Against str.find on random texts of two letters, in which stop strings overlap in every way."""
  rng, stopped = np.random.default_rng(0), 0
  for _ in range(2000):
    whole = "".join(rng.choice(["a", "b"], rng.integers(1, 30)))
    stops = ["".join(rng.choice(["a", "b"], rng.integers(1, 7))) for _ in range(rng.integers(0, 4))]
    expected = whole[: min((at for at in map(whole.find, stops) if at >= 0), default=len(whole))]
    stopper, sent = Stopper(stops), ""
    for part, last in portions(whole, rng, 5):
      sent += stopper.push(part, last)
      assert expected.startswith(sent)
      if stopper.stopped:
        break
    assert sent == expected and stopper.stopped == any(stop in whole for stop in stops)
    stopped += stopper.stopped
  assert 500 < stopped < 1900


def test_only_what_may_begin_a_stop_string_is_held_back():
  stopper = Stopper(["END"])
  assert [stopper.push(piece) for piece in ("abE", "N", "EEN", "x", "yE")] == [
    "ab",
    "",
    "ENE",
    "ENx",
    "y",
  ]
  assert (stopper.push("NDz"), stopper.stopped) == ("", True)


# ---- with a model


@pytest.fixture(scope="module")
def speaker(mesh, parameters, place):
  """speaker(tokenizer, sizes): a small random model of its vocabulary on a mesh that is not in
  force later."""

  def make(tokenizer, sizes=(1, 1, 1)):
    config = ModelConfig(
      n_vocab=tokenizer.vocab_size, n_ctx=64, n_embd=16, n_head=2, n_layer=2, dtype="float32"
    )
    arrays = parameters(config, scale=0.3)
    with mesh(*sizes):
      return place(config, arrays)

  return make


@pytest.fixture(scope="module")
def chars(speaker):
  return speaker(ALPHABET)


WILD = Sample((Temperature(3.0),))


@pytest.mark.parametrize("sizes", [(1, 1, 1), (1, 4, 2)], ids=str)
def test_a_stream_is_the_text_of_awkward_tokens(sizes, speaker):
  """Tokens that are parts of emoji and of CJK characters, in an order that mostly makes no
  sense."""
  tokenizer = gpt2()
  bias = LogitBias(dict.fromkeys(tokenizer.encode(AWKWARD), 100.0))
  sampler, model, prompts = Sample((bias,)), speaker(tokenizer, sizes), ["", "one 🦊", "2"]
  rows = generate(
    model,
    [tokenizer.encode(prompt) or [tokenizer.eot] for prompt in prompts],
    50,
    sampler,
    seed=3,
    samples=2,
  )
  expected = [tokenizer.decode(row.tokens) for row in rows]
  assert sum("\ufffd" in text for text in expected) > 3 and any(
    ord(c) > 0x3000 for c in "".join(expected)
  )
  assert complete(model, tokenizer, prompts, 50, sampler, seed=3, samples=2) == expected
  texts = [""] * 6
  for row, piece in stream_rows(model, tokenizer, prompts, 50, sampler, seed=3, samples=2):
    assert piece
    texts[row] += piece
  assert texts == expected


def test_one_prompt_gives_one_text(chars):
  text = complete(chars, ALPHABET, "abc", 40, WILD, seed=1)
  assert isinstance(text, str) and len(text) == 40
  pieces = list(stream(chars, ALPHABET, "abc", 40, WILD, seed=1))
  assert "".join(pieces) == text and len(pieces) > 4 and len(pieces[0]) == 1, (
    "the first character comes at once"
  )
  assert complete(chars, ALPHABET, ["abc"], 40, WILD, seed=1) == [text]
  assert complete(chars, ALPHABET, "abc", 40, WILD, seed=1, samples=3)[0] == text


def test_stop_strings_end_each_row(chars):
  """Strings of two or three tokens taken from the texts themselves, streamed or not; rows end
  apart."""
  prompts = ["abc", "x", "hello"]
  whole = complete(chars, ALPHABET, prompts, 40, WILD, seed=1)
  for stop in (
    [whole[0][10:13]],
    [whole[1][30:32], whole[2][20:23], "nowhere"],
    [whole[2][:2]],
    [whole[0][38:]],
  ):
    expected = [
      text[: min((at for at in map(text.find, stop) if at >= 0), default=40)] for text in whole
    ]
    assert expected != whole
    assert complete(chars, ALPHABET, prompts, 40, WILD, seed=1, stop=stop) == expected
    assert "".join(stream(chars, ALPHABET, prompts[0], 40, WILD, seed=1, stop=stop)) == expected[0]


def test_counted_tokens_are_those_that_were_generated(speaker):
  """Also where they are no text yet: tokens that are parts of characters."""
  tokenizer = byte_level()
  bias = LogitBias(dict.fromkeys(tokenizer.encode("🦊日"), 100.0))
  model, sampler = speaker(tokenizer), Sample((bias,))
  rows = generate(model, [tokenizer.encode("abc")], 40, sampler)
  pairs = list(stream_counted(model, tokenizer, "abc", Generation(40, sampler)))
  assert [n_tokens for _, n_tokens in pairs] == [1, 2, 4, 8, 16, 9]
  assert "".join(chunk for chunk, _ in pairs) == tokenizer.decode(rows[0].tokens)
  with pytest.raises(ValueError, match="one text, not 2 samples"):
    stream_counted(model, tokenizer, "abc", Generation(40, sampler, samples=2))


def test_what_follows_a_stop_string_is_not_computed(chars, monkeypatch):
  steps = []

  def advance(decoder, state, n, *rest):
    steps.append(n)
    return tokens_advance(decoder, state, n, *rest)

  module = sys.modules["gpt2_jax.decoding.stream"]  # the package's `stream` is the function
  tokens_advance = module.advance
  monkeypatch.setattr(module, "advance", advance)
  whole = complete(chars, ALPHABET, "abc", 55, WILD, seed=1)
  assert steps == [55], "without stop strings all is one call"
  steps.clear()
  assert (
    complete(chars, ALPHABET, "abc", 55, WILD, seed=1, stop=[whole[4:6]])
    == whole[: whole.find(whole[4:6])]
  )
  assert steps == [1, 2, 4]
  pieces = stream(chars, ALPHABET, "abc", 55, WILD, seed=1)
  steps.clear()
  assert next(pieces) == whole[0] and steps == [1, 2], "one portion ahead of what is asked for"


def test_a_window_streams_beyond_the_context(chars):
  window = SlidingWindow(32, keep=2)
  whole = complete(chars, ALPHABET, "abc " * 30, 100, WILD, window=window)
  assert len(whole) == 100
  assert "".join(stream(chars, ALPHABET, "abc " * 30, 100, WILD, window=window)) == whole
  with pytest.raises(ValueError, match="exceed the context of 64"):
    stream(chars, ALPHABET, "abc " * 30, 100)


def test_endoftext_begins_an_empty_prompt_and_ends_a_text(speaker):
  tokenizer = gpt2()
  model = speaker(tokenizer)
  begun = generate(model, [[tokenizer.eot]], 8, eot=tokenizer.eot)[0]
  assert complete(model, tokenizer, "", 8, greedy=True) == tokenizer.decode(begun.tokens) != ""
  assert complete(model, tokenizer, "a", 8, Greedy((LogitBias({tokenizer.eot: 1000.0}),))) == ""


def test_what_cannot_be_is_refused(chars):
  with pytest.raises(ValueError, match="for an empty prompt"):
    complete(chars, ALPHABET, ["a", ""], 5)
  for stop in ("END", ["END", ""]):
    with pytest.raises(ValueError, match="give a sequence of texts, none of them empty"):
      stream(chars, ALPHABET, "a", 5, stop=stop)
  with pytest.raises(ValueError, match="stream gives one text, not 2 samples; call stream_rows"):
    stream(chars, ALPHABET, "a", 5, samples=2)
  with pytest.raises(ValueError, match="texts have no logprobs; call generate"):
    complete(chars, ALPHABET, "a", 5, logprobs=True)
  with pytest.raises(ValueError, match="generation= together with temperature: give one of both"):
    complete(chars, ALPHABET, "a", generation=Generation(5), temperature=0.8)


def test_texts_are_drawn_at_temperature_1_unless_options_say_otherwise(chars):
  """Keywords, a sampler and a Generation say the same; 128 tokens where there is room."""
  drawn = complete(chars, ALPHABET, "abc", seed=1)
  assert drawn == complete(chars, ALPHABET, "abc", 62, Sample(), seed=1), "62: 61, and one behind"
  assert drawn == complete(chars, ALPHABET, "abc", generation=Generation(seed=1))
  assert drawn != complete(chars, ALPHABET, "abc", seed=2)
  greedy = complete(chars, ALPHABET, "abc", greedy=True, seed=1)
  assert greedy == complete(chars, ALPHABET, "abc", greedy=True, seed=2) != drawn

  options = {"temperature": 3.0, "top_k": 9, "top_p": 0.9, "min_p": 0.01, "typical_p": 0.95}
  sampler = make_sampler(**options)
  text = complete(chars, ALPHABET, "abc", 40, seed=1, stop=["zz"], **options)
  assert text == complete(chars, ALPHABET, "abc", 40, sampler, seed=1, stop=["zz"])
  generation = Generation(40, sampler, seed=1, stop=["zz"])
  assert text == "".join(stream(chars, ALPHABET, "abc", generation=generation))
  assert [(0, chunk) for chunk in stream(chars, ALPHABET, "abc", generation=generation)] == list(
    stream_rows(chars, ALPHABET, ["abc"], generation=generation)
  )
