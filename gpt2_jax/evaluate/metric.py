# SPDX-License-Identifier: Apache-2.0
"""Metrics: functions of sums over items, so that a bootstrap resamples them and a subset has its own."""

import dataclasses
import math
from collections.abc import Callable, Mapping

import numpy as np

Sums = Mapping[str, np.ndarray]  # one array of any shape for each number that items contribute


@dataclasses.dataclass(frozen=True)
class Metric:
  """`value` maps sums, arrays [...], to scores [...]; `keys` are the sums that it reads."""

  value: Callable[[Sums], np.ndarray]
  keys: tuple[str, ...]
  higher: bool  # whether more is better
  unit: str


def mean(key: str, over: str = "items", unit: str = "", higher: bool = True) -> Metric:
  """The sum of `key` over that of `over`."""
  return Metric(lambda sums: sums[key] / sums[over], (key, over), higher, unit)


def percent(key: str, over: str = "items") -> Metric:
  """The share of `key` in `over`, in per cent."""
  return Metric(lambda sums: 100 * sums[key] / sums[over], (key, over), True, "%")


def perplexity(over: str) -> Metric:
  """exp of all nats over the count of `over`: never a mean of exps, nor of means."""
  return Metric(
    lambda sums: np.exp(sums["nats"] / sums[over]), ("nats", over), False, f"perplexity per {over.removesuffix('s')}"
  )


def bits(over: str) -> Metric:
  """Bits per byte or per character."""
  return Metric(
    lambda sums: sums["nats"] / (math.log(2) * sums[over]), ("nats", over), False, f"bits per {over.removesuffix('s')}"
  )
