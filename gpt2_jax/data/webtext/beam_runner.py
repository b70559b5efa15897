# SPDX-License-Identifier: Apache-2.0
"""The pipeline on Apache Beam: its DirectRunner here, Dataflow, Flink or Spark elsewhere.

What it keeps and counts equals what the plain loop does. Duplicates are found by shuffles: on the
content hash, then on band keys. Texts are joined for candidate pairs only, and only verified pairs
of ids reach the one worker that finds connected components.
"""

import itertools
import json
import pathlib
import shutil
from collections.abc import Iterable, Iterator, Sequence

import apache_beam as beam
import numpy as np
from apache_beam.options.pipeline_options import PipelineOptions

from gpt2_jax.data.webtext.document import Document, drop, run_stages
from gpt2_jax.data.webtext.inputs import Shard
from gpt2_jax.data.webtext.near_duplicates import Components, MinHash, jaccard
from gpt2_jax.data.webtext.pipeline import EXACT, NEAR, Pipeline
from gpt2_jax.data.webtext.plain_runner import Result, count_sizes
from gpt2_jax.data.webtext.tally import Tally

TALLY = "tally"


class _MapShard(beam.DoFn):
  """Reads a shard and runs the stages before de-duplication."""

  def __init__(self, pipeline: Pipeline):
    self._pipeline = pipeline

  def process(self, shard: Shard):
    tally = Tally()
    yield from self._pipeline.map_shard(shard, tally)
    yield beam.pvalue.TaggedOutput(TALLY, tally)


class _DropExact(beam.DoFn):
  """Of the documents with one content hash, the one with the smallest URL stays."""

  def process(self, group: tuple[str, Iterable[Document]]):
    tally = Tally()
    documents = sorted(group[1], key=lambda document: document.url)
    for document in documents[1:]:
      tally.count(EXACT, document.nbytes, drop("exact_duplicate", document))
    tally.count(EXACT, documents[0].nbytes, documents[0])
    yield documents[0]
    yield beam.pvalue.TaggedOutput(TALLY, tally)


class _DropNear(beam.DoFn):
  """Joins a document with its mark, if it is a near duplicate that does not survive."""

  def process(self, group: tuple[str, dict[str, Iterable]]):
    tally = Tally()
    (document,) = group[1]["document"]
    is_dropped = any(True for _ in group[1]["dropped"])
    result = drop("near_duplicate", document) if is_dropped else document
    tally.count(NEAR, document.nbytes, result)
    if result is document:
      yield document
    yield beam.pvalue.TaggedOutput(TALLY, tally)


class _Finish(beam.DoFn):
  """The stages after de-duplication."""

  def __init__(self, pipeline: Pipeline):
    self._pipeline = pipeline

  def process(self, document: Document):
    tally = Tally()
    document = run_stages(document, self._pipeline.after, tally)
    if document is not None:
      yield json.dumps(document.to_json())
    yield beam.pvalue.TaggedOutput(TALLY, tally)


class _AddTallies(beam.CombineFn):
  def create_accumulator(self):
    return Tally()

  def add_input(self, accumulator, tally):
    return accumulator.add(tally)

  def merge_accumulators(self, accumulators):
    total = Tally()
    for tally in accumulators:
      total.add(tally)
    return total

  def extract_output(self, accumulator):
    return accumulator


def run_beam(
  pipeline: Pipeline, shards: Sequence[Shard], work: pathlib.Path, options: Sequence[str] = ()
) -> Result:
  """Runs the pipeline on Beam; `options` are Beam's flags, such as --runner=FlinkRunner.

  What a killed job left in `work` is removed: Beam gives files their names at the end of a step.
  """
  folder = work / "beam"
  shutil.rmtree(folder, ignore_errors=True)
  folder.mkdir(parents=True)

  with beam.Pipeline(options=PipelineOptions(list(options))) as p:
    shards_P = p | beam.Create(shards) | beam.Reshuffle()
    mapped = shards_P | "read" >> _with_tally(_MapShard(pipeline))
    keyed = mapped.documents | "by text" >> beam.Map(lambda document: (document.id, document))
    exact = keyed | beam.GroupByKey() | EXACT >> _with_tally(_DropExact())
    tallies = [mapped[TALLY], exact[TALLY]]
    documents = exact.documents

    if pipeline.minhash:
      near = _drop_near(documents, pipeline.minhash, folder)
      tallies.append(near[TALLY])
      documents = near.documents
    finished = documents | "finish" >> _with_tally(_Finish(pipeline))
    tallies.append(finished[TALLY])

    _write(finished.documents, folder / "kept")
    total = tallies | beam.Flatten() | beam.CombineGlobally(_AddTallies())
    _write(total | "tally" >> beam.Map(lambda tally: json.dumps(tally.to_json())), folder / TALLY)

  tally = Tally.from_json(_read_json(folder, TALLY))
  sizes = _read_json(folder, "clusters") if pipeline.minhash else {}
  clusters = {int(size): count for size, count in sizes.items()}
  return Result(sorted(folder.glob("kept*")), tally.sorted(pipeline.stage_names), clusters)


def _drop_near(documents, minhash: MinHash, folder: pathlib.Path):
  """Near duplicates out, as output `documents`, with their tallies."""
  by_id = documents | "by id" >> beam.Map(lambda document: (document.id, document))

  # 1. Documents that share a band are candidate pairs, each once.
  pairs = (
    by_id
    | "bands" >> beam.FlatMap(_band_keys, minhash)
    | "by band" >> beam.GroupByKey()
    | "pairs" >> beam.FlatMap(lambda group: itertools.combinations(sorted(group[1]), 2))
    | beam.Distinct()
  )

  # 2. Join the text of the first document to each pair, then that of the second, and compare.
  texts = ({"document": by_id, "other": pairs}) | "first" >> beam.CoGroupByKey()
  halves = texts | "swap" >> beam.FlatMap(_join_first)
  both = ({"document": by_id, "other": halves}) | "second" >> beam.CoGroupByKey()
  edges = both | "verify" >> beam.FlatMap(_verify, minhash)

  # 3. Connected components, on one worker.
  clusters = (
    edges
    | beam.combiners.ToList()
    | "components" >> beam.Map(lambda edges: list(Components(edges).clusters().values()))
  )
  sizes = clusters | "sizes" >> beam.Map(lambda groups: json.dumps(count_sizes(groups)))
  _write(sizes, folder / "clusters")
  dropped = clusters | "dropped" >> beam.FlatMap(_all_but_smallest)
  marked = ({"document": by_id, "dropped": dropped}) | "mark" >> beam.CoGroupByKey()
  return marked | NEAR >> _with_tally(_DropNear())


def _band_keys(keyed: tuple[str, Document], minhash: MinHash) -> Iterator[tuple[int, str]]:
  text_id, document = keyed
  # Beam's integers are signed.
  for key in minhash.band_keys(document.text).view(np.int64).tolist():
    yield key, text_id


def _join_first(group: tuple[str, dict[str, Iterable]]) -> Iterator[tuple[str, tuple[str, str]]]:
  """For a pair (a, b): (b, (a, the text of a))."""
  text_id, joined = group
  for other in joined["other"]:
    (document,) = joined["document"]
    yield other, (text_id, document.text)


def _verify(group: tuple[str, dict[str, Iterable]], minhash: MinHash) -> Iterator[tuple[str, str]]:
  """The pairs of a document whose exact Jaccard similarity is high enough."""
  text_id, joined = group
  shingles = None
  for other, text in joined["other"]:
    if shingles is None:
      (document,) = joined["document"]
      shingles = minhash.shingles(document.text)
    if jaccard(shingles, minhash.shingles(text)) >= minhash.jaccard:
      yield other, text_id


def _all_but_smallest(clusters: list[list[str]]) -> Iterator[tuple[str, bool]]:
  for members in clusters:
    for text_id in members[1:]:
      yield text_id, True


def _with_tally(do_fn: beam.DoFn) -> beam.PTransform:
  return beam.ParDo(do_fn).with_outputs(TALLY, main="documents")


def _write(lines, path: pathlib.Path) -> None:
  name = f"write {path.name}"
  lines | name >> beam.io.WriteToText(str(path), file_name_suffix=".jsonl")


def _read_json(folder: pathlib.Path, name: str) -> dict:
  (path,) = folder.glob(f"{name}*")
  return json.loads(path.read_text())
