# SPDX-License-Identifier: Apache-2.0
"""Tokenizes a corpus into a token store, with several processes; resumes a job that was killed."""

import concurrent.futures
import contextlib
import dataclasses
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
from collections.abc import Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from typing import ClassVar

import numpy as np
import tqdm

from gpt2_jax.data.corpus import is_same_source
from gpt2_jax.data.skipped import BadRecord, Skipped
from gpt2_jax.data.token_store import (
  FORMAT,
  TokenStore,
  count_parts,
  documents_of_part,
  part_name,
  token_dtype,
)
from gpt2_jax.data.zarr_files import create_json, delete, get_json, put_json, write_array
from gpt2_jax.files import file_lock, first_line, sha256, user_path
from gpt2_jax.tokenizer import Tokenizer


def encode_corpus(
  documents: Sequence[str],
  tokenizer: Tokenizer,
  path: str,
  source: dict,
  processes: int | None = None,
  documents_per_part: int | None = None,
  strict: bool = False,
  skipped: Skipped | None = None,
  former_source: dict | None = None,
) -> TokenStore:
  """Tokenizes all documents, in order, each followed by the tokenizer's eot if it has one.

  Resumes a half-written store of the same job. A complete one is checked, and what is damaged in it
  is written again. `source` says in JSON what the documents are: two jobs are the same if it, the
  tokenizer and the parts are; `former_source` is what an older version said of them. Documents that
  cannot be read are skipped and counted, unless `strict`; `skipped` are those that are no documents
  here. Raises ValueError for a folder of another job, no tokens, a worker that died, or a disk that
  is full or read-only, and OSError if another process writes the store.
  """
  path = user_path(path)
  job = corpus_job(documents, tokenizer, source, documents_per_part)
  writer = PartWriter(documents, tokenizer, path, job, strict)
  return write_store(writer, processes or os.cpu_count(), skipped or Skipped(), former_source)


def corpus_job(
  documents: Sequence, tokenizer: Tokenizer, source: dict, documents_per_part: int | None = None
) -> dict:
  """What job.json says of a corpus."""
  # 64 parts keep all processes busy and lose little when killed; large corpora get more of them,
  # for a part has to fit into the memory of its worker.
  per_part = documents_per_part or min(16384, max(1, math.ceil(len(documents) / 64)))
  return {
    "format": FORMAT,
    "source": source,
    "tokenizer_fingerprint": tokenizer.fingerprint,
    "documents": len(documents),
    "documents_per_part": per_part,
  }


def write_store(
  writer: "PartWriter", processes: int, skipped: Skipped, former_source: dict | None
) -> TokenStore:
  """Writes the store of a job, or what is missing or damaged of it; errors are `encode_corpus`'s.

  Another job's folder is refused, and a complete store left as it is, before anything is written.
  """
  path = writer.path
  if writer.strict and skipped.count:
    raise BadRecord(f"{skipped.first}; without --strict it is skipped")
  _same_job(path, writer.job, former_source)
  store = _complete_store(writer, former_source)
  if store is None:
    with _lock(path):
      _write_missing(writer, processes, skipped, former_source)
    store = writer.store.open(path)
  if writer.strict and store.skipped.count:
    raise ValueError(f"{path} was written without --strict{store.skipped}; choose another --out")
  return store


def _lock(path: str) -> contextlib.AbstractContextManager:
  """Keeps other writers out of a local store; on gs:// there is no lock."""
  if "://" in path:
    return contextlib.nullcontext()
  busy = f"another process is writing {path}; wait until it has ended, or choose another --out"
  return file_lock(pathlib.Path(path, "lock"), busy)


def _complete_store(writer: "PartWriter", former_source: dict | None) -> TokenStore | None:
  """The store of that job, with every token checked; None if it is not complete, or damaged."""
  try:
    store = writer.store.open(writer.path)
    store.verify()
  except FileNotFoundError:
    return None
  except ValueError as error:
    print(f"{first_line(error)}: this is done now", file=sys.stderr)
    return None

  if not _is_same_job(store.manifest, writer.job, former_source):
    return None
  print(f"{writer.path} is complete already, and every checksum is right", file=sys.stderr)
  return store


def _write_missing(
  writer: "PartWriter", processes: int, skipped: Skipped, former_source: dict | None
) -> None:
  """Writes what is missing or damaged, and the manifest last. Nobody else writes this store."""
  # 1. The job. Of two processes that start one at this moment, one writes it, and both compare.
  path = writer.path
  parts = {name: None for name in writer.names}
  job = _same_job(path, writer.job, former_source)
  if job is None and create_json(path, "job.json", writer.job):
    job = writer.job
  else:
    # 2. It was there. Keep the parts whose tokens are there, too.
    job = _same_job(path, writer.job, former_source)
    if not _is_same_job(_read_or_none(path, "job.json"), job, None):
      put_json(path, "job.json", job)
    parts = _whole_parts(writer)

  # 3. Write the others. Nobody reads the store meanwhile: the manifest comes last.
  pending = [index for index, name in enumerate(parts) if parts[name] is None]
  if pending:
    delete(path, "manifest.json")
  entries = writer.run(pending, processes)
  for index, entry in _progress(entries, parts, job["documents"]):
    parts[part_name(index)] = entry

  totals = {key: sum(entry[key] for entry in parts.values()) for key in writer.store.TOTALS}
  for entry in parts.values():
    skipped += Skipped.from_json(entry.get("skipped"))
  if not totals["tokens"]:
    raise ValueError(f"no tokens in {job['documents']:,} documents: nothing to train on{skipped}")
  contents = {"dtype": writer.dtype.name, "tokenizer": writer.tokenizer.to_json(), "parts": parts}
  put_json(path, "manifest.json", job | totals | contents | {"skipped": skipped.to_json()})


def _whole_parts(writer: "PartWriter") -> dict[str, dict | None]:
  """What is said of each part; None for those that are not there, or whose tokens are others."""
  parts = {}
  for index, name in enumerate(writer.names):
    entry = _read_or_none(writer.path, f"{name}.json")
    is_whole = writer.store.is_entry(entry, writer.job, index)
    parts[name] = entry if is_whole else None

  written = {name: entry for name, entry in parts.items() if entry is not None}
  for name in writer.store.damaged_parts(writer.path, written, writer.dtype.name):
    parts[name] = None
  return parts


def _read_or_none(path: str, name: str) -> dict | None:
  """A JSON object of the store; None if it is gone or damaged, and has to be written again."""
  try:
    return get_json(path, name)
  except ValueError:
    return None


@dataclasses.dataclass(frozen=True)
class PartWriter:
  """Tokenizes and writes any part of a store. Each worker process gets a copy."""

  # What it writes.
  store: ClassVar[type[TokenStore]] = TokenStore

  documents: Sequence[str]
  tokenizer: Tokenizer
  path: str
  job: dict
  strict: bool

  @property
  def names(self) -> list[str]:
    return list(map(part_name, range(count_parts(self.job))))

  @property
  def dtype(self) -> np.dtype:
    return token_dtype(self.tokenizer.vocab_size)

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
    documents = documents_of_part(self.job, index)
    tokens, n_bytes, skipped = self._encode(documents)

    # From here until the tokens are there, nothing says that they are.
    name = part_name(index)
    delete(self.path, f"{name}.json")
    write_array(self.path, name, tokens)

    # Only now is the part complete.
    entry = {
      "tokens": len(tokens),
      "documents": len(documents),
      "bytes": n_bytes,
      "sha256": sha256(tokens.tobytes()),
    }
    if skipped.count:
      entry["skipped"] = skipped.to_json()
    put_json(self.path, f"{name}.json", entry)
    return entry

  def _encode(self, indices: range) -> tuple[np.ndarray, int, Skipped]:
    """The tokens of some documents, their length in bytes of UTF-8, and what was skipped."""
    n_bytes = 0
    skipped = Skipped()

    # The empty array is for documents without any token: a concatenation of nothing is an error.
    arrays = [np.empty(0, self.dtype)]
    for index in indices:
      try:
        document, n_document_bytes = self._encode_document(index)
      except BadRecord as error:
        # One that cannot be read is none: it gets no eot, either.
        if self.strict:
          raise
        skipped += Skipped(1, first_line(error))
        continue
      arrays += document
      n_bytes += n_document_bytes
    return np.concatenate(arrays), n_bytes, skipped

  def _encode_document(self, index: int) -> tuple[list[np.ndarray], int]:
    """The tokens of a document in pieces, and its bytes. Raises BadRecord if it is no text."""
    arrays = []
    n_bytes = 0
    for segment in _split_long_text(self.documents[index]):
      try:
        n_bytes += len(segment.encode())
      except UnicodeEncodeError as error:
        raise BadRecord(f"document {index:,} has a lone surrogate: no UTF-8 writes it") from error
      try:
        arrays.append(np.array(self.tokenizer.encode(segment), self.dtype))
      except (ValueError, OverflowError) as error:
        # An id past the vocabulary, which some foreign tokenizers have, overflows.
        raise ValueError(f"document {index:,} of the corpus: {first_line(error)}") from error

    if self.tokenizer.eot is not None:
      arrays.append(np.array([self.tokenizer.eot], self.dtype))
    return arrays, n_bytes


# The writer of a worker process: a pool sends it once, at the start, and not with every part.
_worker_writer: PartWriter | None = None


def _start_worker(writer: PartWriter) -> None:
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


def _same_job(path: str, job: dict, former_source: dict | None) -> dict | None:
  """The job that a folder holds, as it stands there; None if there is none.

  The manifest tells it where job.json is gone or damaged. Raises ValueError for another job.
  """
  others = []
  for name in ("job.json", "manifest.json"):
    existing = _read_or_none(path, name)
    if existing is not None and _is_same_job(existing, job, former_source):
      return {key: existing[key] for key in job}
    if existing is not None:
      others.append(existing)

  if others:
    name, theirs, ours = _first_difference({key: others[0].get(key) for key in job}, job)
    raise ValueError(
      f"{path} holds another job: its {name} is {theirs}, this one's {ours}; "
      "choose another --out, or remove it"
    )
  try:
    return get_json(path, "job.json")
  except ValueError as error:
    raise ValueError(
      f"{first_line(error)}; nothing else tells what is in that folder: choose another --out, "
      "or remove it"
    ) from error


def _is_same_job(existing: dict | None, job: dict, former_source: dict | None) -> bool:
  """Whether a job.json or a manifest is of `job`, by whatever patterns its files were named."""
  if existing is None or not is_same_source(existing.get("source"), job["source"], former_source):
    return False
  return all(existing.get(key) == value for key, value in job.items() if key != "source")


def _first_difference(theirs: dict, ours: dict) -> tuple[str, str, str]:
  """The name of the first entry that differs, and its two values as JSON."""
  name = next(key for key in ours | theirs if theirs.get(key) != ours.get(key))
  their_value = theirs.get(name)
  our_value = ours.get(name)

  # Of two objects, such as the sources, the entry that differs says more than both in full.
  if isinstance(their_value, dict) and isinstance(our_value, dict):
    inner, *values = _first_difference(their_value, our_value)
    return f"{name}'s {inner[:40]}", *values
  return name, json.dumps(their_value)[:80], json.dumps(our_value)[:80]
