# SPDX-License-Identifier: Apache-2.0
"""The interface that all tokenizers share: text to token ids and back."""

import difflib
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Protocol

import numpy as np

from gpt2_jax.files import sha256, summarize

# What OpenAI put between the documents of GPT-2's corpus: its only special token.
EOT = "<|endoftext|>"


class Tokenizer(Protocol):
  """What every tokenizer does.

  A special token inside a text is plain text, so that no document can pretend to end. `allow_eot`
  parses `<|endoftext|>`, and `special` whatever it names.
  """

  # Ids of single bytes that become text only together: one byte that is no UTF-8 spoils the whole
  # run. Empty where each character stands for itself.
  byte_run_ids: frozenset[int] = frozenset()

  @property
  def vocab_size(self) -> int:
    """The number of token ids."""

  @property
  def eot(self) -> int | None:
    """The id of `<|endoftext|>`; None for a vocabulary without such a token."""

  @property
  def fingerprint(self) -> str:
    """SHA-256 of what defines the mapping: equal fingerprints give equal ids."""

  @property
  def special_tokens(self) -> tuple[str, ...]:
    """How its special and added tokens are written, in the order of their ids."""

  def encode(
    self, text: str, allow_eot: bool = False, special: bool | Sequence[str] = ()
  ) -> list[int]:
    """The ids of a text, in which the tokens `special` are parsed; True parses all special tokens.

    Raises ValueError for a text that is no Unicode (`check_unicode`), and for a token that is none
    of `special_tokens`.
    """

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


def parsed_tokens(
  special: bool | Sequence[str], special_tokens: tuple[str, ...]
) -> tuple[str, ...]:
  """The tokens that `special` names, in the order of `special_tokens`; True names all of them.

  Raises ValueError for one that the tokenizer lacks.
  """
  if isinstance(special, bool):
    return special_tokens if special else ()
  is_several = isinstance(special, Iterable) and not isinstance(special, str)
  if not is_several or not all(isinstance(token, str) for token in special):
    raise ValueError(
      f"special is {str(special)[:60]!r}; give several tokens, as ('<|user|>',), or True for all"
    )

  for token in special:
    if token not in special_tokens:
      near = difflib.get_close_matches(token[:200], special_tokens, 3, cutoff=0)
      raise ValueError(
        f"{token[:60]!r} is none of the tokenizer's {len(special_tokens):,} special tokens"
        + (f"; the nearest are {summarize(map(repr, near), each=60)}" if near else "")
      )
  return tuple(token for token in special_tokens if token in special)


def split_at_tokens(text: str, tokens: Sequence[str]) -> Iterator[tuple[str, bool]]:
  """Cuts a text at tokens: pairs of a part and whether it is a token, no part empty.

  Of two tokens that begin at one place, the longer counts, as with Hugging Face.
  """
  longest_first = sorted(tokens, key=len, reverse=True)
  pattern = "|".join(re.escape(token) for token in longest_first if token)
  parts = re.split(f"({pattern})", text) if pattern else [text]
  for n, part in enumerate(parts):
    # Every second part is what the group matched.
    if part:
      yield part, n % 2 == 1


def join_ids(separator: list[int], parts: Iterable[list[int]]) -> list[int]:
  """Concatenates lists of ids, with the ids of `separator` between them."""
  ids = []
  for n, part in enumerate(parts):
    # Between parts only: before each but the first.
    if n:
      ids += separator
    ids += part
  return ids
