# SPDX-License-Identifier: Apache-2.0
"""How much of an evaluation set stood in the training corpus: the share of its 8-grams that the corpus has, too.

After the GPT-2 paper (Radford et al. 2019, section 4): a Bloom filter of the corpus' 8-grams with one false positive in
1e8, of texts "normalized to contain only lower-cased alphanumeric words with a single space as a delimiter".
"""

import dataclasses
import functools
import json
import math
import pathlib
import re
import zipfile
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from gpt2_jax.convert import files
from gpt2_jax.evaluate.sources import Row
from gpt2_jax.evaluate.task import Continuation, NextWords, Task

N = 8  # words
RATE = 1e-8
BLOCK = 1 << 20  # characters of a text that are looked at together

WORD = re.compile(r"[^\W_]+")
BASE = 0x9E3779B97F4A7C15  # of a polynomial in bytes, modulo 2^64; it is odd and so has an inverse there

# U n-grams of a block


# ---- the n-grams of a text


def ngrams(text: str, n: int = N) -> Iterator[np.ndarray]:
  """Hashes of a text's n-grams in their order, block by block, uint64 [U]. `It's 9:30` has the words `it s 9 30`."""
  words, begin = [], 0
  while begin < len(text):
    end = _word_end(text, begin + BLOCK)
    words += WORD.findall(text[begin:end].lower())
    if len(words) >= n:
      yield _hashes(" ".join(words), n)
    words, begin = words[max(0, len(words) - n + 1) :], end


def _word_end(text: str, i: int) -> int:
  """The first place from i on that is not inside a word."""
  rest = WORD.match(text, i)
  return rest.end() if rest else i


def _hashes(words: str, n: int) -> np.ndarray:
  """Of each n-gram a polynomial in its bytes: the difference of two sums from the text's start, shifted to its own."""
  bytes_ = np.frombuffer(words.encode(), np.uint8)
  spaces = np.flatnonzero(bytes_ == ord(" "))
  begin_U = np.concatenate([[0], spaces + 1])[: len(spaces) + 2 - n]
  end_U = np.concatenate([spaces, [len(bytes_)]])[n - 1 :]
  size = 1 << len(bytes_).bit_length()
  powers, inverses = _powers(BASE, size), _powers(pow(BASE, -1, 1 << 64), size)
  sums = np.concatenate([np.zeros(1, np.uint64), np.cumsum(bytes_ * powers[: len(bytes_)])])
  return mixed((sums[end_U] - sums[begin_U]) * inverses[begin_U])


@functools.cache
def _powers(base: int, size: int) -> np.ndarray:
  """base^0, base^1, ..., modulo 2^64."""
  return np.concatenate([np.ones(1, np.uint64), np.cumprod(np.full(size - 1, base, np.uint64))])


def mixed(x: np.ndarray) -> np.ndarray:
  """One-to-one, and every bit of it depends on all of x: the finalizer of splitmix64 (Steele, Lea, Flood 2014)."""
  x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
  x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
  return x ^ (x >> np.uint64(31))


# ---- the corpus


@dataclasses.dataclass
class Bloom:
  """A set of hashes that may say yes to one that it does not hold, and never no to one that it does."""

  bits: np.ndarray  # uint8, eight to a byte
  k: int  # probes for each hash
  n: int = N  # words of an n-gram
  source: dict = dataclasses.field(default_factory=dict)  # what the corpus is

  @classmethod
  def sized(cls, expected: int, rate: float = RATE, n: int = N, source: dict | None = None) -> "Bloom":
    """Empty, with room for `expected` hashes at a rate of false positives (Bloom 1970).

    m = -expected ln(rate) / ln(2)^2 bits, 38.3 for each hash at 1e-8, and k = m / expected ln(2) probes, 27.
    """
    m = -max(1, expected) * math.log(rate) / math.log(2) ** 2
    return cls(np.zeros(math.ceil(m / 8), np.uint8), round(-math.log2(rate)), n, source or {})

  @property
  def rate(self) -> float:
    """The rate of false positives that its bits give, whatever had been expected."""
    parts = np.array_split(self.bits, 1 + self.bits.size // BLOCK)
    ones = sum(int(np.bitwise_count(part).sum(dtype=np.int64)) for part in parts)
    return (ones / (8 * self.bits.size)) ** self.k

  def add(self, hashes_U: np.ndarray) -> None:
    for place_U in self._places(hashes_U):
      np.bitwise_or.at(self.bits, place_U >> np.uint64(3), _bit(place_U))

  def has(self, hashes_U: np.ndarray) -> np.ndarray:
    """Bool [U]."""
    found_U = np.ones(len(hashes_U), bool)
    for place_U in self._places(hashes_U):
      found_U &= (self.bits[place_U >> np.uint64(3)] & _bit(place_U)) > 0
    return found_U

  def _places(self, hashes_U: np.ndarray) -> Iterator[np.ndarray]:
    """The bits of each hash, one probe after the other, by double hashing (Kirsch and Mitzenmacher 2006)."""
    step_U = mixed(~hashes_U) | np.uint64(1)
    for i in range(self.k):
      yield (hashes_U + np.uint64(i) * step_U) % np.uint64(8 * self.bits.size)

  def save(self, path: str) -> None:
    """One file, whole or not at all. Raises FileExistsError."""
    about = json.dumps({"k": self.k, "n": self.n, "source": self.source})
    with files.whole(pathlib.Path(path)) as partial, open(partial, "wb") as file:
      np.savez(file, bits=self.bits, about=about)

  @classmethod
  def load(cls, path: str) -> "Bloom":
    """Raises ValueError for a file that is none."""
    try:
      with np.load(path, allow_pickle=False) as file:
        return cls(file["bits"], **json.loads(str(file["about"])))
    except (KeyError, TypeError, ValueError, EOFError, zipfile.BadZipFile) as error:
      raise ValueError(f"{path} is no filter of launch/contamination.py, or damaged") from error


def _bit(place_U: np.ndarray) -> np.ndarray:
  return np.uint8(1) << (place_U & np.uint64(7)).astype(np.uint8)


def build(documents: Iterable[str], expected: int, rate: float = RATE, n: int = N, source: dict | None = None) -> Bloom:
  """The filter of a corpus' n-grams, of which none crosses documents."""
  bloom = Bloom.sized(expected, rate, n, source)
  for document in documents:
    for hashes_U in ngrams(document, n):
      bloom.add(hashes_U)
  return bloom


def count(documents: Iterable[str], n: int = N) -> int:
  """How many n-grams there are, repetitions included: as many as a filter has to expect at most."""
  return sum(max(0, sum(1 for _ in WORD.finditer(document)) - n + 1) for document in documents)


# ---- the evaluation set


@dataclasses.dataclass(frozen=True)
class Overlap:
  """For each item its different n-grams, and how many of them the corpus has; an item of fewer words has none."""

  ngrams: np.ndarray  # int64 [N]
  found: np.ndarray  # int64 [N]

  @property
  def share(self) -> float:
    """Of all n-grams, those found: the paper's figure. NaN where there is none."""
    total = int(self.ngrams.sum())
    return int(self.found.sum()) / total if total else math.nan


def overlap(items: Iterable[Sequence[str]], bloom: Bloom) -> Overlap:
  """Of items of one text or several; no n-gram crosses texts."""
  rows = []
  for texts in items:
    hashes = [np.zeros(0, np.uint64), *(hashes_U for text in texts for hashes_U in ngrams(text, bloom.n))]
    different_U = np.unique(np.concatenate(hashes))
    rows.append((len(different_U), int(bloom.has(different_U).sum())))
  return Overlap(*np.array(rows, np.int64).reshape(-1, 2).T)


def texts(task: Task, row: Row) -> list[str]:
  """All that a model is given to read of an item."""
  read = []
  for request in task.requests(row):
    match request:
      case Continuation(context, continuation):
        read.append(context + continuation)
      case NextWords(context):
        read.append(context)
      case _:
        read.append(request.text)
  return read


def write_overlap(path: str, found: Overlap, bloom: Bloom, task: Task, fingerprint: str) -> None:
  """JSON, with the arrays in the order of the rows. Raises FileExistsError."""
  content = {"task": task.name, "protocol": task.protocol, "fingerprint": fingerprint, "n": bloom.n, "rate": bloom.rate}
  content |= {"corpus": bloom.source, "ngrams": found.ngrams.tolist(), "found": found.found.tolist()}
  with files.whole(pathlib.Path(path)) as partial:
    partial.write_text(json.dumps(content) + "\n", encoding="utf-8")


def read_overlap(path: str) -> dict:
  """What `write_overlap` wrote. Raises ValueError for a file that is no such thing."""
  keys = ("task", "fingerprint", "n", "rate", "ngrams", "found")
  try:
    content = json.loads(pathlib.Path(path).read_text(encoding="utf-8"))
    complete = all(key in content for key in keys) and len(content["ngrams"]) == len(content["found"])
  except (ValueError, TypeError) as error:
    raise ValueError(f"{path} is no overlap of launch/contamination.py: {error}") from error
  if not complete:
    raise ValueError(f"{path} is no overlap of launch/contamination.py, which has {', '.join(keys)}")
  return content
