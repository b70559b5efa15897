# SPDX-License-Identifier: Apache-2.0
"""BPE of GPT-1: lower case, words by ftfy and spaCy, `</w>` at the end of a word.

Source: text_utils.py of openai/finetune-transformer-lm. transformers cuts words by BERT's rules,
which gives other ids around quotes, contractions and line ends. Spaces and upper case are not in
the ids: decoding does not give a text back.
"""

import dataclasses
import functools
import json
import pathlib
import re
from collections.abc import Iterable, Sequence

import numpy as np

from gpt2_jax.files import parse_json_object, read_text
from gpt2_jax.tokenizer.interface import (
  check_unicode,
  hash_vocabulary,
  parsed_tokens,
  split_at_tokens,
)

END_OF_WORD = "</w>"
UNKNOWN_ID = 0  # the id of <unk>

# What the paper puts before, between and after the texts of a task. They are none of the published
# vocabulary's: fine-tuning adds them to it.
TASK_TOKENS = ("_start_", "_delimiter_", "_classify_")

# The vocabulary and its merges, by OpenAI's names and by Hugging Face's.
OPENAI_FILES = ("encoder_bpe_40000.json", "vocab_40000.bpe")
HUGGING_FACE_FILES = ("vocab.json", "merges.txt")

# How texts are written alike before words are cut. OpenAI's pattern has a backslash, too, which
# Python reads as the escape of a plus: it is not set apart.
REPLACED = {"\u2014": "-", "\u2013": "-", "\u2015": "-", "\u2026": "...", "\xb4": "'"}
SET_APART = re.compile(r'(-+|~+|!+|"+|;+|\?+|\++|,+|\)+|\(+|/+|\*+|\[+|\]+|}+|{+|\|+|_+)')

# How far from where a token is expected it is looked for, in characters.
SEARCH = 16


@dataclasses.dataclass(frozen=True)
class Gpt1Bpe:
  """GPT-1's BPE: 40,478 tokens, with any tokens that were added for tasks behind them.

  `vocabulary` and `merges` are the contents of its two files, the first with the added tokens.
  `special_tokens` are those, in the order of their ids. Raises ValueError for files of another
  kind; encoding raises ImportError without ftfy and spaCy.
  """

  vocabulary: str = dataclasses.field(repr=False)
  merges: str = dataclasses.field(repr=False)
  special_tokens: tuple[str, ...] = ()
  byte_run_ids = frozenset()
  eot = None

  @classmethod
  def from_files(cls, vocabulary: str, merges: str, special_tokens: Iterable[str]) -> "Gpt1Bpe":
    """GPT-1's BPE from the contents of its files. Special are the tokens of tasks that the
    vocabulary has, and of `special_tokens` those it has."""
    ids = parse_json_object(vocabulary, "GPT-1's vocabulary")
    named = {}
    for token in (*TASK_TOKENS, *special_tokens):
      # What is unknown is none of them.
      if type(ids.get(token)) is int and ids[token] != UNKNOWN_ID:
        named[ids[token]] = token
    return cls(vocabulary, merges, tuple(named[i] for i in sorted(named)))

  @classmethod
  def from_tokenizer_json(cls, payload: dict, special_tokens: Iterable[str]) -> "Gpt1Bpe":
    """GPT-1's BPE from the model of a tokenizer.json, without tokens that were added behind it."""
    model = payload["model"]
    if model.get("type") != "BPE" or model.get("end_of_word_suffix") != END_OF_WORD:
      raise ValueError(f"its tokenizer.json is no BPE with {END_OF_WORD}, as GPT-1's is")
    # Older files write a pair as one string.
    pairs = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    merges = "\n".join(["#version: 0.2", *pairs, ""])
    return cls.from_files(json.dumps(model["vocab"]), merges, special_tokens)

  @functools.cached_property
  def _ids(self) -> dict[str, int]:
    ids = parse_json_object(self.vocabulary, "GPT-1's vocabulary")
    # The type itself, since True is an int to isinstance.
    is_dense = all(type(i) is int for i in ids.values())
    if not ids or not is_dense or sorted(ids.values()) != list(range(len(ids))):
      raise ValueError("GPT-1's vocabulary does not give each id from 0 on to one token")
    if not any(token.endswith(END_OF_WORD) for token in ids):
      raise ValueError(f"GPT-1's vocabulary has no token that ends a word, with {END_OF_WORD}")
    if missing := [token for token in self.special_tokens if token not in ids]:
      raise ValueError(f"GPT-1's vocabulary has no token {missing[0][:40]!r}")
    return ids

  @functools.cached_property
  def _tokens(self) -> list[str]:
    return sorted(self._ids, key=self._ids.get)

  @functools.cached_property
  def _ranks(self) -> dict[tuple[str, str], int]:
    """The merges, each with the order in which it was learned. The first line is of version."""
    lines = self.merges.split("\n")
    pairs = [tuple(line.split()) for line in lines[1:] if line.strip()]
    if not lines[0].startswith("#version") or any(len(pair) != 2 for pair in pairs):
      raise ValueError("GPT-1's merges are not a line of #version, and pairs of parts after it")
    return {pair: rank for rank, pair in enumerate(pairs)}

  @functools.cached_property
  def _word_cutter(self):
    _, spacy = _import_libraries()
    return spacy.blank("en").tokenizer

  @functools.cached_property
  def _cache(self) -> dict[str, list[int]]:
    return {}

  @property
  def vocab_size(self) -> int:
    return len(self._ids)

  @functools.cached_property
  def fingerprint(self) -> str:
    content = json.dumps([self._tokens, list(self._ranks), self.special_tokens])
    return hash_vocabulary("gpt1", content.encode())

  def special_id(self, token: str) -> int | None:
    return self._ids[token] if token in self.special_tokens else None

  def encode(
    self, text: str, allow_eot: bool = False, special: bool | Sequence[str] = ()
  ) -> list[int]:
    check_unicode(text)
    # What is not installed is told at the first text, an empty one, too.
    _import_libraries()
    ids = []
    for part, is_token in split_at_tokens(text, parsed_tokens(special, self.special_tokens)):
      ids += [self._ids[part]] if is_token else self._encode_plain(part)
    return ids

  def _encode_plain(self, text: str) -> list[int]:
    ftfy, _ = _import_libraries()
    ids = []
    for word in self._word_cutter(standardize(ftfy.fix_text(text))):
      ids += self._encode_word(word.text.lower())
    return ids

  def _encode_word(self, word: str) -> list[int]:
    """BPE of a word: the pair of the lowest rank is merged, wherever it stands, until none is."""
    if word in self._cache:
      return self._cache[word]
    parts = [*word[:-1], word[-1] + END_OF_WORD]
    while len(parts) > 1:
      pairs = list(zip(parts, parts[1:], strict=False))
      pair = min(pairs, key=lambda pair: self._ranks.get(pair, len(self._ranks)))
      if pair not in self._ranks:
        break
      parts = _merge(parts, pair)

    # spaCy leaves the space after a line's end in its word, which the vocabulary does not have.
    joined = " ".join(parts)
    if joined == f"\n  {END_OF_WORD}":
      joined = f"\n{END_OF_WORD}"
    ids = [self._ids.get(part, UNKNOWN_ID) for part in joined.split(" ")]
    if len(self._cache) < 1_000_000:
      self._cache[word] = ids
    return ids

  def encode_batch(self, texts: list[str]) -> list[list[int]]:
    return list(map(self.encode, texts))

  def encode_with_offsets(self, text: str) -> tuple[list[int], np.ndarray]:
    """The ids of a text, and the character at which each token begins.

    The text was changed before it was cut: a token that is not where it should be begins where the
    one before it ended.
    """
    # 1. The text with each character as it is after the changes, and where it was before them.
    changed = [_changed_character(character) for character in text]
    where = np.repeat(np.arange(len(text)), [len(characters) for characters in changed])
    where = np.append(where, len(text))
    standard = "".join(changed)

    # 2. Look for each token behind the one before.
    ids, starts, end = self.encode(text), [], 0
    for token in ids:
      written = self._tokens[token].removesuffix(END_OF_WORD)
      place = standard.find(written, end, end + SEARCH + len(written))
      if place < 0 or token == UNKNOWN_ID:
        starts.append(where[end])
      else:
        starts.append(where[place])
        end = place + len(written)
    return ids, np.array(starts, int)

  def decode(self, ids: Iterable[int]) -> str:
    """Decodes ids, a space between words. Ids past the vocabulary give nothing."""
    text = "".join(self._written(int(i)) for i in ids)
    return text.removesuffix(" ")

  def _written(self, token: int) -> str:
    written = self._tokens[token] if token < self.vocab_size else ""
    return written.replace(END_OF_WORD, " ")

  def token_bytes(self, token: int) -> bytes:
    return self._written(token).encode()

  def with_tokens(self, tokens: Sequence[str]) -> "Gpt1Bpe":
    """The tokenizer with more special tokens behind its vocabulary. Raises ValueError for those it
    has."""
    if present := [token for token in tokens if token in self._ids]:
      raise ValueError(f"the vocabulary has {present[0][:40]!r} already; leave it out")
    ids = self._ids | {token: self.vocab_size + n for n, token in enumerate(tokens)}
    return Gpt1Bpe(json.dumps(ids), self.merges, (*self.special_tokens, *tokens))

  def to_json(self) -> dict:
    return {
      "kind": "gpt1",
      "vocabulary": self.vocabulary,
      "merges": self.merges,
      "special_tokens": list(self.special_tokens),
    }


def standardize(text: str) -> str:
  """GPT-1's standard form of a text: plain dashes, punctuation and line ends between spaces."""
  for character, written in REPLACED.items():
    text = text.replace(character, written)
  text = SET_APART.sub(r" \1 ", text)
  text = re.sub(r"\s*\n\s*", " \n ", text)
  return re.sub(r"[^\S\n]+", " ", text).strip()


def read_gpt1_bpe(
  folder: pathlib.Path, names: tuple[str, str], special_tokens: Iterable[str] = ()
) -> Gpt1Bpe:
  """Reads the vocabulary and merges of a folder, of the given names; see `Gpt1Bpe.from_files`."""
  vocabulary, merges = (read_text(folder / name) for name in names)
  tokenizer = Gpt1Bpe.from_files(vocabulary, merges, special_tokens)

  # Both are parsed at the first text: damaged ones should fail now.
  tokenizer.fingerprint  # noqa: B018
  return tokenizer


def _merge(parts: list[str], pair: tuple[str, str]) -> list[str]:
  """The parts of a word with each occurrence of a pair, from the left, as one part."""
  merged = []
  i = 0
  while i < len(parts):
    is_pair = tuple(parts[i : i + 2]) == pair
    merged.append("".join(pair) if is_pair else parts[i])
    i += 2 if is_pair else 1
  return merged


@functools.lru_cache(maxsize=1 << 16)
def _changed_character(character: str) -> str:
  """A character as it is when words are cut."""
  if not character.isascii():
    ftfy, _ = _import_libraries()
    fixed = ftfy.fix_text(character)
    character = "".join(REPLACED.get(c, c) for c in fixed)
  return character.lower()


@functools.cache
def _import_libraries():
  """(ftfy, spacy), which cut GPT-1's words. Raises ImportError with the way to get them."""
  try:
    import ftfy
    import spacy
  except ImportError as error:
    raise ImportError(
      "GPT-1's tokenizer cuts words by ftfy and spaCy, as OpenAI's did: pip install 'gpt2_jax"
      "[gpt1]', or give token ids"
    ) from error
  return ftfy, spacy
