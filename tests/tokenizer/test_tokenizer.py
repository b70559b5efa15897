# SPDX-License-Identifier: Apache-2.0
import json
import os
import pathlib
import pickle

import pytest
import tiktoken
from hypothesis import given, settings
from hypothesis import strategies as st

from gpt2_jax import tokenizer as tokenizer_lib
from gpt2_jax.tokenizer import EOT, Characters, Gpt2Bpe, HuggingFace, SentencePiece, byte_alphabet

needs_gpt2 = pytest.mark.skipif(
  "TIKTOKEN_CACHE_DIR" not in os.environ,
  reason="TIKTOKEN_CACHE_DIR is not set: no vocabulary of GPT-2",
)
# What the two libraries treat specially, and what they might normalize, drop or take for something
# else.
SPECIALS = [
  EOT,
  "<unk>",
  "<s>",
  "<0x0A>",
  "\u2581",
  "\u2585",
  "\u2047",
  "\ufffd",
  "\ufeff",
  "\0",
  "\t",
  "\r\n",
]
SPECIALS += [
  "  ",
  "\n\n\n    ",
  " ",
  "e\u0301",
  "\uff21",
  "\U0001f600",
  "\x1c",
  "\u2028",
  "\U0010ffff",
]
texts = st.lists(st.text(max_size=8) | st.sampled_from(SPECIALS), max_size=8).map("".join)


def library_sources(count: int) -> list[str]:
  folder = pathlib.Path(os.__file__).parent
  return [path.read_text("utf-8") for path in sorted(folder.glob("[a-z]*.py"))[:count]]


@pytest.fixture(scope="module")
def sentencepiece() -> SentencePiece:
  return tokenizer_lib.train_sentencepiece(library_sources(20), vocab_size=600)


@given(text=texts)
def test_sentencepiece_gives_every_text_back(sentencepiece, text):
  ids = sentencepiece.encode(text)
  assert sentencepiece.decode(ids) == text
  assert sentencepiece.decode(sentencepiece.encode(text, allow_eot=True)) == text
  assert sentencepiece.eot not in ids and all(0 <= i < sentencepiece.vocab_size for i in ids)
  assert sentencepiece.encode_batch([text, "", text]) == [ids, [], ids]


def test_sentencepiece_learns_indentation_and_compresses(sentencepiece):
  source = "".join(library_sources(30)[20:])
  assert sentencepiece.encode("\n        ") == sentencepiece.encode("\n") + sentencepiece.encode(
    "        "
  )
  assert len(sentencepiece.encode("        ")) == 1
  assert len(sentencepiece.encode(source)) < len(source.encode()) / 2


def test_eot_is_encoded_only_when_allowed(sentencepiece):
  assert sentencepiece.encode(f"a{EOT}{EOT}b", allow_eot=True) == [
    *sentencepiece.encode("a"),
    sentencepiece.eot,
    sentencepiece.eot,
    *sentencepiece.encode("b"),
  ]
  assert len(sentencepiece.encode(EOT)) > 1


def test_training_is_deterministic_and_stops_at_its_budget():
  sources = library_sources(6)
  budget = sum(len(text.encode()) for text in sources[:3])
  first = tokenizer_lib.train_sentencepiece(sources, 400, max_bytes=budget)
  assert first == tokenizer_lib.train_sentencepiece(iter(sources[:3]), 400)
  assert first.fingerprint != tokenizer_lib.train_sentencepiece(sources, 400).fingerprint


@pytest.mark.parametrize("source", [[], [""], ["abc"]])
def test_too_little_text_for_the_vocabulary_is_one_line(source):
  with pytest.raises(ValueError, match="^SentencePiece cannot learn 5,000 pieces") as error:
    tokenizer_lib.train_sentencepiece(source, 5000)
  assert "\n" not in str(error.value)


@needs_gpt2
@settings(deadline=None)  # the first example opens the vocabulary
@given(text=texts)
def test_gpt2_is_tiktokens(text):
  ours, raw = Gpt2Bpe(), tiktoken.get_encoding("gpt2")
  assert ours.encode(text) == raw.encode_ordinary(text) == ours.encode_batch([text])[0]
  assert ours.encode(text, allow_eot=True) == raw.encode(text, allowed_special="all")
  assert ours.decode(ours.encode(text)) == text


@needs_gpt2
def test_gpt2_facts():
  ours = Gpt2Bpe()
  assert (ours.vocab_size, ours.eot) == (50257, 50256)
  assert ours.encode("Hello world") == [15496, 995]
  assert ours.encode(EOT, allow_eot=True) == [50256] and 50256 not in ours.encode(EOT)


@pytest.fixture(scope="module")
def from_files() -> HuggingFace:
  """GPT-2's vocabulary and merges as tiktoken read them, in the characters of vocab.json and
  merges.txt."""
  gpt2, alphabet = Gpt2Bpe(), byte_alphabet()
  text = lambda token: "".join(alphabet[byte] for byte in token)  # noqa: E731
  vocab = {EOT if i == gpt2.eot else text(token): i for token, i in gpt2.vocab().items()}
  return HuggingFace.from_merges(vocab, [(text(a), text(b)) for a, b in gpt2.merges()])


@needs_gpt2
@settings(deadline=None)  # the first example opens the vocabulary
@given(text=texts)
def test_gpt2s_files_encode_and_decode_as_tiktoken(from_files, text):
  raw = tiktoken.get_encoding("gpt2")
  ids = raw.encode_ordinary(text)
  assert from_files.encode(text) == ids == from_files.encode_batch(["", text])[1]
  assert from_files.encode(text, allow_eot=True) == raw.encode(text, allowed_special="all")
  assert from_files.decode(ids) == text
  assert from_files.decode([50256, *ids, 50256]) == EOT + text + EOT


@needs_gpt2
@settings(deadline=None)  # the first example opens the vocabulary
@given(ids=st.lists(st.integers(0, 50256), max_size=20))
def test_gpt2s_files_decode_any_ids_as_tiktoken(from_files, ids):
  """Parts of characters become U+FFFD alike."""
  assert from_files.decode(ids) == tiktoken.get_encoding("gpt2").decode(ids)


@needs_gpt2
def test_gpt2s_files_are_gpt2(from_files):
  assert (from_files.vocab_size, from_files.eot, from_files.fingerprint) == (
    50257,
    50256,
    Gpt2Bpe().fingerprint,
  )
  assert len(Gpt2Bpe().merges()) == 50000 and Gpt2Bpe().merges()[0] == (b" ", b"t")
  assert (
    from_files.decode([15496, 50300, 995]) == Gpt2Bpe().decode([15496, 50300, 995]) == "Hello world"
  )
  source = "".join(library_sources(10))
  assert from_files.encode(source) == Gpt2Bpe().encode(source)


def test_the_byte_alphabet_is_one_printable_character_a_byte():
  alphabet = byte_alphabet()
  assert sorted(alphabet) == list(range(256)) and len(set(alphabet.values())) == 256
  assert all(character.isprintable() and not character.isspace() for character in alphabet.values())
  assert (alphabet[ord("a")], alphabet[ord(" ")], alphabet[ord("\n")]) == ("a", "\u0120", "\u010a")


def small_bpe() -> HuggingFace:
  vocab = {
    token: i for i, token in enumerate([*byte_alphabet().values(), "ab", "abc", "\u0120a", EOT])
  }
  return HuggingFace.from_merges(vocab, [("a", "b"), ("ab", "c"), ("\u0120", "a")])


def test_merges_go_in_their_order_and_specials_are_text():
  ours, space = small_bpe(), [*byte_alphabet().values()].index("\u0120")
  assert ours.encode("abc ab") == [257, space, 256], "ab is merged before the space and a are"
  assert ours.encode(" a") == [258] and ours.eot == 259 and ours.vocab_size == 260
  assert 259 not in ours.encode(EOT) and ours.decode(ours.encode(EOT)) == EOT
  assert ours.encode(f"ab{EOT}{EOT}ab", allow_eot=True) == [256, 259, 259, 256]


def test_padding_and_truncation_of_a_tokenizer_json_are_left_out():
  """As sentence embedders and others write into their tokenizer.json."""
  payload = json.loads(small_bpe().payload)
  payload["truncation"] = {
    "direction": "Right",
    "max_length": 2,
    "strategy": "LongestFirst",
    "stride": 0,
  }
  payload["padding"] = {
    "strategy": {"Fixed": 9},
    "direction": "Right",
    "pad_to_multiple_of": None,
    "pad_id": 0,
  }
  payload["padding"] |= {"pad_type_id": 0, "pad_token": "!"}
  ours = HuggingFace(json.dumps(payload))
  assert ours.encode("abcabcabc") == [257] * 3 and ours.encode_batch(["ab", "abc"]) == [
    [256],
    [257],
  ]


def test_gpt2_without_a_vocabulary_is_one_line(monkeypatch):
  def refuse(name):
    raise ConnectionError("no route\nto host")

  monkeypatch.setattr(tiktoken, "get_encoding", refuse)
  with pytest.raises(ValueError, match="TIKTOKEN_CACHE_DIR") as error:
    Gpt2Bpe().encode("a")
  assert "\n" not in str(error.value)


@given(alphabet=st.text(min_size=1), data=st.data())
def test_characters_are_their_places_in_the_sorted_alphabet(alphabet, data):
  ours = tokenizer_lib.train_characters([alphabet, alphabet[::-1]])
  text = data.draw(st.text(st.sampled_from(sorted(set(alphabet)))))
  assert ours.encode(text) == [sorted(set(alphabet)).index(character) for character in text]
  assert ours.decode(ours.encode(text)) == text
  assert ours.vocab_size == len(set(alphabet)) and ours.eot is None


@pytest.mark.parametrize("text", ["abz", "ab\U0001f600", "ab "])
def test_an_unknown_character_is_named_with_its_place(text):
  with pytest.raises(ValueError, match="at position 2 is none of the alphabet's 2"):
    Characters("ab").encode(text)


@pytest.mark.parametrize("alphabet", ["", "ba", "aab"])
def test_an_alphabet_is_sorted_and_without_repeats(alphabet):
  with pytest.raises(ValueError, match="sorted characters, each once"):
    Characters(alphabet).encode("a")


def check_offsets(ours, text: str):
  """A token begins in the character in which all tokens before it, decoded alone, end."""
  ids, starts = ours.encode_with_offsets(text)
  assert ids == ours.encode(text) and len(ids) == len(starts)
  for n, start in enumerate(starts):
    before = ours.decode(ids[:n])
    assert before[:start] == text[:start], (text, n)
    assert len(before) == start or set(before[start:]) == {"\ufffd"}, "it begins too early"


@given(text=texts)
def test_offsets_of_sentencepiece(sentencepiece, text):
  check_offsets(sentencepiece, text)


@needs_gpt2
@settings(deadline=None)  # the first example opens the vocabulary
@given(text=texts)
def test_offsets_of_gpt2(from_files, text):
  check_offsets(Gpt2Bpe(), text)
  assert (
    from_files.encode_with_offsets(text)[1].tolist()
    == Gpt2Bpe().encode_with_offsets(text)[1].tolist()
  )


def test_offsets_by_hand(sentencepiece):
  text = "a \U0001f600b"  # four bytes, which no small vocabulary has as one piece
  assert small_bpe().encode_with_offsets("ab a" + text[2:])[1].tolist() == [0, 2, 4, 4, 4, 4, 5]
  assert Characters("\n ab\U0001f600").encode_with_offsets(text)[1].tolist() == [0, 1, 2, 3]
  assert sentencepiece.encode_with_offsets(text)[1].tolist()[-5:] == [2, 2, 2, 2, 3]
  assert sentencepiece.encode_with_offsets("a\u2581\u2581b")[1].tolist() == [0, 1, 1, 1, 2, 2, 2, 3]
  for ours in (small_bpe(), sentencepiece, Characters("ab")):
    assert list(map(len, ours.encode_with_offsets(""))) == [0, 0]


def test_a_space_that_a_file_leaves_out_is_part_of_its_token():
  """As RoBERTa's tokenizer.json asks for."""
  payload = json.loads(small_bpe().payload)
  payload["post_processor"] = {
    "type": "ByteLevel",
    "add_prefix_space": False,
    "trim_offsets": True,
    "use_regex": True,
  }
  assert HuggingFace(json.dumps(payload)).encode_with_offsets("ab ab a")[1].tolist() == [0, 2, 3, 5]


def test_json_and_pickle_carry_the_complete_tokenizer(sentencepiece):
  sample = "def f(x):\n  return x"
  for ours in (sentencepiece, tokenizer_lib.train_characters([sample]), small_bpe()):
    copies = [
      tokenizer_lib.from_json(json.loads(json.dumps(ours.to_json()))),
      pickle.loads(pickle.dumps(ours)),
    ]
    for copy in copies:
      assert (copy.fingerprint, copy.vocab_size, copy.eot) == (
        ours.fingerprint,
        ours.vocab_size,
        ours.eot,
      )
      assert copy.encode(sample) == ours.encode(sample)
  assert tokenizer_lib.from_json({"kind": "gpt2"}) == Gpt2Bpe()


def test_load_reads_what_was_written(tmp_path, sentencepiece):
  (tmp_path / "a.model").write_bytes(sentencepiece.proto)
  (tmp_path / "b.json").write_text(json.dumps(Characters("ab").to_json()))
  assert tokenizer_lib.load_tokenizer(str(tmp_path / "a.model")) == sentencepiece
  assert tokenizer_lib.load_tokenizer(str(tmp_path / "b.json")) == Characters("ab")


@pytest.mark.parametrize(
  ("name", "content", "message"),
  [
    ("gpt3", None, "is none of gpt2, a SentencePiece .model file, a .json file"),
    ("gone.model", None, "no such file"),
    ("bad.model", b"not a model", "11 bytes are no SentencePiece model"),
    ("bad.json", b"{", "bad.json"),
    (
      "bad.json",
      b'{"kind": "words"}',
      "its kind is gpt2, huggingface, sentencepiece, gpt1 or characters",
    ),
    ("bad.json", b'{"kind": "huggingface", "payload": "{"}', "1 characters are no tokenizer.json"),
    ("bad.model", b"", "a SentencePiece model of 0 bytes is none"),
    ("bad.json", b"[" * 100_000, "bad.json is JSON that is nested too deep"),
    ("bad.json", b"[]", "bad.json holds a list, not an object"),
    ("bad.json", b"\xff", "bad.json is not UTF-8 at byte 0"),
    ("bad.json", b'{"kind": "huggingface", "payload": 3}', "no tokenizer in"),
    ("bad.json", b'{"kind": "huggingface", "payload": "{}", "end": true}', "the end of a text is"),
    ("bad.json", b'{"kind": "sentencepiece", "proto": ["AAAA"]}', "no tokenizer in"),
    ("bad.json", b'{"kind": "characters", "alphabet": {"a": 1}}', "no tokenizer in"),
    ("bad.json", b'{"kind": "characters", "alphabet": "a\\udc80"}', r"lone surrogate \(U\+DC80\)"),
  ],
)
def test_what_is_no_tokenizer_is_one_line(tmp_path, name, content, message):
  if content is not None:
    (tmp_path / name).write_bytes(content)
  with pytest.raises((ValueError, FileNotFoundError), match=message) as error:
    tokenizer_lib.load_tokenizer(name if name == "gpt3" else str(tmp_path / name))
  assert "\n" not in str(error.value)


def test_a_path_is_expanded(tmp_path, monkeypatch):
  monkeypatch.setenv("HOME", str(tmp_path))
  (tmp_path / "a.json").write_text(json.dumps(Characters("ab").to_json()))
  assert tokenizer_lib.load_tokenizer("~/a.json") == Characters("ab")
  with pytest.raises(ValueError, match="this machine has no such user"):
    tokenizer_lib.load_tokenizer("~nobody-of-this-name/a.json")


LONE_SURROGATES = ["\ud83d", "ab\udc80", "a\ud83d b\ude00\n"]


@pytest.mark.parametrize("text", LONE_SURROGATES, ids=ascii)
def test_a_lone_surrogate_is_named_with_its_place(text, sentencepiece):
  """By every tokenizer and every way in. None puts another character in its place."""
  place = next(n for n, character in enumerate(text) if "\ud800" <= character <= "\udfff")
  tokenizers = [sentencepiece, small_bpe(), Characters("ab")]
  if "TIKTOKEN_CACHE_DIR" in os.environ:
    tokenizers.append(Gpt2Bpe())

  for ours in tokenizers:
    ways = [ours.encode, ours.encode_with_offsets, lambda text: ours.encode_batch(["a", text])]  # noqa: B023
    for encode in ways:
      message = (
        rf"not valid Unicode: character {place} is a lone surrogate \(U\+{ord(text[place]):04X}\)"
      )
      with pytest.raises(ValueError, match=message) as error:
        encode(text)
      assert len(str(error.value)) < 200


def nested(depth: int) -> dict:
  """Pre-tokenizers within each other, deeper than the library's parser goes."""
  inner = {"type": "Sequence", "pretokenizers": []}
  for _ in range(depth):
    inner = {"type": "Sequence", "pretokenizers": [inner]}
  return inner


# The library panics at the first three, which is no Exception, and raises at the others.
PRECOMPILED = {"type": "Precompiled", "precompiled_charsmap": "AAAA"}
BAD_PARTS = [
  {"normalizer": PRECOMPILED},
  {"normalizer": {"type": "Sequence", "normalizers": [PRECOMPILED]}},
  {"normalizer": PRECOMPILED | {"precompiled_charsmap": "////AAAA"}},
  {"pre_tokenizer": nested(200)},
  {"pre_tokenizer": 5},
  {"model": {"type": "BPE", "vocab": {"a": -1}, "merges": []}},
]


@pytest.mark.parametrize("parts", BAD_PARTS, ids=range(len(BAD_PARTS)))
def test_a_panic_of_the_library_is_one_line_and_silent(parts, capfd):
  ours = HuggingFace(json.dumps(json.loads(small_bpe().payload) | parts))
  with pytest.raises(ValueError, match="characters are no tokenizer.json") as error:
    _ = ours.vocab_size
  assert "\n" not in str(error.value) and len(str(error.value)) < 400
  assert capfd.readouterr() == ("", "")


def test_a_panic_at_a_text_is_one_line():
  chunks = {"type": "FixedLength", "length": 0}
  ours = HuggingFace(json.dumps(json.loads(small_bpe().payload) | {"pre_tokenizer": chunks}))
  for encode in (ours.encode, ours.encode_with_offsets, lambda text: ours.encode_batch([text])):
    with pytest.raises(ValueError, match="the tokenizers library refuses"):
      encode("ab")


@pytest.mark.parametrize(
  ("vocab", "message"),
  [
    ({"a": 0, "b": 0}, "'a' and 'b' have one id, 0"),
    ({"a": -1}, "the id of 'a' is '-1'"),
    ({"a": True}, "the id of 'a' is 'True'"),
    ({"a": [0]}, r"the id of 'a' is '\[0\]'"),
    ({"a": 2**40}, "the tokenizers library refuses"),
    ({"\ud800": 0}, "the tokenizers library refuses"),
  ],
)
def test_a_vocabulary_of_no_ids_is_one_line(vocab, message):
  with pytest.raises(ValueError, match=message) as error:
    HuggingFace.from_merges(vocab, [])
  assert "\n" not in str(error.value)
