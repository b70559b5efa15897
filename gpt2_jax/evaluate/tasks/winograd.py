# SPDX-License-Identifier: Apache-2.0
"""Winograd schema challenge (WSC): coreference, which of two candidates a pronoun stands for.

Both scores of Trinh & Le (2018, section 3), which the GPT-2 paper follows. They put each candidate
in the pronoun's place. `full` compares how likely the whole sentence is; `partial` compares what
follows the candidate, given all up to it. The paper's 70.70 % is 193 of 273 items, the first of the
collection; 12 were added since.

The collection names candidates as one names people and things, "The city councilmen". In the
sentence an article or a possessive is in lower case unless the pronoun has a capital. A candidate
for a possessive pronoun ends in 's; in the collection, "her" is always one if a word follows.
"""

import itertools
import pathlib
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterator

from gpt2_jax.evaluate.sources import Download, Row, Source, at_place
from gpt2_jax.evaluate.task import Likelihood, Loglikelihood, Task
from gpt2_jax.evaluate.tasks.choice import ACCURACY, checked_label, likeliest_choice

POSSESSIVES = frozenset("my your his her its our their".split())
LOWERED = POSSESSIVES | frozenset("the a an".split())
CLOSING = frozenset(".,;:!?)")  # no space precedes these

# ---- files to rows


def read(path: pathlib.Path) -> Iterator[Row]:
  """Reads the schemas of WSCollection.xml, in their order."""
  try:
    schemas = ElementTree.parse(path).getroot().iter("schema")
  # The last two are of an encoding that is not known, or that the parser does not read.
  except (ElementTree.ParseError, LookupError, ValueError) as error:
    raise ValueError(f"{path} is no XML: {error}") from error
  for i, schema in enumerate(schemas, 1):
    yield at_place(f"{path}: schema {i}", lambda schema=schema: _row_of_schema(schema))


def read_first_273(path: pathlib.Path) -> Iterator[Row]:
  """Reads the schemas that the paper's figure is of."""
  return itertools.islice(read(path), 273)


def _row_of_schema(schema: ElementTree.Element) -> Row:
  before = _text(schema, "text/txt1")
  pronoun = _text(schema, "text/pron")
  after = _text(schema, "text/txt2")
  candidates = ["".join(answer.itertext()) for answer in schema.iterfind("answers/answer")]

  # "A", or "A." in some of the schemas
  right = _text(schema, "correctAnswer").strip()[:1]
  if right not in ("A", "B"):
    raise ValueError(f"its correct answer is {right!r}, neither A nor B")
  return _row(before, pronoun, after, candidates, int(right == "B"))


def _text(schema: ElementTree.Element, path: str) -> str:
  element = schema.find(path)
  if element is None:
    raise ValueError(f"it has no {path}")
  return "".join(element.itertext())


def _tfds_row(record: dict) -> Row:
  text, begin, end = record["text"], record["pronoun_start"], record["pronoun_end"]
  candidates = [record["option1"], record["option2"]]
  return _row(text[:begin], text[begin:end], text[end:], candidates, record["label"])


def _row(before: str, pronoun: str, after: str, candidates: list[str], label: int) -> Row:
  if len(candidates) != 2:
    raise ValueError(f"it has {len(candidates)} candidates, not 2")

  row = {
    "before": _single_spaced(before),
    "pronoun": _single_spaced(pronoun),
    "after": _single_spaced(after),
    "candidates": list(map(_single_spaced, candidates)),
    "label": checked_label(candidates, label),
  }
  if not (row["pronoun"] and row["after"] and all(row["candidates"])):
    raise ValueError("its pronoun, what follows it, or a candidate is empty")
  return row


def _single_spaced(text: str) -> str:
  """With single spaces, and the collection's one misspelling mended, as in TFDS."""
  return re.sub(r"\s+", " ", text).strip().replace("recieved", "received")


# ---- rows to requests and sums


def substituted(row: Row, candidate: str) -> tuple[str, str]:
  """The sentence with a candidate in the pronoun's place, cut after the candidate.

  The second part begins with the space that belongs there.
  """
  # 1. What follows: a space, unless closing punctuation does.
  pronoun, after = row["pronoun"], row["after"]
  follows = after if after[0] in CLOSING else f" {after}"

  # 2. The candidate's capital is the pronoun's; a name keeps its own.
  first, space, rest = candidate.partition(" ")
  if pronoun[0].isupper():
    candidate = candidate[0].upper() + candidate[1:]
  elif first.lower() in LOWERED:
    candidate = first.lower() + space + rest

  # 3. "her" before punctuation is an object, not a possessive.
  if pronoun.lower() in POSSESSIVES and follows[0] == " ":
    candidate += "'s"

  return f"{row['before']} {candidate}".lstrip(), follows


def full_requests(row: Row) -> list[Loglikelihood]:
  """The whole sentence with each candidate, after `<|endoftext|>`."""
  return [Loglikelihood("", "".join(substituted(row, name))) for name in row["candidates"]]


def partial_requests(row: Row) -> list[Loglikelihood]:
  """What follows each candidate, given all up to it."""
  return [Loglikelihood(*substituted(row, name)) for name in row["candidates"]]


def _sums(row: Row, answers: list[Likelihood]) -> dict[str, float]:
  return {"correct": float(likeliest_choice(answers) == row["label"])}


def _example(row: Row) -> str:
  right = row["candidates"][row["label"]]
  return "".join(substituted(row, right))


# ---- the tasks

PUBLISHED = "https://cs.nyu.edu/faculty/davise/papers/WinogradSchemas/WSCollection.xml"
DOWNLOADS = (Download(PUBLISHED),)  # its SHA-256 is recorded nowhere
FIRST_273 = Source(
  name="winograd",
  files=("WSCollection.xml",),
  read=read_first_273,
  url=PUBLISHED,
  tfds="wsc273",
  split="test",
  row=_tfds_row,
  downloads=DOWNLOADS,
)
ALL_285 = Source("winograd", ("WSCollection.xml",), read, PUBLISHED, downloads=DOWNLOADS)

DESCRIPTIONS = {
  "partial": "what follows the candidate, given all up to it (Trinh & Le, 2018)",
  "full": "the whole sentence with the candidate (Trinh & Le, 2018)",
}


def _task(
  name: str, protocol: str, source: Source, requests: Callable[[Row], list[Loglikelihood]]
) -> Task:
  return Task(
    name,
    protocol,
    DESCRIPTIONS[protocol],
    source,
    requests,
    _sums,
    ACCURACY,
    _example,
    chance={"accuracy": 50.0},
  )


TASKS = (
  _task("winograd273", "partial", FIRST_273, partial_requests),
  _task("winograd273", "full", FIRST_273, full_requests),
  _task("winograd285", "partial", ALL_285, partial_requests),
  _task("winograd285", "full", ALL_285, full_requests),
)
