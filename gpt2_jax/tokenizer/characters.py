# SPDX-License-Identifier: Apache-2.0
"""Character-level tokenizer: one id for each character of a sorted alphabet."""

import dataclasses
import functools
from collections.abc import Iterable, Sequence

import numpy as np

from gpt2_jax.tokenizer.interface import check_unicode, hash_vocabulary, parsed_tokens


@dataclasses.dataclass(frozen=True)
class Characters:
  """Character-level tokenizer: an id is a place in the sorted alphabet.

  It has no `<|endoftext|>`: one document follows the other directly.
  """

  alphabet: str
  eot = None
  special_tokens = ()
  byte_run_ids = frozenset()

  @functools.cached_property
  def _alphabet_codepoints(self) -> np.ndarray:
    codepoints = _codepoints(self.alphabet)

    # Strictly increasing: `encode` finds ids by binary search.
    if not len(codepoints) or np.any(np.diff(codepoints.astype(np.int64)) <= 0):
      raise ValueError(f"an alphabet is sorted characters, each once; got {self.alphabet[:40]!r}")
    return codepoints

  @property
  def vocab_size(self) -> int:
    return len(self._alphabet_codepoints)

  @functools.cached_property
  def fingerprint(self) -> str:
    return hash_vocabulary("characters", self.alphabet.encode())

  def encode(
    self, text: str, allow_eot: bool = False, special: bool | Sequence[str] = ()
  ) -> list[int]:
    """Encodes a text. Raises ValueError at the first character that the alphabet lacks."""
    parsed_tokens(special, self.special_tokens)
    codepoints = _codepoints(text)
    alphabet = self._alphabet_codepoints

    # The binary search gives a place to unknown characters too, which holds another character.
    ids = np.searchsorted(alphabet, codepoints).clip(max=self.vocab_size - 1)
    unknown = np.flatnonzero(alphabet[ids] != codepoints)
    if len(unknown):
      first = unknown[0]
      raise ValueError(
        f"character {text[first]!r} at position {first:,} is none of the alphabet's "
        f"{self.vocab_size}; train the characters on all of the text"
      )
    return ids.tolist()

  def special_id(self, token: str) -> int | None:
    return None

  def encode_batch(self, texts: list[str]) -> list[list[int]]:
    return list(map(self.encode, texts))

  def encode_with_offsets(self, text: str) -> tuple[list[int], np.ndarray]:
    return self.encode(text), np.arange(len(text))

  def decode(self, ids: Iterable[int]) -> str:
    """Decodes ids. Ids past the alphabet, which a padded model can produce, give nothing."""
    return "".join(self.alphabet[int(i)] for i in ids if i < self.vocab_size)

  def token_bytes(self, token: int) -> bytes:
    return self.alphabet[token].encode() if token < self.vocab_size else b""

  def to_json(self) -> dict:
    return {"kind": "characters", "alphabet": self.alphabet}


def train_characters(texts: Iterable[str]) -> Characters:
  """Makes the alphabet of all characters in the texts. Raises ValueError if there are none."""
  alphabet = set()
  for text in texts:
    alphabet.update(text)
  if not alphabet:
    raise ValueError("no text: an alphabet needs at least one character")
  return Characters("".join(sorted(alphabet)))


def _codepoints(text: str) -> np.ndarray:
  check_unicode(text)
  return np.frombuffer(text.encode("utf-32-le"), np.uint32)
