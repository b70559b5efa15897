# SPDX-License-Identifier: Apache-2.0
"""Poisson sampling: each row with the same odds, by itself, as a pure function of (seed, step)."""

import dataclasses

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from gpt2_jax.compat import get_mesh
from gpt2_jax.data.batches import count_windows
from gpt2_jax.data.poisson import PADDING, PoissonBatches
from gpt2_jax.sharding import BATCH


@dataclasses.dataclass(frozen=True)
class Count:
  """The tokens 0, 1, 2, ... as a store."""

  length: int
  path: str = "a store"

  def __len__(self):
    return self.length

  def read(self, starts_N, length):
    return np.asarray(starts_N, np.int32)[:, None] + np.arange(length, dtype=np.int32)

  def count_rows(self, n_ctx):
    return count_windows(self, n_ctx)


N, EXPECTED = 40, 8
SAMPLED = PoissonBatches(Count(4 * N + 1), 4, 32, 7, EXPECTED)


def test_each_row_is_drawn_with_the_same_odds_whatever_the_others_are():
  """Over 20,000 steps: each row's part, that of each pair, and the spread of the counts."""
  steps = 20_000
  drawn_SN = np.zeros((steps, N))
  for step in range(steps):
    rows = SAMPLED.windows_at(step)
    drawn_SN[step, rows[rows != PADDING]] += 1

  rate = EXPECTED / N
  assert set(np.unique(drawn_SN)) == {0, 1}, "no row twice"
  error = np.sqrt(rate * (1 - rate) / steps)
  assert np.abs(drawn_SN.mean(0) - rate).max() < 5 * error
  together_NN = drawn_SN.T @ drawn_SN / steps
  pairs = together_NN[np.triu_indices(N, 1)]
  error = np.sqrt(rate**2 * (1 - rate**2) / steps)
  assert np.abs(pairs - rate**2).max() < 5 * error
  assert abs(drawn_SN.sum(1).var() / (N * rate * (1 - rate)) - 1) < 5 * np.sqrt(2 / steps)


def test_a_batch_is_a_function_of_seed_and_step():
  again = dataclasses.replace(SAMPLED)
  other = dataclasses.replace(SAMPLED, seed=8)
  rows = [SAMPLED.windows_at(step).tolist() for step in (0, 3, 9)]
  assert rows == [again.windows_at(step).tolist() for step in (0, 3, 9)]
  assert rows[0] != rows[1] != rows[2]
  assert rows[0] != other.windows_at(0).tolist()


def test_what_is_not_drawn_weighs_nothing(mesh):
  with mesh(1, 4, 1):
    sharding = NamedSharding(get_mesh(), P(None, *BATCH))
    calls = list(SAMPLED.prefetch(3, 6, 2, sharding))
    tokens = np.concatenate([np.asarray(call.tokens_BT) for call in calls])
    weights = np.concatenate([np.asarray(call.weights_BT) for call in calls])
  for step, tokens_BT, weights_BT in zip(range(3, 6), tokens, weights, strict=True):
    rows = SAMPLED.windows_at(step)
    is_real = rows != PADDING
    assert 0 < is_real.sum() < len(rows)
    np.testing.assert_array_equal(weights_BT, np.repeat(is_real[:, None], 4, axis=1))
    np.testing.assert_array_equal(tokens_BT[is_real][:, 0], rows[is_real] * 4)


def test_a_batch_without_room_is_refused_at_the_start_and_never_cut():
  small = dataclasses.replace(SAMPLED, batch_size=EXPECTED)
  counts = [int((SAMPLED.windows_at(step) != PADDING).sum()) for step in range(20)]
  largest = max(counts)
  with pytest.raises(ValueError, match=f"set --config.batch_size to {largest} or more"):
    small.check_room(20)
  with pytest.raises(ValueError, match=f"draws {largest} examples at step {np.argmax(counts)}"):
    small.windows_at(int(np.argmax(counts)))
  dataclasses.replace(SAMPLED, batch_size=largest).check_room(20)


def test_the_host_has_no_say():
  """No state of JAX or NumPy is read."""
  before = SAMPLED.windows_at(5)
  np.random.default_rng(0).normal()
  jax.random.normal(jax.random.key(0))
  np.testing.assert_array_equal(SAMPLED.windows_at(5), before)
