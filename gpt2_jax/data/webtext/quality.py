# SPDX-License-Identifier: Apache-2.0
"""Quality filters of Gopher, C4 and FineWeb: verdict and reason equal datatrove's.

Gopher: Rae et al. 2021, arXiv:2112.11446, section A.1.1. C4: Raffel et al. 2020. FineWeb: Penedo
et al. 2024, arXiv:2406.17557. Reasons have datatrove's names, and so do the knobs. Words and
sentences are spaCy's.
"""

import collections
import dataclasses
import functools
import re
from collections.abc import Iterable
from typing import ClassVar

from gpt2_jax.data.webtext.document import Document, Drop, drop
from gpt2_jax.data.webtext.punctuation import PUNCTUATION, SENTENCE_ENDS

STOP_WORDS = frozenset(["the", "be", "to", "of", "and", "that", "have", "with"])
CITATION = re.compile(r"\[\d*]|\[edit]|\[citation needed]")
POLICY = (
  "terms of use",
  "privacy policy",
  "cookie policy",
  "uses cookies",
  "use of cookies",
  "use cookies",
)


@functools.cache
def _spacy():
  try:
    import spacy
  except ImportError as error:
    raise ImportError("quality filters need spaCy: pip install 'gpt2_jax[webtext]'") from error
  nlp = spacy.blank("en")
  nlp.add_pipe("sentencizer")
  return nlp


def _tokenize(text: str, of_sentences: bool) -> list[str]:
  """spaCy's words or sentences of a text, stripped, without empty ones."""
  nlp = _spacy()
  nlp.max_length = len(text) + 10
  # Without the zone, spaCy keeps every word that it has ever seen.
  with nlp.memory_zone():
    try:
      spans = nlp(text).sents if of_sentences else nlp.make_doc(text)
    except Exception:
      # Some versions take this word for a symbol of their own, and fail. datatrove does the same.
      if "IS_ALPHA" not in text:
        raise
      return _tokenize(text.replace("IS_ALPHA", ""), of_sentences)
    texts = [span.text.strip() for span in spans]
  return [text for text in texts if text]


@functools.lru_cache(maxsize=4)
def split_words(text: str) -> tuple[str, ...]:
  """Words and punctuation marks of an English text. The filters ask for those of one text."""
  return tuple(_tokenize(text, of_sentences=False))


@dataclasses.dataclass(frozen=True)
class GopherQuality:
  """Gopher's rules on lengths, symbols, bullets, ellipses and stop words."""

  name: ClassVar[str] = "gopher_quality"

  min_words: int = 50
  max_words: int = 100_000
  min_word_length: float = 3
  max_word_length: float = 10
  max_symbol_ratio: float = 0.1
  max_bullet_lines: float = 0.9
  max_ellipsis_lines: float = 0.3
  min_alphabetic_words: float = 0.8
  min_stop_words: int = 2

  def __call__(self, document: Document) -> Document | Drop:
    reason = self._of_words(document.text) or self._of_lines(document.text)
    return drop(reason, document) if reason else document

  def _of_words(self, text: str) -> str | None:
    words = split_words(text)
    lengths = [len(word) for word in words if not PUNCTUATION.issuperset(word)]
    if len(lengths) < self.min_words:
      return "gopher_short_doc"
    if len(lengths) > self.max_words:
      return "gopher_long_doc"

    mean_length = sum(lengths) / len(lengths)
    if mean_length < self.min_word_length:
      return "gopher_below_avg_threshold"
    if mean_length > self.max_word_length:
      return "gopher_above_avg_threshold"

    if text.count("#") / len(words) > self.max_symbol_ratio:
      return "gopher_too_many_hashes"
    if (text.count("...") + text.count("…")) / len(words) > self.max_symbol_ratio:
      return "gopher_too_many_ellipsis"
    return None

  def _of_lines(self, text: str) -> str | None:
    lines = text.splitlines()
    bullets = sum(line.lstrip().startswith(("•", "-")) for line in lines)
    if bullets / len(lines) > self.max_bullet_lines:
      return "gopher_too_many_bullets"
    ellipses = sum(line.rstrip().endswith(("...", "…")) for line in lines)
    if ellipses / len(lines) > self.max_ellipsis_lines:
      return "gopher_too_many_end_ellipsis"

    # Gopher's last two rules are about words again: the order decides which reason is named.
    words = split_words(text)
    alphabetic = sum(word.isalpha() or any(map(str.isalpha, word)) for word in words)
    if alphabetic / len(words) < self.min_alphabetic_words:
      return "gopher_below_alpha_threshold"
    if len(STOP_WORDS.intersection(words)) < self.min_stop_words:
      return "gopher_enough_stop_words"
    return None


@dataclasses.dataclass(frozen=True)
class GopherRepetition:
  """Gopher's rules on repeated lines, paragraphs and n-grams (table A1)."""

  name: ClassVar[str] = "gopher_repetition"

  max_duplicate_lines: float = 0.3
  max_duplicate_paragraphs: float = 0.3
  max_duplicate_line_characters: float = 0.2
  max_duplicate_paragraph_characters: float = 0.2
  # (n, the share of characters that are in the most frequent n-gram, or in repeated n-grams)
  top_ngrams: tuple[tuple[int, float], ...] = ((2, 0.2), (3, 0.18), (4, 0.16))
  duplicate_ngrams: tuple[tuple[int, float], ...] = (
    (5, 0.15),
    (6, 0.14),
    (7, 0.13),
    (8, 0.12),
    (9, 0.11),
    (10, 0.10),
  )

  def __call__(self, document: Document) -> Document | Drop:
    reason = self._of_lines(document.text) or self._of_ngrams(document.text)
    return drop(reason, document) if reason else document

  def _of_lines(self, text: str) -> str | None:
    if not text:
      return "empty"
    paragraphs = re.split(r"\n{2,}", text.strip())
    repeated, characters = _count_repeated(paragraphs)
    if repeated / len(paragraphs) > self.max_duplicate_paragraphs:
      return "dup_para_frac"
    if characters / len(text) > self.max_duplicate_paragraph_characters:
      return "dup_para_char_frac"

    lines = re.split(r"\n+", text)
    repeated, characters = _count_repeated(lines)
    if repeated / len(lines) > self.max_duplicate_lines:
      return "dup_line_frac"
    if characters / len(text) > self.max_duplicate_line_characters:
      return "dup_line_char_frac"
    return None

  def _of_ngrams(self, text: str) -> str | None:
    words = split_words(text)
    for n, share in self.top_ngrams:
      if len(words) >= n and _top_ngram_characters(words, n) / len(text) > share:
        return f"top_{n}_gram"

    for n, share in self.duplicate_ngrams:
      if _repeated_ngram_characters(words, n) / len(text) > share:
        return f"duplicated_{n}_n_grams"
    return None


@dataclasses.dataclass(frozen=True)
class C4Quality:
  """C4's rules: lines that end a sentence stay, and pages with five sentences of them."""

  name: ClassVar[str] = "c4"

  min_sentences: int = 5
  min_words_per_line: int = 3
  max_word_length: int = 1000

  def __call__(self, document: Document) -> Document | Drop:
    sentences = 0
    kept = []
    for line in document.text.splitlines():
      line = line.strip()
      words = line.split()
      if any(len(word) > self.max_word_length for word in words):
        continue
      line = CITATION.sub("", line)
      if not line.endswith((".", "?", "!", '"', "'")) or line.endswith("..."):
        continue
      if len(words) < self.min_words_per_line:
        continue

      # Two of the rules drop the whole page.
      lower = line.lower()
      if "lorem ipsum" in lower:
        return drop("lorem_ipsum", document)
      if "javascript" in lower:
        continue
      if "{" in line:
        return drop("curly_bracket", document)
      if any(phrase in lower for phrase in POLICY):
        continue
      # Splitting is what takes the time here, so it ends where there are enough.
      if sentences < self.min_sentences:
        sentences += len(_tokenize(line, of_sentences=True))
      kept.append(line)

    if sentences < self.min_sentences:
      return drop("too_few_sentences", document)
    return dataclasses.replace(document, text="\n".join(kept).strip())


@dataclasses.dataclass(frozen=True)
class FineWebQuality:
  """FineWeb's rules: ends of lines, short lines, repeated lines, lists."""

  name: ClassVar[str] = "fineweb"

  min_punctuated_lines: float = 0.12
  max_short_lines: float = 0.67
  short_line: int = 30
  max_repeated_characters: float = 0.01
  max_newlines_per_word: float = 0.3

  def __call__(self, document: Document) -> Document | Drop:
    reason = self._reason(document.text)
    return drop(reason, document) if reason else document

  def _reason(self, text: str) -> str | None:
    lines = [line for line in text.split("\n") if line.strip()]
    if not lines:
      return "empty"
    punctuated = sum(line[-1] in SENTENCE_ENDS for line in lines)
    if punctuated / len(lines) < self.min_punctuated_lines:
      return "line_punct_ratio"
    short = sum(len(line) <= self.short_line for line in lines)
    if short / len(lines) > self.max_short_lines:
      return "short_line_ratio"

    _, characters = _count_repeated(lines)
    if characters / len(text.replace("\n", "")) > self.max_repeated_characters:
      return "char_dup_ratio"
    if text.count("\n") / len(split_words(text)) > self.max_newlines_per_word:
      return "list_ratio"
    return None


def _count_repeated(texts: Iterable[str]) -> tuple[int, int]:
  """How many texts occurred before, and how many characters they have."""
  seen = set()
  repeated, characters = 0, 0
  for text in texts:
    if text in seen:
      repeated += 1
      characters += len(text)
    seen.add(text)
  return repeated, characters


def _ngrams(words: tuple[str, ...], n: int) -> Iterable[tuple[str, ...]]:
  return zip(*(words[i:] for i in range(n)), strict=False)


def _top_ngram_characters(words: tuple[str, ...], n: int) -> int:
  """Characters of the most frequent n-gram with its spaces, times how often it occurs."""
  top, count = collections.Counter(_ngrams(words, n)).most_common(1)[0]
  return (sum(map(len, top)) + n - 1) * count


def _repeated_ngram_characters(words: tuple[str, ...], n: int) -> int:
  """Characters of the n-grams that occurred before; those do not overlap each other."""
  seen = set()
  characters, skip = 0, 0
  for ngram in map("".join, _ngrams(words, n)):
    if skip:
      skip -= 1
    elif ngram in seen:
      characters += len(ngram)
      skip = n - 1
    else:
      seen.add(ngram)
  return characters
