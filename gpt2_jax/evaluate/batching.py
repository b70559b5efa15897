# SPDX-License-Identifier: Apache-2.0
"""Sequences of many lengths in batches of few shapes, with as little padding as those allow."""

import dataclasses
from collections.abc import Sequence

import numpy as np

SHAPES = 12  # lengths at most: each is compiled once


@dataclasses.dataclass(frozen=True)
class Batch:
  rows: np.ndarray  # which sequences
  length: int  # to which each is padded


@dataclasses.dataclass(frozen=True)
class Plan:
  batches: list[Batch]
  size: int  # rows of every batch; only the last may hold fewer sequences
  waste: float  # padding, as a share of all the batches' token slots


def plan(lengths: Sequence[int], size: int, most: int = SHAPES) -> Plan:
  """Batches of `size` sequences of like lengths, longest first, padded to at most `most` lengths.

  Longest first: what does not fit the memory fails at once, and the rows that fill up the last batch are short.
  """
  lengths = np.asarray(lengths)
  order = np.argsort(-lengths, kind="stable")
  parts = [order[begin : begin + size] for begin in range(0, len(order), size)]
  longest = np.array([lengths[part[0]] for part in parts], int)
  padded = shapes(longest, most)[np.searchsorted(shapes(longest, most), longest)] if parts else longest
  slots = size * padded.sum()
  batches = [Batch(part, int(length)) for part, length in zip(parts, padded, strict=True)]
  return Plan(batches, size, 1 - lengths.sum() / slots if slots else 0.0)


def shapes(lengths: np.ndarray, most: int) -> np.ndarray:
  """At most `most` of the lengths, ascending, to which all can be rounded up with the least sum.

  By dynamic programming: `cost[j]` is the least sum for the lengths up to the j-th distinct one with k shapes, the
  last of which is that one.
  """
  distinct, counts = np.unique(lengths, return_counts=True)
  if len(distinct) <= most:
    return distinct
  before = np.concatenate([[0], np.cumsum(counts)])  # how many lengths lie before the j-th
  sums_IJ = np.where(  # of those from the i-th to the j-th, all rounded up to the j-th
    np.arange(len(distinct))[:, None] <= np.arange(len(distinct)), (before[1:] - before[:-1, None]) * distinct, np.inf
  )
  cost, cuts = sums_IJ[0], []
  for _ in range(most - 1):
    totals_IJ = np.concatenate([[0], cost[:-1]])[:, None] + sums_IJ
    cuts.append(totals_IJ.argmin(0))
    cost = totals_IJ.min(0)
  chosen, last = [], len(distinct) - 1
  for cut in reversed(cuts):
    chosen.append(last)
    last = cut[last] - 1
    if last < 0:
      break
  return distinct[sorted([*chosen, last] if last >= 0 else chosen)]
