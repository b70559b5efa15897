# SPDX-License-Identifier: Apache-2.0
"""Printable labels of tokens: spaces, line ends and lone bytes become visible."""

import unicodedata
from collections.abc import Iterable

from gpt2_jax.tokenizer import Tokenizer

SPACE = "\u2423"  # an open box
VISIBLE = {" ": SPACE, "\n": "\u23ce", "\t": "\u21e5"}


def token_labels(tokenizer: Tokenizer, tokens: Iterable[int]) -> list[str]:
  """A label for each token; none is empty. An id past the vocabulary gives <id>."""
  labels = []
  for token in tokens:
    labels.append(token_label(tokenizer.token_bytes(int(token))) or f"<{token}>")
  return labels


def token_label(token: bytes) -> str:
  r"""The text of a token's bytes, all of it visible.

  Bytes that are no whole UTF-8 character are written as \xe2, other characters without a glyph of
  their own as Python would escape them.
  """
  characters = []
  for character in token.decode("utf-8", errors="backslashreplace"):
    if character in VISIBLE:
      characters.append(VISIBLE[character])
    elif character.isprintable() and not unicodedata.combining(character):
      characters.append(character)
    else:
      characters.append(escape(character))
  return "".join(characters)


def escape(character: str) -> str:
  """A character as Python escapes it: x, u or U after a backslash, and its code point."""
  return character.encode("unicode_escape").decode("ascii")
