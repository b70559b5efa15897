# SPDX-License-Identifier: Apache-2.0
"""Exact search of a token store: where sequences of tokens are, and in how many documents.

All sequences are looked for in one pass over the store. Memory is that of a block and of the
sequences, whatever the size of the store.

Windows of 1, 2, 4 and 8 tokens are hashed, each width from the one before. A sequence is filed
under the hash of as many of its first tokens. A table of the hashes' upper bits says of nearly all
windows at once that no sequence begins there. What is left is compared token by token, so that a
collision costs time and is never a wrong answer.

  T places in a block  P pairs of a place and a sequence  N sequences
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from gpt2_jax.data.token_store import TokenStore
from gpt2_jax.files import progress
from gpt2_jax.tokenizer import Tokenizer

BLOCK = 1 << 18  # tokens that are hashed at once: a few MB, which caches hold
MOST_PLACES = 10
# Of each doubling another factor: with one for all, the order of the tokens would not count.
FACTORS = np.array([0x9E3779B1, 0x85EBCA6B, 0xC2B2AE35, 0x27D4EB2F], np.uint32)
WIDTHS = (1, 2, 4, 8)
TABLE_BITS = 16  # at least; and 8 more than it takes to count the sequences


@dataclasses.dataclass(frozen=True)
class Occurrences:
  """How often a sequence is in a store, overlapping ones counted, and where it is first."""

  count: int
  documents: int | None  # that have it (k-eidetic); None if no token ends a document of the store
  places: tuple[int, ...]  # the first ones, counted in tokens from the store's beginning


def find_texts(store: TokenStore, texts: Sequence[str]) -> list[Occurrences]:
  """Exact search for texts, by the tokens that they have at the beginning of a line or of a word.

  It misses a text that begins or ends inside a token: inside a word, or where its last characters
  and what follows are one token. Raises ValueError for an empty text, and as `find_tokens` does.
  """
  sequences, owners = [], []
  for number, text in enumerate(texts):
    if not text:
      raise ValueError(f"text {number:,} is empty: it is everywhere")
    ways = tokenized_ways(store.tokenizer, text)
    sequences += ways
    owners += [number] * len(ways)
  return _search(store, sequences, np.array(owners, np.int64), len(texts))


def find_tokens(store: TokenStore, sequences: Sequence[Sequence[int]]) -> list[Occurrences]:
  """Exact search for sequences of the store's tokens, all of them in one pass over the store.

  Raises ValueError for a sequence without tokens, and for a store that is damaged.
  """
  return _search(store, sequences, np.arange(len(sequences)), len(sequences))


def tokenized_ways(tokenizer: Tokenizer, text: str) -> list[list[int]]:
  """The tokens of a text at the beginning of a document, after a space, and after a line's end.

  In GPT-2's BPE a word's token begins with the space before it.
  """
  ways = [list(tokenizer.encode(text))]
  for before in (" ", "\n"):
    try:
      space, tokens = tokenizer.encode(before), list(tokenizer.encode(before + text))
    except ValueError:
      continue  # an alphabet without it
    # White space that has a token of its own is none of the text's.
    if tokens[: len(space)] == space:
      tokens = tokens[len(space) :]
    ways.append(tokens)

  # One that ends with another is there only where that one is, too, and would count it twice.
  ways = sorted(ways, key=len)
  kept = []
  for way in ways:
    if way and not any(way[-len(other) :] == other for other in kept):
      kept.append(way)
  return kept


def check_store(store: TokenStore, tokenizer: Tokenizer) -> None:
  """Raises ValueError unless the store's tokens are those of the tokenizer."""
  if store.fingerprint != tokenizer.fingerprint:
    raise ValueError(
      f"{store.path} was made with another tokenizer (fingerprint {store.fingerprint[:12]}, the "
      f"model's has {tokenizer.fingerprint[:12]}): their tokens mean other texts; tokenize the "
      f"corpus with the model's"
    )


def _search(store: TokenStore, sequences, owner_N: np.ndarray, n_owners: int) -> list[Occurrences]:
  """The occurrences of each owner, whose sequences are other ways to write the same."""
  if not sequences:
    return []
  needles = _Needles.make(sequences)
  tally = _Tally.make(n_owners, store.tokenizer.eot)
  blocks = store.blocks(BLOCK, int(needles.length_N.max()) - 1)
  n_blocks = -(-len(store) // BLOCK)
  for start, block in progress(blocks, f"searching {n_blocks:,} blocks", " blocks"):
    place_P, number_P = needles.find(block)
    # What begins in the overlap is found again in the next block.
    inside_P = place_P < BLOCK
    tally.add(start, block[:BLOCK], place_P[inside_P], owner_N[number_P[inside_P]])
  return tally.occurrences()


@dataclasses.dataclass(frozen=True)
class _Prefixes:
  """The first `width` tokens of some sequences, by their hashes."""

  hash_K: np.ndarray  # sorted
  number_K: np.ndarray  # whose they are
  table: np.ndarray  # whether a hash has these upper bits
  shift: np.uint32

  @classmethod
  def make(cls, hash_K: np.ndarray, number_K: np.ndarray) -> "_Prefixes":
    bits = max(TABLE_BITS, len(hash_K).bit_length() + 8)
    shift = np.uint32(32 - min(bits, 28))
    table = np.zeros(1 << (32 - int(shift)), bool)
    table[hash_K >> shift] = True
    order = np.argsort(hash_K, kind="stable")
    return cls(hash_K[order], number_K[order], table, shift)

  def find(self, hash_T: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The pairs of a place and a sequence whose hashes are equal."""
    place_P = np.flatnonzero(self.table[hash_T >> self.shift])
    low_P = np.searchsorted(self.hash_K, hash_T[place_P], "left")
    high_P = np.searchsorted(self.hash_K, hash_T[place_P], "right")

    # Several sequences may have one hash: they may begin alike.
    count_P = high_P - low_P
    before_P = np.cumsum(count_P) - count_P
    within = np.arange(count_P.sum()) - np.repeat(before_P, count_P)
    return np.repeat(place_P, count_P), self.number_K[np.repeat(low_P, count_P) + within]


@dataclasses.dataclass(frozen=True)
class _Needles:
  """Sequences to look for, one after another in `tokens`."""

  tokens: np.ndarray
  begin_N: np.ndarray
  length_N: np.ndarray
  prefixes: dict[int, _Prefixes]  # by their width

  @classmethod
  def make(cls, sequences: Sequence[Sequence[int]]) -> "_Needles":
    for number, sequence in enumerate(sequences):
      if not len(sequence) or min(sequence) < 0:
        raise ValueError(f"sequence {number:,} is {list(sequence)[:4]}; give tokens, 1 or more")
    length_N = np.array([len(sequence) for sequence in sequences], np.int64)
    begin_N = np.cumsum(length_N) - length_N
    tokens = np.concatenate([np.asarray(sequence, np.uint32) for sequence in sequences])

    width_N = np.array(WIDTHS)[np.searchsorted(WIDTHS, length_N, "right") - 1]
    hashes = _hashes(np.append(tokens, np.zeros(WIDTHS[-1], np.uint32)))
    prefixes = {}
    for width, hash_T in zip(WIDTHS, hashes, strict=True):
      number_K = np.flatnonzero(width_N == width)
      if len(number_K):
        prefixes[width] = _Prefixes.make(hash_T[begin_N[number_K]], number_K)
    return cls(tokens, begin_N, length_N, prefixes)

  def find(self, block: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The places in a block at which sequences begin, and their numbers."""
    # 1. What the hashes of the first tokens let through.
    pairs = [(np.zeros(0, np.int64), np.zeros(0, np.int64))]
    for width, hash_T in zip(WIDTHS, _hashes(block, max(self.prefixes)), strict=False):
      if width in self.prefixes:
        pairs.append(self.prefixes[width].find(hash_T))
    place_P, number_P = map(np.concatenate, zip(*pairs, strict=True))

    # 2. Compare, a token of all pairs at a time; a sequence that has ended shows its last one.
    fits_P = place_P + self.length_N[number_P] <= len(block)
    place_P, number_P = place_P[fits_P], number_P[fits_P]
    for step in range(int(self.length_N[number_P].max(initial=0))):
      at_P = np.minimum(step, self.length_N[number_P] - 1)
      same_P = block[place_P + at_P] == self.tokens[self.begin_N[number_P] + at_P]
      place_P, number_P = place_P[same_P], number_P[same_P]
    return place_P, number_P


def _hashes(tokens: np.ndarray, widest: int = WIDTHS[-1]) -> list[np.ndarray]:
  """The hash of the window at each place, for each width up to the widest; uint32 arithmetic."""
  hashes = [tokens.astype(np.uint32) * FACTORS[0]]
  for width, factor in zip(WIDTHS, FACTORS[1:], strict=False):
    if width >= widest or len(hashes[-1]) <= width:
      break
    hash_T = hashes[-1][:-width] * factor
    hash_T += hashes[-1][width:]
    hashes.append(hash_T)
  return hashes


@dataclasses.dataclass
class _Tally:
  """What was found so far: of each owner the occurrences, their documents and first places."""

  count_N: np.ndarray
  documents_N: np.ndarray
  last_document_N: np.ndarray
  places: list[list[int]]
  eot: int | None
  n_ended: int = 0  # documents before this block

  @classmethod
  def make(cls, n: int, eot: int | None) -> "_Tally":
    count_N, documents_N = np.zeros((2, n), np.int64)
    return cls(count_N, documents_N, np.full(n, -1), [[] for _ in range(n)], eot)

  def add(self, start: int, block: np.ndarray, place_P: np.ndarray, owner_P: np.ndarray) -> None:
    """Counts a block's occurrences."""
    # 1. In the order of the owners, and of the places of each.
    order_P = np.lexsort((place_P, owner_P))
    place_P, owner_P = place_P[order_P], owner_P[order_P]
    self.count_N += np.bincount(owner_P, minlength=len(self.count_N))

    # 2. Documents end with the end of text. One is new if neither the occurrence before it nor the
    #    last one of the blocks before is in it.
    ends = np.flatnonzero(block == (-1 if self.eot is None else self.eot))
    document_P = self.n_ended + np.searchsorted(ends, place_P)
    is_first_P = np.diff(owner_P, prepend=-1) != 0
    new_P = is_first_P | (np.diff(document_P, prepend=-1) != 0)
    new_P &= document_P != self.last_document_N[owner_P]
    self.documents_N += np.bincount(owner_P[new_P], minlength=len(self.count_N))
    np.maximum.at(self.last_document_N, owner_P, document_P)
    self.n_ended += len(ends)

    # 3. Keep the first places. The first of each owner says how many are before it.
    first_P = np.maximum.accumulate(np.where(is_first_P, np.arange(len(owner_P)), 0))
    few_P = np.arange(len(owner_P)) - first_P < MOST_PLACES
    for place, owner in zip(place_P[few_P].tolist(), owner_P[few_P].tolist(), strict=True):
      if len(self.places[owner]) < MOST_PLACES:
        self.places[owner].append(start + place)

  def occurrences(self) -> list[Occurrences]:
    results = []
    for count, documents, places in zip(
      self.count_N.tolist(), self.documents_N.tolist(), self.places, strict=True
    ):
      results.append(Occurrences(count, None if self.eot is None else documents, tuple(places)))
    return results
