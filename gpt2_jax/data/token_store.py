# SPDX-License-Identifier: Apache-2.0
"""The token store: a corpus as one long sequence of token ids, on TensorStore, read at random.

A store is a folder, local or on gs://:

  job.json              what is being written: source, tokenizer, number of documents, documents a part
  part-00000/           the tokens of the first documents, a zarr3 array of uint16 or uint32
  part-00000.json       written once that part is whole: tokens, documents, bytes of UTF-8, sha256
  ...
  manifest.json         written last: the job, the tokenizer itself, the totals, each part's counts and sha256

One worker process writes a part whole, so a killed job leaves whole parts, which a rerun keeps, parts without
their .json, which it replaces, and no manifest, without which nothing reads the store. Inside a part, chunks of
2,048 tokens with a crc32c each lie in shards of 16 Mi tokens: few files, and a random window reads a few KiB.
"""

import concurrent.futures
import dataclasses
import functools
import hashlib
import json
import math
import multiprocessing
import os
import pathlib
import re
import signal
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool

import numpy as np
import tensorstore as ts
import tqdm

from gpt2_jax import tokenizer as tokenizer_lib
from gpt2_jax.tokenizer import Tokenizer

FORMAT = 1
CHUNK = 2048  # tokens that are read at once
SHARD = 1 << 24  # tokens in a file
CACHE_BYTES = 1 << 28


@dataclasses.dataclass(frozen=True)
class TokenStore:
  """A whole store, open for reading. `len(store)` is its number of tokens."""

  path: str
  manifest: dict = dataclasses.field(repr=False)
  _parts: list[ts.TensorStore] = dataclasses.field(repr=False)

  @classmethod
  def open(cls, path: str) -> "TokenStore":
    """Raises FileNotFoundError for no store or a half-written one, ValueError for one that cannot be read."""
    manifest = _read_json(path, "manifest.json")
    if manifest is None:
      raise FileNotFoundError(_what_is_missing(path))
    if manifest.get("format") != FORMAT:
      raise ValueError(f"{path}: format {manifest.get('format')}, this version reads {FORMAT}; tokenize again")
    return cls(str(path), manifest, _open_parts(path, manifest["parts"], CACHE_BYTES))

  def __len__(self) -> int:
    return self.manifest["tokens"]

  @functools.cached_property
  def tokenizer(self) -> Tokenizer:
    return tokenizer_lib.from_json(self.manifest["tokenizer"])

  @property
  def fingerprint(self) -> str:
    """The tokenizer's fingerprint."""
    return self.manifest["tokenizer_fingerprint"]

  @functools.cached_property
  def _tokens(self) -> ts.TensorStore:
    return ts.concat(self._parts, axis=0)

  def read(self, starts_N: Sequence[int] | np.ndarray, length: int) -> np.ndarray:
    """Tokens [start, start + length) for each start, int32 [N, length]; all are read at once.

    Raises ValueError where a window leaves the store, or a chunk is damaged or gone.
    """
    starts_N = np.asarray(starts_N, np.int64)
    if starts_N.size and not 0 <= starts_N.min() <= starts_N.max() <= len(self) - length:
      raise ValueError(
        f"windows of {length:,} tokens from {starts_N.min():,} to {starts_N.max():,} leave {self.path} "
        f"of {len(self):,} tokens"
      )
    reading = [self._tokens[start : start + length].read() for start in starts_N.tolist()]
    windows = np.empty((len(reading), length), np.int32)
    try:
      for window, tokens in zip(windows, reading, strict=True):
        window[:] = tokens.result()
    except ValueError as error:
      raise ValueError(f"{self.path} is damaged: {_reason(error)}; check it with --verify") from error
    return windows

  def verify(self) -> None:
    """Reads everything. Raises ValueError naming the parts whose tokens are not those that were written."""
    damaged = []
    parts = _open_parts(self.path, self.manifest["parts"], cache_bytes=0)
    for (name, entry), part in zip(self.manifest["parts"].items(), parts, strict=True):
      digest = hashlib.sha256()
      try:
        for start in range(0, part.shape[0], SHARD):
          digest.update(part[start : min(start + SHARD, part.shape[0])].read().result().tobytes())
      except ValueError:
        damaged.append(name)
      else:
        if digest.hexdigest() != entry["sha256"]:
          damaged.append(name)
    if damaged:
      raise ValueError(
        f"{self.path}: {len(damaged)} of {len(parts)} parts are damaged ({', '.join(damaged[:8])}); remove "
        "manifest.json and their .json files, and the same tokenize command writes those parts anew"
      )


def encode_corpus(
  documents: Sequence[str],
  tokenizer: Tokenizer,
  path: str,
  source: dict,
  processes: int | None = None,
  documents_per_part: int | None = None,
) -> TokenStore:
  """Writes the tokens of all documents, in order, each followed by the tokenizer's eot if it has one.

  A half-written store of the same job is continued, a whole one is left as it is. `source` says in JSON what the
  documents are: jobs are the same where it, the tokenizer and the parts are. Raises ValueError for a folder of
  another job, no tokens, a worker that died, or a disk that is full or refuses.
  """
  per_part = documents_per_part or min(16384, max(1, math.ceil(len(documents) / 64)))
  job = {
    "format": FORMAT,
    "source": source,
    "tokenizer_fingerprint": tokenizer.fingerprint,
    "documents": len(documents),
    "documents_per_part": per_part,
  }
  writer = _Writer(documents, tokenizer, str(path), per_part)
  _claim(path, job)
  if _read_json(path, "manifest.json") is not None:
    print(f"{path} is whole already", file=sys.stderr)
    return TokenStore.open(path)
  parts = {name: _read_json(path, f"{name}.json") for name in writer.names}
  pending = [index for index, entry in enumerate(parts.values()) if entry is None]
  for index, entry in _progress(writer.run(pending, processes or os.cpu_count()), parts, len(documents)):
    parts[writer.names[index]] = entry
  totals = {key: sum(entry[key] for entry in parts.values()) for key in ("tokens", "bytes")}
  if not totals["tokens"]:
    raise ValueError(f"no tokens in {len(documents):,} documents: nothing to train on")
  manifest = job | totals | {"dtype": writer.dtype.name, "tokenizer": tokenizer.to_json(), "parts": parts}
  _write_json(path, "manifest.json", manifest)
  return TokenStore.open(path)


@dataclasses.dataclass(frozen=True)
class _Writer:
  """What a process needs to write any part."""

  documents: Sequence[str]
  tokenizer: Tokenizer
  path: str
  documents_per_part: int

  @property
  def names(self) -> list[str]:
    return [f"part-{i:05d}" for i in range(math.ceil(len(self.documents) / self.documents_per_part))]

  @property
  def dtype(self) -> np.dtype:
    return np.dtype("<u2" if self.tokenizer.vocab_size <= 1 << 16 else "<u4")

  def run(self, pending: list[int], processes: int) -> Iterator[tuple[int, dict]]:
    """Writes the parts; yields (index, entry) as they are done. One process writes them itself."""
    if min(processes, len(pending)) <= 1:
      yield from ((index, self.write(index)) for index in pending)
      return
    # Not fork: the threads of TensorStore and JAX do not survive it.
    pool = concurrent.futures.ProcessPoolExecutor(
      min(processes, len(pending)), multiprocessing.get_context("spawn"), _start_worker, (self,)
    )
    others = multiprocessing.active_children()
    try:
      running = {pool.submit(_write, index): index for index in pending}
      for done in concurrent.futures.as_completed(running):
        yield running[done], done.result()
    except BrokenProcessPool as error:
      raise ValueError(
        f"a worker that wrote {self.path} died (out of memory?); the same command continues, try fewer --processes"
      ) from error
    finally:
      for worker in set(multiprocessing.active_children()) - set(others):
        worker.terminate()
      pool.shutdown(cancel_futures=True)

  def write(self, index: int) -> dict:
    """Writes part `index`, then its .json, which it returns."""
    first = index * self.documents_per_part
    indices = range(first, min(first + self.documents_per_part, len(self.documents)))
    tokens, size = self._encode(indices)
    entry = {
      "tokens": len(tokens),
      "documents": len(indices),
      "bytes": size,
      "sha256": hashlib.sha256(tokens.tobytes()).hexdigest(),
    }
    name = self.names[index]
    try:
      part = ts.open(
        _array(self.path, name) | {"metadata": _metadata(len(tokens), self.dtype)},
        create=True,
        delete_existing=True,
      ).result()
      for start in range(0, len(tokens), SHARD):
        part[start : min(start + SHARD, len(tokens))].write(tokens[start : start + SHARD]).result()
    except ValueError as error:
      raise ValueError(f"cannot write {self.path}: {_reason(error)}") from error
    _write_json(self.path, f"{name}.json", entry)
    return entry

  def _encode(self, indices: range) -> tuple[np.ndarray, int]:
    """The documents' tokens, and their bytes of UTF-8."""
    runs, size = [np.empty(0, self.dtype)], 0
    for text in map(self.documents.__getitem__, indices):
      for piece in _pieces(text):
        runs.append(np.array(self.tokenizer.encode(piece), self.dtype))
        size += len(piece.encode())
      if self.tokenizer.eot is not None:
        runs.append(np.array([self.tokenizer.eot], self.dtype))
    return np.concatenate(runs), size


def _start_worker(writer: _Writer) -> None:
  """Ctrl-C is for the parent, which ends its workers; they also end if it is killed."""
  global _writer
  _writer = writer
  signal.signal(signal.SIGINT, signal.SIG_IGN)
  threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
  multiprocessing.parent_process().join()
  os._exit(1)


def _write(index: int) -> dict:
  return _writer.write(index)


def _progress(entries: Iterator[tuple[int, dict]], parts: dict[str, dict | None], total: int) -> Iterator:
  """The entries, with a bar over `total` documents that starts at those which are there."""
  there = sum(entry["documents"] for entry in parts.values() if entry)
  tokens, begin = 0, time.monotonic()
  with tqdm.tqdm(desc="tokenizing", unit=" documents", initial=there, total=total) as bar:
    for index, entry in entries:
      tokens += entry["tokens"]
      bar.set_postfix_str(f"{tokens / (time.monotonic() - begin):,.0f} tokens/s", refresh=False)
      bar.update(entry["documents"])
      yield index, entry


def _pieces(text: str, size: int = 1 << 24, search: int = 1 << 16) -> Iterator[str]:
  """A long text in pieces of about `size` characters, which bounds memory.

  They are cut before the end of a line that is not blank, where GPT-2's tokens always end too.
  """
  line_end, start = re.compile(r"(?<=\S)(?=\n)"), 0
  while start < len(text):
    stop = start + size
    if stop < len(text):
      stop = max((match.end() for match in line_end.finditer(text, stop - search, stop)), default=stop)
    yield text[start:stop]
    start = stop


def _claim(path: str, job: dict) -> None:
  """Raises ValueError if the folder is another job's, by job.json; else writes that."""
  found = _read_json(path, "job.json")
  if found is None:
    _write_json(path, "job.json", job)
  elif found != job:
    name, theirs, ours = _difference(found, job)
    raise ValueError(
      f"{path} holds another job: its {name} is {theirs}, this one's {ours}; choose another --out, or remove it"
    )


def _what_is_missing(path: str) -> str:
  job = _read_json(path, "job.json")
  if job is None:
    return f"no token store at {path}; launch/tokenize.py writes one"
  total = math.ceil(job["documents"] / job["documents_per_part"])
  done = sum(_read_json(path, f"part-{i:05d}.json") is not None for i in range(total))
  return f"{path} is half-written: {done} of {total} parts; run the same tokenize command again, it continues"


def _metadata(n_tokens: int, dtype: np.dtype) -> dict:
  """zarr3: plain little-endian chunks with a crc32c, in shards."""
  plain = [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}]
  shard = min(SHARD, max(1, math.ceil(n_tokens / CHUNK)) * CHUNK)
  sharding = {"chunk_shape": [CHUNK], "codecs": plain, "index_codecs": plain}
  return {
    "shape": [n_tokens],
    "data_type": dtype.name,
    "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [shard]}},
    "codecs": [{"name": "sharding_indexed", "configuration": sharding}],
  }


def _open_parts(path: str, names: Iterable[str], cache_bytes: int) -> list[ts.TensorStore]:
  context = ts.Context({"cache_pool": {"total_bytes_limit": cache_bytes}})
  once = {"recheck_cached_data": "open", "recheck_cached_metadata": "open"}
  opening = [ts.open(_array(path, name) | once, context=context, read=True, write=False) for name in names]
  try:
    return [part.result() for part in opening]
  except ValueError as error:
    raise ValueError(f"{path} has lost a part: {_reason(error)}; remove that folder and tokenize again") from error


def _array(path: str, name: str) -> dict:
  # A chunk that is gone is an error, not zeros; so a chunk of zeros is written like any other.
  missing = {"fill_missing_data_reads": False, "store_data_equal_to_fill_value": True}
  return {"driver": "zarr3", "kvstore": f"{_url(path)}{name}/"} | missing


def _url(path: str) -> str:
  path = str(path)
  url = path if "://" in path else pathlib.Path(path).absolute().as_uri()
  return url.rstrip("/") + "/"


def _read_json(path: str, name: str) -> dict | None:
  """None where there is no such file; ValueError where it cannot be read."""
  try:
    content = ts.KvStore.open(_url(path)).result().read(name).result()
    return json.loads(content.value) if content.state == "value" else None
  except ValueError as error:
    raise ValueError(f"cannot read {path}/{name}: {_reason(error)}") from error


def _write_json(path: str, name: str, content: dict) -> None:
  try:
    ts.KvStore.open(_url(path)).result().write(name, json.dumps(content, indent=1).encode()).result()
  except ValueError as error:
    raise ValueError(f"cannot write {path}/{name}: {_reason(error)}") from error


def _reason(error: Exception) -> str:
  """TensorStore's message without its long tail of context."""
  return str(error).split(" [")[0].splitlines()[0].rstrip(".: ")


def _difference(theirs: dict, ours: dict) -> tuple[str, str, str]:
  """The name of the first entry that differs, and its two values."""
  name = next(key for key in theirs | ours if theirs.get(key) != ours.get(key))
  values = theirs.get(name), ours.get(name)
  if all(isinstance(value, dict) for value in values):
    inner, *values = _difference(*values)
    return f"{name}'s {inner}", *values
  return name, *map(json.dumps, values)
