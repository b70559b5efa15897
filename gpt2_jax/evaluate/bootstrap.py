# SPDX-License-Identifier: Apache-2.0
"""Error bars: the bootstrap over items, and paired comparisons of two models on the same items.

A resample draws as many items as there are, with replacement (Efron 1979); only how often each was drawn matters, so
that a resample's sums are its counts times the items' sums, and every metric is computed of all resamples at once.
"""

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import numpy as np

from gpt2_jax.evaluate.metric import Metric, Sums

RESAMPLES = 10_000
DRAWS = 2**21  # items drawn at once: 16 MB of their numbers


class Interval(NamedTuple):
  """A score of all items, and the ends of its interval; not a number where no sum says what it is."""

  value: float
  low: float
  high: float


class Difference(NamedTuple):
  """The first model's score minus the second's, the ends of its interval, and the p-value of "they are equal"."""

  value: float
  low: float
  high: float
  p: float


def intervals(
  metrics: Mapping[str, Metric],
  items: Mapping[str, np.ndarray],
  resamples: int = RESAMPLES,
  seed: int = 0,
  level: float = 0.95,
) -> dict[str, Interval]:
  """Each metric of the items' sums [N], with its percentile interval, which holds `level` of the resamples' scores.

  A single item has a score, and no interval.
  """
  keys, sums_NK = _matrix(metrics, items)
  drawn = _sums(keys, np.concatenate([counts @ sums_NK for counts in _counts(len(sums_NK), resamples, seed)]))
  value = _scores(metrics, _sums(keys, sums_NK.sum(0)))
  spread = _scores(metrics, drawn)
  return {name: Interval(float(value[name]), *_ends(spread[name], level, len(sums_NK))) for name in metrics}


def paired(
  metrics: Mapping[str, Metric],
  a: Mapping[str, np.ndarray],
  b: Mapping[str, np.ndarray],
  resamples: int = RESAMPLES,
  seed: int = 0,
  level: float = 0.95,
) -> dict[str, Difference]:
  """Each metric of `a` minus that of `b`, where the same item has the same place in both.

  The interval is that of the differences of the same resamples of both. The two-sided p-value is that of approximate
  randomization (Noreen 1989): how often a difference at least as large comes about where a coin says, item by item,
  which of its two results is whose; (1 + count) / (1 + resamples). Raises ValueError if the items are not as many.
  """
  (keys, a_NK), (_, b_NK) = _matrix(metrics, a), _matrix(metrics, b)
  if len(a_NK) != len(b_NK):
    raise ValueError(f"{len(a_NK):,} items do not pair with {len(b_NK):,}; compare results of the same rows")
  counts = [(c @ a_NK, c @ b_NK) for c in _counts(len(a_NK), resamples, seed)]
  spread = _differences(metrics, keys, *map(np.concatenate, zip(*counts, strict=True)))
  moved = np.concatenate([coins @ (b_NK - a_NK) for coins in _coins(len(a_NK), resamples, seed)])
  swapped = _differences(metrics, keys, a_NK.sum(0) + moved, b_NK.sum(0) - moved)
  value = _differences(metrics, keys, a_NK.sum(0), b_NK.sum(0))
  return {
    name: Difference(float(value[name]), *_ends(spread[name], level, len(a_NK)), _p(value[name], swapped[name]))
    for name in metrics
  }


def _matrix(metrics: Mapping[str, Metric], items: Mapping[str, np.ndarray]) -> tuple[list[str], np.ndarray]:
  """The sums that the metrics read, and what each item has of them, [N, K]."""
  keys = sorted({key for metric in metrics.values() for key in metric.keys})
  return keys, np.stack([np.asarray(items[key], np.float64) for key in keys], axis=1)


def _sums(keys: list[str], sums_XK: np.ndarray) -> Sums:
  return dict(zip(keys, np.moveaxis(sums_XK, -1, 0), strict=True))


def _scores(metrics: Mapping[str, Metric], sums: Sums) -> dict[str, np.ndarray]:
  with np.errstate(divide="ignore", invalid="ignore", over="ignore"):  # a resample may hold nothing to divide by
    return {name: metric.value(sums) for name, metric in metrics.items()}


def _differences(metrics: Mapping[str, Metric], keys: list[str], a_XK, b_XK) -> dict[str, np.ndarray]:
  a, b = _scores(metrics, _sums(keys, a_XK)), _scores(metrics, _sums(keys, b_XK))
  with np.errstate(invalid="ignore"):  # of two infinite perplexities
    return {name: a[name] - b[name] for name in metrics}


def _counts(n: int, resamples: int, seed: int) -> Iterator[np.ndarray]:
  """How often each of n items was drawn in each of some resamples, [R, n]: multinomial counts."""
  rng = np.random.default_rng(seed)
  for rows in _chunks(n, resamples):
    drawn = rng.integers(n, size=(rows, n)) + np.arange(rows)[:, None] * n
    yield np.bincount(drawn.ravel(), minlength=rows * n).reshape(rows, n).astype(np.float64)


def _coins(n: int, resamples: int, seed: int) -> Iterator[np.ndarray]:
  """Zeros and ones, [R, n]."""
  rng = np.random.default_rng([seed, 1])
  for rows in _chunks(n, resamples):
    yield rng.integers(2, size=(rows, n), dtype=np.uint8).astype(np.float64)


def _chunks(n: int, resamples: int) -> list[int]:
  """Resamples in parts that fit the memory."""
  most = max(1, DRAWS // n)
  return [min(most, resamples - done) for done in range(0, resamples, most)]


def _ends(scores_R: np.ndarray, level: float, n: int) -> tuple[float, float]:
  """The percentile interval of the scores that are numbers, of resamples of n items."""
  real = scores_R[~np.isnan(scores_R)]
  if n < 2 or not real.size:
    return float("nan"), float("nan")
  edge = (1 - level) / 2
  low, high = np.quantile(real, [edge, 1 - edge], method="inverted_cdf")  # which never mixes two scores
  return float(low), float(high)


def _p(value: np.ndarray, swapped_R: np.ndarray) -> float:
  smaller = np.abs(swapped_R) < abs(value) * (1 - 1e-9)  # equal differences may differ in their last bits
  return float((1 + (~smaller).sum()) / (1 + len(swapped_R)))  # what is no number speaks for no difference
