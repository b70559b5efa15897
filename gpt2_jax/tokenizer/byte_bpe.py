# SPDX-License-Identifier: Apache-2.0
"""Byte-level BPE with the vocabulary of GPT-2, by tiktoken."""

import dataclasses
import functools
import itertools
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from gpt2_jax.tokenizer.interface import EOT, check_unicode, hash_vocabulary, parsed_tokens

if TYPE_CHECKING:
  import tiktoken


@dataclasses.dataclass(frozen=True)
class Gpt2Bpe:
  """Byte-level BPE of GPT-2: 50,257 tokens, by tiktoken.

  Without a network, TIKTOKEN_CACHE_DIR must name a folder that holds tiktoken's two files.
  """

  special_tokens = (EOT,)
  byte_run_ids = frozenset()

  @functools.cached_property
  def _encoding(self) -> "tiktoken.Encoding":
    import tiktoken

    try:
      return tiktoken.get_encoding("gpt2")
    except Exception as error:
      # tiktoken passes on whatever its HTTP library raises, which may be any class.
      raise ValueError(
        f"tiktoken cannot fetch GPT-2's vocabulary ({type(error).__name__}); "
        "connect once, or point TIKTOKEN_CACHE_DIR to a folder in which it was fetched before"
      ) from error

  @property
  def vocab_size(self) -> int:
    return self._encoding.n_vocab

  @property
  def eot(self) -> int:
    return self._encoding.eot_token

  @functools.cached_property
  def fingerprint(self) -> str:
    ids = range(self.vocab_size)
    return hash_byte_vocabulary(map(self._encoding.decode_single_token_bytes, ids))

  def special_id(self, token: str) -> int | None:
    return self.eot if token == EOT else None

  def encode(
    self, text: str, allow_eot: bool = False, special: bool | Sequence[str] = ()
  ) -> list[int]:
    # tiktoken would put U+FFFD in place of a lone surrogate, without a word.
    check_unicode(text)

    # tiktoken raises for a special token that is neither allowed nor expected. Nothing is
    # disallowed here: what is not allowed is encoded as the characters it is written with.
    allowed = set(parsed_tokens(special, self.special_tokens))
    if allow_eot:
      allowed.add(EOT)
    return self._encoding.encode(text, allowed_special=allowed, disallowed_special=())

  def encode_batch(self, texts: list[str]) -> list[list[int]]:
    for text in texts:
      check_unicode(text)
    # "Ordinary" is `encode` without special tokens, and faster.
    return list(map(self._encoding.encode_ordinary, texts))

  def encode_with_offsets(self, text: str) -> tuple[list[int], np.ndarray]:
    ids = self.encode(text)
    _, starts = self._encoding.decode_with_offsets(ids)
    return ids, np.array(starts, int)

  def decode(self, ids: Iterable[int]) -> str:
    """Decodes ids. Ids past the vocabulary, which a padded model can produce, give nothing."""
    return self._encoding.decode([int(i) for i in ids if i < self.vocab_size])

  def token_bytes(self, token: int) -> bytes:
    return self._encoding.decode_single_token_bytes(token) if token < self.vocab_size else b""

  def to_json(self) -> dict:
    return {"kind": "gpt2"}

  def merges(self) -> list[tuple[bytes, bytes]]:
    """BPE merges, the pairs in the order in which they were learned.

    tiktoken keeps no merges, only the tokens in order of rank. The pair of a token is what is left
    of its bytes after every merge of a lower rank.
    """
    ranks = {}
    for rank in range(self.eot):
      ranks[self._encoding.decode_single_token_bytes(rank)] = rank

    pairs = []
    for token, rank in ranks.items():
      parts = [bytes([byte]) for byte in token]

      # Merge the neighbours of the lowest rank, as BPE encodes, until two parts are left.
      while len(parts) > 2:
        pair_ranks = [ranks.get(a + b, rank) for a, b in itertools.pairwise(parts)]
        i = pair_ranks.index(min(pair_ranks))
        parts[i : i + 2] = [parts[i] + parts[i + 1]]

      # Single bytes are in the vocabulary from the start: nothing was merged into them.
      if len(parts) == 2:
        pairs.append((parts[0], parts[1]))
    return pairs

  def vocab(self) -> dict[bytes, int]:
    """The id of each token's bytes."""
    return {self._encoding.decode_single_token_bytes(i): i for i in range(self.vocab_size)}


def byte_alphabet() -> dict[int, str]:
  """The printable character for each byte, as GPT-2's vocabulary files write it.

  Printable bytes of Latin-1 stand for themselves. The other 68 get the characters from U+0100 on,
  in their order.
  """
  # What these ranges leave out is a control character, a kind of space, or the soft hyphen.
  ranges = (("!", "~"), ("\xa1", "\xac"), ("\xae", "\xff"))
  alphabet = {}
  for first, last in ranges:
    for byte in range(ord(first), ord(last) + 1):
      alphabet[byte] = chr(byte)

  n_others = 0
  for byte in range(256):
    if byte not in alphabet:
      alphabet[byte] = chr(256 + n_others)
      n_others += 1
  return alphabet


def hash_byte_vocabulary(tokens: Iterable[bytes]) -> str:
  """The fingerprint of a byte-level vocabulary: of its tokens' bytes, in the order of their ids."""
  return hash_vocabulary("gpt2", " ".join(token.hex() for token in tokens).encode())
