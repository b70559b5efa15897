# SPDX-License-Identifier: Apache-2.0
"""SentencePiece tokenizers: models of others, and models trained here, which are lossless."""

import base64
import dataclasses
import functools
import io
import itertools
import re
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from gpt2_jax.tokenizer.interface import (
  EOT,
  check_unicode,
  hash_vocabulary,
  join_ids,
  parsed_tokens,
  split_at_tokens,
)

if TYPE_CHECKING:
  import sentencepiece

# SentencePiece writes a space as this character, and would read the character as a space.
SPACE_SYMBOL = "\u2581"


@dataclasses.dataclass(frozen=True)
class SentencePiece:
  """SentencePiece model, held as the bytes of its protocol buffer.

  Models of `train_sentencepiece` give every text back exactly. Others may normalize the text.
  """

  proto: bytes = dataclasses.field(repr=False)
  byte_run_ids = frozenset()

  @functools.cached_property
  def _processor(self) -> "sentencepiece.SentencePieceProcessor":
    # The library, not this module: imports are absolute.
    import sentencepiece

    # The library takes no bytes at all for a model that is not loaded yet.
    if not self.proto:
      raise ValueError("a SentencePiece model of 0 bytes is none")
    try:
      return sentencepiece.SentencePieceProcessor(model_proto=self.proto)
    except RuntimeError as error:
      raise ValueError(f"{len(self.proto):,} bytes are no SentencePiece model") from error

  @functools.cached_property
  def _space_symbol_ids(self) -> list[int] | None:
    """The bytes of SPACE_SYMBOL as ids, which keep it apart from a space.

    None for a model without byte fallback: there the two are the same.
    """
    ids = [self._processor.piece_to_id(f"<0x{byte:02X}>") for byte in SPACE_SYMBOL.encode()]
    return ids if all(map(self._processor.is_byte, ids)) else None

  @property
  def vocab_size(self) -> int:
    return self._processor.get_piece_size()

  @functools.cached_property
  def eot(self) -> int | None:
    eos_id = self._processor.eos_id()
    return eos_id if eos_id >= 0 else None

  @functools.cached_property
  def fingerprint(self) -> str:
    return hash_vocabulary("sentencepiece", self.proto)

  def special_id(self, token: str) -> int | None:
    piece = self._processor.piece_to_id(token)
    if self._processor.id_to_piece(piece) == token:
      return piece
    return self.eot if token == EOT else None

  @functools.cached_property
  def special_tokens(self) -> tuple[str, ...]:
    """Control pieces, which no text encodes to, and the piece of what is unknown."""
    model = self._processor
    ids = [i for i in range(self.vocab_size) if model.is_control(i) or model.is_unknown(i)]
    return tuple(model.id_to_piece(i) for i in ids)

  def encode(
    self, text: str, allow_eot: bool = False, special: bool | Sequence[str] = ()
  ) -> list[int]:
    check_unicode(text)
    if allow_eot and self.eot is not None:
      parts = text.split(EOT)
      return join_ids([self.eot], (self.encode(part, special=special) for part in parts))

    # Each part between special tokens is a text of its own.
    tokens = parsed_tokens(special, self.special_tokens)
    if tokens:
      ids = []
      for part, is_token in split_at_tokens(text, tokens):
        ids += [self._processor.piece_to_id(part)] if is_token else self.encode(part)
      return ids

    # A space symbol in the text is written in bytes, so that it does not come back as a space.
    if self._space_symbol_ids and SPACE_SYMBOL in text:
      parts = text.split(SPACE_SYMBOL)
      return join_ids(self._space_symbol_ids, map(self._processor.encode, parts))
    return self._processor.encode(text)

  def control_names(self) -> dict[str, str]:
    """How the model writes its special tokens, by transformers' names for them."""
    model = self._processor
    ids = {"bos_token": model.bos_id(), "eos_token": model.eos_id()}
    ids |= {"unk_token": model.unk_id(), "pad_token": model.pad_id()}
    return {name: model.id_to_piece(i) for name, i in ids.items() if i >= 0}

  def library_ids(self, text: str) -> list[int]:
    """The ids as the library alone gives them: a space symbol in the text is a space."""
    return self._processor.encode(text)

  def encode_batch(self, texts: list[str]) -> list[list[int]]:
    return list(map(self.encode, texts))

  def encode_with_offsets(self, text: str) -> tuple[list[int], np.ndarray]:
    check_unicode(text)
    # The library's offsets count the characters of what it was given, so parts are shifted.
    parts = text.split(SPACE_SYMBOL) if self._space_symbol_ids else [text]
    ids = []
    starts = []

    # `begin` is the place of the part in the text. One space symbol lies between two parts.
    begin = 0
    for part in parts:
      if begin:
        ids += self._space_symbol_ids
        starts += [begin - 1] * len(self._space_symbol_ids)

      encoding = self._processor.encode(part, return_type="offset_mapping")
      ids += encoding["ids"]
      starts += [begin + first for first, _ in encoding["offsets"]]
      begin += len(part) + 1
    return ids, np.array(starts, int)

  def decode(self, ids: Iterable[int]) -> str:
    known_ids = [int(i) for i in ids if i < self.vocab_size]

    # The library decodes eot, a control piece, to nothing; here it gives its text.
    texts = []
    for is_eot, run in itertools.groupby(known_ids, lambda i: i == self.eot):
      run = list(run)
      texts.append(EOT * len(run) if is_eot else self._processor.decode(run))
    return "".join(texts)

  def token_bytes(self, token: int) -> bytes:
    if token >= self.vocab_size:
      return b""
    piece = self._processor.id_to_piece(token)
    if self._processor.is_byte(token):
      return bytes([int(piece[len("<0x") : -1], 16)])
    return EOT.encode() if token == self.eot else piece.replace(SPACE_SYMBOL, " ").encode()

  def to_json(self) -> dict:
    return {"kind": "sentencepiece", "proto": base64.b64encode(self.proto).decode("ascii")}


def train_sentencepiece(
  texts: Iterable[str], vocab_size: int, max_bytes: int = 1 << 26
) -> SentencePiece:
  """Trains a lossless byte-pair SentencePiece model with `vocab_size` pieces, 256 of them bytes.

  It learns from the first `max_bytes` of UTF-8 of `texts`. The same texts give the same model. Runs
  of spaces and ends of lines may be pieces, which helps source code. Raises ValueError if the texts
  are too few for that many pieces.
  """
  import sentencepiece

  model = io.BytesIO()
  try:
    sentencepiece.SentencePieceTrainer.train(
      sentence_iterator=_sentences(texts, max_bytes),
      model_writer=model,
      vocab_size=vocab_size,
      model_type="bpe",
      byte_fallback=True,
      character_coverage=0.9999,
      allow_whitespace_only_pieces=True,
      # What makes it lossless: nothing is normalized, no space is added or dropped.
      normalization_rule_name="identity",
      add_dummy_prefix=False,
      remove_extra_whitespaces=False,
      # The end of a text is a control piece: no text encodes to it.
      unk_id=0,
      eos_id=1,
      eos_piece=EOT,
      bos_id=-1,
      pad_id=-1,
      max_sentence_length=1 << 20,
      # One thread, so that the same texts give the same model.
      num_threads=1,
      minloglevel=4,
    )
  except RuntimeError as error:
    # The library writes "INTERNAL: file.cc(line) [condition] reason"; only the reason helps.
    reason = str(error).split("]")[-1].split(" or decrease")[0].strip() or "no text to learn from"
    raise ValueError(
      f"SentencePiece cannot learn {vocab_size:,} pieces from these texts: {reason}"
    ) from error
  return SentencePiece(model.getvalue())


def _sentences(texts: Iterable[str], max_bytes: int) -> Iterable[str]:
  """Cuts texts into at most 4,096 characters each, after the end of a line if there is one."""
  for text in texts:
    for sentence in re.findall(r"(?s).{1,4095}\n|.{1,4096}", text):
      max_bytes -= len(sentence.encode())
      if max_bytes < 0:
        return
      yield sentence
