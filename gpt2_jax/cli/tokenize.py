# SPDX-License-Identifier: Apache-2.0
"""Tokenizes a corpus into a token store; can train a tokenizer on the same text first.

  gpt2-jax tokenize --files='books/**/*.txt' --out=/data/books
  gpt2-jax tokenize --tfds_name=lm1b --text_key=text --out=gs://bucket/lm1b
  gpt2-jax tokenize --files=input.txt --characters=:90% \\
    --train_tokenizer=characters --tokenizer=characters.json --out=/data/train
  gpt2-jax tokenize --verify=/data/books

A job that was killed resumes when the same command is run again; of a store that was damaged, it
writes the damaged parts again. Records that are no text are skipped and counted; --strict stops at
the first.
"""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
from collections.abc import Iterable
from typing import TYPE_CHECKING

from absl import flags

from gpt2_jax.cli import shell
from gpt2_jax.files import atomic_write, local_path, user_path

if TYPE_CHECKING:
  from gpt2_jax.data import TokenStore

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
_STRICT = flags.DEFINE_bool(
  "strict", False, "Stop at the first record that is not UTF-8 or has no text, instead of skipping."
)


def main() -> None:
  print(tokenize() if _VERIFY.value is None else verify_store(_VERIFY.value))


def tokenize() -> str:
  """Tokenizes the corpus that the flags name. Returns a line that describes the token store."""
  from gpt2_jax.data import corpus, encode_corpus
  from gpt2_jax.tokenizer import load_tokenizer

  # 1. Look at all flags, before hours are spent on any of them.
  out, tokenizer_path = _check_flags()

  # 2. Open the corpus.
  options = (_SPLIT.value, _TEXT_KEY.value, _DATA_DIR.value)
  if _FILES.value:
    documents = corpus.file_documents(_FILES.value, *options, strict=_STRICT.value)
  else:
    documents = corpus.tfds_documents(_TFDS_NAME.value, *options)
  if _CHARACTERS.value:
    documents = corpus.slice_characters(documents, _CHARACTERS.value)

  # 3. Train the tokenizer, if asked to, and load it from its file, as the next job will.
  if _TRAIN.value:
    texts = documents if _STRICT.value else corpus.readable(documents)
    _write_tokenizer(tokenizer_path, _train_tokenizer(texts, _TRAIN.value))
  tokenizer = load_tokenizer(tokenizer_path)

  # 4. Encode the documents.
  store = encode_corpus(
    documents,
    tokenizer,
    out,
    documents.source,
    _PROCESSES.value,
    strict=_STRICT.value,
    skipped=documents.skipped,
    former_source=documents.former_source,
  )
  return _describe(store)


def _check_flags() -> tuple[str, str]:
  """The paths of the store and the tokenizer. Raises ValueError for what cannot go well."""
  from gpt2_jax.data import corpus
  from gpt2_jax.tokenizer import load_tokenizer

  if not _OUT.value or bool(_FILES.value) == bool(_TFDS_NAME.value):
    raise ValueError("give --out and one of --files and --tfds_name")
  if _CHARACTERS.value:
    corpus.parse_bounds(_CHARACTERS.value)
  out = user_path(_OUT.value)
  if "://" not in out:
    _check_folder(pathlib.Path(out), "--out")
  if _DATA_DIR.value is not None:
    user_path(_DATA_DIR.value)

  if not _TRAIN.value:
    tokenizer_path = user_path(_TOKENIZER.value)
    # GPT-2's is fetched when its size is asked for.
    _ = load_tokenizer(tokenizer_path).vocab_size
    return out, tokenizer_path
  tokenizer_path = local_path(_TOKENIZER.value)
  suffix = {"sentencepiece": ".model", "characters": ".json"}[_TRAIN.value]
  if tokenizer_path.suffix != suffix:
    raise ValueError(
      f"--train_tokenizer={_TRAIN.value} writes a {suffix} file; --tokenizer is "
      f"{_TOKENIZER.value[:200]!r}"
    )
  _check_folder(tokenizer_path.parent, "--tokenizer")
  return out, str(tokenizer_path)


def _check_folder(folder: pathlib.Path, flag: str) -> None:
  """Raises ValueError unless this is a folder that can be written to, or can be made."""
  existing = folder.absolute()
  while not os.path.lexists(existing):
    existing = existing.parent
  if not existing.is_dir():
    raise ValueError(f"{flag}: {existing} is no folder, so nothing can be written to {folder}")

  # A store that is there already may be read-only.
  if existing != folder.absolute() and not os.access(existing, os.W_OK):
    raise ValueError(f"{flag}: {existing} is read-only, so {folder} cannot be made")


def _train_tokenizer(texts: Iterable[str], kind: str) -> bytes:
  """Trains a tokenizer, and returns the content of its file."""
  from gpt2_jax.tokenizer import train_characters, train_sentencepiece

  if kind == "sentencepiece":
    return train_sentencepiece(texts, _VOCAB_SIZE.value).proto
  return json.dumps(train_characters(texts).to_json()).encode()


def verify_store(path: str) -> str:
  """Checks a token store against its checksums. Raises ValueError if it is damaged."""
  from gpt2_jax.data import TokenStore

  store = TokenStore.open(user_path(path))
  store.verify()
  return f"{_describe(store)}; every checksum is right"


def _describe(store: TokenStore) -> str:
  counts = store.manifest
  bytes_per_token = counts["bytes"] / counts["tokens"]
  return (
    f"{store.path}: {counts['tokens']:,} tokens of {counts['documents']:,} documents, "
    f"{bytes_per_token:.2f} bytes a token, vocabulary {store.tokenizer.vocab_size:,}{store.skipped}"
  )


def _write_tokenizer(path: str, content: bytes) -> None:
  """Writes the tokenizer's file. Raises ValueError if the path holds another tokenizer.

  The same content again is no error, so that the same command resumes.
  """
  # Another job may write it at this moment, and then it is there.
  file = pathlib.Path(path)
  with contextlib.suppress(FileExistsError), atomic_write(file) as partial:
    partial.write_bytes(content)
  if file.read_bytes() != content:
    raise ValueError(
      f"{path} is another tokenizer already; name a new --tokenizer, or remove that file"
    )


def run() -> None:
  shell.run(main, __doc__, imports=("gpt2_jax.data",))
