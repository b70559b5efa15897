# SPDX-License-Identifier: Apache-2.0
"""Data contamination: how much of an evaluation set is in a training corpus, by 8-grams.

  gpt2-jax contamination --corpus='books/**/*.txt' --filter=books.bloom \\
    --task=lambada --data=/data/evaluation --out=lambada_books.json
  gpt2-jax contamination --filter=books.bloom \\
    --task=wikitext2 --data=/data/evaluation --out=wikitext2.json

The first command reads the corpus twice (it counts, then it builds) and keeps the filter, 4.8 bytes
for each 8-gram; that is enough for the second. `gpt2-jax evaluate --overlap=lambada_books.json`
then scores clean and seen items apart.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from absl import flags

from gpt2_jax.cli import shell
from gpt2_jax.files import check_folder, file_lock, local_path, progress, user_path

if TYPE_CHECKING:
  from gpt2_jax.data import corpus
  from gpt2_jax.evaluate import contamination

_CORPUS = flags.DEFINE_string(
  "corpus", None, "Globs of local files, with commas between them; ** crosses folders."
)
_TFDS_NAME = flags.DEFINE_string(
  "tfds_name", None, "A TFDS dataset instead: name, name/config or name/config:version."
)
_SPLIT = flags.DEFINE_string("split", "train", "Which of the corpus' documents, in TFDS's syntax.")
_TEXT_KEY = flags.DEFINE_string(
  "text_key", "text", "Where a record of the corpus, or a line of .jsonl, has its text."
)
_DATA_DIR = flags.DEFINE_string(
  "data_dir", None, "TFDS's folder of prepared datasets (~/tensorflow_datasets)."
)
_FILTER = flags.DEFINE_string(
  "filter", None, "The corpus' filter: read if it is there, else built and written."
)
_TASK = flags.DEFINE_string(
  "task", None, "The evaluation set: task or task:protocol.", required=True
)
_DATA = flags.DEFINE_string(
  "data", None, "The folder of the evaluation datasets, or the very file."
)
_OUT = flags.DEFINE_string("out", None, "Where to write the overlap of each item, as JSON.")


def main() -> None:
  from gpt2_jax.evaluate import contamination, remote_data, sources, tasks

  # 1. The cheap checks first: the task, its rows, and that the results have a place.
  name, _, protocol = _TASK.value.partition(":")
  task = tasks.get(name, protocol or None)
  data_dir = user_path(_DATA_DIR.value) if _DATA_DIR.value is not None else None
  if _DATA.value is not None and remote_data.is_file(_DATA.value):
    tasks.check_file(task.source, _DATA.value)
  rows = sources.load(task.source, _DATA.value, data_dir)
  contamination.check_items(task, rows)
  check_places()

  # 2. Read the filter of the corpus, or build it.
  bloom = corpus_filter(data_dir)

  # 3. Look up the n-grams of every item.
  texts = (contamination.request_texts(task, row) for row in progress(rows, "looking up"))
  overlap = contamination.measure_overlap(texts, bloom)
  if _OUT.value:
    contamination.write_overlap(_OUT.value, overlap, bloom, task, rows.fingerprint)
  print(_describe(task.name, overlap, bloom))


def check_places() -> None:
  """Checks, before hours of reading, that --out and --filter can be written. Raises OSError."""
  places = []
  if _OUT.value is not None:
    places.append(local_path(_OUT.value))
    if places[0].exists():
      raise FileExistsError(f"{_OUT.value} is there already; take another name, or move it away")
  if _FILTER.value is not None:
    places.append(local_path(_FILTER.value))
    if places[-1].is_dir():
      raise IsADirectoryError(f"{_FILTER.value} is a folder; --filter is a file")

  for place in places:
    if not place.exists():
      check_folder(place.parent)
  if len({place.absolute() for place in places}) < len(places):
    raise ValueError("--out and --filter are one file; give two names")


def corpus_filter(data_dir: str | None) -> contamination.BloomFilter:
  """Reads or builds the filter that the flags name.

  Raises ValueError if the filter's file is of another corpus than the flags', OSError while another
  process builds it.
  """
  from gpt2_jax.data import corpus
  from gpt2_jax.evaluate import contamination

  has_corpus = bool(_CORPUS.value or _TFDS_NAME.value)
  path = local_path(_FILTER.value) if _FILTER.value is not None else None
  if _CORPUS.value and _TFDS_NAME.value:
    raise ValueError("give one of --corpus and --tfds_name")
  if not has_corpus and not (path and path.exists()):
    raise ValueError("give --corpus or --tfds_name, or a --filter that is there")

  if path is None:
    return build_corpus_filter(corpus_documents(data_dir))
  if not path.exists():
    documents = corpus_documents(data_dir)
    busy = f"another process is building {path}; wait until it is there, or take another --filter"
    with file_lock(path.with_name(f".{path.name}.lock"), busy):
      # It may have come to be while the corpus was opened.
      if not path.exists():
        bloom = build_corpus_filter(documents)
        bloom.save(str(path))
        return bloom

  # A filter is enough by itself. If the flags name a corpus, too, it has to be the filter's.
  bloom = contamination.BloomFilter.load(str(path))
  if has_corpus:
    documents = corpus_documents(data_dir)
    if not corpus.is_same_source(bloom.source, documents.source, documents.former_source):
      source = str(bloom.source)[:200]
      raise ValueError(f"{path} is of another corpus, {source}; name another --filter")
  return bloom


def corpus_documents(data_dir: str | None) -> corpus.Documents:
  from gpt2_jax.data import corpus

  options = _SPLIT.value, _TEXT_KEY.value, data_dir
  if _CORPUS.value:
    return corpus.file_documents(_CORPUS.value, *options)
  return corpus.tfds_documents(_TFDS_NAME.value, *options)


def build_corpus_filter(documents: corpus.Documents) -> contamination.BloomFilter:
  """Reads the corpus twice: to size the filter, and to fill it."""
  from gpt2_jax.evaluate import contamination

  expected = contamination.count_ngrams(progress(documents, "counting"))
  if not expected:
    raise ValueError(
      f"none of the corpus' {len(documents):,} documents has {contamination.NGRAM_WORDS} words: "
      "there is nothing to look for"
    )
  return contamination.build_filter(
    progress(documents, "building"), expected, source=documents.source
  )


def _describe(name: str, overlap: contamination.Overlap, bloom: contamination.BloomFilter) -> str:
  """The result in one line."""
  items = len(overlap.ngrams)
  total = int(overlap.ngrams.sum())
  short = int((overlap.ngrams == 0).sum())
  seen = int((overlap.in_corpus > 0).sum())
  clean = items - seen - short
  return (
    f"{name}: {overlap.share:.2%} of {total:,} {bloom.n}-grams are in the corpus "
    f"(false positives {bloom.false_positive_rate:.1e}); of {items:,} items {seen:,} have one of "
    f"them, {clean:,} have none, {short:,} have fewer than {bloom.n} words"
  )


def run() -> None:
  shell.run(main, __doc__, imports=("gpt2_jax.evaluate.tasks",))
