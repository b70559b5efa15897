# SPDX-License-Identifier: Apache-2.0
"""Reads the project's pages: their code blocks, and the commands that stand in a line of text."""

import dataclasses
import pathlib
import re

ROOT = pathlib.Path(__file__).parents[2]
# What a block may say it is: shell, Python, or `text` for what is shown and not typed.
LANGUAGES = ("bash", "python", "text")


@dataclasses.dataclass(frozen=True)
class Block:
  """A fenced code block: its page, the line it begins in, its language and its text."""

  page: str
  line: int
  language: str
  text: str


def page_names() -> list[str]:
  """All pages of the project, in order."""
  folders = ("gpt2_jax", "configs", "experiments", "launch", "tests")
  paths = [*ROOT.glob("*.md")]
  for folder in folders:
    paths += (ROOT / folder).rglob("*.md")
  return sorted(str(path.relative_to(ROOT)) for path in paths)


def blocks(page: str) -> list[Block]:
  """The fenced blocks of a page. Raises ValueError for one that does not say its language."""
  text = (ROOT / page).read_text()
  result = []
  for match in re.finditer(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
    line = text[: match.start()].count("\n") + 1
    if match[1] not in LANGUAGES:
      raise ValueError(f"{page}:{line}: a block is one of {', '.join(LANGUAGES)}, not {match[1]!r}")
    result.append(Block(page, line, match[1], match[2]))
  return result


def inline_commands(page: str) -> list[Block]:
  """Commands in a line of text, as `gpt2-jax ...`, but for names and parts of commands."""
  text = re.sub(r"^```.*?^```$", _blank, (ROOT / page).read_text(), flags=re.MULTILINE | re.DOTALL)
  result = []
  for match in re.finditer(r"`((?:gpt2-jax|python|make|pip|launch/tpu_vm\.sh)\s[^`]+)`", text):
    is_part = "..." in match[1] or re.search(r"\b(COMMAND|NAME)\b", match[1])
    is_name = re.fullmatch(r"gpt2-jax \w+|python launch/\w+\.py", match[1])
    if not is_part and not is_name:
      line = text[: match.start()].count("\n") + 1
      result.append(Block(page, line, "bash", " ".join(match[1].split()) + "\n"))
  return result


def _blank(match: re.Match) -> str:
  """As many lines, with nothing in them."""
  return "\n" * match[0].count("\n")


def links(page: str) -> list[str]:
  """The targets of a page's links and pictures that lie in the project."""
  text = (ROOT / page).read_text()
  targets = re.findall(r"\]\(([^)\s]+)\)", text)
  return [target for target in targets if not re.match(r"[a-z]+://", target)]
