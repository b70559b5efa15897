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
from gpt2_jax.data.webtext.near_duplicates import MinHash

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
  import xxhash
  from datatrove.data import Document as TheirDocument
  from datatrove.pipeline import filters
  from datatrove.pipeline.dedup.minhash import MinhashDedupSignature
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

  # It writes nothing here. Newer versions of xxhash want bytes, and datatrove gives it text.
  signature = MinhashDedupSignature(tempfile.gettempdir())
  signature._hash_func = lambda text: xxhash.xxh64_intdigest(text.encode())
  minhash = MinHash()
  yield (
    "minhash",
    minhash.band_keys,
    lambda text: signature.get_signature(signature.get_shingles(text)),
  )


def by_document(stage: Callable) -> Callable[[str], object]:
  return lambda text: stage(Document(text=text))


def alternate(ours: Callable, theirs: Callable | None, items: list, rounds: int):
  """CPU seconds of both over all items: the fastest of the rounds, in turn."""
  best = [float("inf"), float("inf")]
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
