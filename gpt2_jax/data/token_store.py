# SPDX-License-Identifier: Apache-2.0
"""The token store: a corpus as tokenized shards, one long sequence of token ids read at random.

A store is a folder, local or on gs://:

  job.json          what is being written: source, tokenizer, number of documents, documents a part
  part-00000/       a tokenized shard: the first documents as a zarr3 array of uint16 or uint32
  part-00000.json   written once that part is complete: tokens, documents, bytes of UTF-8, sha256
  ...
  manifest.json     written last: the job, the tokenizer itself, the totals, each part's counts
                    and sha256

One worker process writes a part from its first token to its last. A killed job leaves complete
parts, which a rerun keeps, and parts without their .json, which a rerun replaces. It leaves no
manifest, and nothing reads a store without one.
"""

import dataclasses
import functools
import hashlib
import math
from collections.abc import Sequence

import numpy as np
import tensorstore as ts

from gpt2_jax.data.zarr_files import get_json, open_arrays, read_shards, tensorstore_reason
from gpt2_jax.tokenizer import Tokenizer, from_json

# The version of the layout above.
FORMAT = 1
# Memory for chunks that were read: neighbouring windows share some.
CACHE_BYTES = 1 << 28


@dataclasses.dataclass(frozen=True)
class TokenStore:
  """A complete token store, open for reading. `len(store)` is its number of tokens."""

  path: str
  manifest: dict = dataclasses.field(repr=False)
  _parts: list[ts.TensorStore] = dataclasses.field(repr=False)

  @classmethod
  def open(cls, path: str) -> "TokenStore":
    """Opens a store by its manifest.

    Raises FileNotFoundError for no store or a half-written one, ValueError for an unreadable one.
    """
    manifest = get_json(path, "manifest.json")
    if manifest is None:
      raise FileNotFoundError(_what_is_missing(path))

    # A layout of another version may look alike and mean something else.
    if manifest.get("format") != FORMAT:
      raise ValueError(
        f"{path}: format {manifest.get('format')}, this version reads {FORMAT}; tokenize again"
      )

    parts = open_arrays(path, manifest["parts"], CACHE_BYTES)
    return cls(str(path), manifest, parts)

  def __len__(self) -> int:
    return self.manifest["tokens"]

  @functools.cached_property
  def tokenizer(self) -> Tokenizer:
    """The tokenizer with which the corpus was encoded: the manifest holds it."""
    return from_json(self.manifest["tokenizer"])

  @property
  def fingerprint(self) -> str:
    """The tokenizer's fingerprint."""
    return self.manifest["tokenizer_fingerprint"]

  @functools.cached_property
  def _tokens(self) -> ts.TensorStore:
    # One virtual array: a window may lie in two parts. Nothing is read yet.
    return ts.concat(self._parts, axis=0)

  def read(self, starts_N: Sequence[int] | np.ndarray, length: int) -> np.ndarray:
    """Reads windows: tokens [start, start + length) for each start, int32 [N, length].

    Raises ValueError if a window leaves the store, or a chunk is damaged or gone.
    """
    starts_N = np.asarray(starts_N, np.int64)
    if starts_N.size and not 0 <= starts_N.min() <= starts_N.max() <= len(self) - length:
      raise ValueError(
        f"windows of {length:,} tokens from {starts_N.min():,} to {starts_N.max():,} "
        f"leave {self.path} of {len(self):,} tokens"
      )

    # All reads are started before the first is waited for: TensorStore reads them in parallel.
    reading = [self._tokens[start : start + length].read() for start in starts_N.tolist()]

    windows = np.empty((len(reading), length), np.int32)
    try:
      for window, tokens in zip(windows, reading, strict=True):
        window[:] = tokens.result()
    except ValueError as error:
      raise ValueError(
        f"{self.path} is damaged: {tensorstore_reason(error)}; check it with --verify"
      ) from error
    return windows

  def verify(self) -> None:
    """Checks every token against the checksums. Raises ValueError that names the damaged parts."""
    # Without a cache: what is in memory must not vouch for what is on disk.
    entries = self.manifest["parts"]
    parts = open_arrays(self.path, entries, cache_bytes=0)

    damaged = []
    for (name, entry), part in zip(entries.items(), parts, strict=True):
      digest = hashlib.sha256()
      try:
        for tokens in read_shards(part):
          digest.update(tokens.tobytes())
      except ValueError:
        # A chunk is gone, or does not agree with its own crc32c.
        damaged.append(name)
        continue
      if digest.hexdigest() != entry["sha256"]:
        damaged.append(name)

    if damaged:
      raise ValueError(
        f"{self.path}: {len(damaged)} of {len(parts)} parts are damaged "
        f"({', '.join(damaged[:8])}); remove manifest.json and their .json files, "
        "and the same tokenize command writes those parts again"
      )


def part_name(index: int) -> str:
  """The name of a tokenized shard: of its array's folder, and with .json of its counts."""
  return f"part-{index:05d}"


def _what_is_missing(path: str) -> str:
  """Says why a folder without a manifest is no store, and what to do."""
  job = get_json(path, "job.json")
  if job is None:
    return f"no token store at {path}; launch/tokenize.py writes one"

  n_parts = math.ceil(job["documents"] / job["documents_per_part"])
  n_complete = 0
  for index in range(n_parts):
    if get_json(path, f"{part_name(index)}.json") is not None:
      n_complete += 1
  return (
    f"{path} is half-written: {n_complete} of {n_parts} parts; "
    "run the same tokenize command again, it resumes"
  )
