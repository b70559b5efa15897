# SPDX-License-Identifier: Apache-2.0
"""A document on its way from a page to the corpus, and what takes it out: a reason with a name."""

import dataclasses
import functools
import hashlib
from collections.abc import Sequence
from typing import Protocol

# Characters of a dropped text that a report shows.
EXAMPLE_CHARACTERS = 200


@dataclasses.dataclass(frozen=True)
class Document:
  """A page or its text. `html` is there until the main text is extracted."""

  url: str = ""
  text: str = ""
  html: bytes | None = dataclasses.field(default=None, repr=False)
  language: str = ""
  contaminated: int = 0  # n-grams of evaluation sets in the text

  @functools.cached_property
  def id(self) -> str:
    """The content hash: 32 hexadecimal digits of the text's SHA-256."""
    return hashlib.sha256(self.text.encode()).hexdigest()[:32]

  @property
  def nbytes(self) -> int:
    """Bytes of the page, or of the text's UTF-8."""
    return len(self.text.encode()) if self.html is None else len(self.html)

  def to_json(self) -> dict:
    """A document whose text is extracted, as an object of JSON."""
    return {
      "url": self.url,
      "text": self.text,
      "language": self.language,
      "contaminated": self.contaminated,
    }


@dataclasses.dataclass(frozen=True)
class Drop:
  """Why a document is dropped: a reason to count by, and where or what it was, for the report."""

  reason: str
  example: str = ""


class Stage(Protocol):
  """A pure function of a document. It pickles, and `name` stands in the report."""

  name: str

  def __call__(self, document: Document) -> Document | Drop: ...


def drop(reason: str, document: Document) -> Drop:
  """A `Drop` whose example is the document's URL and the start of its text."""
  start = " ".join(document.text[: 4 * EXAMPLE_CHARACTERS].split())[:EXAMPLE_CHARACTERS]
  return Drop(reason, f"{document.url[:EXAMPLE_CHARACTERS]} {start}".strip())


def run_stages(document: Document, stages: Sequence[Stage], tally) -> Document | None:
  """Runs stages until one drops the document, which is None then. The tally counts each."""
  for stage in stages:
    result = stage(document)
    tally.count(stage.name, document.nbytes, result)
    if isinstance(result, Drop):
      return None
    document = result
  return document
