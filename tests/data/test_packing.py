# SPDX-License-Identifier: Apache-2.0
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpt2_jax.data.packing import pack


@given(st.lists(st.integers(1, 16), max_size=60))
def test_every_example_is_in_one_row_and_every_row_holds_its_examples(lengths):
  rows = pack(lengths, 16)
  assert sorted(example for row in rows for example in row) == list(range(len(lengths)))
  assert all(row == sorted(row) and sum(lengths[i] for i in row) <= 16 for row in rows)
  assert pack(list(lengths), 16) == rows

  # Any fit: what opened a row did not fit into another, so at most one row is half empty.
  room = sorted(16 - sum(lengths[i] for i in row) for row in rows)
  assert sum(x >= 8 for x in room) <= 1


def naive(lengths: list[int], capacity: int) -> list[list[int]]:
  """Best fit decreasing as its definition says it: a look at every row for every example."""
  rows = []
  touched = []
  for time, i in enumerate(sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))):
    rooms = [
      (capacity - sum(lengths[j] for j in row), -last)
      for row, last in zip(rows, touched, strict=True)
    ]
    fitting = [(room, n) for n, room in enumerate(rooms) if room[0] >= lengths[i]]
    if fitting:
      n = min(fitting)[1]
      rows[n].append(i)
      touched[n] = time
    else:
      rows.append([i])
      touched.append(time)
  return rows


@given(st.lists(st.integers(1, 12), max_size=40))
def test_the_rows_are_those_of_best_fit_decreasing(lengths):
  expected = naive(lengths, 12)
  assert sorted(map(sorted, expected)) == sorted(pack(lengths, 12))


def test_these_lengths_make_these_rows():
  """Worked out by hand, but for the order of the rows, which is that of the first one's hashes."""
  assert pack([3, 8, 5, 2, 7, 1, 6, 4, 4], 10) == [[0, 4], [1, 3], [2, 5, 8], [6, 7]]


def test_the_first_rows_are_a_sample_of_all():
  """Best fit makes the rows of long examples first; an evaluation reads the first rows."""
  lengths = np.concatenate([np.full(200, 16), np.full(800, 4)])
  rows = pack(lengths, 16)
  is_long = [len(row) == 1 for row in rows]
  assert len(rows) == 400 and 60 < sum(is_long[:200]) < 140


def test_an_example_that_is_longer_than_a_row_is_none_of_its():
  with pytest.raises(ValueError, match="examples of 1 to 17 tokens, rows of 16"):
    pack([1, 17], 16)
