# SPDX-License-Identifier: Apache-2.0
"""Metrics (accuracy, perplexity, bits per byte) as functions of sums over items.

Sums can be resampled by a bootstrap, and any subset of the items has its own metric. Means of means
cannot arise: a metric divides last. A metric of the items' order, such as the area under a ROC, is
no function of sums; it is one of how often each item counts, and can be resampled, too.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping

import numpy as np

Sums = Mapping[str, np.ndarray]  # one array of any shape for each number that items contribute


@dataclasses.dataclass(frozen=True)
class Metric:
  """A metric: `value` maps sums, arrays [...], to scores [...]; `keys` are the sums it reads."""

  value: Callable[[Sums], np.ndarray]
  keys: tuple[str, ...]
  higher: bool  # whether more is better
  unit: str

  def of_counts(self, items: Sums, counts_RN: np.ndarray) -> np.ndarray:
    """The score of each resample, [R], from what items have, [N], and how often each counts."""
    return self.value({key: counts_RN @ items[key] for key in self.keys})


@dataclasses.dataclass(frozen=True)
class RankMetric(Metric):
  """A metric of the items' order.

  `value` maps what each item has, [N], and under "items" how often it counts, [..., N], to scores
  [...]. So it takes a task's items as they are, and no sums of them. `ranks` replaces what items
  have by their ranks, which leaves the score as it is: two models' items then have one scale.
  """

  ranks: Callable[[Sums], Sums]

  def of_counts(self, items: Sums, counts_RN: np.ndarray) -> np.ndarray:
    return self.value({key: items[key] for key in self.keys} | {"items": counts_RN})


def mean(key: str, over: str = "items", unit: str = "", higher: bool = True) -> Metric:
  """Mean: the sum of `key` over that of `over`."""
  return Metric(lambda sums: sums[key] / sums[over], (key, over), higher, unit)


def percent(key: str, over: str = "items") -> Metric:
  """Percentage: the share of `key` in `over`, such as the accuracy."""
  return Metric(lambda sums: 100 * sums[key] / sums[over], (key, over), True, "%")


def perplexity(over: str) -> Metric:
  """Perplexity: exp of all nats over the count of `over`, never a mean of exps or of means."""
  return Metric(
    lambda sums: np.exp(sums["nats"] / sums[over]),
    ("nats", over),
    False,
    f"perplexity per {over.removesuffix('s')}",
  )


def bits(over: str) -> Metric:
  """Bits per byte or per character: the nats over ln 2 and the count of `over`."""
  return Metric(
    lambda sums: sums["nats"] / (math.log(2) * sums[over]),
    ("nats", over),
    False,
    f"bits per {over.removesuffix('s')}",
  )
