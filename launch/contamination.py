# SPDX-License-Identifier: Apache-2.0
"""How much of an evaluation set stands in a training corpus, by 8-grams.

  python launch/contamination.py --corpus='books/**/*.txt' --filter=books.bloom \\
    --task=lambada --data=/data/evaluation --out=lambada_books.json
  python launch/contamination.py --filter=books.bloom --task=wikitext2 --data=/data/evaluation --out=wikitext2.json

The first command reads the corpus twice (it counts, then it builds) and keeps the filter, 4.8 bytes for each 8-gram;
that is enough for the second. `launch/evaluate.py --overlap=lambada_books.json` then scores clean and seen items apart.
"""

import os
import sys

if __name__ == "__main__":  # the root in place of launch/, where tokenize.py would hide the standard library's
  sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

import pathlib

from absl import flags

from gpt2_jax.convert.weights import progress
from gpt2_jax.data import corpus
from gpt2_jax.evaluate import contamination, sources, tasks
from launch import shell

_CORPUS = flags.DEFINE_string("corpus", None, "Globs of local files, with commas between them; ** crosses folders.")
_TFDS_NAME = flags.DEFINE_string("tfds_name", None, "A TFDS dataset instead: name, name/config or name/config:version.")
_SPLIT = flags.DEFINE_string("split", "train", "Which of the corpus' documents, in TFDS's syntax.")
_TEXT_KEY = flags.DEFINE_string("text_key", "text", "Where a record of the corpus, or a line of .jsonl, has its text.")
_DATA_DIR = flags.DEFINE_string("data_dir", None, "TFDS's folder of prepared datasets (~/tensorflow_datasets).")
_FILTER = flags.DEFINE_string("filter", None, "The corpus' filter: read if it is there, else built and written.")
_TASK = flags.DEFINE_string("task", None, "The evaluation set: task or task:protocol.", required=True)
_DATA = flags.DEFINE_string("data", None, "The folder of the evaluation datasets, or the very file.")
_OUT = flags.DEFINE_string("out", None, "Where to write the overlap of each item, as JSON.")


def main() -> None:
  name, _, protocol = _TASK.value.partition(":")
  task = tasks.get(name, protocol or None)
  rows = sources.load(task.source, _DATA.value, _DATA_DIR.value)
  if _OUT.value and pathlib.Path(_OUT.value).exists():
    raise FileExistsError(f"{_OUT.value} is there already; take another name, or move it away")
  bloom = corpus_filter()
  found = contamination.overlap((contamination.texts(task, row) for row in progress(rows, "looking up")), bloom)
  if _OUT.value:
    contamination.write_overlap(_OUT.value, found, bloom, task, rows.fingerprint)
  print(describe(task.name, found, bloom))


def corpus_filter() -> contamination.Bloom:
  """The filter of the flags. Raises ValueError where there is one of another corpus."""
  if _CORPUS.value and _TFDS_NAME.value:
    raise ValueError("give one of --corpus and --tfds_name")
  known = _FILTER.value and pathlib.Path(_FILTER.value).exists()
  if not known and not (_CORPUS.value or _TFDS_NAME.value):
    raise ValueError("give --corpus or --tfds_name, or a --filter that is there")
  bloom = contamination.Bloom.load(_FILTER.value) if known else None
  if bloom and not (_CORPUS.value or _TFDS_NAME.value):
    return bloom
  documents = corpus_documents()
  if bloom and bloom.source != documents.source:
    raise ValueError(f"{_FILTER.value} is of another corpus, {bloom.source}; name another --filter")
  return bloom or build(documents)


def corpus_documents() -> corpus.Documents:
  where = _SPLIT.value, _TEXT_KEY.value, _DATA_DIR.value
  if _CORPUS.value:
    return corpus.file_documents(_CORPUS.value, *where)
  return corpus.tfds_documents(_TFDS_NAME.value, *where)


def build(documents: corpus.Documents) -> contamination.Bloom:
  expected = contamination.count(progress(documents, "counting"))
  bloom = contamination.build(progress(documents, "building"), expected, source=documents.source)
  if _FILTER.value:
    bloom.save(_FILTER.value)
  return bloom


def describe(name: str, found: contamination.Overlap, bloom: contamination.Bloom) -> str:
  short, seen = int((found.ngrams == 0).sum()), int((found.found > 0).sum())
  total = int(found.ngrams.sum())
  return (
    f"{name}: {found.share:.2%} of {total:,} {bloom.n}-grams are in the corpus (false positives {bloom.rate:.1e}); "
    f"of {len(found.ngrams):,} items {seen:,} have one of them, {len(found.ngrams) - seen - short:,} have none, "
    f"{short:,} have fewer than {bloom.n} words"
  )


if __name__ == "__main__":
  shell.run(main)
