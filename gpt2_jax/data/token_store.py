# SPDX-License-Identifier: Apache-2.0
"""The token store: a corpus as tokenized shards, one long sequence of token ids read at random.

A store is a folder, local or on gs://:

  job.json          what is being written: source, tokenizer, number of documents, documents a part
  part-00000/       a tokenized shard: the first documents as a zarr3 array of uint16 or uint32
  part-00000.json   written once that part is complete: tokens, documents, bytes of UTF-8, sha256
  ...
  manifest.json     written last: the job, the tokenizer itself, the totals, each part's counts
                    and sha256
  lock              held by the process that writes (flock); empty, and never on gs://

One worker process writes a part from its first token to its last. A killed job leaves complete
parts, which a rerun keeps, and parts without their .json, which a rerun replaces. It leaves no
manifest, and nothing reads a store without one.

The manifest's "skipped" counts the records of the corpus that could not be read, and names the
first. A part's .json has it only if there are any. Stores of older versions have none.
"""

import concurrent.futures
import dataclasses
import functools
import hashlib
import itertools
import math
from collections.abc import Iterator, Sequence
from typing import ClassVar, Self

import numpy as np
import tensorstore as ts
from jax.sharding import NamedSharding

from gpt2_jax.batch import Batch
from gpt2_jax.data.batches import Batches, count_windows, evaluation_batches
from gpt2_jax.data.skipped import Skipped
from gpt2_jax.data.zarr_files import (
  get_json,
  list_names,
  open_arrays,
  read_shards,
  tensorstore_reason,
)
from gpt2_jax.files import progress, summarize, user_path
from gpt2_jax.tokenizer import Tokenizer, from_json

# The version of the layout above.
FORMAT = 1
# Memory for chunks that were read: neighbouring windows share some.
CACHE_BYTES = 1 << 28
# What job.json says, and the manifest repeats.
JOB_KEYS = {"format", "source", "tokenizer_fingerprint", "documents", "documents_per_part"}
# The way out, wherever a store is damaged.
REPAIR = "the same tokenize command writes what is damaged again"


@dataclasses.dataclass(frozen=True)
class TokenStore:
  """A complete token store, open for reading. `len(store)` is its number of tokens."""

  path: str
  manifest: dict = dataclasses.field(repr=False)
  _parts: list[ts.TensorStore] = dataclasses.field(repr=False)

  # The version of the layout, and the counts of the parts that the manifest adds up.
  FORMAT: ClassVar[int | str] = FORMAT
  TOTALS: ClassVar[tuple[str, ...]] = ("tokens", "bytes")

  @classmethod
  def open(cls, path: str) -> Self:
    """Opens a store by its manifest.

    Raises FileNotFoundError for no store or a half-written one, ValueError for an unreadable one.
    """
    path = user_path(path)
    manifest = get_json(path, "manifest.json")
    if manifest is None:
      raise FileNotFoundError(_what_is_missing(path))

    # A layout of another version may look alike and mean something else.
    if manifest.get("format") != cls.FORMAT:
      raise ValueError(
        f"{path}: format {str(manifest.get('format'))[:40]}, this version reads {cls.FORMAT}; "
        "tokenize again"
      )

    cls.check_manifest(manifest, f"{path}/manifest.json")
    return cls(path, manifest, *cls.open_parts(path, manifest))

  @staticmethod
  def open_parts(path: str, manifest: dict) -> tuple[list[ts.TensorStore], ...]:
    """The arrays of a store by its manifest. Raises ValueError if one is gone or damaged."""
    lengths = {name: entry["tokens"] for name, entry in manifest["parts"].items()}
    return (open_arrays(path, lengths, manifest["dtype"], CACHE_BYTES),)

  def __len__(self) -> int:
    return self.manifest["tokens"]

  @functools.cached_property
  def tokenizer(self) -> Tokenizer:
    """The tokenizer with which the corpus was encoded: the manifest holds it.

    Raises ValueError if it is not the one that the manifest's fingerprint tells.
    """
    tokenizer = from_json(self.manifest.get("tokenizer"))
    if tokenizer.fingerprint != self.fingerprint:
      raise ValueError(
        f"{self.path}/manifest.json holds a tokenizer with fingerprint "
        f"{tokenizer.fingerprint[:12]} and says {self.fingerprint[:12]}; {REPAIR}"
      )
    return tokenizer

  @property
  def fingerprint(self) -> str:
    """The tokenizer's fingerprint."""
    return self.manifest["tokenizer_fingerprint"]

  @property
  def skipped(self) -> Skipped:
    """The records of the corpus that are not in the store."""
    return Skipped.from_json(self.manifest.get("skipped"))

  @functools.cached_property
  def _tokens(self) -> ts.TensorStore:
    # One virtual array: a window may lie in two parts. Nothing is read yet.
    return ts.concat(self._parts, axis=0)

  def read(self, starts_N: Sequence[int] | np.ndarray, length: int) -> np.ndarray:
    """Reads windows: tokens [start, start + length) for each start, int32 [N, length].

    Raises ValueError if a window leaves the store, or a chunk is damaged or gone.
    """
    return self.read_array(self._tokens, starts_N, length, np.int32)

  def read_array(
    self, array: ts.TensorStore, starts_N: Sequence[int] | np.ndarray, length: int, dtype: type
  ) -> np.ndarray:
    """`read` for any array of the store that is as long as its tokens."""
    starts_N = np.asarray(starts_N, np.int64)
    if starts_N.size and not 0 <= starts_N.min() <= starts_N.max() <= len(self) - length:
      raise ValueError(
        f"windows of {length:,} tokens from {starts_N.min():,} to {starts_N.max():,} "
        f"leave {self.path} of {len(self):,} tokens"
      )

    # All reads are started before the first is waited for: TensorStore reads them in parallel.
    reading = [array[start : start + length].read() for start in starts_N.tolist()]

    windows = np.empty((len(reading), length), dtype)
    try:
      for window, tokens in zip(windows, reading, strict=True):
        window[:] = tokens.result()
    except ValueError as error:
      raise self._damaged(error) from error
    return windows

  def blocks(self, length: int, overlap: int) -> Iterator[tuple[int, np.ndarray]]:
    """All tokens in order: each start, and the `length` tokens from it on with `overlap` more.

    They have the store's own dtype. One block is read ahead, and nothing is kept: memory does not
    grow with the store. Raises ValueError for a chunk that is damaged or gone.
    """
    # A cache would only fill up: no token is read twice but for the overlap.
    lengths = {name: entry["tokens"] for name, entry in self.manifest["parts"].items()}
    arrays = open_arrays(self.path, lengths, self.manifest["dtype"], cache_bytes=0)
    tokens = ts.concat(arrays, axis=0)

    def start_reading(start: int) -> ts.Future:
      return tokens[start : min(start + length + overlap, len(self))].read()

    ahead = start_reading(0)
    for start in range(0, len(self), length):
      block = ahead
      if start + length < len(self):
        ahead = start_reading(start + length)
      try:
        yield start, block.result()
      except ValueError as error:
        raise self._damaged(error) from error

  def _damaged(self, error: ValueError) -> ValueError:
    reason = tensorstore_reason(error)
    return ValueError(f"{self.path} is damaged: {reason}; check it with --verify")

  def batches(self, n_ctx: int, batch_size: int, seed: int) -> Batches:
    """What a run trains on: windows in an order of that seed."""
    return Batches(self, n_ctx, batch_size, seed)

  def evaluation_batches(
    self, n_ctx: int, batch_size: int, sharding: NamedSharding, max_rows: int | None = None
  ) -> Iterator[Batch]:
    """All windows in order, or the first `max_rows`, as the function of this name has them."""
    return evaluation_batches(self, n_ctx, batch_size, sharding, max_rows)

  def count_rows(self, n_ctx: int) -> int:
    """Windows in an epoch. Raises ValueError if there is none."""
    return count_windows(self, n_ctx)

  def sample_prompt(self, length: int) -> list[int]:
    """The first `length` tokens, which a sample during training continues."""
    return self.read([0], length)[0].tolist()

  def verify(self) -> None:
    """Holds all files of the store against each other, and every token against the checksums.

    Raises ValueError that names what is damaged.
    """
    # The manifest repeats what job.json and the parts' .json say.
    job = get_json(self.path, "job.json")
    if job is None:
      raise ValueError(f"{self.path}: job.json is gone; {REPAIR}")
    other = [key for key in job if key in self.manifest and job[key] != self.manifest[key]]
    if other or not job.keys() >= JOB_KEYS:
      names = summarize(other or sorted(JOB_KEYS - job.keys()), each=40)
      raise ValueError(f"{self.path}: manifest.json and job.json differ in {names}; {REPAIR}")

    entries = self.manifest["parts"]
    other = [name for name in entries if get_json(self.path, f"{name}.json") != entries[name]]
    if other:
      raise ValueError(
        f"{self.path}: manifest.json and the .json of {summarize(other)} differ; {REPAIR}"
      )

    # It is compared with its fingerprint when it is opened.
    vocab_size = self.tokenizer.vocab_size
    if np.dtype(self.manifest["dtype"]) != token_dtype(vocab_size):
      raise ValueError(f"{self.path}: {self.manifest['dtype']} for {vocab_size:,} ids; {REPAIR}")

    damaged = self.damaged_parts(self.path, entries, self.manifest["dtype"])
    if damaged:
      raise ValueError(
        f"{self.path}: {len(damaged)} of {len(entries)} parts are damaged "
        f"({summarize(damaged)}); {REPAIR}"
      )

  @classmethod
  def check_manifest(cls, manifest: dict, place: str) -> None:
    """Raises ValueError unless a manifest is whole in itself: its parts make up its totals."""
    # 1. Everything is there, and of its type.
    for key in (*cls.TOTALS, "documents", "documents_per_part"):
      if not _is_count(manifest.get(key)):
        raise ValueError(f"{place}: {key} is {str(manifest.get(key))[:40]!r}, no count; {REPAIR}")
    kinds = {"parts": dict, "source": dict, "tokenizer": dict, "tokenizer_fingerprint": str}
    for key, kind in kinds.items():
      if not isinstance(manifest.get(key), kind):
        raise ValueError(f"{place} has no {key}; {REPAIR}")
    if manifest.get("dtype") not in ("uint16", "uint32"):
      raise ValueError(f"{place}: dtype {str(manifest.get('dtype'))[:40]!r} is no id's; {REPAIR}")

    # 2. The parts are those of that many documents. Their names are made and never taken from the
    # file, where they could lead out of the folder.
    parts = manifest["parts"]
    n_parts = count_parts(manifest)
    if len(parts) != n_parts or list(parts) != list(map(part_name, range(n_parts))):
      raise ValueError(
        f"{place}: {len(parts):,} parts ({summarize(parts, 2, 40)}) where "
        f"{manifest['documents']:,} documents make {n_parts:,} from part-00000 on; {REPAIR}"
      )
    for index, name in enumerate(parts):
      if not cls.is_entry(parts[name], manifest, index):
        raise ValueError(f"{place}: the counts of {name} are damaged; {REPAIR}")

    Skipped.from_json(manifest.get("skipped"))

    # 3. They make up the totals.
    for key in cls.TOTALS:
      total = sum(entry[key] for entry in parts.values())
      if manifest[key] != total:
        raise ValueError(
          f"{place} says {manifest[key]:,} {key}, and its parts have {total:,}; {REPAIR}"
        )

  @classmethod
  def is_entry(cls, entry: object, job: dict, index: int) -> bool:
    """Whether this is what is said of part `index` of a job."""
    if not isinstance(entry, dict) or not isinstance(entry.get("sha256"), str):
      return False
    if not all(_is_count(entry.get(key)) for key in cls.TOTALS):
      return False
    try:
      Skipped.from_json(entry.get("skipped"))
    except ValueError:
      return False
    return entry.get("documents") == len(documents_of_part(job, index))

  @staticmethod
  def damaged_parts(path: str, entries: dict[str, dict], dtype: str) -> list[str]:
    """The parts whose tokens are not those that `entries` count and hash. Reads all tokens."""
    return damaged_arrays(path, entries, dtype)


def part_name(index: int) -> str:
  """The name of a tokenized shard: of its array's folder, and with .json of its counts."""
  return f"part-{index:05d}"


def token_dtype(vocab_size: int) -> np.dtype:
  """Two bytes a token where the largest id fits, else four; little-endian."""
  return np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")


def damaged_arrays(path: str, entries: dict[str, dict], dtype: str) -> list[str]:
  """The arrays that do not hold the "tokens" that `entries` count and hash. Reads all of them."""

  def is_damaged(item: tuple[str, dict]) -> bool:
    name, entry = item
    digest = hashlib.sha256()
    try:
      # Without a cache: what is in memory must not vouch for what is on disk.
      (part,) = open_arrays(path, {name: entry["tokens"]}, dtype, cache_bytes=0)
      for tokens in read_shards(part):
        digest.update(tokens.tobytes())
    except ValueError:
      # A chunk is gone, or does not agree with its own crc32c.
      return True
    return digest.hexdigest() != entry["sha256"]

  with concurrent.futures.ThreadPoolExecutor(4) as threads:
    results = progress(threads.map(is_damaged, entries.items()), "checking", " parts")
    return list(itertools.compress(entries, results))


def count_parts(job: dict) -> int:
  """The number of parts of a job."""
  return math.ceil(job["documents"] / max(1, job["documents_per_part"]))


def documents_of_part(job: dict, index: int) -> range:
  """The documents of a part: all parts have the same number, but for the last one."""
  first = index * job["documents_per_part"]
  return range(first, min(first + job["documents_per_part"], job["documents"]))


def _is_count(value: object) -> bool:
  # True is an int, too.
  return type(value) is int and value >= 0


def _what_is_missing(path: str) -> str:
  """Says why a folder without a manifest is no store, and what to do."""
  job = get_json(path, "job.json")
  if job is None:
    return (
      f"no token store at {path}; write it: gpt2-jax tokenize --out={path} with --files, or with "
      "--examples and a --recipe"
    )

  if not _is_count(job.get("documents")) or not _is_count(job.get("documents_per_part")):
    return f"{path} is no token store: its job.json is of something else; choose another folder"

  n_complete = len(list_names(path, r"part-\d+\.json"))
  return (
    f"{path} is half-written: {n_complete:,} of {count_parts(job):,} parts; "
    "run the same tokenize command again, it resumes"
  )
