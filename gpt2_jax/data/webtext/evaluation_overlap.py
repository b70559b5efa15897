# SPDX-License-Identifier: Apache-2.0
"""Contamination with evaluation sets: documents that share long n-grams with them, out or marked.

The n-grams are those of `gpt2-jax contamination`, in its Bloom filter; 13 words as for GPT-3 (Brown
et al. 2020, appendix C).
"""

import dataclasses
import functools
import os
from collections.abc import Sequence
from typing import ClassVar

from gpt2_jax.data.webtext.document import Document, Drop, drop
from gpt2_jax.evaluate.contamination import (
  BloomFilter,
  build_filter,
  count_ngrams,
  hash_ngrams,
  request_texts,
)


@dataclasses.dataclass(frozen=True)
class EvaluationOverlap:
  """Drops documents with n-grams of evaluation sets, or `mark`s them with the number of them."""

  name: ClassVar[str] = "contamination"

  path: str  # of the evaluation sets' filter
  min_ngrams: int = 1
  mark: bool = False

  def __call__(self, document: Document) -> Document | Drop:
    bloom = _load_filter(self.path)
    overlap = 0
    for hashes_U in hash_ngrams(document.text, bloom.n):
      overlap += int(bloom.contains(hashes_U).sum())
    if overlap < self.min_ngrams:
      return document
    if self.mark:
      return dataclasses.replace(document, contaminated=overlap)
    return drop("contaminated", document)


@functools.cache
def _load_filter(path: str) -> BloomFilter:
  return BloomFilter.load(path)


def build_evaluation_filter(names: Sequence[str], data: str, n: int, path: str) -> None:
  """Writes the filter of the n-grams of tasks, by their names, unless it is there.

  Raises ValueError for an unknown task, FileNotFoundError without its data in `data`.
  """
  from gpt2_jax.evaluate import sources, tasks

  if os.path.exists(path):
    return
  texts = []
  for name in names:
    task_name, _, protocol = name.partition(":")
    task = tasks.get(task_name, protocol or None)
    for row in sources.load(task.source, data, None):
      texts += request_texts(task, row)
  source = {"kind": "tasks", "names": list(names)}
  build_filter(texts, count_ngrams(texts, n), n=n, source=source).save(path)
