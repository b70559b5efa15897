# SPDX-License-Identifier: Apache-2.0
"""Tokenizes a corpus into a token store; can train a tokenizer on the same text first.

  python launch/tokenize.py --files='books/**/*.txt' --out=/data/books
  python launch/tokenize.py --tfds_name=lm1b --text_key=text --out=gs://bucket/lm1b
  python launch/tokenize.py --files=input.txt --characters=:90% \\
    --train_tokenizer=characters --tokenizer=characters.json --out=/data/train
  python launch/tokenize.py --verify=/data/books

A job that was killed resumes when the same command is run again.
"""

import os
import sys

# Python puts launch/ first on the path, where this file would hide the standard library's tokenize.
# The project's root takes its place.
if __name__ == "__main__":
  sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

import json
import pathlib
from collections.abc import Sequence

from absl import flags

from gpt2_jax import tokenizer as tokenizer_lib
from gpt2_jax.data import TokenStore, corpus, encode_corpus
from gpt2_jax.files import atomic_write
from launch import shell

_FILES = flags.DEFINE_string(
  "files", None, "Corpus of local files: globs with commas between them; ** crosses folders."
)
_TFDS_NAME = flags.DEFINE_string(
  "tfds_name", None, "Corpus of TFDS instead: name, name/config or name/config:version."
)
_SPLIT = flags.DEFINE_string(
  "split", "train", "Split of the corpus, in TFDS's syntax: train, train[:90%], test."
)
_TEXT_KEY = flags.DEFINE_string(
  "text_key", "text", "Key of the text in a record of the dataset, or in a line of a .jsonl file."
)
_DATA_DIR = flags.DEFINE_string(
  "data_dir", None, "TFDS's folder of prepared datasets (default: ~/tensorflow_datasets)."
)
_CHARACTERS = flags.DEFINE_string(
  "characters", None, "Slice of the text as FROM:TO, in characters or %: ':90%' or '90%:'."
)
_TOKENIZER = flags.DEFINE_string(
  "tokenizer", "gpt2", "Tokenizer: gpt2, a SentencePiece .model file, or a tokenizer .json file."
)
_TRAIN = flags.DEFINE_enum(
  "train_tokenizer",
  None,
  ["sentencepiece", "characters"],
  "Train the tokenizer on this text first, and write it to --tokenizer (.model or .json).",
)
_VOCAB_SIZE = flags.DEFINE_integer(
  "vocab_size", 4096, "Vocabulary size of a SentencePiece model that is trained.", lower_bound=1
)
_OUT = flags.DEFINE_string(
  "out", None, "Folder of the token store (tokenized shards), local or gs://."
)
_PROCESSES = flags.DEFINE_integer(
  "processes", None, "Worker processes (default: one a CPU core).", lower_bound=1
)
_VERIFY = flags.DEFINE_string(
  "verify", None, "Instead of tokenizing, check the tokens of this token store's folder (SHA-256)."
)


def main() -> None:
  print(verify(_VERIFY.value) if _VERIFY.value else tokenize())


def tokenize() -> str:
  """Tokenizes the corpus that the flags name. Returns a line that describes the token store."""
  if not _OUT.value or bool(_FILES.value) == bool(_TFDS_NAME.value):
    raise ValueError("give --out and one of --files and --tfds_name")

  # 1. Open the corpus.
  options = (_SPLIT.value, _TEXT_KEY.value, _DATA_DIR.value)
  if _FILES.value:
    documents = corpus.file_documents(_FILES.value, *options)
  else:
    documents = corpus.tfds_documents(_TFDS_NAME.value, *options)
  if _CHARACTERS.value:
    documents = corpus.slice_characters(documents, _CHARACTERS.value)

  # 2. Train the tokenizer, if asked to, and load it from its file, as the next job will.
  if _TRAIN.value:
    _write_tokenizer(_TOKENIZER.value, train_tokenizer(documents, _TRAIN.value))
  tokenizer = tokenizer_lib.load_tokenizer(_TOKENIZER.value)

  # 3. Encode the documents.
  store = encode_corpus(documents, tokenizer, _OUT.value, documents.source, _PROCESSES.value)
  return _describe(store)


def train_tokenizer(documents: Sequence[str], kind: str) -> bytes:
  """Trains a tokenizer, and returns the content of its file.

  Raises ValueError if --tokenizer does not name a file of that kind.
  """
  # Before training, which may take minutes.
  suffix = {"sentencepiece": ".model", "characters": ".json"}[kind]
  if not _TOKENIZER.value.endswith(suffix):
    raise ValueError(
      f"--train_tokenizer={kind} writes a {suffix} file; --tokenizer is {_TOKENIZER.value!r}"
    )

  if kind == "sentencepiece":
    return tokenizer_lib.train_sentencepiece(documents, _VOCAB_SIZE.value).proto
  return json.dumps(tokenizer_lib.train_characters(documents).to_json()).encode()


def verify(path: str) -> str:
  """Checks a token store against its checksums. Raises ValueError if it is damaged."""
  store = TokenStore.open(path)
  store.verify()
  return f"{_describe(store)}; every checksum is right"


def _describe(store: TokenStore) -> str:
  counts = store.manifest
  bytes_per_token = counts["bytes"] / counts["tokens"]
  return (
    f"{store.path}: {counts['tokens']:,} tokens of {counts['documents']:,} documents, "
    f"{bytes_per_token:.2f} bytes a token, vocabulary {store.tokenizer.vocab_size:,}"
  )


def _write_tokenizer(path: str, content: bytes) -> None:
  """Writes the tokenizer's file. Raises ValueError if the path holds another tokenizer.

  The same content again is no error, so that the same command resumes.
  """
  file = pathlib.Path(path)
  if file.exists() and file.read_bytes() != content:
    raise ValueError(
      f"{path} is another tokenizer already; name a new --tokenizer, or remove that file"
    )
  with atomic_write(file, overwrite=True) as partial:
    partial.write_bytes(content)


if __name__ == "__main__":
  shell.run(main)
