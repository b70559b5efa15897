# SPDX-License-Identifier: Apache-2.0
"""Tokenizes a corpus into a token store, with several processes; resumes a job that was killed."""

import concurrent.futures
import dataclasses
import json
import math
import multiprocessing
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool

import numpy as np
import tqdm

from gpt2_jax.data.token_store import FORMAT, TokenStore, part_name
from gpt2_jax.data.zarr_files import get_json, put_json, write_array
from gpt2_jax.files import sha256
from gpt2_jax.tokenizer import Tokenizer


def encode_corpus(
  documents: Sequence[str],
  tokenizer: Tokenizer,
  path: str,
  source: dict,
  processes: int | None = None,
  documents_per_part: int | None = None,
) -> TokenStore:
  """Tokenizes all documents, in order, each followed by the tokenizer's eot if it has one.

  Resumes a half-written store of the same job, and leaves a complete one as it is. `source` says in
  JSON what the documents are: two jobs are the same if it, the tokenizer and the parts are. Raises
  ValueError for a folder of another job, no tokens, a worker that died, or a disk that is full or
  read-only.
  """
  # 64 parts keep all processes busy and lose little when killed; large corpora get more of them,
  # for a part has to fit into the memory of its worker.
  per_part = documents_per_part or min(16384, max(1, math.ceil(len(documents) / 64)))
  writer = _PartWriter(documents, tokenizer, str(path), per_part)
  job = {
    "format": FORMAT,
    "source": source,
    "tokenizer_fingerprint": tokenizer.fingerprint,
    "documents": len(documents),
    "documents_per_part": per_part,
  }

  # Resume only the same job. A complete store is not written again.
  _start_or_resume(path, job)
  if get_json(path, "manifest.json") is not None:
    print(f"{path} is complete already", file=sys.stderr)
    return TokenStore.open(path)

  # Write the parts that an earlier process did not complete.
  names = writer.names
  parts = {name: get_json(path, f"{name}.json") for name in names}
  pending = [index for index, name in enumerate(names) if parts[name] is None]
  entries = writer.run(pending, processes or os.cpu_count())
  for index, entry in _progress(entries, parts, len(documents)):
    parts[names[index]] = entry

  # The manifest comes last: with it, the store is complete.
  totals = {key: sum(entry[key] for entry in parts.values()) for key in ("tokens", "bytes")}
  if not totals["tokens"]:
    raise ValueError(f"no tokens in {len(documents):,} documents: nothing to train on")
  contents = {"dtype": writer.dtype.name, "tokenizer": tokenizer.to_json(), "parts": parts}
  put_json(path, "manifest.json", job | totals | contents)
  return TokenStore.open(path)


@dataclasses.dataclass(frozen=True)
class _PartWriter:
  """Tokenizes and writes any part of a store. Each worker process gets a copy."""

  documents: Sequence[str]
  tokenizer: Tokenizer
  path: str
  documents_per_part: int

  @property
  def names(self) -> list[str]:
    return list(map(part_name, range(math.ceil(len(self.documents) / self.documents_per_part))))

  @property
  def dtype(self) -> np.dtype:
    """Two bytes a token where the largest id fits, else four; little-endian."""
    return np.dtype("<u2" if self.tokenizer.vocab_size <= 1 << 16 else "<u4")

  def run(self, pending: list[int], processes: int) -> Iterator[tuple[int, dict]]:
    """Writes the parts, and yields (index, entry) as each is done."""
    # One process writes the parts itself: workers take seconds to start.
    n_workers = min(processes, len(pending))
    if n_workers <= 1:
      for index in pending:
        yield index, self.write(index)
      return

    # Not fork: the threads of TensorStore and JAX do not survive it.
    context = multiprocessing.get_context("spawn")
    children_before = set(multiprocessing.active_children())
    pool = concurrent.futures.ProcessPoolExecutor(n_workers, context, _start_worker, (self,))
    try:
      index_of = {pool.submit(_write_part, index): index for index in pending}
      for done in concurrent.futures.as_completed(index_of):
        yield index_of[done], done.result()
    except BrokenProcessPool as error:
      raise ValueError(
        f"a worker that wrote {self.path} died (out of memory?); "
        "the same command resumes, try fewer --processes"
      ) from error
    finally:
      # A pool waits for its workers to finish their parts. After an error or Ctrl-C, nobody should.
      for worker in set(multiprocessing.active_children()) - children_before:
        worker.terminate()
      pool.shutdown(cancel_futures=True)

  def write(self, index: int) -> dict:
    """Writes part `index`, then its .json, whose content is returned."""
    first = index * self.documents_per_part
    last = min(first + self.documents_per_part, len(self.documents))
    tokens, n_bytes = self._encode(range(first, last))

    name = part_name(index)
    write_array(self.path, name, tokens)

    # Only now is the part complete.
    entry = {
      "tokens": len(tokens),
      "documents": last - first,
      "bytes": n_bytes,
      "sha256": sha256(tokens.tobytes()),
    }
    put_json(self.path, f"{name}.json", entry)
    return entry

  def _encode(self, indices: range) -> tuple[np.ndarray, int]:
    """The tokens of some documents, and their length in bytes of UTF-8."""
    n_bytes = 0

    # The empty array is for documents without any token: a concatenation of nothing is an error.
    arrays = [np.empty(0, self.dtype)]
    for index in indices:
      for segment in _split_long_text(self.documents[index]):
        arrays.append(np.array(self.tokenizer.encode(segment), self.dtype))
        n_bytes += len(segment.encode())
      if self.tokenizer.eot is not None:
        arrays.append(np.array([self.tokenizer.eot], self.dtype))
    return np.concatenate(arrays), n_bytes


# The writer of a worker process: a pool sends it once, at the start, and not with every part.
_worker_writer: _PartWriter | None = None


def _start_worker(writer: _PartWriter) -> None:
  """Initializes a worker process, which ignores Ctrl-C, and ends when its parent ends."""
  global _worker_writer
  _worker_writer = writer

  # The terminal sends Ctrl-C to all processes. Only the parent acts on it, and ends its workers.
  signal.signal(signal.SIGINT, signal.SIG_IGN)
  threading.Thread(target=_exit_with_parent, daemon=True).start()


def _exit_with_parent() -> None:
  # Returns when the parent has ended in any way, SIGKILL too. What is half-written has no .json.
  multiprocessing.parent_process().join()
  os._exit(1)


def _write_part(index: int) -> dict:
  return _worker_writer.write(index)


def _progress(
  entries: Iterator[tuple[int, dict]], parts: dict[str, dict | None], total: int
) -> Iterator[tuple[int, dict]]:
  """Yields the entries under a progress bar over `total` documents, with tokens per second.

  The bar starts at the documents of the parts that exist. The speed counts only new ones.
  """
  initial = sum(entry["documents"] for entry in parts.values() if entry)
  tokens = 0
  begin = time.monotonic()

  with tqdm.tqdm(desc="tokenizing", unit=" documents", initial=initial, total=total) as bar:
    for index, entry in entries:
      tokens += entry["tokens"]
      bar.set_postfix_str(f"{tokens / (time.monotonic() - begin):,.0f} tokens/s", refresh=False)
      bar.update(entry["documents"])
      yield index, entry


def _split_long_text(text: str, size: int = 1 << 24, search: int = 1 << 16) -> Iterator[str]:
  """Cuts a long text into segments of at most `size` characters, which bounds memory.

  It cuts before the end of a line that is not blank. GPT-2's tokens always end there, so the ids
  are those of the uncut text. The last `search` characters of a segment are searched for such a
  place; a text that has none there is cut at `size`.
  """
  line_end = re.compile(r"(?<=\S)(?=\n)")
  start = 0
  while start < len(text):
    stop = start + size
    if stop < len(text):
      # The last place within reach, so that segments are long.
      for match in line_end.finditer(text, start + size - search, start + size):
        stop = match.end()
    yield text[start:stop]
    start = stop


def _start_or_resume(path: str, job: dict) -> None:
  """Writes job.json in a new folder. Raises ValueError if the folder has that of another job."""
  existing = get_json(path, "job.json")
  if existing is None:
    put_json(path, "job.json", job)
  elif existing != job:
    name, theirs, ours = _first_difference(existing, job)
    raise ValueError(
      f"{path} holds another job: its {name} is {theirs}, this one's {ours}; "
      "choose another --out, or remove it"
    )


def _first_difference(theirs: dict, ours: dict) -> tuple[str, str, str]:
  """The name of the first entry that differs, and its two values as JSON."""
  name = next(key for key in theirs | ours if theirs.get(key) != ours.get(key))
  their_value = theirs.get(name)
  our_value = ours.get(name)

  # Of two objects, such as the sources, the entry that differs says more than both in full.
  if isinstance(their_value, dict) and isinstance(our_value, dict):
    inner, *values = _first_difference(their_value, our_value)
    return f"{name}'s {inner}", *values
  return name, json.dumps(their_value), json.dumps(our_value)
