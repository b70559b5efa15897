# SPDX-License-Identifier: Apache-2.0
"""The files that a card is made of: numbered, hashed, and read by key, so that every row of a card
names where its numbers are."""

import dataclasses
import json
import pathlib
import re
import string
from collections.abc import Sequence

from gpt2_jax.files import parse_json_object, sha256, summarize
from gpt2_jax.runs.workdir import as_path, cloud_errors

DIGEST = re.compile("[0-9a-f]{64}")
SHOWN_DIGITS = 12  # of a SHA-256 in a row; the file has all of it
LONGEST = 300  # characters of a text in a row

# A row of a card: what is told, its value, and where that is from.
Row = tuple[str, str, str]


@dataclasses.dataclass(frozen=True)
class CardSource:
  """A file of a card. Of a .jsonl, `content` is its lines by their numbers: a key begins with one.
  What the command line says is a source, too, without a file."""

  number: int
  place: str
  sha256: str
  content: dict

  def get(self, key: str) -> object:
    """The value at a path of names with slashes between them; None where there is none."""
    value = self.content
    for name in key.split("/"):
      if isinstance(value, list) and name.isdigit() and int(name) < len(value):
        value = value[int(name)]
      else:
        value = value.get(name) if isinstance(value, dict) else None
    return value

  def values(self, keys: str) -> list:
    """The values of all keys of `a/b, c/{d, e}`."""
    return [self.get(key) for key in expand_keys(keys)]

  def row(self, name: str, keys: str, form: str | None = None) -> list[Row]:
    """A row of the values of all keys, as `form` joins them; none where one is not there."""
    values = self.values(keys)
    if any(value is None for value in values):
      return []
    form = form or ", ".join("{}" for _ in values)
    return [(name, form.format(*map(show, values)), self.cite(keys))]

  def cite(self, what: str) -> str:
    return f"[{self.number}] `{what}`"


@dataclasses.dataclass(frozen=True)
class CardSources:
  """All sources of a card, in the order in which they were read."""

  files: list[CardSource] = dataclasses.field(default_factory=list)

  def add(self, place: str, content: dict, digest: str = "") -> CardSource:
    source = CardSource(len(self.files) + 1, place, digest, content)
    self.files.append(source)
    return source

  def read(self, place: str) -> CardSource:
    """Reads a .json or .jsonl file. Raises OSError, or ValueError for what is none."""
    with cloud_errors(place):
      payload = as_path(place).read_bytes()
    if not place.endswith(".jsonl"):
      return self.add(place, parse_json_object(payload, place), sha256(payload))
    lines = {}
    for number, line in enumerate(payload.splitlines(), 1):
      lines[str(number)] = parse_json_object(line, f"{place}, line {number:,},")
    return self.add(place, lines, sha256(payload))

  def rows(self) -> list[Row]:
    return [(f"[{file.number}]", plain(file.place), file.sha256) for file in self.files]


def expand_keys(keys: str) -> list[str]:
  """`a/b, c/{d, e}` as a/b, c/d and c/e."""
  expanded = []
  for part in re.findall(r"[^,{]*\{[^}]*\}|[^,{]+", keys):
    stem, _, names = part.strip().partition("{")
    expanded += [stem + name.strip() for name in names.rstrip("}").split(",")]
  return expanded


def show(value: object) -> str:
  """A value for a row: whole numbers with commas, others with five digits, texts on one line."""
  if isinstance(value, bool):
    return "yes" if value else "no"
  if isinstance(value, int):
    return f"{value:,}"
  if isinstance(value, float):
    return f"{value:.5g}"
  if isinstance(value, str):
    return plain(value[:SHOWN_DIGITS] if DIGEST.fullmatch(value) else value)
  if isinstance(value, dict):
    return ", ".join(f"{plain(name)} {show(entry)}" for name, entry in value.items())
  return plain(json.dumps(value))


def plain(text: str) -> str:
  """A text that Markdown and HTML show as it is, on one line of bounded length."""
  text = summarize([" ".join(text.split())], each=LONGEST)
  return re.sub(r"([\\`*_{}\[\]<>|#~$])", r"\\\1", text).replace(r"\<", "&lt;")


def markdown_table(rows: Sequence[Row], head: Row = ("", "value", "source")) -> str:
  """A table of Markdown; a sentence where there are no rows."""
  if not rows:
    return "Nothing was measured."
  lines = [head, ("---",) * len(head), *rows]
  return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def fill_card(template: str, sources: CardSources, **contents: str | list[Row]) -> str:
  """A card's Markdown: a template of this folder with texts, tables and the table of sources."""
  texts = {}
  for name, content in contents.items():
    texts[name] = content if isinstance(content, str) else markdown_table(content)
  texts["sources"] = markdown_table(sources.rows(), ("source", "file", "SHA-256"))
  path = pathlib.Path(__file__).with_name(template)
  return string.Template(path.read_text(encoding="utf-8")).substitute(texts)
