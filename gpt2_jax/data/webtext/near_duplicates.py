# SPDX-License-Identifier: Apache-2.0
"""Near duplicates by MinHash and locality-sensitive hashing (LSH), with exact verification.

A document is the set of its word 5-grams. MinHash (Broder 1997) has 14 bands of 8 hashes, as in
FineWeb: two documents of Jaccard similarity J share a band with probability 1 - (1 - J^8)^14, that
is 0.77 at 0.75 and 0.92 at 0.8. Pairs that share a band are candidates. Their exact Jaccard
similarity decides. Connected components of such pairs are clusters, and of a cluster the document
with the smallest content hash survives. So neither order nor sharding matters.

Below, U is the number of distinct n-grams of a document, B of bands, R of hashes in a band, and
H = B x R.
"""

import dataclasses
import functools
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence

import numpy as np

from gpt2_jax.evaluate.contamination import hash_ngrams, splitmix64

# N-grams that are hashed together: 1 MB of hashes, which a core's cache holds.
CHUNK = 1 << 10


@dataclasses.dataclass(frozen=True)
class MinHash:
  """The parameters of MinHash. `seed` draws the permutations."""

  ngram: int = 5
  bands: int = 14
  rows: int = 8
  jaccard: float = 0.75  # at least so similar are near duplicates
  seed: int = 0

  def shingles(self, text: str) -> np.ndarray:
    """The distinct word n-grams of a text as sorted hashes, uint64 [U]. Case does not count."""
    blocks = [np.zeros(0, np.uint64), *hash_ngrams(text, self.ngram)]
    return np.unique(np.concatenate(blocks))

  def signature(self, shingles_U: np.ndarray) -> np.ndarray:
    """The smallest hash under each permutation, uint64 [B, R]."""
    factor_H1, offset_H1 = self._permutations
    smallest_H = np.full(len(factor_H1), np.iinfo(np.uint64).max, np.uint64)
    buffer_HU = np.empty((len(factor_H1), min(CHUNK, len(shingles_U))), np.uint64)
    for start in range(0, len(shingles_U), CHUNK):
      chunk_U = shingles_U[start : start + CHUNK]
      # x -> a x + b is one-to-one modulo 2^64 for odd a, and the hashes x are random already.
      hashes_HU = np.multiply(factor_H1, chunk_U, out=buffer_HU[:, : len(chunk_U)])
      hashes_HU += offset_H1
      np.minimum(smallest_H, hashes_HU.min(axis=1), out=smallest_H)
    return smallest_H.reshape(self.bands, self.rows)

  def band_keys(self, text: str) -> np.ndarray:
    """A key for each band, uint64 [B]; none for a text that is shorter than an n-gram."""
    shingles_U = self.shingles(text)
    if not len(shingles_U):
      return np.zeros(0, np.uint64)

    key_B = splitmix64(np.arange(self.bands, dtype=np.uint64))
    for hash_B in self.signature(shingles_U).T:
      key_B = splitmix64(key_B ^ hash_B)
    return key_B

  @functools.cached_property
  def _permutations(self) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.Generator(np.random.PCG64(self.seed))
    factor_H1, offset_H1 = rng.integers(0, 1 << 64, (2, self.bands * self.rows, 1), np.uint64)
    return factor_H1 | np.uint64(1), offset_H1


def jaccard(a_U: np.ndarray, b_U: np.ndarray) -> float:
  """Jaccard similarity of two sets, as sorted arrays of distinct elements."""
  common = np.intersect1d(a_U, b_U, assume_unique=True).size
  union = a_U.size + b_U.size - common
  return common / union if union else 0.0


class Components:
  """Connected components by union-find. Memory grows with the edges that join two of them.

  A Python dictionary takes about 180 bytes for each document that has an edge.
  """

  def __init__(self, edges: Iterable[tuple[Hashable, Hashable]] = ()):
    self._parents = {}
    for a, b in edges:
      self.join(a, b)

  def root(self, node: Hashable) -> Hashable:
    """The smallest node of the component."""
    path = []
    while (parent := self._parents.get(node, node)) != node:
      path.append(node)
      node = parent
    for passed in path:
      self._parents[passed] = node
    return node

  def join(self, a: Hashable, b: Hashable) -> None:
    low, high = sorted((self.root(a), self.root(b)))
    self._parents[high] = self._parents[low] = low

  def clusters(self) -> dict[Hashable, list]:
    """The nodes of each component that has an edge, by its smallest node."""
    clusters = {}
    for node in sorted(self._parents):
      clusters.setdefault(self.root(node), []).append(node)
    return clusters


def join_similar(
  groups: Iterator[Sequence[Hashable]],
  shingles: Callable[[Hashable], np.ndarray],
  threshold: float,
) -> Components:
  """Joins the documents that share a band and are similar enough.

  A pair that is connected already is not compared: the components would be the same.
  """
  components = Components()
  for group in groups:
    for i, a in enumerate(group):
      for b in group[:i]:
        if components.root(a) == components.root(b):
          continue
        if jaccard(shingles(a), shingles(b)) >= threshold:
          components.join(a, b)
  return components
