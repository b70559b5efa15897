# SPDX-License-Identifier: Apache-2.0
"""Tokenizer files in a checkpoint's folder: tokenizer.json, or a vocabulary and its merges.

The two have different names with Hugging Face and with OpenAI.
"""

import contextlib
import json
import pathlib
from collections.abc import Iterator

from gpt2_jax.convert.safe_load import read_json
from gpt2_jax.files import first_line, read_text
from gpt2_jax.tokenizer import EOT, Gpt2Bpe, HuggingFace, Tokenizer, byte_alphabet, from_json

# For tokenizers that the other files cannot hold.
OWN_TOKENIZER = "gpt2_jax_tokenizer.json"

# The vocabulary and its merges, by Hugging Face's names and by OpenAI's.
VOCAB_AND_MERGES = (("vocab.json", "merges.txt"), ("encoder.json", "vocab.bpe"))


def read_vocabulary(path: pathlib.Path, n_vocab: int) -> Tokenizer | None:
  """Reads the tokenizer of a folder, or takes the default one for `n_vocab` tokens.

  Raises ValueError for a damaged one, and for one with more tokens than the model has.
  """
  with checked(path):
    tokenizer = _read_tokenizer(path)
  if tokenizer is None:
    return default_tokenizer(n_vocab)
  check_tokenizer(tokenizer, n_vocab, path)
  return tokenizer


@contextlib.contextmanager
def checked(path: pathlib.Path) -> Iterator[None]:
  """Makes one line of what a damaged tokenizer at `path` raises."""
  try:
    yield
  except ValueError as error:
    raise ValueError(
      f"the vocabulary in {path} is damaged ({first_line(error)}); fetch it again"
    ) from error


def check_tokenizer(tokenizer: Tokenizer, n_vocab: int, path: pathlib.Path) -> None:
  """Opens the tokenizer of `path`. Raises ValueError if it is damaged, or larger than the model."""
  with checked(path):
    vocab_size = tokenizer.vocab_size
    # Ids need not be those from 0 on: one that the model lacks would read another's embedding.
    largest = tokenizer.largest_id if isinstance(tokenizer, HuggingFace) else vocab_size - 1

  if vocab_size > n_vocab:
    raise ValueError(
      f"the vocabulary in {path} has {vocab_size:,} tokens, and the model {n_vocab:,}"
    )
  if largest >= n_vocab:
    raise ValueError(
      f"the vocabulary in {path} has a token with id {largest}, and the model {n_vocab:,} tokens"
    )


def _read_tokenizer(path: pathlib.Path) -> Tokenizer | None:
  """The tokenizer of a folder's files, the most specific first; None without any."""
  if (path / OWN_TOKENIZER).is_file():
    return from_json(read_json(path / OWN_TOKENIZER))
  if (path / "tokenizer.json").is_file():
    return HuggingFace(read_text(path / "tokenizer.json"))

  for vocab, merges in VOCAB_AND_MERGES:
    if (path / vocab).is_file() and (path / merges).is_file():
      return HuggingFace.from_merges(read_json(path / vocab), _read_merges(path / merges))
  return None


def _read_merges(path: pathlib.Path) -> list[tuple[str, ...]]:
  """The pairs of a merges file, after its line of version if it has one."""
  lines = read_text(path).split("\n")
  if lines[0].startswith("#version"):
    lines = lines[1:]
  return [tuple(line.split()) for line in lines if line]


def default_tokenizer(n_vocab: int) -> Tokenizer | None:
  """GPT-2's tokenizer for a model of its vocabulary, padded to a multiple of 64 or not."""
  return Gpt2Bpe() if n_vocab in (50257, 50304) else None


def write_vocabulary(tokenizer: Tokenizer | None, path: pathlib.Path, n_ctx: int) -> None:
  """Writes the tokenizer's files, which `transformers`, or at least `read_vocabulary`, loads."""
  # 1. GPT-2's BPE also as the older pair of files.
  if isinstance(tokenizer, Gpt2Bpe):
    tokenizer = _write_vocab_and_merges(tokenizer, path)

  # 2. tokenizer.json, and the config that transformers wants with it. The class is one that adds
  #    no token of its own: GPT2Tokenizer would add <|endoftext|>.
  if isinstance(tokenizer, HuggingFace):
    (path / "tokenizer.json").write_text(tokenizer.payload, encoding="utf-8")
    end = tokenizer.end_token
    if end is None:
      config = {"tokenizer_class": "PreTrainedTokenizerFast"}
    else:
      config = dict.fromkeys(("bos_token", "eos_token", "unk_token"), end)
      config["tokenizer_class"] = "GPT2Tokenizer"
    config["model_max_length"] = n_ctx
    (path / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")

  # 3. What tokenizer.json cannot say: other kinds, and another end of text.
  fits = isinstance(tokenizer, HuggingFace) and tokenizer.end is None
  if tokenizer is not None and not fits:
    (path / OWN_TOKENIZER).write_text(json.dumps(tokenizer.to_json()))


def _write_vocab_and_merges(tokenizer: Gpt2Bpe, path: pathlib.Path) -> HuggingFace:
  """Writes vocab.json and merges.txt; returns the same tokenizer as Hugging Face's."""
  alphabet = byte_alphabet()

  def printable(token: bytes) -> str:
    return "".join(map(alphabet.get, token))

  vocab = {}
  for token, i in tokenizer.vocab().items():
    vocab[EOT if i == tokenizer.eot else printable(token)] = i
  merges = []
  for left, right in tokenizer.merges():
    merges.append((printable(left), printable(right)))

  (path / "vocab.json").write_text(json.dumps(vocab), encoding="utf-8")
  lines = ["#version: 0.2", *map(" ".join, merges), ""]
  (path / "merges.txt").write_text("\n".join(lines), encoding="utf-8")
  return HuggingFace.from_merges(vocab, merges)
