# SPDX-License-Identifier: Apache-2.0
"""The Winograd schema challenge: which of two candidates does a pronoun stand for?

Both scores of Trinh & Le (2018, section 3), which the GPT-2 paper follows: put each candidate in the pronoun's place
and compare how likely the whole sentence is (`full`), or what follows the candidate, given all up to it (`partial`).
The paper's 70.70 % is 193 of 273 items, the first of the collection; 12 were added since.

The collection names candidates as one names people and things, "The city councilmen". In the sentence an article or a
possessive is in lower case unless the pronoun has a capital, and a candidate for a possessive pronoun ends in 's; in
the collection, "her" is always one where a word follows.
"""

import itertools
import pathlib
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterator

from gpt2_jax.evaluate.sources import Row, Source, at_place
from gpt2_jax.evaluate.task import Continuation, Likelihood, Task
from gpt2_jax.evaluate.tasks.choice import ACCURACY, chosen, one_of

POSSESSIVES = frozenset("my your his her its our their".split())
LOWERED = POSSESSIVES | frozenset("the a an".split())
CLOSING = frozenset(".,;:!?)")  # without a space before them


def read(path: pathlib.Path) -> Iterator[Row]:
  """The schemas of WSCollection.xml, in their order."""
  try:
    schemas = ElementTree.parse(path).getroot().iter("schema")
  except ElementTree.ParseError as error:
    raise ValueError(f"{path} is no XML: {error}") from error
  for i, schema in enumerate(schemas, 1):
    yield at_place(f"{path}: schema {i}", lambda schema=schema: _row_of_schema(schema))


def _row_of_schema(schema: ElementTree.Element) -> Row:
  before, pronoun, after = (_text(schema, f"text/{part}") for part in ("txt1", "pron", "txt2"))
  candidates = ["".join(answer.itertext()) for answer in schema.iterfind("answers/answer")]
  right = _text(schema, "correctAnswer").strip()[:1]
  if right not in ("A", "B"):
    raise ValueError(f"its correct answer is {right!r}, neither A nor B")
  return _row(before, pronoun, after, candidates, int(right == "B"))


def _text(schema: ElementTree.Element, path: str) -> str:
  found = schema.find(path)
  if found is None:
    raise ValueError(f"it has no {path}")
  return "".join(found.itertext())


def _row_of_record(record: dict) -> Row:
  text, begin, end = record["text"], record["pronoun_start"], record["pronoun_end"]
  return _row(text[:begin], text[begin:end], text[end:], [record["option1"], record["option2"]], record["label"])


def _row(before: str, pronoun: str, after: str, candidates: list[str], label: int) -> Row:
  if len(candidates) != 2:
    raise ValueError(f"it has {len(candidates)} candidates, not 2")
  before, pronoun, after, *candidates = map(_spaced, (before, pronoun, after, *candidates))
  if not (pronoun and after and all(candidates)):
    raise ValueError("its pronoun, what follows it, or a candidate is empty")
  return {
    "before": before,
    "pronoun": pronoun,
    "after": after,
    "candidates": candidates,
    "label": one_of(candidates, label),
  }


def _spaced(text: str) -> str:
  """With single spaces, and the collection's one misspelling mended, as in TFDS."""
  return re.sub(r"\s+", " ", text).strip().replace("recieved", "received")


def parts(row: Row, candidate: str) -> tuple[str, str]:
  """The sentence up to the candidate's end, and what follows, with the space that belongs there."""
  pronoun, after = row["pronoun"], row["after"]
  follows = after if after[0] in CLOSING else f" {after}"
  first, space, rest = candidate.partition(" ")
  if pronoun[0].isupper():
    candidate = candidate[0].upper() + candidate[1:]
  elif first.lower() in LOWERED:
    candidate = first.lower() + space + rest
  if pronoun.lower() in POSSESSIVES and follows[0] == " ":
    candidate += "'s"
  return f"{row['before']} {candidate}".lstrip(), follows


def full(row: Row) -> list[Continuation]:
  return [Continuation("", "".join(parts(row, candidate))) for candidate in row["candidates"]]


def partial(row: Row) -> list[Continuation]:
  return [Continuation(*parts(row, candidate)) for candidate in row["candidates"]]


def sums(row: Row, answers: list[Likelihood]) -> dict[str, float]:
  return {"correct": float(chosen(answers) == row["label"])}


def example(row: Row) -> str:
  return "".join(parts(row, row["candidates"][row["label"]]))


PUBLISHED = "https://cs.nyu.edu/faculty/davise/papers/WinogradSchemas/WSCollection.xml"
FIRST_273 = Source(
  "winograd",
  ("WSCollection.xml",),
  lambda path: itertools.islice(read(path), 273),
  PUBLISHED,
  "wsc273",
  "test",
  _row_of_record,
)
ALL_285 = Source("winograd", ("WSCollection.xml",), read, PUBLISHED)


def _task(name: str, protocol: str, source: Source, requests: Callable[[Row], list[Continuation]]) -> Task:
  about = {
    "partial": "what follows the candidate, given all up to it (Trinh & Le, 2018)",
    "full": "the whole sentence with the candidate (Trinh & Le, 2018)",
  }
  return Task(name, protocol, about[protocol], source, requests, sums, ACCURACY, example)


TASKS = (
  _task("winograd273", "partial", FIRST_273, partial),
  _task("winograd273", "full", FIRST_273, full),
  _task("winograd285", "partial", ALL_285, partial),
  _task("winograd285", "full", ALL_285, full),
)
