# SPDX-License-Identifier: Apache-2.0
"""Text to a token store, and a tokenizer from the same text if asked for.

  python launch/tokenize.py --files='books/**/*.txt' --out=/data/books
  python launch/tokenize.py --tfds_name=lm1b --text_key=text --out=gs://bucket/lm1b
  python launch/tokenize.py --files=input.txt --characters=:90% \\
    --train_tokenizer=characters --tokenizer=characters.json --out=/data/train
  python launch/tokenize.py --verify=/data/books

A job that was killed continues when it is started again.
"""

import os
import sys

if __name__ == "__main__":  # the root in place of launch/, where this file would hide the standard library's tokenize
  sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

import json
import pathlib
from collections.abc import Sequence

from absl import flags

from gpt2_jax import tokenizer as tokenizer_lib
from gpt2_jax.data import corpus, token_store
from launch import shell

_FILES = flags.DEFINE_string("files", None, "Globs of local files, with commas between them; ** crosses folders.")
_TFDS_NAME = flags.DEFINE_string("tfds_name", None, "A TFDS dataset instead: name, name/config or name/config:version.")
_SPLIT = flags.DEFINE_string("split", "train", "Which documents, in TFDS's syntax: train, train[:90%], test.")
_TEXT_KEY = flags.DEFINE_string("text_key", "text", "Where a record of the dataset, or a line of .jsonl, has its text.")
_DATA_DIR = flags.DEFINE_string("data_dir", None, "TFDS's folder of prepared datasets (~/tensorflow_datasets).")
_CHARACTERS = flags.DEFINE_string(
  "characters", None, "Part of the text as FROM:TO in characters or %: ':90%' or '90%:'."
)
_TOKENIZER = flags.DEFINE_string("tokenizer", "gpt2", "gpt2, a SentencePiece .model file, or a tokenizer .json file.")
_TRAIN = flags.DEFINE_enum(
  "train_tokenizer",
  None,
  ["sentencepiece", "characters"],
  "Learn the tokenizer from this text first and write it to --tokenizer (.model or .json).",
)
_VOCAB_SIZE = flags.DEFINE_integer(
  "vocab_size", 4096, "Pieces of a SentencePiece model that is learned.", lower_bound=1
)
_OUT = flags.DEFINE_string("out", None, "The folder of the token store, local or gs://.")
_PROCESSES = flags.DEFINE_integer("processes", None, "Worker processes (one a core).", lower_bound=1)
_VERIFY = flags.DEFINE_string("verify", None, "Check every token of the store in this folder against its checksums.")


def main() -> None:
  print(verify(_VERIFY.value) if _VERIFY.value else tokenize())


def tokenize() -> str:
  """Runs the job of the flags; returns what it made, in a line."""
  if not _OUT.value or bool(_FILES.value) == bool(_TFDS_NAME.value):
    raise ValueError("give --out and one of --files and --tfds_name")
  if _FILES.value:
    documents = corpus.file_documents(_FILES.value, _SPLIT.value, _TEXT_KEY.value, _DATA_DIR.value)
  else:
    documents = corpus.tfds_documents(_TFDS_NAME.value, _SPLIT.value, _TEXT_KEY.value, _DATA_DIR.value)
  if _CHARACTERS.value:
    documents = corpus.slice_characters(documents, _CHARACTERS.value)
  if _TRAIN.value:
    _write(_TOKENIZER.value, learn(documents, _TRAIN.value))
  tokenizer = tokenizer_lib.load_tokenizer(_TOKENIZER.value)
  store = token_store.encode_corpus(documents, tokenizer, _OUT.value, documents.source, _PROCESSES.value)
  return _describe(store)


def learn(documents: Sequence[str], kind: str) -> bytes:
  """The content of the tokenizer's file. Raises ValueError if --tokenizer does not name such a file."""
  suffix = {"sentencepiece": ".model", "characters": ".json"}[kind]
  if not _TOKENIZER.value.endswith(suffix):
    raise ValueError(f"--train_tokenizer={kind} writes a {suffix} file; --tokenizer is {_TOKENIZER.value!r}")
  if kind == "sentencepiece":
    return tokenizer_lib.train_sentencepiece(documents, _VOCAB_SIZE.value).proto
  return json.dumps(tokenizer_lib.train_characters(documents).to_json()).encode()


def verify(path: str) -> str:
  store = token_store.TokenStore.open(path)
  store.verify()
  return f"{_describe(store)}; every checksum is right"


def _describe(store: token_store.TokenStore) -> str:
  counts = store.manifest
  ratio = counts["bytes"] / counts["tokens"]
  return (
    f"{store.path}: {counts['tokens']:,} tokens of {counts['documents']:,} documents, "
    f"{ratio:.2f} bytes a token, vocabulary {store.tokenizer.vocab_size:,}"
  )


def _write(path: str, content: bytes) -> None:
  """Writes the file whole or not at all. Raises ValueError where there is another one."""
  if os.path.exists(path) and pathlib.Path(path).read_bytes() != content:
    raise ValueError(f"{path} is another tokenizer already; name a new --tokenizer, or remove that file")
  pathlib.Path(f"{path}.new").write_bytes(content)
  os.replace(f"{path}.new", path)


if __name__ == "__main__":
  shell.run(main)
