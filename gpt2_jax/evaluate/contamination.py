# SPDX-License-Identifier: Apache-2.0
"""Data contamination: the share of an evaluation set's 8-grams that the training corpus has, too.

After the GPT-2 paper (Radford et al. 2019, section 4): a Bloom filter of the corpus' 8-grams with
one false positive in 1e8, of texts "normalized to contain only lower-cased alphanumeric words with
a single space as a delimiter".
"""

import dataclasses
import functools
import json
import math
import re
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Sequence
from typing import BinaryIO

import numpy as np

from gpt2_jax.evaluate.sources import MALFORMED, SURROGATE, Row, malformed_reason
from gpt2_jax.evaluate.task import Loglikelihood, NextWords, Task
from gpt2_jax.files import (
  atomic_write,
  json_sha256,
  local_path,
  parse_json_object,
  read_json_object,
)

NGRAM_WORDS = 8
FALSE_POSITIVE_RATE = 1e-8
# Characters of a text, and bytes of a filter, that are worked on together. Bounds the memory.
BLOCK = 1 << 20

WORD = re.compile(r"[^\W_]+")
# A hash is a polynomial in bytes, modulo 2^64. Its base is odd, and so has an inverse there.
BASE = 0x9E3779B97F4A7C15

# Below, U is the number of n-grams of a block.


# ---- the n-grams of a text


def hash_ngrams(text: str, n: int = NGRAM_WORDS) -> Iterator[np.ndarray]:
  """Hashes of a text's word n-grams in their order, block by block, uint64 [U].

  `It's 9:30` has the words `it s 9 30`.
  """
  words = []
  begin = 0
  while begin < len(text):
    end = _word_end(text, begin + BLOCK)
    words += WORD.findall(text[begin:end].lower())
    if len(words) >= n:
      yield _rolling_hashes(" ".join(words), n)

    # The last n - 1 words begin n-grams that end in the next block.
    words = words[max(0, len(words) - n + 1) :]
    begin = end


def _word_end(text: str, i: int) -> int:
  """The first place from i on that is not inside a word."""
  rest = WORD.match(text, i)
  return rest.end() if rest else i


def _rolling_hashes(words: str, n: int) -> np.ndarray:
  """Rolling hash (Rabin-Karp) of each n-gram of a text of words with single spaces.

  The hash is a polynomial in the n-gram's bytes: the difference of two prefix sums, divided by the
  power of the base at which the n-gram begins.
  """
  # 1. Where n-grams begin and end: at spaces, and at both ends of the text.
  bytes_ = np.frombuffer(words.encode(), np.uint8)
  spaces = np.flatnonzero(bytes_ == ord(" "))
  begin_U = np.concatenate([[0], spaces + 1])[: len(spaces) + 2 - n]
  end_U = np.concatenate([spaces, [len(bytes_)]])[n - 1 :]

  # 2. Prefix sums, modulo 2^64. Sizes are powers of two, so that few tables of powers are kept.
  size = 1 << len(bytes_).bit_length()
  powers = _powers(BASE, size)
  inverses = _powers(pow(BASE, -1, 1 << 64), size)
  sums = np.concatenate([np.zeros(1, np.uint64), np.cumsum(bytes_ * powers[: len(bytes_)])])
  return splitmix64((sums[end_U] - sums[begin_U]) * inverses[begin_U])


@functools.cache
def _powers(base: int, size: int) -> np.ndarray:
  """base^0, base^1, ..., modulo 2^64."""
  return np.concatenate([np.ones(1, np.uint64), np.cumprod(np.full(size - 1, base, np.uint64))])


def splitmix64(x: np.ndarray) -> np.ndarray:
  """Hash finalizer of splitmix64 (Steele, Lea, Flood 2014): one-to-one, every bit on all bits."""
  x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
  x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
  return x ^ (x >> np.uint64(31))


# ---- the corpus


@dataclasses.dataclass
class BloomFilter:
  """Bloom filter: a set of hashes with false positives at a known rate, and no false negatives."""

  bits: np.ndarray  # uint8, eight to a byte
  k: int  # probes for each hash
  n: int = NGRAM_WORDS  # words of an n-gram
  source: dict = dataclasses.field(default_factory=dict)  # what the corpus is

  @classmethod
  def with_capacity(
    cls,
    expected: int,
    rate: float = FALSE_POSITIVE_RATE,
    n: int = NGRAM_WORDS,
    source: dict | None = None,
  ) -> "BloomFilter":
    """An empty filter for `expected` hashes at a rate of false positives (Bloom 1970).

    It has m = -expected ln(rate) / ln(2)^2 bits, 38.3 for each hash at 1e-8, and probes
    k = m / expected ln(2) of them for each hash, 27.
    """
    n_bits = -max(1, expected) * math.log(rate) / math.log(2) ** 2
    bits = np.zeros(math.ceil(n_bits / 8), np.uint8)
    return cls(bits, round(-math.log2(rate)), n, source or {})

  @property
  def false_positive_rate(self) -> float:
    """The false positive rate that the bits give, however many hashes had been expected."""
    # Bit counts have the size of the filter: in parts, to bound the memory.
    ones = 0
    for part in np.array_split(self.bits, 1 + self.bits.size // BLOCK):
      ones += int(np.bitwise_count(part).sum(dtype=np.int64))
    return (ones / (8 * self.bits.size)) ** self.k

  def add(self, hashes_U: np.ndarray) -> None:
    for bit_U in self._probes(hashes_U):
      np.bitwise_or.at(self.bits, bit_U >> np.uint64(3), _mask(bit_U))

  def contains(self, hashes_U: np.ndarray) -> np.ndarray:
    """Membership of each hash, bool [U]."""
    contained_U = np.ones(len(hashes_U), bool)
    for bit_U in self._probes(hashes_U):
      contained_U &= (self.bits[bit_U >> np.uint64(3)] & _mask(bit_U)) > 0
    return contained_U

  def _probes(self, hashes_U: np.ndarray) -> Iterator[np.ndarray]:
    """The k bits of each hash, by double hashing (Kirsch and Mitzenmacher 2006)."""
    # Odd steps are never zero.
    step_U = splitmix64(~hashes_U) | np.uint64(1)
    for i in range(self.k):
      yield (hashes_U + np.uint64(i) * step_U) % np.uint64(8 * self.bits.size)

  def save(self, path: str) -> None:
    """Atomic write of the filter to one .npz file. Raises FileExistsError."""
    metadata = json.dumps({"k": self.k, "n": self.n, "source": self.source})
    with atomic_write(local_path(path)) as partial, open(partial, "wb") as file:
      np.savez(file, bits=self.bits, about=metadata)

  @classmethod
  def load(cls, path: str) -> "BloomFilter":
    """Loads a saved filter. Raises ValueError for another kind of file, or a damaged one."""
    # A file that is not there is no damaged one: it is opened outside.
    with open(local_path(path), "rb") as stream:
      return cls._read(stream, path)

  @classmethod
  def _read(cls, stream: BinaryIO, path: str) -> "BloomFilter":
    try:
      with np.load(stream, allow_pickle=False) as file:
        about = parse_json_object(str(file["about"]), "its description")
        loaded = cls(file["bits"], **about)
      loaded._check()
      return loaded
    # Whatever zipfile and NumPy raise for bytes that are no .npz, or another one.
    except (
      *MALFORMED,
      EOFError,
      MemoryError,
      OSError,
      RuntimeError,
      zipfile.BadZipFile,
      zlib.error,
    ) as error:
      # NumPy's own words for a pickle are advice to trust it.
      raise ValueError(f"{path} is no filter of gpt2-jax contamination, or damaged") from error

  def _check(self) -> None:
    """Raises ValueError unless the fields are those of a filter."""
    if self.bits.dtype != np.uint8 or self.bits.ndim != 1 or not self.bits.size:
      raise ValueError(f"its bits are {self.bits.dtype} {self.bits.shape}")
    for name, value, high in (("k", self.k, 64), ("n", self.n, 1000)):
      if type(value) is not int or not 1 <= value <= high:
        raise ValueError(f"its {name} is {str(value)[:40]}")
    if not isinstance(self.source, dict):
      raise ValueError("its source is no object")


def _mask(bit_U: np.ndarray) -> np.ndarray:
  """The byte in which only this bit is set."""
  return np.uint8(1) << (bit_U & np.uint64(7)).astype(np.uint8)


def build_filter(
  documents: Iterable[str],
  expected: int,
  rate: float = FALSE_POSITIVE_RATE,
  n: int = NGRAM_WORDS,
  source: dict | None = None,
) -> BloomFilter:
  """Builds the Bloom filter of a corpus' n-grams. No n-gram crosses documents."""
  bloom = BloomFilter.with_capacity(expected, rate, n, source)

  for document in documents:
    for hashes_U in hash_ngrams(document, n):
      bloom.add(hashes_U)
  return bloom


def count_ngrams(documents: Iterable[str], n: int = NGRAM_WORDS) -> int:
  """Number of n-grams of a corpus with repetitions: the most that a filter has to expect."""
  count = 0
  for document in documents:
    # Not findall: a list of all words of a long document takes much memory.
    n_words = sum(1 for _ in WORD.finditer(document))
    count += max(0, n_words - n + 1)
  return count


# ---- the evaluation set


@dataclasses.dataclass(frozen=True)
class Overlap:
  """For each item the number of its distinct n-grams, and of those that the corpus has.

  An item of fewer than n words has no n-gram.
  """

  ngrams: np.ndarray  # int64 [N]
  in_corpus: np.ndarray  # int64 [N]

  @property
  def share(self) -> float:
    """The paper's figure: of all n-grams, those in the corpus. NaN without n-grams."""
    total = int(self.ngrams.sum())
    return int(self.in_corpus.sum()) / total if total else math.nan


def measure_overlap(items: Iterable[Sequence[str]], bloom: BloomFilter) -> Overlap:
  """N-gram overlap of items with a corpus. An item is one text or several; no n-gram crosses
  texts."""
  counts = []
  for texts in items:
    hashes = [np.zeros(0, np.uint64)]  # for an item without n-grams
    for text in texts:
      hashes.extend(hash_ngrams(text, bloom.n))

    # An n-gram that an item repeats counts once.
    distinct_U = np.unique(np.concatenate(hashes))
    counts.append((len(distinct_U), int(bloom.contains(distinct_U).sum())))

  # The shape holds without items, too.
  counts_N2 = np.array(counts, np.int64).reshape(-1, 2)
  return Overlap(counts_N2[:, 0], counts_N2[:, 1])


def request_texts(task: Task, row: Row) -> list[str]:
  """All that a model reads of an item: the texts of its requests."""
  texts = []
  for request in task.requests(row):
    match request:
      case Loglikelihood(context, continuation):
        texts.append(context + continuation)
      case NextWords(context):
        texts.append(context)
      case _:
        texts.append(request.text)
  return texts


def check_items(task: Task, rows: Sequence[Row], n: int = NGRAM_WORDS) -> None:
  """Raises ValueError unless every row can be read, and at least one has an n-gram."""
  has_ngram = False
  for i, row in enumerate(rows):
    try:
      texts = request_texts(task, row)
      problem = None if all(isinstance(text, str) for text in texts) else "its text is no text"
    except MALFORMED as error:
      problem = malformed_reason(error)
    if not problem and any(map(SURROGATE.search, texts)):
      problem = "it has a lone surrogate, which is no text"
    if problem:
      raise ValueError(f"{task.name}: row {i:,} is malformed: {problem}")
    has_ngram = has_ngram or count_ngrams(texts, n) > 0

  if not has_ngram:
    raise ValueError(
      f"{task.name}: none of its {len(rows):,} items has {n} words in a row, so that there is no "
      f"{n}-gram to look up"
    )


def write_overlap(
  path: str, overlap: Overlap, bloom: BloomFilter, task: Task, fingerprint: str
) -> None:
  """Writes an overlap as JSON, the arrays in the order of the rows. Raises FileExistsError."""
  # The fingerprint tells the rows apart from those of another version of the dataset.
  content = {
    "task": task.name,
    "protocol": task.protocol,
    "fingerprint": fingerprint,
    "n": bloom.n,
    "rate": bloom.false_positive_rate,
    "corpus": bloom.source,
    "ngrams": overlap.ngrams.tolist(),
    "found": overlap.in_corpus.tolist(),
  }
  content["sha256"] = json_sha256(content)
  with atomic_write(local_path(path)) as partial:
    partial.write_text(json.dumps(content) + "\n", encoding="utf-8")


def read_overlap(path: str) -> dict:
  """Reads what `write_overlap` wrote. Raises ValueError for any other file."""
  try:
    content = read_json_object(local_path(path))
    # Overlaps of before the checksum have none.
    checksum = json_sha256(content)
    if content.pop("sha256", checksum) != checksum:
      raise ValueError("its checksum is another: it is damaged, or was edited")
    _check_overlap(content)
  except (ValueError, TypeError, KeyError) as error:
    raise ValueError(
      f"{path[:200]} is no overlap of gpt2-jax contamination: {malformed_reason(error)}"
    ) from error
  return content


def _check_overlap(content: dict) -> None:
  """Raises ValueError, TypeError or KeyError for JSON of another kind, or edited by hand."""
  for name, type_ in (("task", str), ("fingerprint", str), ("n", int), ("rate", int | float)):
    if not isinstance(content[name], type_):
      raise ValueError(f"its {name} is {str(content[name])[:40]!r}")

  ngrams, in_corpus = content["ngrams"], content["found"]
  if not isinstance(ngrams, list) or not isinstance(in_corpus, list):
    raise ValueError("its ngrams and found are not two lists")
  if not ngrams or len(ngrams) != len(in_corpus):
    raise ValueError(f"it has {len(ngrams):,} items and {len(in_corpus):,} counts")
  for i, (total, seen) in enumerate(zip(ngrams, in_corpus, strict=True)):
    are_counts = type(total) is int and type(seen) is int
    if not are_counts or not 0 <= seen <= total < 2**53:
      raise ValueError(
        f"item {i:,} has {str(seen)[:20]} of {str(total)[:20]} n-grams in the corpus"
      )
