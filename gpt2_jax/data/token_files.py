# SPDX-License-Identifier: Apache-2.0
"""Token files of other projects, as documents of tokens: nanoGPT's train.bin, llm.c's shards, .npy.

  train.bin     uint16 without a header (nanoGPT); documents end with <|endoftext|>
  shard.bin     256 int32 of header, then uint16 (llm.c); documents begin with <|endoftext|>
  shard.npy     NumPy's header, then uint16 or uint32 (build-nanogpt); as llm.c's

They are copied into a token store, and not read in place. A store has checksums, the tokenizer that
made the tokens, and gs://; these files have nothing that tells a truncated copy or another
vocabulary.
"""

import dataclasses
import functools
import hashlib
import os
import struct
import sys
import tokenize
from collections.abc import Iterator, Sequence

import numpy as np

from gpt2_jax.data.globs import drop_other_names, expand_globs
from gpt2_jax.data.skipped import Skipped
from gpt2_jax.data.token_store import TokenStore
from gpt2_jax.data.tokenize_corpus import PartWriter, corpus_job, write_store
from gpt2_jax.files import first_line, progress, user_path
from gpt2_jax.tokenizer import Tokenizer

# What llm.c writes first into its files.
LLMC_MAGIC = 20240520
LLMC_HEADER_BYTES = 256 * 4
LLMC_OTHERS = {
  20240326: "a model's weights",
  20240327: "a model's debugging state",
  20240328: "a tokenizer",
  20240522: "an evaluation's examples",
  20240801: "Llama 3's tokens, of another vocabulary",
}
# A document has less than 2 GiB, as one of text.
MAX_TOKENS = 1 << 30
# Tokens that are looked at at a time.
CHUNK = 1 << 22


@dataclasses.dataclass(frozen=True)
class TokenFile:
  """Where the tokens lie in a file. `continues`: its last document may go on in the next file."""

  path: str
  dtype: np.dtype
  offset: int
  n_tokens: int
  continues: bool

  def read(self, start: int, stop: int) -> np.ndarray:
    """Tokens [start, stop). Raises ValueError if the file has become shorter."""
    offset = self.offset + start * self.dtype.itemsize
    tokens = np.fromfile(self.path, self.dtype, stop - start, offset=offset)
    if len(tokens) != stop - start:
      raise ValueError(f"{self.path} has become shorter while it was read")
    return tokens

  def chunks(self) -> Iterator[np.ndarray]:
    for start in range(0, self.n_tokens, CHUNK):
      yield self.read(start, min(start + CHUNK, self.n_tokens))


def open_token_file(path: str) -> TokenFile:
  """Finds the tokens of a file by its header. Raises ValueError for what holds none."""
  if path.lower().endswith(".npy"):
    return _open_npy(path)
  if not path.lower().endswith(".bin"):
    raise ValueError(
      f"{path} is by its name no token file (.bin, .npy); text is tokenized with --files"
    )
  size = os.path.getsize(path)
  with open(path, "rb") as file:
    head = file.read(4096)
  magic, version, n_tokens = struct.unpack("<3i", head[:12].ljust(12, b"\0"))
  if magic in LLMC_OTHERS:
    raise ValueError(f"{path} holds {LLMC_OTHERS[magic]} (llm.c's), and no tokens of GPT-2")
  if magic == LLMC_MAGIC:
    return _open_llmc(path, size, version, n_tokens)

  if size % 2:
    raise ValueError(
      f"{path} has {size:,} bytes, and tokens have two each: it is cut, or no tokens"
    )
  # Pairs of letters would be ids like any other.
  if len(head) >= 32 and head.isascii() and not set(head) & set(range(9)):
    raise ValueError(f"{path} holds text, and no tokens; it is tokenized with --files")
  file = TokenFile(path, np.dtype("<u2"), 0, size // 2, continues=False)
  # Of ids of four bytes, each is below 65,536: the other two bytes are 0.
  first = file.read(0, min(CHUNK, file.n_tokens))
  if len(first) >= 16 and not first[1::2].any():
    raise ValueError(
      f"{path} looks like tokens of four bytes each, and a .bin file has two (uint16); write it "
      "so, or as a .npy file, which says what it holds"
    )
  return file


def _open_llmc(path: str, size: int, version: int, n_tokens: int) -> TokenFile:
  if version != 1:
    raise ValueError(f"{path} is a token file of llm.c, version {version}; 1 is read (uint16)")
  expected = LLMC_HEADER_BYTES + 2 * n_tokens
  if size != expected:
    raise ValueError(
      f"{path} has {size:,} bytes, and {expected:,} with the {n_tokens:,} tokens that its header "
      "counts: it is cut; get it again"
    )
  return TokenFile(path, np.dtype("<u2"), LLMC_HEADER_BYTES, n_tokens, continues=True)


def _open_npy(path: str) -> TokenFile:
  try:
    array = np.load(path, mmap_mode="r", allow_pickle=False)
  # NumPy reads the header as Python's tokens where it is no literal.
  except (ValueError, EOFError, tokenize.TokenError) as error:
    raise ValueError(f"{path} cannot be read as .npy ({first_line(error, 200)})") from error
  if array.ndim != 1 or array.dtype not in (np.dtype("<u2"), np.dtype("<u4")):
    raise ValueError(
      f"{path} holds {array.dtype.name[:40]} in {array.ndim} dimensions, and tokens are one row of "
      "uint16 or uint32"
    )
  return TokenFile(path, array.dtype, array.offset, len(array), continues=True)


@dataclasses.dataclass(frozen=True)
class TokenDocuments(Sequence):
  """Documents of token files, random access, in the order of the files: `documents[i] -> tokens`.

  Document i has the tokens [starts[i], stops[i]) of all files together, without any eot.
  """

  files: tuple[TokenFile, ...]
  starts: np.ndarray = dataclasses.field(repr=False)
  stops: np.ndarray = dataclasses.field(repr=False)
  source: dict = dataclasses.field(repr=False)
  skipped: Skipped = Skipped()
  former_source: None = None

  def __len__(self) -> int:
    return len(self.starts)

  @functools.cached_property
  def _file_starts(self) -> np.ndarray:
    return np.cumsum([0] + [file.n_tokens for file in self.files])

  def __getitem__(self, i: int) -> np.ndarray:
    start, stop = int(self.starts[i]), int(self.stops[i])

    # It may begin in one file and end in another.
    pieces = []
    first = int(np.searchsorted(self._file_starts, start, side="right")) - 1
    for file, file_start in zip(self.files[first:], self._file_starts[first:], strict=False):
      if file_start >= stop:
        break
      low = max(0, start - int(file_start))
      pieces.append(file.read(low, min(stop - int(file_start), file.n_tokens)))
    return np.concatenate(pieces)


def token_documents(patterns: str, split: str, tokenizer: Tokenizer) -> TokenDocuments:
  """Opens the token files that match globs, sorted by name, and cuts them at the tokenizer's eot.

  An eot may stand before documents or after them. `split` is in TFDS's syntax, "train[:90%]", and
  keeps the order of the files. Raises FileNotFoundError if nothing matches, ValueError for a file
  that holds no tokens, or tokens that the tokenizer does not have.
  """
  paths = drop_other_names(expand_globs(patterns))
  files = tuple(map(open_token_file, paths))
  starts, stops, sha256 = _index(files, tokenizer)
  low, high = _parse_split(split, len(starts))
  source = {"kind": "tokens", "patterns": patterns, "split": split, "sha256": sha256}
  return TokenDocuments(files, starts[low:high], stops[low:high], source)


def copy_tokens(
  documents: TokenDocuments, tokenizer: Tokenizer, path: str, processes: int | None = None
) -> TokenStore:
  """Writes the documents into a token store, each followed by the tokenizer's eot if it has one.

  It is the store that `encode_corpus` writes of the same documents as text, and errors are the
  same.
  """
  path = user_path(path)
  job = corpus_job(documents, tokenizer, documents.source)
  writer = TokenFileWriter(documents, tokenizer, path, job, strict=False)
  return write_store(writer, processes or os.cpu_count(), documents.skipped, None)


def _index(files: Sequence[TokenFile], tokenizer: Tokenizer) -> tuple[np.ndarray, np.ndarray, str]:
  """Where the documents start and stop, and the SHA-256 of the tokens. Reads all of them."""
  # 1. Find the cuts: the place of an eot, which belongs to no document, or the end of a file.
  eots, ends = [np.empty(0, np.int64)], []
  digest = hashlib.sha256()
  position = 0
  unknown = _UnknownTokens(tokenizer.vocab_size)
  for file in progress(files, "reading", " files"):
    digest.update(f"{file.n_tokens} {file.dtype.str} {file.continues}\n".encode())
    file_start = position
    for tokens in file.chunks():
      digest.update(tokens.tobytes())
      unknown.look(tokens, file.path, position - file_start)
      if tokenizer.eot is not None:
        eots.append(np.flatnonzero(tokens == tokenizer.eot) + position)
      position += len(tokens)
    if not file.continues:
      ends.append(position)
  unknown.check()

  # 2. Documents are what lies between the cuts, where anything does.
  eots = np.concatenate(eots)
  n_empty = int(np.count_nonzero(np.diff(eots) == 1))
  if n_empty:
    print(f"{n_empty:,} documents without a token, left out", file=sys.stderr)

  ends = np.array([*ends, position], np.int64)
  starts = np.sort(np.concatenate([[0], eots + 1, ends]))
  stops = np.sort(np.concatenate([eots, ends, [position]]))
  has_tokens = stops > starts
  starts, stops = starts[has_tokens], stops[has_tokens]
  if not len(starts):
    raise ValueError(f"{len(files):,} files hold {position:,} tokens, and no document")

  # 3. Each has to fit into the memory of the process that copies it.
  longest = int(np.argmax(stops - starts))
  if stops[longest] - starts[longest] >= MAX_TOKENS:
    raise ValueError(
      f"the document from token {starts[longest]:,} on has {stops[longest] - starts[longest]:,} "
      f"tokens, and must have less than {MAX_TOKENS:,}: is the --tokenizer theirs?"
    )
  return starts, stops, digest.hexdigest()


class _UnknownTokens:
  """Counts the ids that a vocabulary does not have, and keeps the first place."""

  def __init__(self, vocab_size: int):
    self._vocab_size = vocab_size
    self._count = 0
    self._first = ""

  def look(self, tokens: np.ndarray, path: str, position: int) -> None:
    places = np.flatnonzero(tokens >= self._vocab_size)
    if len(places) and not self._count:
      self._first = f"{path} has id {tokens[places[0]]:,} at token {position + places[0]:,}"
    self._count += len(places)

  def check(self) -> None:
    """Raises ValueError if there was any."""
    if self._count:
      raise ValueError(
        f"{self._count:,} ids are beyond the tokenizer's {self._vocab_size:,}, the first: "
        f"{self._first}; give the --tokenizer that made them, or this is no token file"
      )


def _parse_split(split: str, n_documents: int) -> tuple[int, int]:
  """The first document of a split of "train", and the one after its last."""
  from gpt2_jax.data.import_tfds import import_tfds

  tfds = import_tfds()
  info = tfds.core.SplitInfo(name="train", shard_lengths=[n_documents], num_bytes=0)
  try:
    (part,) = tfds.core.ReadInstruction.from_spec(split).to_absolute({"train": info})
  except (ValueError, KeyError, AssertionError) as error:
    raise ValueError(
      f"the tokens have no split {split[:40]!r}: it is train, or a part of it such as train[:90%]"
    ) from error
  low, high = part.from_ or 0, n_documents if part.to is None else part.to
  if low >= high:
    raise ValueError(f"the split {split[:40]} holds none of {n_documents:,} documents of tokens")
  return low, high


@dataclasses.dataclass(frozen=True)
class TokenFileWriter(PartWriter):
  """Writes documents that are tokens already, each followed by the tokenizer's eot if any."""

  @functools.cached_property
  def _n_bytes(self) -> np.ndarray:
    """The bytes of UTF-8 of each token."""
    return np.array([len(self.tokenizer.token_bytes(i)) for i in range(self.tokenizer.vocab_size)])

  def _encode_document(self, index: int) -> tuple[list[np.ndarray], int]:
    tokens = self.documents[index]
    eot = [] if self.tokenizer.eot is None else [self.tokenizer.eot]
    return [tokens.astype(self.dtype), np.array(eot, self.dtype)], int(self._n_bytes[tokens].sum())
