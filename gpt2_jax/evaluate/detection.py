# SPDX-License-Identifier: Apache-2.0
"""Detection of machine text: scores of a text from its tokens' statistics, and their ROC.

Each criterion maps a text's `Statistics` to a number that is larger for machine text:

  likelihood     mean log p: a model's own text is likely to it
  log_rank       minus the mean log of the rank                  (Gehrmann et al. 2019, GLTR)
  lrr            log-likelihood log-rank ratio                   (Su et al. 2023)
  rank           minus the mean rank
  entropy        mean entropy of the distributions; larger is machine, as in its publication
  fast_detectgpt how far log p lies above its expectation, in standard deviations
                                                                  (Bao et al. 2024, analytic)
  binoculars     minus the ratio of the log-perplexity to the cross-entropy with another model
                                                                  (Hans et al. 2024)

The last two may have a reference model (`Scorer.reference`); Binoculars says nothing without one.
"""

import dataclasses
from collections.abc import Callable, Mapping

import numpy as np

from gpt2_jax.evaluate.sweep.bootstrap import draw_counts
from gpt2_jax.evaluate.task import Statistics

RESAMPLES = 2000


def fast_detectgpt(statistics: Statistics) -> float:
  """The analytic discrepancy: sum of log p less its expectation, over its standard deviation.

  A text whose distributions are all certain has no deviation, and 0.
  """
  surplus = -statistics.nats.sum() - statistics.mean.sum()
  deviation = np.sqrt(statistics.variance.sum())
  return float(surplus / deviation) if deviation else 0.0


def lrr(statistics: Statistics) -> float:
  """-log p over log rank, both summed; infinite where all tokens were the likeliest."""
  log_ranks = np.log(statistics.rank).sum()
  return float(statistics.nats.sum() / log_ranks) if log_ranks else np.inf


CRITERIA: Mapping[str, Callable[[Statistics], float]] = {
  "likelihood": lambda s: float(-s.nats.mean()),
  "log_rank": lambda s: float(-np.log(s.rank).mean()),
  "lrr": lrr,
  "rank": lambda s: float(-s.rank.mean()),
  "entropy": lambda s: float(s.entropy.mean()),
  "fast_detectgpt": fast_detectgpt,
  "binoculars": lambda s: float(s.nats.sum() / s.mean.sum()),
}


@dataclasses.dataclass(frozen=True)
class Roc:
  """A receiver operating characteristic: both rates at each threshold, from none to all."""

  thresholds: np.ndarray  # a score at least this large is called machine text
  false_positive_rate: np.ndarray
  true_positive_rate: np.ndarray

  @property
  def auc(self) -> float:
    """The area under it: how often a machine text has the larger score, ties counted half."""
    return float(np.trapezoid(self.true_positive_rate, self.false_positive_rate))

  def at_false_positives(self, rate: float) -> tuple[float, float]:
    """The true positive rate where at most `rate` of human texts are accused, and its threshold."""
    best = np.flatnonzero(self.false_positive_rate <= rate)[-1]
    return float(self.true_positive_rate[best]), float(self.thresholds[best])


def roc(human: np.ndarray, machine: np.ndarray) -> Roc:
  """The ROC of scores that are larger for machine text. Raises ValueError for none, or for NaN."""
  human, machine = np.asarray(human, np.float64), np.asarray(machine, np.float64)
  return _weighted_roc(human, machine, np.ones(len(human)), np.ones(len(machine)))


def roc_interval(
  human: np.ndarray,
  machine: np.ndarray,
  value: Callable[[Roc], float] = lambda curve: curve.auc,
  seed: int = 0,
  level: float = 0.95,
) -> tuple[float, float, float]:
  """A value of the ROC, such as its AUC, with the percentiles of a bootstrap over documents.

  Human and machine texts are drawn apart, so that their numbers stay.
  """
  human, machine = np.asarray(human, np.float64), np.asarray(machine, np.float64)
  values = []
  draws = [
    np.concatenate(list(draw_counts(len(scores), RESAMPLES, seed + i)))
    for i, scores in enumerate((human, machine))
  ]
  for of_human, of_machine in zip(*draws, strict=True):
    values.append(value(_weighted_roc(human, machine, of_human, of_machine)))
  low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
  return value(roc(human, machine)), float(low), float(high)


def weighted_auc(human_N, machine_M, human_RN, machine_RM) -> np.ndarray:
  """The area under the ROC of texts that count several times, [R]: Mann and Whitney's statistic.

  `human_RN` and `machine_RM` are how often each score counts in each resample.
  """
  order = np.argsort(human_N)
  total_RN = np.cumsum(human_RN[:, order], axis=1)
  total_RN = np.pad(total_RN, ((0, 0), (1, 0)))

  # The human texts below each machine text, and half of those that equal it.
  below_M, upto_M = (np.searchsorted(human_N[order], machine_M, side) for side in ("left", "right"))
  won_RM = (total_RN[:, below_M] + total_RN[:, upto_M]) / 2
  return (machine_RM * won_RM).sum(1) / (total_RN[:, -1] * machine_RM.sum(1))


def weighted_true_positives(
  human_N, machine_M, human_RN, machine_RM, rate: float = 0.01
) -> np.ndarray:
  """The true positive rate where at most `rate` of human texts are accused, [R]."""
  order = np.argsort(-human_N)
  accused_RN = np.cumsum(human_RN[:, order], axis=1)
  accused_RN = accused_RN / accused_RN[:, -1:]

  # The largest human score at which too many would be accused: a threshold lies above it.
  too_many_RN = accused_RN > rate
  limit_R = np.where(too_many_RN.any(1), human_N[order][too_many_RN.argmax(1)], -np.inf)
  is_found_RM = machine_M > limit_R[:, None]
  return (machine_RM * is_found_RM).sum(1) / machine_RM.sum(1)


def _weighted_roc(
  human: np.ndarray, machine: np.ndarray, human_weights: np.ndarray, machine_weights: np.ndarray
) -> Roc:
  """The ROC of texts that count several times, as in a resample."""
  # 1. Check.
  for name, scores in (("human", human), ("machine", machine)):
    if not len(scores):
      raise ValueError(f"there are no scores of {name} text; a ROC has both kinds")
    if np.isnan(scores).any():
      raise ValueError(
        f"{np.isnan(scores).sum():,} of {len(scores):,} scores of {name} text are NaN; leave those "
        f"texts out"
      )

  # 2. From the largest score down, the weight of each kind that lies at or above it; equal scores
  #    are one point.
  scores = np.concatenate([human, machine])
  order = np.argsort(-scores, kind="stable")
  ends = np.flatnonzero(np.diff(-scores[order], append=np.inf))
  rates = []
  for weights in (
    np.concatenate([human_weights, 0 * machine_weights]),
    np.concatenate([0 * human_weights, machine_weights]),
  ):
    above = np.cumsum(weights[order])
    rates.append(np.concatenate([[0.0], above[ends] / above[-1]]))
  return Roc(np.concatenate([[np.inf], scores[order][ends]]), *rates)
