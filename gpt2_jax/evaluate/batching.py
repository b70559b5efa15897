# SPDX-License-Identifier: Apache-2.0
"""Sequences of many lengths in batches of few shapes, with as little padding as those allow."""

import dataclasses
from collections.abc import Sequence

import numpy as np

# A length more is compiled once more: it has to save so many token slots, and such a share of all.
WORTH, SHARE = 1024, 1 / 512


@dataclasses.dataclass(frozen=True)
class Batch:
  rows: np.ndarray  # which sequences
  length: int  # to which each is padded


@dataclasses.dataclass(frozen=True)
class Plan:
  batches: list[Batch]
  size: int  # rows of every batch; only the last may hold fewer sequences
  waste: float  # padding, as a share of all the batches' token slots


def plan(lengths: Sequence[int], size: int) -> Plan:
  """Batches of `size` sequences of like lengths, longest first, padded to few lengths.

  Longest first: what does not fit the memory fails at once, and the rows that fill up the last batch are short.
  """
  lengths = np.asarray(lengths)
  order = np.argsort(-lengths, kind="stable")
  parts = [order[begin : begin + size] for begin in range(0, len(order), size)]
  longest = np.array([lengths[part[0]] for part in parts], int)
  chosen = shapes(longest, max(WORTH / size, SHARE * longest.sum()))
  batches = [Batch(part, int(chosen[np.searchsorted(chosen, lengths[part[0]])])) for part in parts]
  slots = size * sum(batch.length for batch in batches)
  return Plan(batches, size, 1 - lengths.sum() / slots if slots else 0.0)


def shapes(lengths: np.ndarray, price: float) -> np.ndarray:
  """Those of the lengths, ascending, to which all are best rounded up: the least sum, and `price` for each of them.

  By dynamic programming: `cost[j]` is the least for the first j distinct lengths.
  """
  distinct, counts = np.unique(lengths, return_counts=True)
  before = np.concatenate([[0], np.cumsum(counts)])  # how many lengths lie before the j-th
  cost, begin = np.zeros(len(distinct) + 1), np.zeros(len(distinct), int)
  for j, length in enumerate(distinct):
    costs = cost[: j + 1] + (before[j + 1] - before[: j + 1]) * length + price  # of the i-th to the j-th as one
    begin[j], cost[j + 1] = costs.argmin(), costs.min()
  chosen, j = [], len(distinct) - 1
  while j >= 0:
    chosen.append(j)
    j = begin[j] - 1
  return distinct[chosen[::-1]]
