# SPDX-License-Identifier: Apache-2.0
"""Watermarks as transformers makes them: its green lists and g-values, from its keys and hashes.

For texts that its detectors have to find, and for those of its generation. `TransformersSynthId`
runs on the device as the filters of watermark.py do. `TransformersGreenList` is SLOW: its lists are
permutations by torch's generator (MT19937), which the host makes for each token and row. Neither
needs torch.
"""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from gpt2_jax.decoding.samplers import History
from gpt2_jax.decoding.watermark import is_repeated, newest_tokens, tournament

# transformers' defaults.
HASHING_KEY = 15_485_863
FIXED_TABLE = 1_000_003
CANDIDATES = 40  # of a self hash, how many of the likeliest tokens may get the bias

# The multiplier of SynthID's hash; its low 32 bits depend on low bits alone.
MULTIPLIER = np.uint32(6364136223846793005 & 0xFFFFFFFF)


@dataclasses.dataclass(frozen=True)
class TransformersGreenList:
  """transformers' WatermarkingConfig for a vocabulary of `n_vocab`; on one device, and slow.

  `context` is its `context_width`: of a left hash the last of these tokens counts; of a self hash
  the token itself is one of them.
  """

  n_vocab: int
  key: int = HASHING_KEY
  gamma: float = 0.25
  delta: float = 2.0
  context: int = 1
  self_hash: bool = False

  def __post_init__(self):
    if not 0 < self.gamma < 1 or self.context < 1 or self.n_vocab < 1:
      raise ValueError(
        f"a watermark of transformers with gamma {self.gamma}, {self.context} tokens of context "
        f"and {self.n_vocab} of vocabulary: gamma is in (0, 1), the others are 1 or more"
      )

  def __call__(self, logits_V, history: History):
    if logits_V.size != self.n_vocab:
      raise ValueError(
        f"the model has {logits_V.size:,} tokens, and the watermark's lists {self.n_vocab:,}"
      )
    if jax.sharding.get_abstract_mesh().size > 1:
      raise ValueError(
        "transformers' green lists are made on the host, for one device; take --mesh_data=1, or "
        "GreenListWatermark"
      )
    context, is_there = newest_tokens(history, self.context)
    shape = jax.ShapeDtypeStruct(logits_V.shape, jnp.float32)
    bias_V = jax.pure_callback(
      self._bias, shape, logits_V, jnp.stack(context), vmap_method="sequential"
    )
    return jnp.where(is_there, logits_V + bias_V, logits_V)

  def _bias(self, logits_V, context) -> np.ndarray:
    """What is added to the logits, on the host."""
    logits_V, context = np.asarray(logits_V), np.asarray(context).tolist()
    bias_V = np.zeros(self.n_vocab, np.float32)
    if self.self_hash:
      for token in np.argsort(-logits_V, kind="stable")[:CANDIDATES].tolist():
        bias_V[token] = self.delta * self.is_green((*context, token))
    else:
      bias_V[self.green_ids(context)] = self.delta
    return bias_V

  def is_green(self, ngram: Sequence[int]) -> bool:
    """Whether the last token of an n-gram is green after those before it."""
    prefix = ngram if self.self_hash else ngram[:-1]
    return ngram[-1] in self.green_ids(prefix)

  def green_ids(self, prefix: Sequence[int]) -> np.ndarray:
    """The green list after these tokens; of a self hash the last one is the candidate."""
    prefix = tuple(prefix)[-self.context :]
    if self.self_hash:
      table = torch_permutation(self.key, FIXED_TABLE)
      numbers = [int(table[token % FIXED_TABLE]) + 1 for token in prefix]
      seed = min(_wrapped(self.key * number * numbers[-1]) for number in numbers)
    else:
      seed = self.key * prefix[-1]
    return torch_permutation(seed % (2**64 - 1), self.n_vocab, first=int(self.n_vocab * self.gamma))


@dataclasses.dataclass(frozen=True)
class TransformersSynthId:
  """transformers' SynthIDTextWatermarkingConfig: a key for each layer of the tournament.

  Raises ValueError for a table whose size is no power of two: only low bits are computed.
  """

  keys: tuple[int, ...]
  ngram_len: int = 5
  table_size: int = 1 << 16
  table_seed: int = 0

  def __post_init__(self):
    if not self.keys or self.ngram_len < 2:
      raise ValueError("SynthID wants a key for each layer, and n-grams of 2 tokens or more")
    if self.table_size < 2 or self.table_size & (self.table_size - 1):
      raise ValueError(
        f"a sampling table of {self.table_size} numbers: its size has to be a power of two here"
      )
    object.__setattr__(self, "keys", tuple(self.keys))

  @property
  def context(self) -> int:
    return self.ngram_len - 1

  @property
  def depth(self) -> int:
    return len(self.keys)

  def __call__(self, logits_V, history: History):
    context, is_there = newest_tokens(history, self.context)
    hash_V = self.hash_ngram(context, jnp.arange(logits_V.size, dtype=jnp.uint32))
    table, keys = jnp.asarray(self.table), jnp.asarray(self.words_of_keys)
    changed_V = tournament(
      logits_V, self.depth, lambda layer: table[self.places(hash_V, keys[layer])]
    )
    return jnp.where(is_there & ~is_repeated(history, self.context), changed_V, logits_V)

  def bits(self, context: Sequence, token) -> np.ndarray:
    """g of each layer for NumPy's arrays, [N, depth]."""
    hashes = self.hash_ngram(context, token)
    return np.stack([self.table[self.places(hashes, key)] for key in self.words_of_keys], -1)

  @property
  def words_of_keys(self) -> np.ndarray:
    return np.array([key & 0xFFFFFFFF for key in self.keys], np.uint32)

  @property
  def table(self) -> np.ndarray:
    return (torch_words(self.table_seed, self.table_size) & 1).astype(np.uint32)

  def hash_ngram(self, context: Sequence, token):
    """The low 32 bits of its hash of an n-gram, a linear congruential generator."""
    state = token * np.uint32(0) + np.uint32(1)
    for data in (*context, token):
      state = (state + data) * MULTIPLIER + np.uint32(1)
    return state

  def places(self, hashes, key):
    """Where g of a layer stands in the table."""
    return ((hashes + key) * MULTIPLIER + np.uint32(1)) & np.uint32(self.table_size - 1)


def torch_words(seed: int, n: int) -> np.ndarray:
  """The first n random words of `torch.Generator().manual_seed(seed)`: MT19937, as NumPy's."""
  generator = np.random.RandomState(seed & 0xFFFFFFFF)
  return generator.randint(0, 1 << 32, n, np.uint32)


@functools.lru_cache(maxsize=4096)
def torch_permutation(seed: int, n: int, first: int | None = None) -> np.ndarray:
  """`torch.randperm(n)` of a seed, or its first numbers: Fisher and Yates, forwards."""
  first = n if first is None else first
  steps = min(first, n - 1)
  words = torch_words(seed, steps).astype(np.int64)
  swaps = (words % np.arange(n, n - steps, -1) + np.arange(steps)).tolist()
  numbers = list(range(n))
  for i, j in enumerate(swaps):
    numbers[i], numbers[j] = numbers[j], numbers[i]
  return np.array(numbers[:first])


def _wrapped(number: int) -> int:
  """A whole number as one of 64 bits with a sign, as torch multiplies them."""
  return (number + 2**63) % 2**64 - 2**63
