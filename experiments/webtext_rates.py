# SPDX-License-Identifier: Apache-2.0
"""Rates of WebText's stages on one core, beside datatrove's, and what they make of WebText's size.

  python experiments/webtext_rates.py --data=$GPT2_JAX_TEST_DATA

CPU time of this process (extraction is called in it), the two implementations in turn on the same
texts: pages' main texts and WikiText. Another load on the machine changes it less than the clock.
"""

import gzip
import json
import pathlib
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterable

from absl import flags

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

from gpt2_jax.cli import shell
from gpt2_jax.data.webtext import extraction_process, language, quality, redact, repair
from gpt2_jax.data.webtext.document import Document
from gpt2_jax.data.webtext.inputs import list_shards
from gpt2_jax.data.webtext.near_duplicates import MinHash
from gpt2_jax.data.webtext.pipeline import Pipeline
from gpt2_jax.data.webtext.plain_runner import MappedDocuments, find_duplicates, map_shard

_DATA = flags.DEFINE_string("data", None, "The folder of the test data.", required=True)
_ROUNDS = flags.DEFINE_integer("rounds", 3, "How often both are run; the fastest counts.")

# WebText: links, documents and bytes of text (GPT-2 paper, section 2.1).
LINKS, DOCUMENTS, TEXT_BYTES = 45_000_000, 8_000_000, 40e9
# Bytes of a page: the mean of the benchmark's 121. Share of the links whose page still answers: a
# guess, of which the extraction's hours are proportional.
ALIVE = 0.8


def main() -> None:
  pages, texts = read_texts(pathlib.Path(_DATA.value))
  megabytes = sum(len(text.encode()) for text in texts) / 1e6
  print(f"{len(pages)} pages, {len(texts):,} texts of {megabytes:.2f} MB")

  seconds = {}
  for name, ours, theirs in stages():
    items = pages if name.startswith("extract") else texts
    mine, other = alternate(ours, theirs, items, _ROUNDS.value)
    size = sum(len(item) for item in items) / 1e6
    ratio = f", datatrove {len(items) / other:,.0f}/s: {other / mine:.2f} x" if theirs else ""
    print(f"{name:18} {len(items) / mine:8,.0f} /s {size / mine:8.2f} MB/s{ratio}", flush=True)
    seconds[name] = mine / len(items)
  print_deduplication(texts, _ROUNDS.value)
  print_estimate(seconds, texts)


def read_texts(data: pathlib.Path) -> tuple[list[bytes], list[str]]:
  truth = json.loads((data / "web_pages/ground_truth.json").read_text())
  pages = [
    gzip.decompress((data / f"web_pages/html/{name}.html.gz").read_bytes()) for name in truth
  ]
  wiki = (data / "wikitext2/wiki.test.tokens").read_text(encoding="utf-8")
  articles = [part for part in re.split(r"\n (?== [^=])", wiki) if len(part) > 500]
  return pages, [*(fields["articleBody"] for fields in truth.values()), *articles]


def stages() -> Iterable[tuple[str, Callable, Callable | None]]:
  """Name, our function of a text (or page), and datatrove's where it has the stage."""
  from datatrove.data import Document as TheirDocument
  from datatrove.pipeline import filters
  from datatrove.pipeline.formatters import PIIFormatter
  from datatrove.utils.text import split_into_parts

  yield "extract precise", lambda page: extraction_process.extract_main_text(page, "precise"), None
  yield "extract fast", lambda page: extraction_process.extract_main_text(page, "fast"), None
  yield "repair", by_document(repair.Repair()), None
  yield "language", by_document(language.Language()), None

  for stage, theirs in (
    (quality.GopherQuality(), filters.GopherQualityFilter()),
    (quality.GopherRepetition(), filters.GopherRepetitionFilter()),
    (quality.C4Quality(), filters.C4QualityFilter()),
    (quality.FineWebQuality(), filters.FineWebQualityFilter()),
  ):

    def ours(text: str, stage=stage) -> None:
      # Neither may know the words of the text from before.
      quality.split_words.cache_clear()
      stage(Document(text=text))

    def other(text: str, theirs=theirs) -> None:
      split_into_parts.cache_clear()
      theirs.filter(TheirDocument(text, "id"))

    yield stage.name, ours, other
  yield "redact", by_document(redact.Redact()), PIIFormatter().format

  signature = their_signature(tempfile.gettempdir())  # it writes nothing here
  minhash = MinHash()
  yield (
    "minhash",
    minhash.band_keys,
    lambda text: signature.get_signature(signature.get_shingles(text)),
  )


def their_signature(folder: str):
  """datatrove's first step of de-duplication."""
  import xxhash
  from datatrove.pipeline.dedup.minhash import MinhashDedupSignature

  # Newer versions of xxhash want bytes, and datatrove gives it text.
  signature = MinhashDedupSignature(folder)
  signature._hash_func = lambda text: xxhash.xxh64_intdigest(text.encode())
  return signature


def print_deduplication(texts: list[str], rounds: int) -> None:
  """CPU seconds from texts to what is dropped. Only our groups are compared text by text."""
  documents = plant_duplicates(texts)
  runs = {our_deduplication: [], their_deduplication: []}
  for _ in range(rounds):
    for deduplicate, times in runs.items():
      with tempfile.TemporaryDirectory() as folder:
        times.append(deduplicate(documents, pathlib.Path(folder)))

  mine, other = (min(times, key=lambda run: sum(run[:2])) for times in runs.values())
  print(f"de-duplication of {len(documents):,} texts, CPU seconds:")
  for name, a, b in zip(("signatures", "groups"), mine, other, strict=False):
    print(f"{name:18} {a:8.2f}, datatrove {b:.2f}: {b / a:.2f} x")
  a, b = (sum(run[:2]) for run in (mine, other))
  print(f"{'both':18} {a:8.2f}, datatrove {b:.2f}: {b / a:.2f} x")
  print(f"{'dropped':18} {mine[2]:8,}, datatrove {other[2]:,}")


def plant_duplicates(texts: list[str]) -> list[str]:
  """Pieces of 100 words; after every fourth, the piece before it with one word changed."""
  documents = []
  for text in texts:
    words = text.split()
    for start in range(0, len(words) - 100, 100):
      piece = words[start : start + 100]
      documents.append(" ".join(piece))
      if len(documents) % 5 == 4:
        documents.append(" ".join(["changed", *piece[1:]]))
  return documents


def our_deduplication(texts: list[str], folder: pathlib.Path) -> tuple[float, float, int]:
  source = folder / "texts.jsonl"
  source.write_text("".join(json.dumps({"url": "", "text": text}) + "\n" for text in texts))
  shards = list_shards(str(source))
  pipeline = Pipeline(before=())

  start = time.process_time()
  for shard in shards:
    map_shard(pipeline, folder / "mapped", shard)
  mapped = time.process_time()
  documents = MappedDocuments(folder / "mapped", shards)
  reasons, _ = find_duplicates(documents, pipeline.minhash, folder / "spill")
  return mapped - start, time.process_time() - mapped, int((reasons > 0).sum())


def their_deduplication(texts: list[str], folder: pathlib.Path) -> tuple[float, float, int]:
  from datatrove.data import Document as TheirDocument
  from datatrove.pipeline.dedup.minhash import MinhashDedupBuckets, MinhashDedupCluster
  from datatrove.utils.logging import logger

  logger.remove()
  signatures, buckets, removed = (str(folder / name) for name in ("signatures", "buckets", "out"))
  start = time.process_time()
  their_signature(signatures).run(TheirDocument(text, "id") for text in texts)
  signed = time.process_time()
  bands = MinHash().bands
  for i in range(bands):
    # By default it reads five records at a time from the disk.
    MinhashDedupBuckets(signatures, buckets, lines_to_buffer=1000).run(None, i, bands)
  MinhashDedupCluster(buckets, removed).run()
  end = time.process_time()
  nbytes = sum(path.stat().st_size for path in pathlib.Path(removed).iterdir())
  return signed - start, end - signed, nbytes // 4


def by_document(stage: Callable) -> Callable[[str], object]:
  return lambda text: stage(Document(text=text))


def alternate(ours: Callable, theirs: Callable | None, items: list, rounds: int):
  """CPU seconds of both over all items: the fastest of the rounds, in turn."""
  best = [float("inf"), float("inf")]
  # What is loaded at the first call is no part of a rate.
  for function in filter(None, (ours, theirs)):
    function(items[0])
  for _ in range(rounds):
    for i, function in enumerate((ours, theirs)):
      if function is not None:
        start = time.process_time()
        for item in items:
          function(item)
        best[i] = min(best[i], time.process_time() - start)
  return best


def print_estimate(seconds: dict[str, float], texts: list[str]) -> None:
  """Core hours for WebText's own size; the time of a text stage grows with its bytes."""
  scale = TEXT_BYTES / DOCUMENTS / (sum(len(text.encode()) for text in texts) / len(texts))
  pages = LINKS * ALIVE
  extraction = pages * seconds["extract precise"]
  text_stages = ("repair", "language", "gopher_quality", "minhash")
  rest = pages * scale * sum(seconds[name] for name in text_stages)
  print(
    f"WebText's size: {LINKS:,} links, of which {ALIVE:.0%} answer: extraction "
    f"{extraction / 3600:,.0f} core hours, {', '.join(text_stages)} at most {rest / 3600:,.0f}"
  )


if __name__ == "__main__":
  shell.run(main, __doc__)
