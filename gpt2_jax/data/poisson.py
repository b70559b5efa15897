# SPDX-License-Identifier: Apache-2.0
"""Poisson sampling for private training: each row is in each batch with the same odds.

The rows of batch s are a pure function of (seed, step), as every batch's here, and no iterator is
saved. How many they are is random. A batch has room for `batch_size`; what is not drawn is padding
that weighs nothing. More than there is room for are never cut: the source refuses the run at its
start, for how many each step draws is known without drawing them.
"""

import dataclasses

import numpy as np
from jax.sharding import NamedSharding

from gpt2_jax.batch import Batch
from gpt2_jax.data.batches import Batches, from_rows
from gpt2_jax.data.examples import assemble

PADDING = -1  # in place of a row's number


@dataclasses.dataclass(frozen=True)
class PoissonBatches(Batches):
  """The windows of a token store, or rows of its subclass, drawn by Poisson sampling.

  `expected` rows are drawn a step on average, and `batch_size` at most.
  """

  expected: int

  @property
  def n_rows(self) -> int:
    return self.store.count_rows(self.n_ctx)

  @property
  def rate(self) -> float:
    """The odds of a row to be in a batch."""
    return self.expected / self.n_rows

  def _draw(self, step: int) -> tuple[np.random.Generator, int]:
    """The generator of a step, and how many rows it draws."""
    draw = np.random.Generator(np.random.Philox(key=[self.seed, step]))
    return draw, int(draw.binomial(self.n_rows, self.rate))

  def windows_at(self, step: int) -> np.ndarray:
    """The rows of batch `step`, [B], with padding at the end. Raises ValueError if they are more.

    A binomial count, and then that many rows of all, is Poisson sampling.
    """
    draw, count = self._draw(step)
    if count > self.batch_size:
      raise ValueError(self._overflow(step, count))
    windows = np.full(self.batch_size, PADDING, np.int64)
    windows[:count] = draw.choice(self.n_rows, count, replace=False)
    return windows

  def check_room(self, steps: int) -> None:
    """Raises ValueError if one of the first `steps` batches draws more rows than there is room."""
    counts = [self._draw(step)[1] for step in range(steps)]
    if max(counts) > self.batch_size:
      raise ValueError(self._overflow(int(np.argmax(counts)), max(counts)))

  def _overflow(self, step: int, count: int) -> str:
    return (
      f"Poisson sampling draws {count} examples at step {step}, and a batch has room for "
      f"{self.batch_size} ({self.expected} are expected); set --config.batch_size to {count} or "
      f"more"
    )

  def _assemble(self, steps: range, sharding: NamedSharding) -> Batch:
    windows = np.stack([self.windows_at(step) for step in steps])

    def weigh(low: int, high: int) -> np.ndarray:
      is_real = windows[:, low:high, None] != PADDING
      return np.repeat(is_real.astype(np.float32), self.n_ctx, axis=2)

    def read(low: int, high: int) -> np.ndarray:
      return self._read(np.maximum(windows[:, low:high], 0))

    return Batch(
      from_rows((*windows.shape, self.n_ctx + 1), sharding, 1, read),
      from_rows((*windows.shape, self.n_ctx), sharding, 1, weigh),
    )


class PoissonExamples(PoissonBatches):
  """The rows of an `ExampleStore`, one example each, drawn by Poisson sampling.

  Raises ValueError for a store whose rows hold several examples: a row is what is clipped.
  """

  def __post_init__(self):
    manifest = self.store.manifest
    if manifest["examples"] != manifest["rows"]:
      raise ValueError(
        f"{self.store.path} has {manifest['examples']:,} examples packed into "
        f"{manifest['rows']:,} rows, and private training clips each example alone; tokenize them "
        f"again with --nopack"
      )

  def _assemble(self, steps: range, sharding: NamedSharding) -> Batch:
    rows = np.stack([self.windows_at(step) for step in steps])

    def read(low: int, high: int) -> Batch:
      return self.store.read_filled(np.maximum(rows[:, low:high], 0), rows[:, low:high] != PADDING)

    store = self.store
    return assemble(read, rows.shape, store.n_ctx, store.n_classes > 0, sharding)
