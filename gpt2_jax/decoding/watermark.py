# SPDX-License-Identifier: Apache-2.0
"""Watermarks of generated text: green lists (KGW), SynthID-Text, and Gumbel (Aaronson), as filters.

A filter of `Sample` or `Greedy` that stands last, so that temperature, top-k and top-p come before:
`complete(model, tokenizer, prompt, top_p=0.9, watermark=GumbelWatermark(key))`. What it does to a
token depends on a key, on the `context` tokens before, and on the token: a counter-based hash on
the device, Threefry-2x32 with 20 rounds for each token of the vocabulary and step. The same
functions take NumPy's arrays in detection (evaluate/watermark_detection.py).

  GreenListWatermark  adds delta to the logits of a part of the vocabulary: the text changes, and is
                      the easiest to detect (Kirchenbauer et al. 2023; with `self_hash`, "On the
                      Reliability of Watermarks for Large Language Models")
  SynthIdWatermark    a tournament of the drawn tokens; over keys, the distribution of each token is
                      the model's (Dathathri et al. 2024)
  GumbelWatermark     draws by the Gumbel trick with hashed numbers; over keys, the distribution is
                      the model's, and a prompt has one continuation for each key (Aaronson 2022)

Where the same context has come before in a row, the latter two leave the token to chance: else
loops would be certain. Speculative decoding draws from the filtered distribution, watermark
included. Beam search and contrastive search take no filters.
"""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from gpt2_jax.decoding.samplers import History

# A token of the context has this bit in the hash, a token that is scored has not: so the hash of a
# context is no hash of an n-gram.
IN_CONTEXT = np.uint32(1 << 31)
MAX_CONTEXT = 16
MAX_DEPTH = 64

# Threefry-2x32 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3").
ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))
PARITY = np.uint32(0x1BD11BDA)


def threefry(key: int, count_0, count_1) -> tuple:
  """Two words of 32 random bits for each pair of counters, uint32 arrays of NumPy or JAX."""
  keys = np.uint32(key & 0xFFFFFFFF), np.uint32(key >> 32)
  keys = (*keys, keys[0] ^ keys[1] ^ PARITY)
  x_0, x_1 = count_0 + keys[0], count_1 + keys[1]
  for group in range(5):
    for rotation in ROTATIONS[group % 2]:
      x_0 = x_0 + x_1
      x_1 = ((x_1 << rotation) | (x_1 >> (32 - rotation))) ^ x_0
    x_0 = x_0 + keys[(group + 1) % 3]
    x_1 = x_1 + keys[(group + 2) % 3] + np.uint32(group + 1)
  return x_0, x_1


def hash_context(key: int, context: Sequence):
  """The hash of the tokens before one, the oldest first: uint32 as they are."""
  state = context[0] * np.uint32(0)
  for token in context:
    _, state = threefry(key, state, token | IN_CONTEXT)
  return state


@dataclasses.dataclass(frozen=True)
class GreenListWatermark:
  """KGW: adds `delta` to the logits of the green list, a part `gamma` of the vocabulary.

  The list is of the key and the last `context` tokens (left hash). With `self_hash` a token also
  decides whether it is green: which of the tokens before counts is the one whose hash with it is
  least, so an edit of the others does not matter.
  """

  key: int
  gamma: float = 0.25
  delta: float = 2.0
  context: int = 1
  self_hash: bool = False

  def __post_init__(self):
    _check(self.key, self.context)
    if not 0 < self.gamma < 1:
      raise ValueError(f"a green list of {self.gamma} of the vocabulary: gamma is between 0 and 1")
    if not 0 < self.delta <= 100:
      raise ValueError(f"green tokens get {self.delta} on their logits: delta is in (0, 100]")

  def __call__(self, logits_V, history: History):
    context, is_there = newest_tokens(history, self.context)
    is_green_V = self.is_green(context, jnp.arange(logits_V.size, dtype=jnp.uint32))
    return jnp.where(is_green_V & is_there, logits_V + self.delta, logits_V)

  def is_green(self, context: Sequence, token):
    """Whether tokens are green after these."""
    word, _ = threefry(self.key, self.seed(context, token), token)
    return word < np.uint32(round(self.gamma * 2**32))

  def seed(self, context: Sequence, token):
    """What decides with a token whether it is green: the hash of its context, or of one of it."""
    if not self.self_hash:
      return hash_context(self.key, context)
    _, seed = threefry(self.key, token | IN_CONTEXT, token)
    for other in context:
      # The lesser one; NumPy and JAX have no common minimum.
      _, anchored = threefry(self.key, other | IN_CONTEXT, token)
      is_less = anchored < seed
      seed = anchored * is_less + seed * ~is_less
    return seed


@dataclasses.dataclass(frozen=True)
class GumbelWatermark:
  """Gumbel watermark: the token whose hashed number wins is certain.

  With numbers u of [0, 1) the winner has the greatest u ** (1 / p), which is a draw from p.
  """

  key: int
  context: int = 4

  def __post_init__(self):
    _check(self.key, self.context)

  def __call__(self, logits_V, history: History):
    # u is 1 - r: near 1, where winners are, float32 is too coarse for u itself.
    context, is_there = newest_tokens(history, self.context)
    token_V = jnp.arange(logits_V.size, dtype=jnp.uint32)
    r_V = (self.word(context, token_V).astype(jnp.float32) + 0.5) * np.float32(2**-32)
    winner = jnp.argmax(logits_V - jnp.log(-jnp.log1p(-r_V)))
    certain_V = jnp.where(token_V == winner, 0.0, -jnp.inf)
    return jnp.where(is_there & ~is_repeated(history, self.context), certain_V, logits_V)

  def word(self, context: Sequence, token):
    """32 bits for tokens after these: 2^32 (1 - u)."""
    return threefry(self.key, hash_context(self.key, context), token)[0]


@dataclasses.dataclass(frozen=True)
class SynthIdWatermark:
  """SynthID-Text without distortion: `depth` layers of a tournament between two draws.

  Each layer has a bit g for each token, and one with 1 wins against one with 0.
  """

  key: int
  depth: int = 30
  context: int = 4

  def __post_init__(self):
    _check(self.key, self.context)
    if not 1 <= self.depth <= MAX_DEPTH:
      raise ValueError(f"a tournament of {self.depth} layers: depth is from 1 to {MAX_DEPTH}")

  def __call__(self, logits_V, history: History):
    context, is_there = newest_tokens(history, self.context)
    words = self.words(context, jnp.arange(logits_V.size, dtype=jnp.uint32))
    changed_V = tournament(logits_V, self.depth, lambda layer: bit_of(words, layer))
    return jnp.where(is_there & ~is_repeated(history, self.context), changed_V, logits_V)

  def words(self, context: Sequence, token) -> tuple:
    """The bits of 64 layers for tokens after these, as two words."""
    return threefry(self.key, hash_context(self.key, context), token)

  def bits(self, context: Sequence, token) -> np.ndarray:
    """g of each layer for NumPy's arrays, [N, depth]."""
    words = self.words(context, token)
    return np.stack([bit_of(words, np.uint32(layer)) for layer in range(self.depth)], -1)


Watermark = GreenListWatermark | SynthIdWatermark | GumbelWatermark


def bit_of(words: tuple, layer):
  """The bit of a layer: 32 layers a word."""
  is_first = layer < 32
  return ((words[0] * is_first + words[1] * ~is_first) >> (layer % 32)) & 1


def tournament(logits_V, depth: int, bits_of):
  """log p of each token after `depth` layers; `bits_of(layer)` are g of a layer, [V]."""

  def play(layer, p_V):
    # Two draws from p: one with g = 1 wins, and ties are as they were. Rounded, a sum of
    # probabilities may be above 1, and the rest would be negative.
    g_V = bits_of(layer.astype(jnp.uint32)).astype(jnp.float32)
    return p_V * (1 + g_V - jnp.minimum(jnp.sum(p_V * g_V), 1.0))

  p_V = jax.lax.fori_loop(0, depth, play, jax.nn.softmax(logits_V))
  return jnp.log(p_V)


def parse_watermark(text: str) -> Watermark:
  """A watermark as the commands name it: KIND:KEY, with the paper's settings; KEY alone is green's.

  Raises ValueError for what is none.
  """
  kind, _, key = text.rpartition(":")
  if not key.isascii() or not key.isdecimal() or len(key) > 20:
    raise ValueError(
      f"the watermark {text[:80]!r} has no key; give KIND:KEY, a number from 0 to 2^64 - 1, as "
      f"gumbel:1234"
    )
  match kind:
    case "" | "green":
      return GreenListWatermark(int(key))
    case "selfhash":
      return GreenListWatermark(int(key), context=3, self_hash=True)
    case "gumbel":
      return GumbelWatermark(int(key))
    case "synthid":
      return SynthIdWatermark(int(key))
  raise ValueError(
    f"there is no watermark {kind[:40]!r}; KIND of KIND:KEY is green, selfhash, gumbel or synthid"
  )


def _check(key: int, context: int) -> None:
  """Raises ValueError for a key or a context that no watermark has."""
  # The type itself, since True is an int to isinstance.
  if type(key) is not int or not 0 <= key < 1 << 64:
    raise ValueError(f"the key of a watermark is {str(key)[:40]}; it is a number of 64 bits")
  if not 1 <= context <= MAX_CONTEXT:
    raise ValueError(f"{context} tokens of context for a watermark: from 1 to {MAX_CONTEXT}")


def newest_tokens(history: History, n: int) -> tuple[list, jax.Array]:
  """The n newest tokens of a row, the oldest first, and whether it has so many."""
  column_W = jnp.arange(history.tokens_W.shape[0])
  tokens = []
  for back in range(n, 0, -1):
    token = jnp.sum(jnp.where(column_W == history.end - back, history.tokens_W, 0))
    tokens.append(token.astype(jnp.uint32))
  return tokens, history.end - history.prompt_start >= n


def is_repeated(history: History, n: int):
  """Whether the n newest tokens of a row stand in it before, too."""
  return jnp.any(history.repeats(n))
