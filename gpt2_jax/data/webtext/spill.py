# SPDX-License-Identifier: Apache-2.0
"""Groups of equal 64-bit keys, by way of the disk: a 256th of the records is in memory at a time.

A record of a key and a position takes 16 bytes. 8 million documents of 14 bands are 1.8 GB on disk
and 7 MB in memory.
"""

import contextlib
import pathlib
from collections.abc import Iterable, Iterator

import numpy as np

RECORD = np.dtype([("key", "<u8"), ("position", "<u8")])
PARTITIONS = 256


def group_by_key(batches: Iterable[np.ndarray], folder: pathlib.Path) -> Iterator[np.ndarray]:
  """The positions of each key that several records have; batches have the dtype RECORD.

  `folder` is made, and is emptied as the groups are read.
  """
  folder.mkdir(parents=True)
  paths = [folder / f"{i:03}" for i in range(PARTITIONS)]

  # 1. Scatter: keys are hashes, so that the partitions have about one size.
  with contextlib.ExitStack() as stack:
    files = [stack.enter_context(open(path, "wb")) for path in paths]
    for batch in batches:
      batch = np.sort(batch, order="key")
      edges = np.searchsorted(batch["key"], _lower_bounds())
      for i, part in enumerate(np.split(batch, edges)):
        files[i].write(part.tobytes())

  # 2. Sort each partition, and cut it where the key changes.
  for path in paths:
    records = np.fromfile(path, RECORD)
    path.unlink()
    records.sort(order=["key", "position"])
    cuts = np.flatnonzero(np.diff(records["key"])) + 1
    starts = np.concatenate([[0], cuts])
    lengths = np.diff(np.concatenate([starts, [len(records)]]))
    for start, length in zip(starts[lengths > 1], lengths[lengths > 1], strict=True):
      yield records["position"][start : start + length]
  folder.rmdir()


def _lower_bounds() -> np.ndarray:
  """The smallest key of each partition but the first."""
  return np.arange(1, PARTITIONS, dtype=np.uint64) << np.uint64(56)
