# SPDX-License-Identifier: Apache-2.0
"""The interface that all tokenizers share: text to token ids and back."""

from collections.abc import Iterable
from typing import Protocol

import numpy as np

from gpt2_jax.files import sha256

# What OpenAI put between the documents of GPT-2's corpus: its only special token.
EOT = "<|endoftext|>"


class Tokenizer(Protocol):
  """What every tokenizer does.

  `<|endoftext|>` inside a text is plain text unless `allow_eot`, so that no document can pretend
  to end.
  """

  @property
  def vocab_size(self) -> int:
    """The number of token ids."""

  @property
  def eot(self) -> int | None:
    """The id of `<|endoftext|>`; None for a vocabulary without such a token."""

  @property
  def fingerprint(self) -> str:
    """SHA-256 of what defines the mapping: equal fingerprints give equal ids."""

  def encode(self, text: str, allow_eot: bool = False) -> list[int]:
    """The ids of a text. Raises ValueError for a text that is no Unicode (`check_unicode`)."""

  def special_id(self, token: str) -> int | None:
    """The id of a special token by how it is written; None if there is no such one."""

  def encode_batch(self, texts: list[str]) -> list[list[int]]:
    """The ids of each text."""

  def encode_with_offsets(self, text: str) -> tuple[list[int], np.ndarray]:
    """The ids of a text, and for each id the character at which its token begins."""

  def decode(self, ids: Iterable[int]) -> str:
    """The text of the ids. Ids that spell no complete UTF-8 character give U+FFFD."""

  def token_bytes(self, token: int) -> bytes:
    """The UTF-8 bytes of one token, which may be part of a character; b"" past the vocabulary."""

  def to_json(self) -> dict:
    """A JSON object from which `from_json` makes the same tokenizer."""


def hash_vocabulary(kind: str, content: bytes) -> str:
  """The fingerprint of a tokenizer: SHA-256 of its kind and of what defines its mapping."""
  return sha256(kind.encode() + b"\n" + content)


def check_unicode(text: str, what: str = "the text") -> None:
  """Raises ValueError for a lone surrogate, which a str can hold and UTF-8 cannot.

  It comes from JSON with half of an escaped pair, and from bytes that were decoded by force.
  """
  # Python knows without a look at the characters whether all are ASCII.
  if text.isascii():
    return
  try:
    text.encode()
  except UnicodeEncodeError as error:
    raise ValueError(
      f"{what} is not valid Unicode: character {error.start:,} is a lone surrogate "
      f"(U+{ord(text[error.start]):04X}); leave it out, or give UTF-8"
    ) from error


def join_ids(separator: list[int], parts: Iterable[list[int]]) -> list[int]:
  """Concatenates lists of ids, with the ids of `separator` between them."""
  ids = []
  for n, part in enumerate(parts):
    # Between parts only: before each but the first.
    if n:
      ids += separator
    ids += part
  return ids
