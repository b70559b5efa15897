# SPDX-License-Identifier: Apache-2.0
import os
import pathlib
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec

from gpt2_jax.data import batches as batches_lib
from gpt2_jax.data.batches import Batches, batch_sha256, evaluation_batches

ROOT = pathlib.Path(__file__).parents[2]
MESHES = [(1, 8, 1), (2, 2, 2), (1, 1, 8), (2, 4, 1), (8, 1, 1)]


class Tokens:
  """A store in memory that counts what is read, and fails at the windows of `broken`."""

  path = "memory"

  def __init__(self, count: int, broken: tuple[int, ...] = ()):
    self.tokens, self.broken, self.rows = np.arange(count) * 7919 % 50257, broken, 0

  def __len__(self):
    return len(self.tokens)

  def read(self, starts, length):
    self.rows += len(starts)
    if set(self.broken) & set(starts.tolist()):
      raise ValueError("damaged")
    rows = [self.tokens[start : start + length] for start in starts]
    return np.reshape(rows, (len(rows), length)).astype(np.int32)


def sharding(shape: tuple[int, int, int], *spec) -> NamedSharding:
  return NamedSharding(jax.make_mesh(shape, ("replica", "data", "model")), PartitionSpec(*spec))


def training(shape: tuple[int, int, int]) -> NamedSharding:
  return sharding(shape, None, ("replica", "data"), None)


def evaluation(shape: tuple[int, int, int]) -> NamedSharding:
  return sharding(shape, ("replica", "data"), None)


@settings(deadline=None)
@given(n_windows=st.integers(1, 40), batch_size=st.integers(1, 13), seed=st.integers(0, 2**32 - 1))
def test_every_epoch_is_a_permutation_of_all_windows(n_windows, batch_size, seed):
  batches = Batches(Tokens(n_windows * 4 + 1), 4, batch_size, seed)
  steps = -(-3 * n_windows // batch_size)
  order = np.concatenate([batches.windows_at(step) for step in range(steps)])[: 3 * n_windows]
  for epoch in order.reshape(3, n_windows):
    assert sorted(epoch) == list(range(n_windows))


def test_epochs_and_seeds_differ():
  orders = [
    Batches(Tokens(4001), 4, 1000, seed).windows_at(epoch).tolist()
    for seed in range(5)
    for epoch in range(5)
  ]
  assert len(set(map(tuple, orders))) == 25


def test_the_order_is_this_one():
  """As this very line prints it; another order, by Grain or by us, would break the resumption of
  every run."""
  assert Batches(Tokens(10 * 4 + 1), 4, 7, seed=3).windows_at(1).tolist() == [8, 2, 0, 8, 1, 3, 7]


@given(step=st.integers(0, 10**6), low=st.integers(0, 6), high=st.integers(0, 6))
def test_rows_are_the_formula_at_any_step_without_a_past(step, low, high):
  store, n_ctx = Tokens(997), 8
  batches = Batches(store, n_ctx, 6, seed=1)
  windows = Batches(store, n_ctx, 6, seed=1).windows_at(step)
  expected = [store.tokens[i * n_ctx : i * n_ctx + n_ctx + 1] for i in windows[low:high]]
  np.testing.assert_array_equal(
    batches.rows(step, low, high), np.reshape(expected, (-1, n_ctx + 1))
  )


def test_the_last_window_ends_inside_the_store():
  assert Batches(Tokens(4 * 5 + 1), 4, 1, 0).n_rows == 5
  assert Batches(Tokens(4 * 5), 4, 1, 0).n_rows == 4


@pytest.mark.parametrize("shape", MESHES)
@pytest.mark.parametrize("steps_per_call", [1, 3, 10])
def test_the_mesh_has_no_say_in_the_batches(shape, steps_per_call):
  store = Tokens(2000)
  batches = Batches(store, 16, 8, seed=5)
  expected = [batches.rows(step, 0, 8) for step in range(2, 9)]
  calls = list(batches.prefetch(2, 9, steps_per_call, training(shape)))
  calls = [call.tokens_BT for call in calls]
  assert [len(call) for call in calls[:-1]] == [steps_per_call] * (len(calls) - 1)
  assert all(call.sharding == training(shape) and call.dtype == np.int32 for call in calls)
  np.testing.assert_array_equal(np.concatenate(calls), expected)


@pytest.mark.parametrize("shape", MESHES)
def test_a_row_is_read_once_however_many_devices_hold_it(shape):
  store = Tokens(2000)
  list(Batches(store, 16, 8, seed=5).prefetch(0, 6, 2, training(shape)))
  assert store.rows == 6 * 8


def test_each_process_reads_its_own_rows_only():
  """Two processes of four devices each: together they read every row once, and hold the batches of
  one process."""
  with socket.socket() as free:
    free.bind(("localhost", 0))
    address = f"localhost:{free.getsockname()[1]}"
  environment = os.environ | {
    "PYTHONPATH": f"{ROOT}:{ROOT / 'tests' / 'data'}",
    "JAX_PLATFORMS": "cpu",
  }
  environment["XLA_FLAGS"] = "--xla_force_host_platform_device_count=4"
  command = [
    sys.executable,
    "-c",
    "import sys, test_batches; test_batches.two_processes(*sys.argv[1:])",
    address,
  ]
  running = [
    subprocess.Popen([*command, str(i)], env=environment, stdout=subprocess.PIPE, text=True)
    for i in range(2)
  ]
  outputs = [process.communicate(timeout=60)[0].split() for process in running]
  assert [process.returncode for process in running] == [0, 0]
  batches = Batches(Tokens(2000), 16, 8, seed=5)
  for i, (rows, *hashes) in enumerate(outputs):
    assert int(rows) == 3 * 4
    assert hashes == [batch_sha256(batches.rows(step, 4 * i, 4 * i + 4)) for step in range(3)]


def two_processes(address: str, process_id: str) -> None:
  """What each of the two processes above does: prints how many rows it read, and hashes of those it
  holds."""
  jax.distributed.initialize(address, num_processes=2, process_id=int(process_id))
  store = Tokens(2000)
  calls = list(Batches(store, 16, 8, seed=5).prefetch(0, 3, 1, training((2, 2, 2))))
  local = [
    {shard.index[1].start: np.asarray(shard.data)[0] for shard in call.tokens_BT.addressable_shards}
    for call in calls
  ]
  print(
    store.rows,
    *[batch_sha256(np.concatenate([rows[start] for start in sorted(rows)])) for rows in local],
  )


def test_an_exception_comes_where_its_batch_would_have_come():
  batches = Batches(Tokens(2000), 16, 8, seed=5)
  broken = int(batches.windows_at(3)[2]) * 16
  failing = Batches(Tokens(2000, broken=(broken,)), 16, 8, seed=5).prefetch(
    0, 6, 1, training((1, 8, 1))
  )
  for step in range(3):
    np.testing.assert_array_equal(next(failing).tokens_BT[0], batches.rows(step, 0, 8))
  with pytest.raises(ValueError, match="damaged"):
    next(failing)


@pytest.mark.parametrize("end", ["", "ahead.close()", "del ahead", "raise SystemExit(0)"])
def test_leaving_early_does_not_hang(end):
  code = f"""
import test_batches as t
ahead = t.Batches(t.Tokens(2000), 16, 8, 0).prefetch(0, 10**9, 1, t.training((1, 1, 1)))
next(ahead)
{end}
"""
  environment = os.environ | {
    "PYTHONPATH": f"{ROOT}:{ROOT / 'tests' / 'data'}",
    "JAX_PLATFORMS": "cpu",
  }
  environment["XLA_FLAGS"] = ""
  subprocess.run([sys.executable, "-c", code], env=environment, check=True, timeout=30)


@pytest.mark.parametrize("shape", MESHES)
@pytest.mark.parametrize("max_windows", [None, 1, 8, 13, 1000])
def test_evaluation_covers_every_window_once_in_order(shape, max_windows):
  store = Tokens(16 * 21 + 5)
  seen = []
  for batch in evaluation_batches(store, 16, 8, evaluation(shape), max_windows):
    tokens, weights = batch.tokens_BT, np.asarray(batch.weights_BT)
    assert tokens.shape == (8, 17) and weights.shape == (8, 16)
    assert tokens.sharding == batch.weights_BT.sharding == evaluation(shape)
    assert ((weights == 0) | (weights == 1)).all() and (weights == weights[:, :1]).all()
    is_real = weights[:, 0] == 1
    assert not np.asarray(tokens)[~is_real].any()
    seen += np.asarray(tokens)[is_real].tolist()
  assert seen == [
    store.tokens[16 * i : 16 * i + 17].tolist() for i in range(min(21, max_windows or 21))
  ]


@pytest.mark.parametrize("count", [0, 1, 16])
def test_a_store_shorter_than_a_window_is_refused(count):
  with pytest.raises(
    ValueError, match=f"memory has {count} tokens, one window needs n_ctx \\+ 1 = 17"
  ):
    Batches(Tokens(count), 16, 8, 0)
  with pytest.raises(ValueError, match="tokenize more text or lower n_ctx"):
    evaluation_batches(Tokens(count), 16, 8, evaluation((1, 8, 1)))


def test_a_batch_that_does_not_divide_is_refused_before_anything_is_read():
  store = Tokens(2000)
  with pytest.raises(
    ValueError, match="a batch of 12 does not divide by replica 2 x data 4 = 8; .* batch of 8 "
  ):
    Batches(store, 16, 12, 0).prefetch(0, 1, 1, training((2, 4, 1)))
  with pytest.raises(
    ValueError, match="a batch of 3 does not divide by replica 1 x data 8 = 8; .* batch of 8 "
  ):
    evaluation_batches(store, 16, 3, evaluation((1, 8, 1)))
  assert store.rows == 0
  batches_lib.check_shards(12, training((1, 1, 8)), axis=1)


def test_a_hash_is_of_the_tokens_alone():
  tokens = np.arange(12).reshape(3, 4)
  assert (
    batch_sha256(tokens)
    == batch_sha256(tokens.astype(np.uint16))
    == batch_sha256(jax.numpy.array(tokens))
  )
  assert batch_sha256(tokens) != batch_sha256(tokens + 1) and len(batch_sha256(tokens)) == 16
