# SPDX-License-Identifier: Apache-2.0
"""Coverage of bootstrap intervals by simulation: how often they hold the truth, percentile and BCa.

  python experiments/interval_coverage.py    # 4,000 samples a line, five minutes on one core

Each sample has n items whose true score is known, and gets one 95 % interval by each method from
the same 1,000 resamples, those of gpt2_jax/evaluate/sweep/bootstrap.py. Printed are the shares of
the intervals that hold the truth, that lie below it, and that lie above it. 95, 2.5 and 2.5 are
right. With 4,000 samples a share of 95 % is known to +- 0.7 points.

  perplexity   exp of the mean of lognormal nats an item, sigma 1 (a heavy tail) or 0.5
  by length    the same over texts of very different lengths: exp of nats over words
  accuracy     a share of 30 %, and of 90 %
  difference   of the perplexities of two models on the same items
"""

from collections.abc import Callable, Mapping

import numpy as np
from absl import app, flags

from gpt2_jax.evaluate.metric import Metric, percent, perplexity
from gpt2_jax.evaluate.sweep import bootstrap

_SAMPLES = flags.DEFINE_integer("samples", 4000, "Samples of each kind and size.", lower_bound=1)
_RESAMPLES = flags.DEFINE_integer("resamples", 1000, "Resamples of each sample.", lower_bound=1)
_SIZES = flags.DEFINE_multi_integer("n", [50, 200], "Items of a sample; may be given many times.")

LEVEL = 0.95
MEAN_WORDS = 40.0
Items = dict[str, np.ndarray]


def lognormal(sigma: float) -> Callable[[np.random.Generator, int], Items]:
  """Items of one word, with lognormal nats of the mean exp(sigma^2 / 2)."""
  return lambda rng, n: {"nats": rng.lognormal(0, sigma, n), "words": np.ones(n)}


def by_length(rng: np.random.Generator, n: int) -> Items:
  """Texts of 1 to hundreds of words, whose nats a word are lognormal."""
  words = 1.0 + rng.geometric(1 / (MEAN_WORDS - 1), n)
  return {"nats": words * rng.lognormal(0, 0.5, n), "words": words}


def correct(share: float) -> Callable[[np.random.Generator, int], Items]:
  """Items that are right with a probability of `share`."""
  return lambda rng, n: {"correct": (rng.random(n) < share) * 1.0, "items": np.ones(n)}


def two_models(rng: np.random.Generator, n: int) -> tuple[Items, Items]:
  """Two models on the same items: the second needs 0.2 nats more on average."""
  difficulty = rng.lognormal(0, 0.7, n)
  other = difficulty + rng.lognormal(0, 0.7, n) * 0.2 / np.exp(0.7**2 / 2)
  return {"nats": difficulty, "words": np.ones(n)}, {"nats": other, "words": np.ones(n)}


PERPLEXITY = perplexity("words")
# The kind of items, the metric, and the score of infinitely many of them.
SINGLE = {
  "perplexity, sigma 1": (lognormal(1.0), PERPLEXITY, np.exp(np.exp(0.5))),
  "perplexity, sigma 0.5": (lognormal(0.5), PERPLEXITY, np.exp(np.exp(0.125))),
  "perplexity by length": (by_length, PERPLEXITY, np.exp(np.exp(0.125))),
  "accuracy, 30 %": (correct(0.3), percent("correct"), 30.0),
  "accuracy, 90 %": (correct(0.9), percent("correct"), 90.0),
}
PAIRED = {"difference of two": np.exp(np.exp(0.245) + 0.2) - np.exp(np.exp(0.245))}


def percentile_ends(scores_R: np.ndarray) -> tuple[float, float]:
  """The interval that holds the middle 95 % of the resamples' scores."""
  edge = (1 - LEVEL) / 2
  low, high = np.quantile(scores_R, [edge, 1 - edge], method="inverted_cdf")
  return float(low), float(high)


def resampled_scores(metric: Metric, items: Mapping[str, np.ndarray], seed: int) -> np.ndarray:
  """The metric of each resample that `bootstrap` draws with this seed."""
  n = len(next(iter(items.values())))
  counts_RN = np.concatenate(list(bootstrap.draw_counts(n, _RESAMPLES.value, seed)))
  return metric.value({key: counts_RN @ items[key] for key in metric.keys})


def side(low: float, high: float, truth: float) -> int:
  """0 where the interval holds the truth, -1 where it lies below it, 1 where it lies above."""
  return int(low > truth) - int(high < truth)


def single(kind: str, n: int, seed: int) -> tuple[int, int]:
  """One sample: on which side its two intervals are, percentile and BCa."""
  draw, metric, truth = SINGLE[kind]
  items = draw(np.random.default_rng([n, seed]), n)
  interval = bootstrap.intervals({"": metric}, items, _RESAMPLES.value, seed, LEVEL)[""]
  percentiles = percentile_ends(resampled_scores(metric, items, seed))
  return side(*percentiles, truth), side(interval.low, interval.high, truth)


def paired(kind: str, n: int, seed: int) -> tuple[int, int]:
  """As `single`, for a difference of two models on the same items."""
  a, b = two_models(np.random.default_rng([n, seed]), n)
  metrics = {"": PERPLEXITY}
  interval = bootstrap.paired_differences(metrics, b, a, _RESAMPLES.value, seed, LEVEL)[""]
  scores_R = resampled_scores(PERPLEXITY, b, seed) - resampled_scores(PERPLEXITY, a, seed)
  truth = PAIRED[kind]
  return side(*percentile_ends(scores_R), truth), side(interval.low, interval.high, truth)


def shares(sides: np.ndarray) -> str:
  """The shares that hold the truth, lie below it, and lie above it, in per cent."""
  held, below, above = (100 * (sides == value).mean() for value in (0, -1, 1))
  return f"{held:.1f} ({below:.1f} / {above:.1f})"


def main(_) -> None:
  print("| items' scores | n | percentile | BCa |\n|---|---|---|---|")
  for kind in (*SINGLE, *PAIRED):
    sample = single if kind in SINGLE else paired
    for n in _SIZES.value:
      sides_S2 = np.array([sample(kind, n, seed) for seed in range(_SAMPLES.value)])
      print(f"| {kind} | {n} | {shares(sides_S2[:, 0])} | {shares(sides_S2[:, 1])} |", flush=True)


if __name__ == "__main__":
  app.run(main)
