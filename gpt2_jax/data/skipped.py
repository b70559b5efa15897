# SPDX-License-Identifier: Apache-2.0
"""Records of a corpus that cannot be read: one is skipped and counted, and the first is named."""

import dataclasses


class BadRecord(ValueError):
  """A record that is no text: not UTF-8, no JSON, without the key, with a lone surrogate."""


@dataclasses.dataclass(frozen=True)
class Skipped:
  """How many records were skipped; where the first one is, and why: "b.jsonl:17 is not UTF-8"."""

  count: int = 0
  first: str = ""

  def __add__(self, other: "Skipped") -> "Skipped":
    return Skipped(self.count + other.count, self.first or other.first)

  def __str__(self) -> str:
    """For the end of a message; nothing if nothing was skipped."""
    if not self.count:
      return ""
    records = "1 record" if self.count == 1 else f"{self.count:,} records, the first"
    return f"; skipped {records}: {self.first}"

  def to_json(self) -> dict:
    return dataclasses.asdict(self)

  @classmethod
  def from_json(cls, payload: object) -> "Skipped":
    """The inverse of `to_json`, and of its absence. Raises ValueError for another shape."""
    match payload:
      case None:
        return cls()
      case {"count": int(count), "first": str(first)}:
        return cls(count, first)
    raise ValueError(f"{str(payload)[:40]!r} does not count skipped records")
