# SPDX-License-Identifier: Apache-2.0
"""Packing of examples into rows of one length: best-fit decreasing, the same rows every time.

Examples are placed in decreasing length, equal lengths in their order. Each goes into the row with
the least room that still holds it (of several, into the one that got that room last), or opens a
row. Source: Ding et al. 2024, "Fewer Truncations Improve Language Modeling".
"""

import bisect
import hashlib
from collections.abc import Sequence

import numpy as np

# What a store's manifest says of its rows.
ALGORITHM = "best-fit decreasing"
UNPACKED = "one example a row"


def pack(lengths: Sequence[int] | np.ndarray, capacity: int) -> list[list[int]]:
  """The rows, each as the numbers of its examples. Raises ValueError if one is too long.

  A row has its examples in their order. Rows lie in an order of hashes, so that the first rows of a
  store are a sample of all: best fit makes the rows of long examples first.
  """
  lengths = np.asarray(lengths, np.int64)
  if lengths.size and not 1 <= lengths.min() <= lengths.max() <= capacity:
    raise ValueError(f"examples of {lengths.min()} to {lengths.max()} tokens, rows of {capacity}")

  # `rows_of[room]` are the rows with that many free places; `rooms` are those of any, sorted.
  rows = []
  rows_of = [[] for _ in range(capacity + 1)]
  rooms = []
  for example in np.argsort(-lengths, kind="stable").tolist():
    length = int(lengths[example])
    place = bisect.bisect_left(rooms, length)
    if place == len(rooms):
      room, row = capacity, len(rows)
      rows.append([])
    else:
      room = rooms[place]
      row = rows_of[room].pop()
      if not rows_of[room]:
        del rooms[place]
    rows[row].append(example)

    # The row has less room now.
    room -= length
    if room and not rows_of[room]:
      bisect.insort(rooms, room)
    if room:
      rows_of[room].append(row)

  return sorted(map(sorted, rows), key=lambda row: hashlib.sha256(str(row[0]).encode()).digest())
