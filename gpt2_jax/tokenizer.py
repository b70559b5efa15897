# SPDX-License-Identifier: Apache-2.0
"""Text to token ids and back: GPT-2's byte-level BPE, others like it, SentencePiece, and single characters.

The classes share one interface: `vocab_size`, `eot` (the id of `<|endoftext|>`, or None), `fingerprint`
(sha256 of what defines the mapping), `encode`, `encode_batch`, `encode_with_offsets`, `decode` and `to_json`.
`<|endoftext|>` inside a text is plain text unless `allow_eot`, so that no document can pretend to end.
"""

import base64
import dataclasses
import functools
import hashlib
import io
import itertools
import json
import pathlib
import re
from collections.abc import Iterable

import numpy as np
import sentencepiece
import tiktoken
import tokenizers

EOT = "<|endoftext|>"


@dataclasses.dataclass(frozen=True)
class Gpt2Bpe:
  """The 50,257 tokens of GPT-2, by tiktoken. Offline, TIKTOKEN_CACHE_DIR must hold its two files."""

  @functools.cached_property
  def _encoding(self) -> tiktoken.Encoding:
    try:
      return tiktoken.get_encoding("gpt2")
    except Exception as error:  # tiktoken passes on whatever its HTTP library raises
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
    pieces = [self._encoding.decode_single_token_bytes(i).hex() for i in range(self.vocab_size)]
    return _sha256("gpt2", " ".join(pieces).encode())

  def encode(self, text: str, allow_eot: bool = False) -> list[int]:
    return self._encoding.encode(text, allowed_special={EOT} if allow_eot else set(), disallowed_special=())

  def encode_batch(self, texts: list[str]) -> list[list[int]]:
    return [self._encoding.encode_ordinary(text) for text in texts]

  def encode_with_offsets(self, text: str) -> tuple[list[int], np.ndarray]:
    """The ids, and for each the character of the text in which it begins."""
    ids = self.encode(text)
    return ids, np.array(self._encoding.decode_with_offsets(ids)[1], int)

  def decode(self, ids: Iterable[int]) -> str:
    """Ids that spell no whole UTF-8 character give U+FFFD; ids past the vocabulary, of a padded model, give nothing."""
    return self._encoding.decode([int(i) for i in ids if i < self.vocab_size])

  def to_json(self) -> dict:
    return {"kind": "gpt2"}

  def merges(self) -> list[tuple[bytes, bytes]]:
    """The pairs in the order in which they are merged: each token's last two parts before it became whole."""
    ranks = {self._encoding.decode_single_token_bytes(i): i for i in range(self.eot)}
    pairs = []
    for piece, rank in ranks.items():
      parts = [piece[i : i + 1] for i in range(len(piece))]
      while len(parts) > 2:
        at = min(range(len(parts) - 1), key=lambda i: ranks.get(parts[i] + parts[i + 1], rank))
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
      pairs += [tuple(parts)] if len(parts) == 2 else []
    return pairs

  def vocab(self) -> dict[bytes, int]:
    """The id of each token's bytes."""
    return {self._encoding.decode_single_token_bytes(i): i for i in range(self.vocab_size)}


@dataclasses.dataclass(frozen=True)
class HuggingFace:
  """A tokenizer of the `tokenizers` library, held as the text of its tokenizer.json: byte-level BPE, mostly."""

  payload: str = dataclasses.field(repr=False)
  end: int | None = None  # the id that ends a text, where it is not that of <|endoftext|>

  @classmethod
  def from_merges(cls, vocab: dict[str, int], merges: list[tuple[str, str]]) -> "HuggingFace":
    """GPT-2's scheme with the content of a vocab.json (or encoder.json) and a merges.txt (or vocab.bpe)."""
    made = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, merges))
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    if EOT in vocab:
      made.add_special_tokens([tokenizers.AddedToken(EOT, normalized=False)])
    return cls(made.to_str())

  @functools.cached_property
  def _tokenizer(self) -> tokenizers.Tokenizer:
    try:
      made = tokenizers.Tokenizer.from_str(self.payload)
    except Exception as error:  # the library raises plain Exception
      raise ValueError(f"{len(self.payload):,} characters are no tokenizer.json ({error})") from error
    made.encode_special_tokens = True  # what looks like a special token is text
    made.no_padding()
    made.no_truncation()
    return made

  @property
  def vocab_size(self) -> int:
    return self._tokenizer.get_vocab_size(with_added_tokens=True)

  @functools.cached_property
  def eot(self) -> int | None:
    return self._tokenizer.token_to_id(EOT) if self.end is None else self.end

  @property
  def end_token(self) -> str | None:
    """How the end of a text is written in its vocabulary."""
    return None if self.eot is None else self._tokenizer.id_to_token(self.eot)

  @functools.cached_property
  def fingerprint(self) -> str:
    """With GPT-2's own vocabulary, that of Gpt2Bpe."""
    alphabet = {character: byte for byte, character in byte_alphabet().items()}
    table = self._tokenizer.get_vocab(with_added_tokens=True)
    pieces = [
      bytes(alphabet[c] for c in piece) if alphabet.keys() >= set(piece) else piece.encode()
      for piece, _ in sorted(table.items(), key=lambda item: item[1])
    ]
    return _sha256("gpt2", " ".join(piece.hex() for piece in pieces).encode())

  def encode(self, text: str, allow_eot: bool = False) -> list[int]:
    if allow_eot and self.eot is not None:
      return _join(self.eot, (self.encode(part) for part in text.split(EOT)))
    return self._tokenizer.encode(text, add_special_tokens=False).ids

  def encode_batch(self, texts: list[str]) -> list[list[int]]:
    return [found.ids for found in self._tokenizer.encode_batch(texts, add_special_tokens=False)]

  def encode_with_offsets(self, text: str) -> tuple[list[int], np.ndarray]:
    """The ids, and for each the character of the text in which it begins: a space before a word is part of it."""
    found = self._tokenizer.encode(text, add_special_tokens=False)
    begins, ends = np.array(found.offsets, int).reshape(-1, 2).T
    return found.ids, np.minimum(begins, np.concatenate([[0], ends])[:-1])  # some files leave out what is white

  def decode(self, ids: Iterable[int]) -> str:
    """Ids that spell no whole UTF-8 character give U+FFFD."""
    return self._tokenizer.decode([int(i) for i in ids], skip_special_tokens=False)

  def to_json(self) -> dict:
    return {"kind": "huggingface", "payload": self.payload, "end": self.end}


def byte_alphabet() -> dict[int, str]:
  """The printable character by which GPT-2's vocabulary files write each byte."""
  plain = [*range(ord("!"), ord("~") + 1), *range(ord("\xa1"), ord("\xac") + 1), *range(ord("\xae"), ord("\xff") + 1)]
  others = (byte for byte in range(256) if byte not in plain)
  return {byte: chr(byte) for byte in plain} | {byte: chr(256 + n) for n, byte in enumerate(others)}


@dataclasses.dataclass(frozen=True)
class SentencePiece:
  """A SentencePiece model, held as the bytes of its protocol buffer.

  Models of `train_sentencepiece` give every text back exactly; others may normalize, as their makers chose.
  """

  proto: bytes = dataclasses.field(repr=False)

  @functools.cached_property
  def _processor(self) -> sentencepiece.SentencePieceProcessor:
    try:
      return sentencepiece.SentencePieceProcessor(model_proto=self.proto)
    except RuntimeError as error:
      raise ValueError(f"{len(self.proto):,} bytes are no SentencePiece model") from error

  @functools.cached_property
  def _space_ids(self) -> list[int] | None:
    """How to spell U+2581, which SentencePiece would take for a space: in bytes, if the model has them."""
    ids = [self._processor.piece_to_id(f"<0x{byte:02X}>") for byte in "\u2581".encode()]
    return ids if all(self._processor.is_byte(i) for i in ids) else None

  @property
  def vocab_size(self) -> int:
    return self._processor.get_piece_size()

  @functools.cached_property
  def eot(self) -> int | None:
    eot = self._processor.eos_id()
    return eot if eot >= 0 else None

  @functools.cached_property
  def fingerprint(self) -> str:
    return _sha256("sentencepiece", self.proto)

  def encode(self, text: str, allow_eot: bool = False) -> list[int]:
    if allow_eot and self.eot is not None:
      return _join(self.eot, (self.encode(part) for part in text.split(EOT)))
    if self._space_ids and "\u2581" in text:
      return _join(self._space_ids, (self._processor.encode(part) for part in text.split("\u2581")))
    return self._processor.encode(text)

  def encode_batch(self, texts: list[str]) -> list[list[int]]:
    return [self.encode(text) for text in texts]

  def encode_with_offsets(self, text: str) -> tuple[list[int], np.ndarray]:
    """The ids, and for each the character of the text in which it begins."""
    ids, starts, begin = [], [], 0
    for part in text.split("\u2581") if self._space_ids else [text]:
      if begin:
        ids += self._space_ids
        starts += [begin - 1] * len(self._space_ids)
      found = self._processor.encode(part, return_type="offset_mapping")
      ids += found["ids"]
      starts += [begin + first for first, _ in found["offsets"]]
      begin += len(part) + 1
    return ids, np.array(starts, int)

  def decode(self, ids: Iterable[int]) -> str:
    """Ids that spell no whole UTF-8 character give U+FFFD."""
    runs = itertools.groupby((int(i) for i in ids if i < self.vocab_size), lambda i: i == self.eot)
    return "".join(EOT * len(list(run)) if eot else self._processor.decode(list(run)) for eot, run in runs)

  def to_json(self) -> dict:
    return {"kind": "sentencepiece", "proto": base64.b64encode(self.proto).decode("ascii")}


@dataclasses.dataclass(frozen=True)
class Characters:
  """One id for each character of a sorted alphabet. There is no `<|endoftext|>`: documents just follow."""

  alphabet: str
  eot = None

  @functools.cached_property
  def _codepoints(self) -> np.ndarray:
    codepoints = _codepoints(self.alphabet)
    if not len(codepoints) or np.any(np.diff(codepoints.astype(np.int64)) <= 0):
      raise ValueError(f"an alphabet is sorted characters, each once; got {self.alphabet[:40]!r}")
    return codepoints

  @property
  def vocab_size(self) -> int:
    return len(self._codepoints)

  @functools.cached_property
  def fingerprint(self) -> str:
    return _sha256("characters", self.alphabet.encode())

  def encode(self, text: str, allow_eot: bool = False) -> list[int]:
    """Raises ValueError at the first character that the alphabet lacks."""
    codepoints = _codepoints(text)
    ids = np.searchsorted(self._codepoints, codepoints).clip(max=self.vocab_size - 1)
    if len(unknown := np.flatnonzero(self._codepoints[ids] != codepoints)):
      raise ValueError(
        f"character {text[unknown[0]]!r} at position {unknown[0]:,} is none of the alphabet's {self.vocab_size}; "
        "train the characters on all of the text"
      )
    return ids.tolist()

  def encode_batch(self, texts: list[str]) -> list[list[int]]:
    return [self.encode(text) for text in texts]

  def encode_with_offsets(self, text: str) -> tuple[list[int], np.ndarray]:
    """The ids, and for each the character of the text in which it begins: its own."""
    return self.encode(text), np.arange(len(text))

  def decode(self, ids: Iterable[int]) -> str:
    return "".join(self.alphabet[int(i)] for i in ids if i < self.vocab_size)

  def to_json(self) -> dict:
    return {"kind": "characters", "alphabet": self.alphabet}


Tokenizer = Gpt2Bpe | HuggingFace | SentencePiece | Characters


def from_json(payload: dict) -> Tokenizer:
  """The inverse of `to_json`."""
  match payload:
    case {"kind": "gpt2"}:
      return Gpt2Bpe()
    case {"kind": "huggingface", "payload": text}:
      return HuggingFace(text, payload.get("end"))
    case {"kind": "sentencepiece", "proto": proto}:
      return SentencePiece(base64.b64decode(proto))
    case {"kind": "characters", "alphabet": alphabet}:
      return Characters(alphabet)
  raise ValueError(f"no tokenizer in {str(payload)[:60]!r}; its kind is gpt2, huggingface, sentencepiece or characters")


def load_tokenizer(name_or_path: str) -> Tokenizer:
  """The tokenizer named "gpt2", or in a SentencePiece `.model` file, or in a `.json` file of `to_json`.

  Raises ValueError for any other name, FileNotFoundError for a file that is not there.
  """
  if name_or_path == "gpt2":
    return Gpt2Bpe()
  path = pathlib.Path(name_or_path)
  if path.suffix not in (".model", ".json"):
    raise ValueError(f"tokenizer {name_or_path!r} is none of gpt2, a SentencePiece .model file, a .json file")
  if not path.is_file():
    raise FileNotFoundError(f"tokenizer {name_or_path}: no such file; launch/tokenize.py --train_tokenizer writes one")
  try:
    found = SentencePiece(path.read_bytes()) if path.suffix == ".model" else from_json(json.loads(path.read_text()))
    found.encode("")  # opens the model now rather than at the first text
  except ValueError as error:
    raise ValueError(f"tokenizer {name_or_path}: {error}") from error
  return found


def train_sentencepiece(texts: Iterable[str], vocab_size: int, max_bytes: int = 1 << 26) -> SentencePiece:
  """A lossless byte-pair SentencePiece model of `vocab_size` pieces, 256 of them single bytes.

  Learns from the first `max_bytes` of UTF-8 of `texts`; the same texts give the same model. Runs of spaces and
  ends of lines may be pieces, from which source code gains. Raises ValueError where the texts are too few for
  that many pieces.
  """
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
      num_threads=1,
      minloglevel=4,
    )
  except RuntimeError as error:
    reason = str(error).split("]")[-1].split(" or decrease")[0].strip() or "no text to learn from"
    raise ValueError(f"SentencePiece cannot learn {vocab_size:,} pieces from these texts: {reason}") from error
  return SentencePiece(model.getvalue())


def train_characters(texts: Iterable[str]) -> Characters:
  """The characters of the texts. Raises ValueError if there are none."""
  alphabet = set()
  for text in texts:
    alphabet.update(text)
  if not alphabet:
    raise ValueError("no text: an alphabet needs at least one character")
  return Characters("".join(sorted(alphabet)))


def _sentences(texts: Iterable[str], max_bytes: int) -> Iterable[str]:
  """Pieces of at most 4,096 characters, cut after an end of line where there is one."""
  for text in texts:
    for sentence in re.findall(r"(?s).{1,4095}\n|.{1,4096}", text):
      max_bytes -= len(sentence.encode())
      if max_bytes < 0:
        return
      yield sentence


def _join(separator: int | list[int], parts: Iterable[list[int]]) -> list[int]:
  separator = [separator] if isinstance(separator, int) else separator
  joined = list(itertools.chain.from_iterable(separator + part for part in parts))
  return joined[len(separator) :]


def _codepoints(text: str) -> np.ndarray:
  return np.frombuffer(text.encode("utf-32-le"), np.uint32)


def _sha256(kind: str, content: bytes) -> str:
  return hashlib.sha256(kind.encode() + b"\n" + content).hexdigest()
