# SPDX-License-Identifier: Apache-2.0
"""The store of packed examples, and its data loader: rows in the order of a seed.

A store is a token store (token_store.py) whose tokens lie in rows of `n_ctx`. Beside each part's
tokens lies an array of marks, one byte a token:

  bit 0     the token is scored: the model is to predict it
  bit 1     the token is the first of an example, or of the padding that ends a row
  bits 2-7  a label + 1 to the base 64, its digits at the first two tokens of its example

A row is read as a batch has it: the loss mask of each predicted token, segments that attention does
not cross, positions that restart with each. The first token of an example is never scored: it would
be predicted from the example before it.
"""

import dataclasses
import functools
import math
from collections.abc import Iterator
from typing import ClassVar

import grain
import jax
import numpy as np
import tensorstore as ts
from jax.sharding import NamedSharding, PartitionSpec

from gpt2_jax.batch import Batch
from gpt2_jax.data.batches import Batches, check_shards, from_rows, in_background
from gpt2_jax.data.token_store import CACHE_BYTES, REPAIR, TokenStore, damaged_arrays
from gpt2_jax.data.zarr_files import open_arrays

SCORED, START, LABEL_SHIFT = 1, 2, 2


@dataclasses.dataclass(frozen=True)
class ExampleStore(TokenStore):
  """A complete store of packed examples, open for reading. `len(store)` counts padding, too."""

  _mark_parts: list[ts.TensorStore] = dataclasses.field(repr=False)

  FORMAT: ClassVar[int | str] = "examples 1"
  TOTALS: ClassVar[tuple[str, ...]] = (
    "tokens",  # of all rows
    "bytes",  # of the examples' texts
    "rows",
    "examples",
    "example_tokens",  # without padding
    "scored",
    "cut",  # examples that were longer than a row
    "cut_tokens",
    "labelled",  # examples with a label
  )

  @staticmethod
  def open_parts(path: str, manifest: dict) -> tuple[list[ts.TensorStore], ...]:
    marks = {marks_name(name): entry["tokens"] for name, entry in manifest["parts"].items()}
    mark_parts = open_arrays(path, marks, "uint8", CACHE_BYTES)
    return *TokenStore.open_parts(path, manifest), mark_parts

  @classmethod
  def check_manifest(cls, manifest: dict, place: str) -> None:
    n_ctx = manifest.get("n_ctx")
    if type(n_ctx) is not int or n_ctx < 2:
      raise ValueError(f"{place}: n_ctx is {str(n_ctx)[:40]!r}, no length of a row; {REPAIR}")
    super().check_manifest(manifest, place)

  @classmethod
  def is_entry(cls, entry: object, job: dict, index: int) -> bool:
    if not super().is_entry(entry, job, index):
      return False
    if not isinstance(entry.get("marks_sha256"), str) or type(entry.get("classes")) is not int:
      return False
    return entry["tokens"] == entry["rows"] * job["n_ctx"]

  @staticmethod
  def damaged_parts(path: str, entries: dict[str, dict], dtype: str) -> list[str]:
    marks = {}
    for name, entry in entries.items():
      marks[marks_name(name)] = {"tokens": entry["tokens"], "sha256": entry["marks_sha256"]}
    damaged = set(damaged_arrays(path, entries, dtype))
    damaged_marks = set(damaged_arrays(path, marks, "uint8"))
    return [name for name in entries if name in damaged or marks_name(name) in damaged_marks]

  @property
  def n_ctx(self) -> int:
    """Tokens of a row."""
    return self.manifest["n_ctx"]

  @property
  def n_classes(self) -> int:
    """The largest label and one; 0 for examples without labels."""
    return max(entry["classes"] for entry in self.manifest["parts"].values())

  @property
  def padding(self) -> float:
    """The part of all tokens that is padding."""
    return 1 - self.manifest["example_tokens"] / self.manifest["tokens"]

  @functools.cached_property
  def _marks(self) -> ts.TensorStore:
    return ts.concat(self._mark_parts, axis=0)

  def read_rows(self, rows: np.ndarray) -> Batch:
    """Rows by their numbers, an array of any shape, as a batch of NumPy arrays [*rows.shape, ...].

    Raises ValueError if a row leaves the store, or a chunk is damaged or gone.
    """
    starts = np.asarray(rows, np.int64).ravel() * self.n_ctx
    tokens_NT = self.read(starts, self.n_ctx)
    marks_NT = self.read_array(self._marks, starts, self.n_ctx, np.uint8)
    batch = unpack(tokens_NT, marks_NT, self.n_classes > 0)
    return jax.tree.map(lambda x: x.reshape(*np.shape(rows), x.shape[-1]), batch)

  def batches(self, n_ctx: int, batch_size: int, seed: int) -> "Examples":
    return Examples(self, n_ctx, batch_size, seed)

  def evaluation_batches(
    self, n_ctx: int, batch_size: int, sharding: NamedSharding, max_rows: int | None = None
  ) -> Iterator[Batch]:
    """All rows in order, or the first `max_rows`. What fills up the last batch weighs nothing."""
    n_rows = min(self.count_rows(n_ctx), max_rows or math.inf)
    check_shards(batch_size, sharding, axis=0)
    # The spec may name the second axis only for arrays that have one more.
    row_sharding = NamedSharding(sharding.mesh, PartitionSpec(sharding.spec[0], None))

    def batch(first: int) -> Batch:
      def read(low: int, high: int) -> Batch:
        rows = np.arange(first + low, first + high)
        return self.read_filled(rows, rows < n_rows)

      return assemble(read, (batch_size,), self.n_ctx, self.n_classes > 0, row_sharding)

    return in_background(grain.MapDataset.range(0, n_rows, batch_size).map(batch))

  def read_filled(self, rows_N: np.ndarray, is_real_N: np.ndarray) -> Batch:
    """`read_rows` where some are not there: any row stands for one, without weight and label."""
    batch = self.read_rows(np.where(is_real_N, rows_N, 0))
    is_real_N1 = is_real_N[..., None]
    extras = {name: np.where(is_real_N1, labels, -1) for name, labels in batch.extras.items()}
    return dataclasses.replace(batch, weights_BT=batch.weights_BT * is_real_N1, extras=extras)

  def count_rows(self, n_ctx: int) -> int:
    """Rows in an epoch. Raises ValueError for rows that are longer than `n_ctx`."""
    if self.n_ctx > n_ctx:
      raise ValueError(
        f"{self.path} has rows of {self.n_ctx:,} tokens, the context is {n_ctx:,}; "
        f"pack the examples with --n_ctx={n_ctx}, or raise the model's n_ctx"
      )
    return self.manifest["rows"]

  def sample_prompt(self, length: int) -> list[int]:
    """The first example up to its first response, at most half a row: its end.

    Of an example that is scored whole, the first `length` tokens.
    """
    row = self.read_rows(np.zeros(1, np.int64))
    (segments,) = np.nonzero(row.segments_BT[0] == 0)
    ids = row.tokens_BT[0, : len(segments)].tolist()

    first_scored = 1 + int(np.argmax(row.weights_BT[0]))
    if first_scored == 1:
      return ids[: max(1, min(length, len(ids) - 1))]
    return ids[:first_scored][-max(1, self.n_ctx // 2) :]


class Examples(Batches):
  """The rows of an `ExampleStore` as batches, at random access.

  Row r of global batch s is the row at `position` of permutation(seed, epoch), where epoch,
  position = divmod(s * batch_size + r, n_rows). Raises ValueError for rows that do not fit into
  `n_ctx`; shorter ones make shorter batches.
  """

  @property
  def n_rows(self) -> int:
    """Rows in an epoch."""
    return self.store.count_rows(self.n_ctx)

  def rows(self, step: int, low: int, high: int) -> np.ndarray:
    """Tokens of rows [low, high) of global batch `step`, int32 [high - low, T + 1]."""
    return self.store.read_rows(self.windows_at(step)[low:high]).tokens_BT

  def _assemble(self, steps: range, sharding: NamedSharding) -> Batch:
    rows = np.stack([self.windows_at(step) for step in steps])
    return assemble(
      lambda low, high: self.store.read_rows(rows[:, low:high]),
      rows.shape,
      self.store.n_ctx,
      self.store.n_classes > 0,
      sharding,
    )


def marks_name(part: str) -> str:
  """The name of the array of marks that belongs to a part."""
  return f"marks-{part.removeprefix('part-')}"


def unpack(tokens_NT: np.ndarray, marks_NT: np.ndarray, has_labels: bool) -> Batch:
  """Rows of a store as a batch: tokens [N, T + 1], and the other leaves [N, T].

  Extras are `labels_BT`, if there are any labels: an example's label at its last token, -1 at all
  others.
  """
  N, T = tokens_NT.shape

  # 1. The last input predicts nothing: an example ends with its row, at the latest.
  tokens = np.zeros((N, T + 1), np.int32)
  tokens[:, :-1] = tokens_NT
  weights = np.zeros((N, T), np.float32)
  weights[:, :-1] = marks_NT[:, 1:] & SCORED

  # 2. Each segment knows where it starts.
  is_start = (marks_NT & START) != 0
  segments = np.cumsum(is_start, axis=1, dtype=np.int32) - 1
  time = np.arange(T, dtype=np.int32)
  first = np.maximum.accumulate(np.where(is_start, time, 0), axis=1)
  batch = Batch(tokens, weights, segments, time - first)
  if not has_labels:
    return batch

  # 3. Labels, from the digits at an example's first two tokens to its last token.
  digits = (marks_NT >> LABEL_SHIFT).astype(np.int32)
  labels = digits - 1
  labels[:, :-1] += 64 * digits[:, 1:]
  is_last = np.ones_like(is_start)
  is_last[:, :-1] = is_start[:, 1:]
  labels = np.where(is_last, np.take_along_axis(labels, first, axis=1), -1)
  return dataclasses.replace(batch, extras={"labels_BT": labels.astype(np.int32)})


def assemble(
  read, shape: tuple[int, ...], T: int, has_labels: bool, sharding: NamedSharding
) -> Batch:
  """A batch of global arrays [*shape, ...], whose last axis of `shape` is the rows'.

  Each process calls read(low, high) once for the rows that its devices hold.
  """
  read = functools.cache(read)
  axis = len(shape) - 1

  def leaf(length: int, take) -> jax.Array:
    return from_rows((*shape, length), sharding, axis, lambda low, high: take(read(low, high)))

  extras = {"labels_BT": leaf(T, lambda b: b.extras["labels_BT"])} if has_labels else {}
  return Batch(
    tokens_BT=leaf(T + 1, lambda b: b.tokens_BT),
    weights_BT=leaf(T, lambda b: b.weights_BT),
    segments_BT=leaf(T, lambda b: b.segments_BT),
    positions_BT=leaf(T, lambda b: b.positions_BT),
    extras=extras,
  )
