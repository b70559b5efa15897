# SPDX-License-Identifier: Apache-2.0
"""Length-bucketed batches: sequences of many lengths, padded to few shapes.

XLA compiles once for each shape, and padding is computed for nothing. The plan here weighs one
against the other.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

# One more padded length is one more compilation. It has to save at least so many token slots, and
# at least such a share of all of them.
MIN_SAVED_SLOTS = 1024
MIN_SAVED_SHARE = 1 / 512


@dataclasses.dataclass(frozen=True)
class PaddedBatch:
  """The sequences of one batch, by their numbers, and the length to which each is padded."""

  rows: np.ndarray
  length: int


@dataclasses.dataclass(frozen=True)
class BatchPlan:
  """Batches of one size, in the order in which they are computed."""

  batches: list[PaddedBatch]
  size: int  # rows of every batch; only the last may hold fewer sequences
  padding_share: float  # padding over all token slots of the batches


def plan_batches(lengths: Sequence[int], size: int) -> BatchPlan:
  """Bucketing by length: batches of `size` sequences of similar lengths, longest first.

  Longest first has two reasons: what does not fit the memory fails at once, and the last batch,
  which is filled up with empty rows, is short.
  """
  # 1. Sort, longest first. The sort is stable, so that equal lengths keep their order.
  lengths = np.asarray(lengths)
  order = np.argsort(-lengths, kind="stable")

  # 2. Cut into batches. The first sequence of each is its longest.
  groups = [order[begin : begin + size] for begin in range(0, len(order), size)]
  longest = np.array([lengths[group[0]] for group in groups], int)

  # 3. Choose few padded lengths, and round each batch up to the next of them.
  price = max(MIN_SAVED_SLOTS / size, MIN_SAVED_SHARE * longest.sum())
  allowed = padded_lengths(longest, price)
  batches = []
  for group, length in zip(groups, longest, strict=True):
    rounded = allowed[np.searchsorted(allowed, length)]
    batches.append(PaddedBatch(group, int(rounded)))

  # 4. Count what is padding.
  slots = size * sum(batch.length for batch in batches)
  padding_share = 1 - lengths.sum() / slots if slots else 0.0
  return BatchPlan(batches, size, padding_share)


def padded_lengths(lengths: np.ndarray, price: float) -> np.ndarray:
  """Optimal padded lengths (bucket boundaries), ascending: some of `lengths`.

  Every length is rounded up to the next of them. They minimize the sum of the rounded lengths plus
  `price` for each padded length. Solved by dynamic programming: `cost[j]` is the minimum for the
  first j distinct lengths.
  """
  distinct, counts = np.unique(lengths, return_counts=True)
  n_shorter = np.concatenate([[0], np.cumsum(counts)])  # how many lengths are below the j-th
  cost = np.zeros(len(distinct) + 1)
  bucket_begin = np.zeros(len(distinct), int)

  # Forward: the last bucket ends at the j-th length and begins at the i-th, for every i up to j.
  for j, length in enumerate(distinct):
    in_bucket = n_shorter[j + 1] - n_shorter[: j + 1]
    costs = cost[: j + 1] + in_bucket * length + price
    bucket_begin[j] = costs.argmin()
    cost[j + 1] = costs.min()

  # Backward: follow the best buckets from the longest length down.
  ends = []
  j = len(distinct) - 1
  while j >= 0:
    ends.append(j)
    j = bucket_begin[j] - 1
  return distinct[ends[::-1]]
