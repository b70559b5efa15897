# SPDX-License-Identifier: Apache-2.0
"""Counts of documents and bytes at every stage, by reason. Tallies add up in any order."""

import dataclasses
import hashlib
import heapq

from gpt2_jax.data.webtext.document import Document, Drop

# Dropped documents that a tally keeps for each reason, to be looked at.
EXAMPLES = 3


@dataclasses.dataclass
class Reason:
  """How many were dropped for a reason, and the examples with the smallest hashes.

  So the examples are the same whatever the order and the shards.
  """

  documents: int = 0
  bytes: int = 0
  examples: list[str] = dataclasses.field(default_factory=list)

  def add(self, documents: int, nbytes: int, examples: list[str]) -> None:
    self.documents += documents
    self.bytes += nbytes
    self.examples = heapq.nsmallest(EXAMPLES, {*self.examples, *examples}, key=_hash)


@dataclasses.dataclass
class Stats:
  """What came into a stage, what left it, and why the rest did not."""

  documents_in: int = 0
  documents_out: int = 0
  bytes_in: int = 0
  bytes_out: int = 0
  reasons: dict[str, Reason] = dataclasses.field(default_factory=dict)

  def drop(self, reason: str, documents: int, nbytes: int, examples: list[str]) -> None:
    self.reasons.setdefault(reason, Reason()).add(documents, nbytes, examples)


@dataclasses.dataclass
class Tally:
  """Counts by stage, in the order of the stages."""

  stages: dict[str, Stats] = dataclasses.field(default_factory=dict)

  def count(self, stage: str, nbytes: int, result: Document | Drop) -> None:
    """Counts one document of that many bytes, and what a stage made of it."""
    stats = self.stages.setdefault(stage, Stats())
    stats.documents_in += 1
    stats.bytes_in += nbytes
    if isinstance(result, Drop):
      stats.drop(result.reason, 1, nbytes, [result.example])
    else:
      stats.documents_out += 1
      stats.bytes_out += result.nbytes

  def add(self, other: "Tally") -> "Tally":
    """Adds another tally to this one, which is returned."""
    for name, theirs in other.stages.items():
      stats = self.stages.setdefault(name, Stats())
      stats.documents_in += theirs.documents_in
      stats.documents_out += theirs.documents_out
      stats.bytes_in += theirs.bytes_in
      stats.bytes_out += theirs.bytes_out
      for reason, dropped in theirs.reasons.items():
        stats.drop(reason, dropped.documents, dropped.bytes, dropped.examples)
    return self

  def check(self) -> None:
    """Raises ValueError unless every stage accounts for each document that the one before left."""
    before = None
    for name, stats in self.stages.items():
      dropped = sum(reason.documents for reason in stats.reasons.values())
      if stats.documents_in != stats.documents_out + dropped:
        raise ValueError(
          f"stage {name}: {stats.documents_in:,} documents came in, {stats.documents_out:,} left "
          f"and {dropped:,} were dropped; this is a defect of the pipeline"
        )
      if before is not None and stats.documents_in != before:
        raise ValueError(
          f"stage {name}: {stats.documents_in:,} documents came in, and {before:,} left the one "
          "before; this is a defect of the pipeline"
        )
      before = stats.documents_out

  def sorted(self, order: list[str]) -> "Tally":
    """The stages in an order, each there, with the reasons by name."""
    stages = {}
    for name in order:
      stats = self.stages.get(name, Stats())
      stages[name] = dataclasses.replace(stats, reasons=dict(sorted(stats.reasons.items())))
    return Tally(stages)

  def to_json(self) -> dict:
    return dataclasses.asdict(self)["stages"]

  @classmethod
  def from_json(cls, payload: dict) -> "Tally":
    stages = {}
    for name, fields in payload.items():
      reasons = {reason: Reason(**entry) for reason, entry in fields["reasons"].items()}
      stages[name] = Stats(**fields | {"reasons": reasons})
    return cls(stages)


def _hash(example: str) -> bytes:
  return hashlib.sha256(example.encode(errors="replace")).digest()
