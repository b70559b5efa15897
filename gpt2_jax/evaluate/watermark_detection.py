# SPDX-License-Identifier: Apache-2.0
"""Detection of watermarks in tokens: z-scores and p-values, by the key that made the text.

A p-value is the probability of so high a score in a text that does not know the key, human or not.
It is no verdict on who wrote the text: another key, another tokenizer or an edited text give a high
one. What is hashed alike counts once, since it is no new evidence. A prompt is not scored.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from gpt2_jax.decoding.watermark import GreenListWatermark, GumbelWatermark, Watermark
from gpt2_jax.decoding.watermark_transformers import TransformersGreenList, TransformersSynthId

# Fewer tokens give a p-value, but are too short for any verdict.
SHORTEST = 25


class Detection(NamedTuple):
  """The score of a text.

  `mean` is the mean over its n-grams: of green tokens, of g-values, or of -log(1 - u). `expected`
  is that of a text without the watermark, and `z` the distance in its standard deviations.
  """

  n_scored: int
  mean: float
  expected: float
  z: float
  p_value: float

  @property
  def is_too_short(self) -> bool:
    return self.n_scored < SHORTEST


# What `detect` takes.
AnyWatermark = Watermark | TransformersGreenList | TransformersSynthId


def detect(
  watermark: AnyWatermark,
  tokens: Sequence[int],
  n_prompt: int = 0,
  count_repeated: bool = False,
) -> Detection:
  """Looks for a watermark in tokens, of which the first `n_prompt` are the prompt.

  `count_repeated` counts n-grams as often as they occur: then p-values are too low for texts that
  repeat themselves. Raises ValueError for a text without an n-gram.
  """
  ngrams_NC = _scored_ngrams(watermark, np.asarray(tokens, np.uint32), n_prompt, count_repeated)
  context, token = list(ngrams_NC[:, :-1].T), ngrams_NC[:, -1]
  match watermark:
    case GumbelWatermark():
      return _detect_gumbel(watermark.word(context, token))
    case GreenListWatermark():
      return _detect_bits(watermark.is_green(context, token)[:, None], watermark.gamma)
    case TransformersGreenList():
      is_green_N = np.array([watermark.is_green(ngram) for ngram in ngrams_NC.tolist()])
      return _detect_bits(is_green_N[:, None], watermark.gamma)
    case _:
      return _detect_bits(watermark.bits(context, token), 0.5)


def _scored_ngrams(
  watermark: AnyWatermark, tokens: np.ndarray, n_prompt: int, count_repeated: bool
) -> np.ndarray:
  """The n-grams that are evidence, [N, C]; the last token of each is scored."""
  # 1. All n-grams that end behind the prompt.
  size = watermark.context + 1
  if isinstance(watermark, TransformersGreenList) and watermark.self_hash:
    size -= 1
  if len(tokens) < max(size, n_prompt + 1):
    raise ValueError(
      f"{len(tokens)} tokens, {n_prompt} of them of the prompt, have none to score: the watermark "
      f"looks at {size} tokens at a time; give a longer text"
    )
  ngrams_NC = np.lib.stride_tricks.sliding_window_view(tokens, size)
  first = max(0, n_prompt + 1 - size)
  if count_repeated:
    return ngrams_NC[first:]

  # 2. Of green lists each draw of the hash once. Of a self hash many n-grams are one draw: a token,
  #    and the one before it that decides.
  match watermark:
    case TransformersGreenList():
      return np.unique(ngrams_NC[first:], axis=0)
    case GreenListWatermark():
      ngrams_NC = ngrams_NC[first:]
      seeds = watermark.seed(list(ngrams_NC[:, :-1].T), ngrams_NC[:, -1])
      pairs_N2 = np.stack([seeds, ngrams_NC[:, -1]], -1)
      return ngrams_NC[np.unique(pairs_N2, axis=0, return_index=True)[1]]

  # 3. Of the others a context that has come before was not marked, whatever followed it.
  places = np.unique(ngrams_NC[:, :-1], axis=0, return_index=True)[1]
  places = np.sort(places[places >= first])
  if not len(places):
    raise ValueError("all contexts of the text are repeated ones, which are not scored")
  return ngrams_NC[places]


def _detect_bits(bits_ND: np.ndarray, p: float) -> Detection:
  """Bits that are 1 with probability p in other texts: the exact tail of the binomial."""
  # Imported here: SciPy takes a while, and only detection needs it.
  from scipy.special import bdtrc

  n, ones = bits_ND.size, int(bits_ND.sum())
  z = (ones - n * p) / math.sqrt(n * p * (1 - p))
  p_value = float(bdtrc(ones - 1, n, p)) if ones else 1.0
  return Detection(len(bits_ND), ones / n, p, z, p_value)


def _detect_gumbel(word_N: np.ndarray) -> Detection:
  """-log(1 - u) is exponential in other texts, so that the sum of n is Gamma(n, 1)."""
  from scipy.special import gammaincc

  n = len(word_N)
  total = float(-np.log((word_N + 0.5) / 2**32).sum())
  return Detection(n, total / n, 1.0, (total - n) / math.sqrt(n), float(gammaincc(n, total)))
