# SPDX-License-Identifier: Apache-2.0
"""A dry run: a sample of the inputs goes through the stages, and their rates are multiplied.

The clock of each stage is read on one core, so the machine has to be quiet. What is left out: the
crawl, the start of workers, shuffles and the disk, and the pairs that de-duplication compares.
"""

import dataclasses
import itertools
import time
from collections.abc import Sequence

from gpt2_jax.data.webtext.document import Drop
from gpt2_jax.data.webtext.inputs import Shard, read_shard
from gpt2_jax.data.webtext.pipeline import NEAR, READ, Pipeline
from gpt2_jax.files import progress


@dataclasses.dataclass
class StageRate:
  """What a stage took for the documents of a sample that reached it."""

  documents: int = 0
  bytes: int = 0
  kept: int = 0
  seconds: float = 0.0


def measure_stages(
  pipeline: Pipeline, shards: Sequence[Shard], sample: int
) -> dict[str, StageRate]:
  """Runs the first `sample` documents through the stages, and reads the clock of each.

  Raises ValueError for inputs without a document.
  """
  inputs = itertools.chain.from_iterable(read_shard(shard, pipeline.max_bytes) for shard in shards)
  inputs = itertools.islice(inputs, sample)
  rates = new_rates(pipeline)

  start = time.perf_counter()
  for number, (nbytes, document) in enumerate(progress(inputs, "measuring", " documents")):
    _count(rates[READ], nbytes, document, time.perf_counter() - start)

    # Once more for the first: processes start with it, and models are loaded.
    if number == 0:
      run_timed(pipeline, document, new_rates(pipeline))
    run_timed(pipeline, document, rates)
    start = time.perf_counter()

  if not rates[READ].documents:
    raise ValueError("the inputs have no document to measure")
  return rates


def new_rates(pipeline: Pipeline) -> dict[str, StageRate]:
  """A rate for each stage that has a clock, in their order."""
  before = [stage.name for stage in pipeline.before]
  near = [NEAR] if pipeline.minhash else []
  after = [stage.name for stage in pipeline.after]
  return {name: StageRate() for name in (READ, *before, *near, *after)}


def run_timed(pipeline: Pipeline, document, rates: dict[str, StageRate]) -> None:
  """Runs the stages until one drops the document. Of de-duplication the signature takes time."""
  signature = [pipeline.minhash] if pipeline.minhash else []
  for stage in (*pipeline.before, *signature, *pipeline.after):
    if isinstance(document, Drop):
      return
    before, nbytes = time.perf_counter(), document.nbytes
    if stage is pipeline.minhash:
      stage.band_keys(document.text)
      name = NEAR
    else:
      document = stage(document)
      name = stage.name
    _count(rates[name], nbytes, document, time.perf_counter() - before)


def _count(rate: StageRate, nbytes: int, result, seconds: float) -> None:
  rate.documents += 1
  rate.bytes += nbytes
  rate.kept += not isinstance(result, Drop)
  rate.seconds += seconds


def estimate_table(
  rates: dict[str, StageRate], terabytes: float, machines: int, cores: int, usd: float | None
) -> str:
  """Rates on one core, and what so many terabytes of pages (not compressed) take of machines."""
  # 1. The documents of the input, and the share of them that reaches a stage.
  total = rates[READ]
  factor = terabytes * 1e12 / max(total.bytes, 1)
  lines = [f"{'stage':20} {'documents/s':>11} {'MB/s':>8} {'reach it':>9} {'core hours':>11}"]
  core_hours = 0.0
  for name, rate in rates.items():
    hours = rate.seconds * factor / 3600
    core_hours += hours
    seconds = max(rate.seconds, 1e-9)
    lines.append(
      f"{name:20} {rate.documents / seconds:11,.0f} {rate.bytes / seconds / 1e6:8.1f} "
      f"{rate.documents / total.documents:9.1%} {hours:11,.1f}"
    )

  # 2. The whole.
  last = rates[list(rates)[-1]]
  hours = core_hours / (machines * cores)
  price = "" if usd is None else f", {usd * core_hours:,.0f} USD at {usd:g} a core hour"
  lines += [
    "",
    f"{terabytes:g} TB of pages, {total.documents * factor:,.0f} of them by the mean of "
    f"{total.documents:,} measured; {last.kept / total.documents:.1%} are left, duplicates among "
    f"them",
    f"{core_hours:,.0f} core hours: {hours:,.1f} hours on {machines:,} machines of {cores:,} cores"
    f"{price}",
    "An estimate from this machine's rates. Left out: the crawl, the start of workers, shuffles, "
    "the disk.",
  ]
  return "\n".join(lines)
