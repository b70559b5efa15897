# SPDX-License-Identifier: Apache-2.0
"""The stages that a config asks for, in their order. It pickles, so that workers get it whole."""

import dataclasses
import pathlib
from collections.abc import Iterator

from ml_collections import ConfigDict

from gpt2_jax.data.webtext.document import Document, Drop, Stage, run_stages
from gpt2_jax.data.webtext.domains import Domains, read_domains
from gpt2_jax.data.webtext.evaluation_overlap import EvaluationOverlap, build_evaluation_filter
from gpt2_jax.data.webtext.extract import Extract, check_extractor
from gpt2_jax.data.webtext.inputs import Shard, read_shard
from gpt2_jax.data.webtext.language import Language, check_model
from gpt2_jax.data.webtext.links import Linked
from gpt2_jax.data.webtext.near_duplicates import MinHash
from gpt2_jax.data.webtext.quality import C4Quality, FineWebQuality, GopherQuality, GopherRepetition
from gpt2_jax.data.webtext.redact import Redact
from gpt2_jax.data.webtext.repair import Repair
from gpt2_jax.data.webtext.tally import Tally
from gpt2_jax.evaluate.contamination import BloomFilter

READ, EXACT, NEAR = "read", "exact_duplicates", "near_duplicates"


@dataclasses.dataclass(frozen=True)
class Pipeline:
  """Stages before and after de-duplication. Without `minhash`, near duplicates stay."""

  before: tuple[Stage, ...]
  after: tuple[Stage, ...] = ()
  minhash: MinHash | None = dataclasses.field(default_factory=MinHash)
  max_bytes: int = 10_000_000  # of a page

  @property
  def stage_names(self) -> list[str]:
    """Every stage that counts documents, in its order."""
    duplicates = [EXACT, NEAR] if self.minhash else [EXACT]
    before = [stage.name for stage in self.before]
    return [READ, *before, *duplicates, *(stage.name for stage in self.after)]

  def map_shard(self, shard: Shard, tally: Tally) -> Iterator[Document]:
    """The documents of a shard that pass the stages before de-duplication."""
    for nbytes, result in read_shard(shard, self.max_bytes):
      tally.count(READ, nbytes, result)
      if isinstance(result, Drop):
        continue
      document = run_stages(result, self.before, tally)
      if document is not None:
        yield document


def build_pipeline(config: ConfigDict, work: pathlib.Path) -> Pipeline:
  """The pipeline of a config such as configs/webtext.py.

  Files that it names are read, and the filter of evaluation sets is written to `work`. Raises
  ValueError for a knob that cannot be, OSError for a file that is not there.
  """
  # 1. By URL, which costs nothing, before the main text is extracted: the documents that are left
  #    at the end are the same in any order.
  before = [Linked.read(config.links)] if config.links else []
  blocked = read_domains(config.domains.blocked) if config.domains.blocked else frozenset()
  before.append(Domains(config.domains.wikipedia, blocked))

  # 2. From the page to a text, and whether it is good enough.
  check_extractor(config.extract.extractor)
  for knob in ("seconds", "memory_mib"):
    if not config.extract[knob] > 0:
      raise ValueError(f"extract.{knob} is {config.extract[knob]}; it is above 0")
  before.append(
    Extract(config.extract.extractor, config.extract.seconds, config.extract.memory_mib << 20)
  )
  if config.repair:
    before.append(Repair())
  if config.language.keep:
    if config.language.model:
      check_model(config.language.model)
    before.append(
      Language(tuple(config.language.keep), config.language.model, config.language.min_score)
    )
  before += _quality_stages(config.quality)
  if config.redact.email or config.redact.ip:
    before.append(Redact(config.redact.email, config.redact.ip))

  # 3. Duplicates, and what evaluation sets have, too.
  minhash = _minhash(config) if config.near_duplicates.enabled else None
  return Pipeline(tuple(before), _after(config.contamination, work), minhash, config.max_bytes)


def _quality_stages(config: ConfigDict) -> list[Stage]:
  stages = []
  if config.gopher_quality:
    stages.append(GopherQuality())
  if config.gopher_repetition:
    stages.append(GopherRepetition())
  if config.c4:
    stages.append(C4Quality())
  if config.fineweb:
    stages.append(FineWebQuality())
  return stages


def _minhash(config: ConfigDict) -> MinHash:
  knobs = config.near_duplicates
  for name in ("ngram", "bands", "rows"):
    if knobs[name] < 1:
      raise ValueError(f"near_duplicates.{name} is {knobs[name]}; it is 1 or more")
  if not 0 < knobs.jaccard <= 1:
    raise ValueError(f"near_duplicates.jaccard is {knobs.jaccard}; it is above 0 and at most 1")
  return MinHash(knobs.ngram, knobs.bands, knobs.rows, knobs.jaccard, config.seed)


def _after(config: ConfigDict, work: pathlib.Path) -> tuple[Stage, ...]:
  if config.tasks and config.filter:
    raise ValueError("give one of contamination.tasks and contamination.filter")
  path = config.filter
  if config.tasks:
    path = str(work / "evaluation.bloom")
    build_evaluation_filter(config.tasks, config.data, config.ngram, path)
  if not path:
    return ()
  if config.min_ngrams < 1:
    raise ValueError(f"contamination.min_ngrams is {config.min_ngrams}; it is 1 or more")
  BloomFilter.load(path)  # a filter that cannot be read is known now, not after all documents
  return (EvaluationOverlap(path, config.min_ngrams, config.mark),)
