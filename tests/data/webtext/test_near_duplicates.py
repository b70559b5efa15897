# SPDX-License-Identifier: Apache-2.0
"""MinHash: recall at known similarities, clusters against brute force."""

import itertools

import numpy as np
import pytest

from gpt2_jax.data.webtext.near_duplicates import Components, MinHash, jaccard, join_similar

SETS = np.random.default_rng(0)


def pair_of_sets(similarity: float, size: int = 400) -> tuple[np.ndarray, np.ndarray]:
  """Two random sets of `size` hashes with about this Jaccard similarity."""
  # J = c / (2 size - c)
  common = round(2 * size * similarity / (1 + similarity))
  hashes = SETS.integers(0, 1 << 64, 2 * size - common, np.uint64)
  return np.sort(hashes[:size]), np.sort(hashes[size - common :])


def share_a_band(a: np.ndarray, b: np.ndarray, minhash: MinHash) -> bool:
  return bool((minhash.signature(a) == minhash.signature(b)).all(axis=1).any())


@pytest.mark.parametrize("similarity", [0.5, 0.6, 0.7, 0.75, 0.8, 0.9])
def test_recall_is_that_of_the_bands(similarity):
  """Within four standard deviations of 1 - (1 - J^8)^14, over 400 pairs and 20 seeds."""
  pairs = [pair_of_sets(similarity) for _ in range(400)]
  exact = np.mean([jaccard(a, b) for a, b in pairs])
  minhash = [MinHash(seed=seed) for seed in range(20)]
  recall = np.mean([share_a_band(a, b, minhash[i % 20]) for i, (a, b) in enumerate(pairs)])
  expected = 1 - (1 - exact**8) ** 14
  print(f"J {exact:.3f}: recall {recall:.3f}, expected {expected:.3f}")
  deviation = (expected * (1 - expected) / len(pairs)) ** 0.5
  assert abs(exact - similarity) < 0.01 and abs(recall - expected) < 4 * deviation + 1e-3


def test_a_signature_agrees_as_often_as_sets_do():
  """The share of equal hashes estimates the Jaccard similarity without bias (Broder 1997)."""
  minhash = MinHash(bands=64, rows=8)
  for similarity in (0.2, 0.5, 0.9):
    shares, exact = [], []
    for _ in range(20):
      a, b = pair_of_sets(similarity)
      shares.append((minhash.signature(a) == minhash.signature(b)).mean())
      exact.append(jaccard(a, b))
    error = (similarity * (1 - similarity) / (20 * 512)) ** 0.5
    assert abs(np.mean(shares) - np.mean(exact)) < 5 * error


def test_shingles_are_the_words_five_in_a_row():
  minhash = MinHash()
  words = "a b c d e f g".split()
  same = minhash.shingles("A b, c d -- e f\n\n g")
  assert len(same) == 3 and (same == minhash.shingles(" ".join(words))).all()
  assert len(minhash.shingles("one two three four")) == 0 == len(minhash.band_keys("one two"))
  a, b = minhash.shingles("a b c d e f g"), minhash.shingles("a b c d e f h")
  assert jaccard(a, b) == 2 / 4 and jaccard(a[:0], a[:0]) == 0


def corpus(n: int) -> list[str]:
  """Texts of which many are edits of others, some at the threshold."""
  rng = np.random.default_rng(1)
  texts = []
  while len(texts) < n:
    words = rng.integers(0, 5000, rng.integers(30, 120)).tolist()
    for _ in range(rng.choice([1, 1, 1, 2, 3, 5])):
      copy = list(words)
      for place in rng.integers(0, len(words), rng.integers(0, 4)):
        copy[place] = int(rng.integers(0, 5000))
      texts.append(" ".join(map(str, copy)))
  return texts[:n]


def test_clusters_equal_brute_force_over_the_pairs_that_share_a_band():
  minhash, texts = MinHash(), corpus(2000)
  shingles = [minhash.shingles(text) for text in texts]
  keys = np.array([minhash.band_keys(text) for text in texts])

  # Brute force: all pairs, by the keys and by Python's sets.
  shared = np.zeros((len(texts), len(texts)), bool)
  for key in keys.T:
    shared |= key[:, None] == key[None, :]
  sets = [frozenset(s.tolist()) for s in shingles]
  edges = []
  for i, j in np.argwhere(np.triu(shared, 1)).tolist():
    if len(sets[i] & sets[j]) / len(sets[i] | sets[j]) >= minhash.jaccard:
      edges.append((i, j))
  expected = connected(len(texts), edges)

  groups = []
  for column in keys.T:
    for key in np.unique(column):
      groups.append(np.flatnonzero(column == key).tolist())
  compared = []

  def look_up(i):
    compared.append(i)
    return shingles[i]

  found = join_similar(iter(groups), look_up, minhash.jaccard).clusters()
  assert {root: set(members) for root, members in found.items()} == expected
  sizes = [len(members) for members in expected.values()]
  print(f"{len(edges)} pairs, {len(sizes)} clusters of up to {max(sizes)}")
  assert len(edges) > 500 and max(sizes) > 3 and len(compared) < 4 * len(edges)


def connected(n: int, edges: list[tuple[int, int]]) -> dict[int, set[int]]:
  """SciPy's connected components, those of more than one node, by the smallest node."""
  sparse = pytest.importorskip("scipy.sparse")
  rows, columns = np.array(edges).T
  graph = sparse.coo_matrix((np.ones(len(edges)), (rows, columns)), (n, n))
  _, labels = sparse.csgraph.connected_components(graph, directed=False)
  members = {}
  for node, label in enumerate(labels):
    members.setdefault(label, set()).add(node)
  return {min(nodes): nodes for nodes in members.values() if len(nodes) > 1}


def test_components_are_the_same_in_any_order():
  edges = [(5, 3), (3, 9), (1, 2), (9, 1), (7, 8), (4, 4)]
  expected = {1: [1, 2, 3, 5, 9], 4: [4], 7: [7, 8]}
  for order in itertools.permutations(edges):
    assert Components(order).clusters() == expected
