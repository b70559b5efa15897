# SPDX-License-Identifier: Apache-2.0
"""Hugging Face tokenizers: the content of a tokenizer.json, or a vocab.json with its merges.txt."""

import contextlib
import dataclasses
import functools
import json
import os
import secrets
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from gpt2_jax.files import first_line
from gpt2_jax.tokenizer.byte_bpe import byte_alphabet, hash_byte_vocabulary
from gpt2_jax.tokenizer.interface import EOT, check_unicode, join_ids, parsed_tokens

if TYPE_CHECKING:
  import tokenizers

# Only one thread at a time moves stderr, which is the process's.
_stderr_lock = threading.Lock()


@dataclasses.dataclass(frozen=True)
class HuggingFace:
  """Hugging Face tokenizer (byte-level BPE, mostly), held as the text of its tokenizer.json.

  `end` is the id that ends a text, for vocabularies that do not call it `<|endoftext|>`. `config`
  is what transformers keeps beside it, as JSON: names of special tokens, a chat template. `limit`
  is the model's vocabulary where added tokens have ids beyond it: a text with one is refused.
  """

  payload: str = dataclasses.field(repr=False)
  end: int | None = None
  config: str | None = dataclasses.field(default=None, repr=False)
  limit: int | None = None

  @classmethod
  def from_merges(
    cls, vocab: dict[str, int], merges: list[tuple[str, str]], add_prefix_space: bool = False
  ) -> "HuggingFace":
    """Byte-level BPE from the content of GPT-2's files.

    `vocab` is a vocab.json (OpenAI's encoder.json), `merges` a merges.txt (OpenAI's vocab.bpe).
    Raises ValueError for ids that are none, or are those of two tokens.
    """
    import tokenizers

    tokens = {}
    for token, i in vocab.items():
      # The type itself, since True is an int to isinstance.
      if type(i) is not int or i < 0:
        raise ValueError(f"the id of {token[:40]!r} is {str(i)[:40]!r}, and ids count from 0")
      if i in tokens:
        raise ValueError(f"{tokens[i][:40]!r} and {token[:40]!r} have one id, {i}")
      tokens[i] = token

    bpe = _call(tokenizers.models.BPE, vocab, merges)
    tokenizer = tokenizers.Tokenizer(bpe)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    if EOT in vocab:
      tokenizer.add_special_tokens([tokenizers.AddedToken(EOT, normalized=False)])
    return cls(tokenizer.to_str())

  @classmethod
  def from_word_pieces(cls, vocab: dict[str, int], unknown: str, **settings) -> "HuggingFace":
    """BERT's WordPiece: `##` begins a piece inside a word. `settings` are of BertNormalizer."""
    import tokenizers

    model = _call(tokenizers.models.WordPiece, vocab, unk_token=unknown)
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.normalizer = tokenizers.normalizers.BertNormalizer(clean_text=True, **settings)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = tokenizers.decoders.WordPiece(prefix="##")
    return cls(tokenizer.to_str())

  @functools.cached_property
  def _tokenizer(self) -> "tokenizers.Tokenizer":
    return open_tokenizer_json(self.payload)

  @functools.cached_property
  def _parsers(self) -> dict[tuple[str, ...], "tokenizers.Tokenizer"]:
    """Tokenizers that parse special tokens, by those that they parse."""
    return {}

  @property
  def vocab_size(self) -> int:
    size = self._tokenizer.get_vocab_size(with_added_tokens=True)
    return size if self.limit is None else min(size, self.limit)

  @functools.cached_property
  def largest_id(self) -> int:
    """The largest id of a token; -1 for a vocabulary without any. Ids may leave some out."""
    largest = max(self._tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)
    return largest if self.limit is None else min(largest, self.limit - 1)

  def added_from(self, first: int) -> dict[str, int] | None:
    """The tokens with ids from `first` on; None if not all were added to the vocabulary later."""
    own = self._tokenizer.get_vocab(with_added_tokens=False)
    if max(own.values(), default=-1) >= first:
      return None
    added = self._tokenizer.get_added_tokens_decoder()
    return {added[i].content: i for i in sorted(added) if i >= first}

  @functools.cached_property
  def eot(self) -> int | None:
    return self._tokenizer.token_to_id(EOT) if self.end is None else self.end

  @property
  def end_token(self) -> str | None:
    """How the vocabulary writes the token that ends a text."""
    return None if self.eot is None else self._tokenizer.id_to_token(self.eot)

  @functools.cached_property
  def fingerprint(self) -> str:
    """SHA-256 of the vocabulary; with GPT-2's own, it equals the one of Gpt2Bpe."""
    bytes_of = {character: byte for byte, character in byte_alphabet().items()}
    vocab = self._tokenizer.get_vocab(with_added_tokens=True)

    # Tokens outside the byte alphabet are special ones, which stand for their own characters.
    tokens = []
    for token in sorted(vocab, key=vocab.get):
      if bytes_of.keys() >= set(token):
        tokens.append(bytes(map(bytes_of.get, token)))
      else:
        tokens.append(token.encode())
    return hash_byte_vocabulary(tokens)

  def special_id(self, token: str) -> int | None:
    return self.eot if token == EOT else self._tokenizer.token_to_id(token)

  @functools.cached_property
  def special_tokens(self) -> tuple[str, ...]:
    """Added tokens, and the one that ends a text where it is not among them."""
    tokens = {i: token.content for i, token in self._tokenizer.get_added_tokens_decoder().items()}
    if self.end_token is not None:
      tokens.setdefault(self.eot, self.end_token)
    return tuple(tokens[i] for i in sorted(tokens))

  @functools.cached_property
  def byte_run_ids(self) -> frozenset[int]:
    """Ids of the bytes <0x00> to <0xFF> of a byte fallback: a bad byte spoils the run it is in."""
    ids = [self._tokenizer.token_to_id(f"<0x{byte:02X}>") for byte in range(256)]
    if None in ids:
      return frozenset()
    # A vocabulary may hold them as texts.
    is_fallback = self.decode([ids[0xC3], ids[0xA9]]).strip() == "\u00e9"
    return frozenset(ids) if is_fallback else frozenset()

  def encode(
    self, text: str, allow_eot: bool = False, special: bool | Sequence[str] = ()
  ) -> list[int]:
    if allow_eot and self.eot is not None:
      parts = text.split(EOT)
      return join_ids([self.eot], (self.encode(part, special=special) for part in parts))

    # No special tokens: a file may put one before each text, which no text of a corpus has.
    check_unicode(text)
    tokenizer = self._parser(parsed_tokens(special, self.special_tokens))
    return self._checked(_call(tokenizer.encode, text, add_special_tokens=False).ids)

  def _checked(self, ids: list[int]) -> list[int]:
    """The ids. Raises ValueError for one that the model lacks."""
    if self.limit is not None and max(ids, default=-1) >= self.limit:
      beyond = next(i for i in ids if i >= self.limit)
      raise ValueError(
        f"the text has the token {self._tokenizer.id_to_token(beyond)!r} with id {beyond:,}, and "
        f"the model {self.limit:,} tokens: the token was added without resizing the model"
      )
    return ids

  def _parser(self, tokens: tuple[str, ...]) -> "tokenizers.Tokenizer":
    """The same tokenizer, in which these special tokens are parsed and the others are text.

    The library parses added tokens of its file, but for special ones: so these become ordinary
    ones there. How spaces beside them are read stays with each token's flags.
    """
    if tokens not in self._parsers:
      payload = json.loads(self.payload)
      is_masked = self._mask(payload, tokens)
      added = {token["content"]: token for token in payload.get("added_tokens") or ()}
      for token in tokens:
        flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        entry = {"id": self._tokenizer.token_to_id(token), "content": token} | flags
        added[token] = entry | added.get(token, {}) | {"special": False}

      payload["added_tokens"] = sorted(added.values(), key=lambda token: token["id"])
      is_other = is_masked or bool(tokens)
      self._parsers[tokens] = (
        open_tokenizer_json(json.dumps(payload)) if is_other else self._tokenizer
      )
    return self._parsers[tokens]

  def _mask(self, payload: dict, parsed: tuple[str, ...]) -> bool:
    """Renames special tokens in the vocabulary, but for the parsed ones, so that no text has them.

    BPE cannot merge its way to a special token. The other models look up any part of a text, and
    would take `</s>` in a document for the end of it. Returns whether any was renamed.
    """
    model = payload["model"]
    if model.get("type") not in ("Unigram", "WordLevel", "WordPiece"):
      return False
    added = payload.get("added_tokens") or ()
    hidden = {token["content"] for token in added if token["special"]} | {self.end_token}
    # What is unknown is looked up by its name, and means as little when a text writes it.
    hidden -= {*parsed, model.get("unk_token")}

    # A name that nobody can write into a text beforehand.
    secret = secrets.token_hex(16)
    vocab = model["vocab"]
    pieces = vocab if isinstance(vocab, dict) else [piece for piece, _ in vocab]
    hidden &= set(pieces)
    names = {piece: secret + piece if piece in hidden else piece for piece in pieces}
    if isinstance(vocab, dict):
      model["vocab"] = {names[piece]: i for piece, i in vocab.items()}
    else:
      model["vocab"] = [(names[piece], score) for piece, score in vocab]
    payload["added_tokens"] = [token for token in added if token["content"] not in hidden]
    return bool(hidden)

  def encode_batch(self, texts: list[str]) -> list[list[int]]:
    for text in texts:
      check_unicode(text)
    encodings = _call(self._parser(()).encode_batch, texts, add_special_tokens=False)
    return [self._checked(encoding.ids) for encoding in encodings]

  def encode_with_offsets(self, text: str) -> tuple[list[int], np.ndarray]:
    """Encodes a text, with the character at which each token begins.

    A space before a word is part of the word's token. Some files (RoBERTa's) leave such spaces out
    of the offsets: a token then begins where the one before it ends.
    """
    check_unicode(text)
    encoding = _call(self._parser(()).encode, text, add_special_tokens=False)

    # The reshape gives an empty text two columns, too.
    begins, ends = np.array(encoding.offsets, int).reshape(-1, 2).T
    previous_ends = np.concatenate([[0], ends])[:-1]
    return self._checked(encoding.ids), np.minimum(begins, previous_ends)

  def decode(self, ids: Iterable[int]) -> str:
    return _call(self._tokenizer.decode, list(map(int, ids)), skip_special_tokens=False)

  def token_bytes(self, token: int) -> bytes:
    written = self._tokenizer.id_to_token(token)
    if written is None:
      return b""

    # U+FFFD stands for a part of a character. Only then is the token's spelling needed, which is
    # bytes in a byte-level vocabulary and text in others.
    text = self.decode([token])
    if token in self.byte_run_ids:
      return bytes([int(written[len("<0x") : -1], 16)])
    bytes_of = {character: byte for byte, character in byte_alphabet().items()}
    if "\ufffd" in text and bytes_of.keys() >= set(written):
      return bytes(map(bytes_of.get, written))
    return text.encode()

  def to_json(self) -> dict:
    content = {"kind": "huggingface", "payload": self.payload, "end": self.end}
    # Only where they say something: files from before they were kept have neither.
    if self.config is not None:
      content["config"] = self.config
    if self.limit is not None:
      content["limit"] = self.limit
    return content


def open_tokenizer_json(payload: str) -> "tokenizers.Tokenizer":
  """Reads a tokenizer.json. Raises ValueError for a text that is none."""
  import tokenizers

  try:
    with _silent_stderr():
      tokenizer = _call(tokenizers.Tokenizer.from_str, payload)
  except ValueError as error:
    raise ValueError(f"{len(payload):,} characters are no tokenizer.json ({error})") from error

  # What looks like a special token is text.
  tokenizer.encode_special_tokens = True

  # Files of sentence embedders and others ask for both; a corpus wants neither.
  tokenizer.no_padding()
  tokenizer.no_truncation()
  return tokenizer


def _call(function: Callable, *args, **kwargs):
  """Calls the tokenizers library. Raises ValueError, in one line, for whatever it raises."""
  try:
    return function(*args, **kwargs)
  except BaseException as error:
    # Any kind: it raises plain Exception, and its panics are no Exceptions and have no public name.
    if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
      raise
    raise ValueError(f"the tokenizers library refuses: {first_line(error, 200)}") from error


@contextlib.contextmanager
def _silent_stderr() -> Iterator[None]:
  """Sends the process's stderr to nowhere: a panic writes lines there before it is raised."""
  with _stderr_lock, open(os.devnull, "w") as nowhere:
    try:
      stderr = os.dup(2)
    except OSError:
      # The process has none.
      yield
      return
    os.dup2(nowhere.fileno(), 2)
    try:
      yield
    finally:
      os.dup2(stderr, 2)
      os.close(stderr)
