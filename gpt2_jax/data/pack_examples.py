# SPDX-License-Identifier: Apache-2.0
"""Encodes and packs examples into a store of rows, once; resumes a job that was killed.

16,384 examples are a part, whatever the corpus, and are packed by themselves: memory is that of one
part in each process. The rows are a pure function of the examples, the tokenizer and the template.

An example that is longer than a row is cut. It loses tokens from its front, as long as one is left
in front of its last response; a last response that is still too long loses its end. With a label,
its last token stays, for there the label is predicted.
"""

import contextlib
import dataclasses
import itertools
import os
from collections.abc import Sequence
from typing import ClassVar

import numpy as np

from gpt2_jax.data.example_records import Example, parse_record
from gpt2_jax.data.examples import LABEL_SHIFT, SCORED, START, ExampleStore, marks_name
from gpt2_jax.data.packing import ALGORITHM, UNPACKED, pack
from gpt2_jax.data.skipped import BadRecord, Skipped
from gpt2_jax.data.templates import LOSSES, Encoded, ExampleEncoder
from gpt2_jax.data.token_store import TokenStore, documents_of_part
from gpt2_jax.data.tokenize_corpus import PartWriter, write_store
from gpt2_jax.data.zarr_files import delete, put_json, write_array
from gpt2_jax.files import first_line, progress, sha256, user_path

EXAMPLES_PER_PART = 16384


def encode_examples(
  documents: Sequence[str],
  encoder: ExampleEncoder,
  path: str,
  source: dict,
  n_ctx: int,
  processes: int | None = None,
  examples_per_part: int = EXAMPLES_PER_PART,
  strict: bool = False,
  skipped: Skipped | None = None,
  packed: bool = True,
) -> ExampleStore:
  """Packs all examples, which `example_records.write_record` wrote, into rows of `n_ctx` tokens; or
  gives each a row of its own.

  Resumes and repairs as `encode_corpus` does. Raises ValueError before anything is written if an
  example follows no convention, has an unknown role, or has nothing that would be scored.
  """
  # 1. What can be known at the start.
  path = user_path(path)
  if encoder.loss not in LOSSES:
    raise ValueError(f"the loss is {encoder.loss[:40]!r}; it is one of {', '.join(LOSSES)}")
  if not 2 <= n_ctx <= 1 << 20:
    raise ValueError(f"n_ctx is {n_ctx:,}; a row has 2 to {1 << 20:,} tokens")
  _ = encoder.special_ids
  check_examples(documents, encoder)

  # 2. Write the store.
  job = {
    "format": ExampleStore.FORMAT,
    "source": source,
    "tokenizer_fingerprint": encoder.tokenizer.fingerprint,
    "documents": len(documents),
    "documents_per_part": examples_per_part,
    "template": encoder.template.to_json(),
    "loss": encoder.loss,
    "n_ctx": n_ctx,
    "packing": ALGORITHM if packed else UNPACKED,
  }
  writer = ExampleWriter(documents, encoder.tokenizer, path, job, strict, encoder)
  return write_store(writer, processes or os.cpu_count(), skipped or Skipped(), None)


def check_examples(documents: Sequence[str], encoder: ExampleEncoder) -> None:
  """Reads all examples. Raises ValueError with the number of those that cannot be used."""
  count = 0
  first = ""
  for index in progress(range(len(documents)), "checking", " examples"):
    # What cannot be read is skipped and counted where it is encoded.
    with contextlib.suppress(BadRecord):
      text = documents[index]
      try:
        parse_record(text, encoder.template, encoder.loss)
      except ValueError as error:
        count += 1
        first = first or first_line(error)
  if count:
    raise ValueError(
      f"{count:,} of {len(documents):,} examples cannot be used; the first: {first}; "
      "mend them or leave them out, nothing is written"
    )


@dataclasses.dataclass(frozen=True)
class ExampleWriter(PartWriter):
  """Encodes, packs and writes any part of a store of examples."""

  encoder: ExampleEncoder

  store: ClassVar[type[TokenStore]] = ExampleStore

  def write(self, index: int) -> dict:
    """Writes part `index`, then its .json, whose content is returned."""
    # 1. Encode the examples, and pack them.
    documents = documents_of_part(self.job, index)
    examples = PackedExamples(self.job["n_ctx"], self.dtype)
    for number in documents:
      self._add(examples, number)
    tokens, marks = examples.pack(self.job["packing"] == ALGORITHM)

    # 2. From here until the arrays are there, nothing says that they are.
    name = f"part-{index:05d}"
    delete(self.path, f"{name}.json")
    write_array(self.path, name, tokens)
    write_array(self.path, marks_name(name), marks)

    # 3. Only now is the part complete.
    hashes = {"sha256": sha256(tokens.tobytes()), "marks_sha256": sha256(marks.tobytes())}
    entry = {"tokens": len(tokens), "documents": len(documents)} | examples.counts | hashes
    if examples.skipped.count:
      entry["skipped"] = examples.skipped.to_json()
    put_json(self.path, f"{name}.json", entry)
    return entry

  def _add(self, examples: "PackedExamples", number: int) -> None:
    """Adds an example to a part, or counts it as skipped."""
    try:
      example = parse_record(self.documents[number], self.encoder.template, self.encoder.loss)
      try:
        encoded = self.encoder.encode(example.messages)
      except (ValueError, OverflowError) as error:
        raise ValueError(f"{example.place}: {first_line(error)}") from error

      # A text may have no tokens, as spaces alone in some vocabularies.
      if not encoded.is_scored.any():
        raise BadRecord(f"{example.place} has no scored token")
    except BadRecord as error:
      if self.strict:
        raise
      examples.skipped += Skipped(1, first_line(error))
      return
    examples.add(example, encoded)


class PackedExamples:
  """The examples of a part: they are added one by one, and then packed into rows."""

  def __init__(self, n_ctx: int, dtype: np.dtype):
    self.n_ctx = n_ctx
    self.dtype = dtype
    self.tokens = []
    self.marks = []
    self.skipped = Skipped()
    self.counts = dict.fromkeys(ExampleStore.TOTALS, 0) | {"classes": 0}
    del self.counts["tokens"]

  def add(self, example: Example, encoded: Encoded) -> None:
    tokens, is_scored = cut(encoded, self.n_ctx, keeps_last=example.label is not None)

    marks = np.where(is_scored, SCORED, 0).astype(np.uint8)
    marks[0] |= START
    if example.label is not None:
      high, low = divmod(example.label + 1, 64)
      marks[0] |= low << LABEL_SHIFT
      marks[1] |= high << LABEL_SHIFT
      self.counts["classes"] = max(self.counts["classes"], example.label + 1)
    self.tokens.append(tokens.astype(self.dtype))
    self.marks.append(marks)

    lost = len(encoded.ids) - len(tokens)
    self.counts["bytes"] += sum(len(message.text.encode()) for message in example.messages)
    self.counts["examples"] += 1
    self.counts["example_tokens"] += len(tokens)
    self.counts["scored"] += int(is_scored.sum())
    self.counts["cut"] += lost > 0
    self.counts["cut_tokens"] += lost
    self.counts["labelled"] += example.label is not None

  def pack(self, several: bool) -> tuple[np.ndarray, np.ndarray]:
    """The rows one after another: tokens, and marks. Padding is zeros, and starts a segment.

    A row has `several` examples, or one.
    """
    lengths = list(map(len, self.tokens))
    rows = pack(lengths, self.n_ctx) if several else [[example] for example in range(len(lengths))]
    self.counts["rows"] = len(rows)
    tokens = np.zeros((len(rows), self.n_ctx), self.dtype)
    marks = np.zeros((len(rows), self.n_ctx), np.uint8)

    for row, examples in enumerate(rows):
      ends = list(itertools.accumulate(len(self.tokens[example]) for example in examples))
      for example, end in zip(examples, ends, strict=True):
        start = end - len(self.tokens[example])
        tokens[row, start:end] = self.tokens[example]
        marks[row, start:end] = self.marks[example]
      if ends[-1] < self.n_ctx:
        marks[row, ends[-1]] = START
    return tokens.ravel(), marks.ravel()


def cut(encoded: Encoded, n_ctx: int, keeps_last: bool) -> tuple[np.ndarray, np.ndarray]:
  """At most `n_ctx` tokens of an example, and which are scored: this module's docstring has the
  rule."""
  excess = max(0, len(encoded.ids) - n_ctx)
  front = min(excess, max(0, encoded.last_response - 1))
  kept = np.arange(front, front + min(n_ctx, len(encoded.ids)))
  if keeps_last:
    kept[-1] = len(encoded.ids) - 1

  # What is the first token now has nothing before it.
  is_scored = encoded.is_scored[kept]
  is_scored[:1] = False
  return encoded.ids[kept], is_scored
