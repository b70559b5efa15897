# SPDX-License-Identifier: Apache-2.0
"""The pipeline as a plain loop on one machine, in a folder from which a killed job resumes.

1. Each shard goes through the stages before de-duplication: mapped/KEY.jsonl has its documents, and
   KEY.npy for each the place of its line, its content hash and its band keys.
2. Keys are grouped on disk (spill.py), and texts are read for candidate pairs only.
3. What is left goes through the other stages into kept.jsonl.

Nothing grows with the corpus but one byte a document, and what near duplicates take (about 260
bytes for each document that has one).
"""

import bisect
import collections
import concurrent.futures
import dataclasses
import functools
import itertools
import json
import multiprocessing
import pathlib
import shutil
from collections.abc import Iterator, Sequence

import numpy as np

from gpt2_jax.data.webtext.document import Document, drop, run_stages
from gpt2_jax.data.webtext.inputs import Shard
from gpt2_jax.data.webtext.near_duplicates import MinHash, join_similar
from gpt2_jax.data.webtext.pipeline import EXACT, NEAR, Pipeline
from gpt2_jax.data.webtext.spill import RECORD, group_by_key
from gpt2_jax.data.webtext.tally import Tally
from gpt2_jax.files import atomic_write, progress, read_json_object

# Documents whose n-grams are kept while their candidate pairs are compared.
CACHED = 256
# Shards whose keys are mapped at a time.
OPEN_SHARDS = 64


@dataclasses.dataclass(frozen=True)
class Result:
  """What a runner leaves: the kept documents as files of JSON lines, the counts, the clusters.

  `clusters` counts the groups of near duplicates by their size.
  """

  paths: list[pathlib.Path]
  tally: Tally
  clusters: dict[int, int]

  def documents(self) -> Iterator[Document]:
    for path in self.paths:
      with open(path, encoding="utf-8") as file:
        for line in file:
          yield Document(**json.loads(line))


def run_plain(
  pipeline: Pipeline, shards: Sequence[Shard], work: pathlib.Path, processes: int = 1
) -> Result:
  """Runs the pipeline. `work` keeps what is done, for a rerun with the same arguments."""
  mapped = work / "mapped"
  map_one = functools.partial(map_shard, pipeline, mapped)
  if processes == 1:
    for shard in progress(shards, "reading", " shards"):
      map_one(shard)
  else:
    context = multiprocessing.get_context("forkserver")
    with concurrent.futures.ProcessPoolExecutor(processes, context) as pool:
      jobs = [pool.submit(map_one, shard) for shard in shards]
      for job in progress(concurrent.futures.as_completed(jobs), "reading", " shards"):
        job.result()

  tally = Tally()
  for shard in shards:
    tally.add(Tally.from_json(read_json_object(mapped / f"{shard.key}.json")))
  documents = MappedDocuments(mapped, shards)
  reasons, clusters = find_duplicates(documents, pipeline.minhash, work / "spill")

  kept = work / "kept.jsonl"
  with atomic_write(kept, overwrite=True) as partial, open(partial, "w", encoding="utf-8") as file:
    for document, reason in zip(progress(documents, "writing"), reasons, strict=True):
      document = _finish(document, int(reason), pipeline, tally)
      if document is not None:
        file.write(json.dumps(document.to_json()) + "\n")
  return Result([kept], tally.sorted(pipeline.stage_names), clusters)


def map_shard(pipeline: Pipeline, folder: pathlib.Path, shard: Shard) -> None:
  """Writes the documents of a shard, their keys and counts, unless they are there."""
  counts = folder / f"{shard.key}.json"
  if counts.exists():
    return
  tally = Tally()
  rows = []
  bands = pipeline.minhash.bands if pipeline.minhash else 0
  with (
    atomic_write(folder / f"{shard.key}.jsonl", overwrite=True) as partial,
    open(partial, "wb") as file,
  ):
    for document in pipeline.map_shard(shard, tally):
      # A text that is too short for an n-gram has no keys; it stands there once with a zero each.
      row = np.zeros(2 + bands, np.uint64)
      row[:2] = file.tell(), int(document.id[:16], 16)
      if pipeline.minhash and len(keys_B := pipeline.minhash.band_keys(document.text)):
        row[2:] = keys_B
      rows.append(row)
      file.write(json.dumps(document.to_json()).encode() + b"\n")

  with atomic_write(folder / f"{shard.key}.npy", overwrite=True) as partial:
    np.save(partial, np.array(rows, np.uint64).reshape(-1, 2 + bands))
  # The counts come last: with them, the shard is done.
  with atomic_write(counts, overwrite=True) as partial:
    partial.write_text(json.dumps(tally.to_json()))


class MappedDocuments(Sequence):
  """The mapped documents of all shards, random access."""

  def __init__(self, folder: pathlib.Path, shards: Sequence[Shard]):
    self._texts = [folder / f"{shard.key}.jsonl" for shard in shards]
    paths = [folder / f"{shard.key}.npy" for shard in shards]
    # A mapped array holds a file descriptor, of which a process has 1,024.
    self._keys = functools.lru_cache(OPEN_SHARDS)(lambda i: np.load(paths[i], mmap_mode="r"))
    lengths = (len(self._keys(i)) for i in range(len(paths)))
    self._starts = [0, *itertools.accumulate(lengths)]

  def __len__(self) -> int:
    return self._starts[-1]

  def __getitem__(self, i: int) -> Document:
    shard, row = self._place(i)
    with open(self._texts[shard], "rb") as file:
      file.seek(int(self._keys(shard)[row, 0]))
      return Document(**json.loads(file.readline()))

  def content_hash(self, i: int) -> int:
    """The first 64 bits of a document's id, for which its text is not read."""
    shard, row = self._place(i)
    return int(self._keys(shard)[row, 1])

  def _place(self, i: int) -> tuple[int, int]:
    shard = bisect.bisect_right(self._starts, i) - 1
    return shard, i - self._starts[shard]

  def __iter__(self) -> Iterator[Document]:
    for path in self._texts:
      with open(path, "rb") as file:
        for line in file:
          yield Document(**json.loads(line))

  def records(self, column: slice, dropped: np.ndarray) -> Iterator[np.ndarray]:
    """Records of the keys in a column, of documents that are not dropped, for `group_by_key`."""
    for shard in range(len(self._texts)):
      start, keys = self._starts[shard], self._keys(shard)
      rows = np.flatnonzero(dropped[start : start + len(keys)] == 0)
      columns = keys[rows, column]
      records = np.empty(columns.size, RECORD)
      records["key"] = columns.ravel()
      records["position"] = np.repeat(rows + start, columns.shape[1])
      yield records[records["key"] != 0]


# What is to happen to a document.
_KEPT, _EXACT_DUPLICATE, _NEAR_DUPLICATE = range(3)


def find_duplicates(
  documents: MappedDocuments, minhash: MinHash | None, folder: pathlib.Path
) -> tuple[np.ndarray, dict[int, int]]:
  """What is to happen to each document, uint8, and the clusters of near duplicates by size."""
  shutil.rmtree(folder, ignore_errors=True)
  reasons = np.full(len(documents), _KEPT, np.uint8)

  # 1. Exact duplicates: of one text the smallest URL stays. Its hash has more bits than the key.
  for group in group_by_key(documents.records(slice(1, 2), reasons), folder):
    ordered = sorted((documents[i].id, documents[i].url, i) for i in group.tolist())
    for (previous, *_), (text_id, _, i) in itertools.pairwise(ordered):
      if text_id == previous:
        reasons[i] = _EXACT_DUPLICATE
  if minhash is None:
    return reasons, {}

  # 2. Near duplicates. The content hash comes first, so that the smallest document of a cluster is
  #    the same whatever the positions. No text is read before two documents are compared.
  def groups() -> Iterator[list[tuple[int, int]]]:
    for group in group_by_key(documents.records(slice(2, None), reasons), folder):
      yield [(documents.content_hash(i), i) for i in group.tolist()]

  @functools.lru_cache(maxsize=CACHED)
  def shingles(node: tuple[int, int]) -> np.ndarray:
    return minhash.shingles(documents[node[1]].text)

  components = join_similar(groups(), shingles, minhash.jaccard)
  clusters = components.clusters()
  for members in clusters.values():
    for _, i in members[1:]:
      reasons[i] = _NEAR_DUPLICATE
  return reasons, count_sizes(clusters.values())


def count_sizes(clusters: Iterator[Sequence]) -> dict[int, int]:
  """How many clusters there are of each size, by size."""
  return dict(sorted(collections.Counter(map(len, clusters)).items()))


def _finish(document: Document, reason: int, pipeline: Pipeline, tally: Tally) -> Document | None:
  """Counts what de-duplication says of a document, and runs the stages after it."""
  nbytes = document.nbytes
  if reason == _EXACT_DUPLICATE:
    tally.count(EXACT, nbytes, drop("exact_duplicate", document))
    return None
  tally.count(EXACT, nbytes, document)
  if pipeline.minhash is None:
    return run_stages(document, pipeline.after, tally)

  if reason == _NEAR_DUPLICATE:
    tally.count(NEAR, nbytes, drop("near_duplicate", document))
    return None
  tally.count(NEAR, nbytes, document)
  return run_stages(document, pipeline.after, tally)
