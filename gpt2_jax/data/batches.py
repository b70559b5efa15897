# SPDX-License-Identifier: Apache-2.0
"""The data loader: a batch is a pure function of (seed, step), whatever the hosts.

Window i of a store is tokens [i * n_ctx, i * n_ctx + n_ctx + 1). Row r of global batch s is the
window at `position` of permutation(seed, epoch), where epoch, position = divmod(s * batch_size + r,
n_windows). Hosts, devices and the mesh have no say, and there is no iterator to save. Grain's
random-access shuffle is the permutation, its read threads are the prefetch.
"""

import dataclasses
import functools
import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import grain
import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from gpt2_jax.batch import Batch


class TokenSequence(Protocol):
  """One long sequence of tokens, read at random. `TokenStore` is one."""

  path: str

  def __len__(self) -> int: ...

  def read(self, starts_N: Sequence[int] | np.ndarray, length: int) -> np.ndarray:
    """Tokens [start, start + length) for each start, int32 [N, length]."""
    ...


class BatchSource(Protocol):
  """What training reads: batches of a step, at random access. `Batches` are windows of a token
  store, `Examples` rows of packed examples."""

  batch_size: int

  @property
  def n_rows(self) -> int:
    """Rows (windows) in an epoch."""
    ...

  def prefetch(
    self, first_step: int, last_step: int, steps_per_call: int, sharding: NamedSharding
  ) -> Iterator[Batch]:
    """The batches of steps [first_step, last_step), K to a call: leaves [K, B, ...]."""
    ...


@dataclasses.dataclass(frozen=True)
class Batches:
  """The windows of a token store as batches, at random access.

  Raises ValueError if the store is shorter than one window.
  """

  store: TokenSequence
  n_ctx: int
  batch_size: int
  seed: int

  def __post_init__(self):
    # Raises ValueError if there is none.
    _ = self.n_rows

  @property
  def n_rows(self) -> int:
    """Windows in an epoch."""
    return count_windows(self.store, self.n_ctx)

  @functools.cached_property
  def _order(self) -> grain.MapDataset:
    return grain.MapDataset.range(self.n_rows).seed(self.seed).shuffle().repeat()

  def windows_at(self, step: int) -> np.ndarray:
    """The windows of global batch `step`, [B]."""
    first = step * self.batch_size
    return np.array([self._order[row] for row in range(first, first + self.batch_size)], np.int64)

  def rows(self, step: int, low: int, high: int) -> np.ndarray:
    """Rows [low, high) of global batch `step`, int32 [high - low, n_ctx + 1]."""
    return self._read(self.windows_at(step)[low:high])

  def prefetch(
    self, first_step: int, last_step: int, steps_per_call: int, sharding: NamedSharding
  ) -> Iterator[Batch]:
    """Batches of steps [first_step, last_step), read in the background, tokens int32
    [K, B, n_ctx + 1].

    K is `steps_per_call`, less in the last call if it does not divide the steps. `sharding` splits
    the second axis: each process reads the rows that its devices hold, once. Raises ValueError if
    it cannot split it evenly.
    """
    check_shards(self.batch_size, sharding, axis=1)

    def call(step: int) -> Batch:
      steps = range(step, min(step + steps_per_call, last_step))
      return self._assemble(steps, sharding)

    return in_background(grain.MapDataset.range(first_step, last_step, steps_per_call).map(call))

  def _assemble(self, steps: range, sharding: NamedSharding) -> Batch:
    shape = (len(steps), self.batch_size, self.n_ctx + 1)
    windows = np.stack([self.windows_at(step) for step in steps])
    return Batch(from_rows(shape, sharding, 1, lambda low, high: self._read(windows[:, low:high])))

  def _read(self, windows: np.ndarray) -> np.ndarray:
    length = self.n_ctx + 1
    tokens = self.store.read(windows.ravel() * self.n_ctx, length)
    return tokens.reshape(*windows.shape, length)


def evaluation_batches(
  store: TokenSequence,
  n_ctx: int,
  batch_size: int,
  sharding: NamedSharding,
  max_windows: int | None = None,
) -> Iterator[Batch]:
  """All windows in order, or the first `max_windows`: tokens int32 [B, n_ctx + 1].

  The last batch is filled up with rows of zeros, whose weights are 0; real tokens weigh 1.
  `sharding` splits the first axis. Raises ValueError for a store shorter than one window, or a
  batch that it cannot split evenly.
  """
  n_windows = min(count_windows(store, n_ctx), max_windows or math.inf)
  check_shards(batch_size, sharding, axis=0)
  row_sharding = NamedSharding(sharding.mesh, PartitionSpec(sharding.spec[0], None))

  def read_tokens(first: int, low: int, high: int) -> np.ndarray:
    real = range(first + low, min(first + high, n_windows))
    rows = np.zeros((high - low, n_ctx + 1), np.int32)
    rows[: len(real)] = store.read(np.array(real, np.int64) * n_ctx, n_ctx + 1)
    return rows

  def weigh(first: int, low: int, high: int) -> np.ndarray:
    is_real = np.arange(first + low, first + high) < n_windows
    return np.repeat(is_real[:, None].astype(np.float32), n_ctx, axis=1)

  def batch(first: int) -> Batch:
    read, weights = (functools.partial(rows, first) for rows in (read_tokens, weigh))
    return Batch(
      from_rows((batch_size, n_ctx + 1), sharding, 0, read),
      from_rows((batch_size, n_ctx), row_sharding, 0, weights),
    )

  return in_background(grain.MapDataset.range(0, n_windows, batch_size).map(batch))


def count_windows(store: TokenSequence, n_ctx: int) -> int:
  """Non-overlapping windows in the store; ValueError if there is none."""
  n_windows = (len(store) - 1) // n_ctx
  if n_windows < 1:
    raise ValueError(
      f"{store.path} has {len(store):,} tokens, one window needs n_ctx + 1 = {n_ctx + 1:,}; "
      "tokenize more text or lower n_ctx"
    )
  return n_windows


def check_shards(batch_size: int, sharding: NamedSharding, axis: int) -> None:
  """Raises ValueError unless the mesh axes over which `sharding` splits `axis` divide the batch."""
  names = sharding.spec[axis] or ()
  names = (names,) if isinstance(names, str) else names
  shards = math.prod(sharding.mesh.shape[name] for name in names)
  if batch_size % shards:
    sizes = " x ".join(f"{name} {sharding.mesh.shape[name]}" for name in names)
    raise ValueError(
      f"a batch of {batch_size} does not divide by {sizes} = {shards}; "
      f"take a batch of {max(1, batch_size // shards) * shards} or another mesh"
    )


def batch_sha256(tokens: np.ndarray | jax.Array) -> str:
  """16 hexadecimal digits that two batches share only if they are the same tokens."""
  return hashlib.sha256(np.asarray(tokens, np.int32).tobytes()).hexdigest()[:16]


def from_rows(
  shape: tuple[int, ...], sharding: NamedSharding, axis: int, read: Callable
) -> jax.Array:
  """A global array; each process calls read(low, high) once for the rows of `axis` that its devices
  hold."""
  read = functools.cache(read)

  def shard(index):
    low, high, _ = index[axis].indices(shape[axis])
    return read(low, high)

  return jax.make_array_from_callback(shape, sharding, shard)


def in_background(calls: grain.MapDataset) -> Iterator:
  """The elements in order, two of them ahead; an exception comes where its element would have
  come."""
  ahead = iter(calls.to_iter_dataset(grain.ReadOptions(num_threads=2, prefetch_buffer_size=2)))
  try:
    yield from ahead
  finally:
    ahead.close()
