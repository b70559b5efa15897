# SPDX-License-Identifier: Apache-2.0
"""Tokenizes a corpus into a token store; can train a tokenizer on the same text first. Copies
nanoGPT's and llm.c's token files into one. Packs examples for fine-tuning into rows.

  gpt2-jax tokenize --files='books/**/*.txt' --out=/data/books
  gpt2-jax tokenize --tfds_name=lm1b --text_key=text --out=gs://bucket/lm1b
  gpt2-jax tokenize --files=input.txt --characters=:90% \\
    --train_tokenizer=characters --tokenizer=characters.json --out=/data/train
  gpt2-jax tokenize --examples=chats.jsonl --template=dialogpt --n_ctx=1024 --out=/data/chats
  gpt2-jax tokenize --examples=stories.jsonl --recipe=story --out=/data/stories
  gpt2-jax tokenize --files='fineweb/*.parquet' --out=/data/fineweb
  gpt2-jax tokenize --files=stories.txt.gz --split_on='<|endoftext|>' --out=/data/stories
  gpt2-jax tokenize --tokens=openwebtext/train.bin --out=/data/openwebtext
  gpt2-jax tokenize --verify=/data/books

Files are text, .jsonl, .ndjson, .json or .parquet; all but the last may be compressed (.gz, .zst,
.bz2, .xz).
An example is a JSON object: {"text": ...}, {"prompt": ..., "completion": ...} or {"messages":
[{"role": ..., "content": ...}, ...]}, or texts by the names of a template's roles; any of them
with a "label".

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
from gpt2_jax.recipe import load_recipe

if TYPE_CHECKING:
  from gpt2_jax.data import TokenStore
  from gpt2_jax.data.examples import ExampleStore

_FILES = flags.DEFINE_string(
  "files", None, "Corpus of local files: globs with commas between them; ** crosses folders."
)
_TFDS_NAME = flags.DEFINE_string(
  "tfds_name", None, "Corpus of TFDS instead: name, name/config or name/config:version."
)
_TOKENS = flags.DEFINE_string(
  "tokens",
  None,
  "Token files instead, copied: nanoGPT's train.bin, llm.c's .bin shards, .npy; globs as --files.",
)
_SPLIT_ON = flags.DEFINE_string(
  "split_on", None, "What stands between the documents of a text of --files: '<|endoftext|>'."
)
_EXAMPLES = flags.DEFINE_string(
  "examples", None, "Examples for fine-tuning instead: .jsonl, .json, .parquet, globs as --files."
)
_TEMPLATE = flags.DEFINE_string(
  "template",
  None,
  "Markers of the examples' roles: plain (default), tldr, dialogpt, dialogpt_reverse, chat, "
  "chatml, gpt1, or a .json file; with --tfds_name, its records are examples.",
)
_RECIPE = flags.DEFINE_string(
  "recipe",
  None,
  "Application whose template, loss and n_ctx the examples have: a name of "
  "configs/recipes/forkme.py (story, chat, ...), or FILE.py:NAME.",
)
_LOSS = flags.DEFINE_enum(
  "loss",
  None,
  ["responses", "all"],
  "Tokens of the examples that are scored: of responses alone (default), or all.",
)
_N_CTX = flags.DEFINE_integer(
  "n_ctx", None, "Length of the rows that examples are packed into (default: 1024).", lower_bound=2
)
_PACK = flags.DEFINE_bool(
  "pack",
  True,
  "Several examples to a row; --nopack gives each a row, as private training takes them.",
)
_SPLIT = flags.DEFINE_string(
  "split", "train", "Split of the corpus, in TFDS's syntax: train, train[:90%], test."
)
_TEXT_KEY = flags.DEFINE_string(
  "text_key", "text", "Key of the text in a record: of a dataset, .jsonl, .json or .parquet file."
)
_DATA_DIR = flags.DEFINE_string(
  "data_dir", None, "TFDS's folder of prepared datasets (default: ~/tensorflow_datasets)."
)
_CHARACTERS = flags.DEFINE_string(
  "characters", None, "Slice of the text as FROM:TO, in characters or %: ':90%' or '90%:'."
)
_TOKENIZER = flags.DEFINE_string(
  "tokenizer",
  "gpt2",
  "Tokenizer: gpt2, a SentencePiece .model, a .json (also Hugging Face's tokenizer.json), "
  "WordPiece's vocab.txt, or a folder with one.",
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
  if _are_examples():
    return tokenize_examples(out, tokenizer_path)
  if _TOKENS.value:
    return copy_token_files(out, tokenizer_path)

  # 2. Open the corpus.
  options = (_SPLIT.value, _TEXT_KEY.value, _DATA_DIR.value)
  if _FILES.value:
    documents = corpus.file_documents(
      _FILES.value, *options, strict=_STRICT.value, split_on=_SPLIT_ON.value
    )
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


def copy_token_files(out: str, tokenizer_path: str) -> str:
  """Copies the token files that the flags name. Returns a line that describes their store."""
  from gpt2_jax.data.token_files import copy_tokens, token_documents
  from gpt2_jax.tokenizer import load_tokenizer

  tokenizer = load_tokenizer(tokenizer_path)
  documents = token_documents(_TOKENS.value, _SPLIT.value, tokenizer)
  return _describe(copy_tokens(documents, tokenizer, out, _PROCESSES.value))


def tokenize_examples(out: str, tokenizer_path: str) -> str:
  """Packs the examples that the flags name. Returns a line that describes their store."""
  from gpt2_jax.data import corpus
  from gpt2_jax.data.pack_examples import encode_examples
  from gpt2_jax.data.templates import ExampleEncoder, load_template
  from gpt2_jax.tokenizer import load_tokenizer

  # 1. What the template asks of the tokenizer is known before the examples are read.
  recipe = load_recipe(_RECIPE.value) if _RECIPE.value else None
  template = recipe.template() if recipe else load_template(_TEMPLATE.value or "plain")
  loss = _LOSS.value or (recipe.loss if recipe else "responses")
  n_ctx = _N_CTX.value or (recipe.n_ctx if recipe else 1024)
  encoder = ExampleEncoder(template, load_tokenizer(tokenizer_path), loss)
  _ = encoder.special_ids

  # 2. Open the examples: without a key, a document is a whole record.
  options = (_SPLIT.value, None, _DATA_DIR.value)
  if _EXAMPLES.value:
    documents = corpus.file_documents(_EXAMPLES.value, *options, strict=_STRICT.value)
  else:
    documents = corpus.tfds_documents(_TFDS_NAME.value, *options)

  # 3. Encode and pack them.
  store = encode_examples(
    documents,
    encoder,
    out,
    documents.source,
    n_ctx,
    _PROCESSES.value,
    strict=_STRICT.value,
    skipped=documents.skipped,
    packed=_PACK.value,
  )
  return _describe(store)


def _are_examples() -> bool:
  is_template = _TEMPLATE.value or _RECIPE.value and load_recipe(_RECIPE.value).form != "text"
  return bool(_EXAMPLES.value or is_template)


def _check_recipe() -> None:
  """Raises ValueError for a recipe without the data that it is made of."""
  if not _RECIPE.value:
    return
  recipe = load_recipe(_RECIPE.value)
  if _TEMPLATE.value:
    raise ValueError(f"--recipe={recipe.name[:40]} has its own template; leave out --template")
  is_text = recipe.form == "text"
  has_data = bool(_FILES.value or _TOKENS.value) if is_text else bool(_EXAMPLES.value)
  if not has_data and not _TFDS_NAME.value:
    raise ValueError(
      f"the recipe {recipe.name[:40]} has no data; give {recipe.data_hint()} (or --tfds_name)"
    )


def _check_example_flags() -> None:
  """Raises ValueError for flags of examples without any, and for flags that they do not have."""
  if not _are_examples():
    for flag in (_LOSS, _N_CTX):
      if flag.value is not None:
        raise ValueError(f"--{flag.name} is for examples: give --examples, or --template")
    return
  if _FILES.value:
    raise ValueError("--files are documents of text, and have no --template; give --examples")
  if _TRAIN.value or _CHARACTERS.value:
    flag = _TRAIN if _TRAIN.value else _CHARACTERS
    raise ValueError(f"--{flag.name} is for text, not for examples; run it with --files first")


def _check_text_flags() -> None:
  """Raises ValueError for flags of text where there is none."""
  if _SPLIT_ON.value is not None and not _FILES.value:
    raise ValueError("--split_on is for the texts of --files")
  if _SPLIT_ON.value == "":
    raise ValueError("--split_on is empty; give what stands between documents: '<|endoftext|>'")
  if _TOKENS.value and (_TRAIN.value or _CHARACTERS.value or _TEMPLATE.value):
    flag = next(flag for flag in (_TRAIN, _CHARACTERS, _TEMPLATE) if flag.value)
    raise ValueError(f"--{flag.name} is for text, and --tokens are tokens already")


def _check_flags() -> tuple[str, str]:
  """The paths of the store and the tokenizer. Raises ValueError for what cannot go well."""
  from gpt2_jax.data import corpus
  from gpt2_jax.tokenizer import load_tokenizer

  _check_recipe()
  corpora = (_FILES.value, _EXAMPLES.value, _TFDS_NAME.value, _TOKENS.value)
  if not _OUT.value or sum(map(bool, corpora)) != 1:
    raise ValueError("give --out and one of --files and --tfds_name, or of --examples, or --tokens")
  _check_example_flags()
  _check_text_flags()
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
  from gpt2_jax.data.stores import open_store

  store = open_store(path)
  store.verify()
  return f"{_describe(store)}; every checksum is right"


def _describe(store: TokenStore) -> str:
  from gpt2_jax.data.examples import ExampleStore

  counts = store.manifest
  if isinstance(store, ExampleStore):
    return _describe_examples(store)
  bytes_per_token = counts["bytes"] / counts["tokens"]
  return (
    f"{store.path}: {counts['tokens']:,} tokens of {counts['documents']:,} documents, "
    f"{bytes_per_token:.2f} bytes a token, vocabulary {store.tokenizer.vocab_size:,}{store.skipped}"
  )


def _describe_examples(store: ExampleStore) -> str:
  counts = store.manifest
  labels = f", labels 0 to {store.n_classes - 1}" if store.n_classes else ""
  return (
    f"{store.path}: {counts['examples']:,} examples in {counts['rows']:,} rows of {store.n_ctx:,}, "
    f"{counts['example_tokens']:,} tokens of which {counts['scored']:,} are scored, padding "
    f"{store.padding:.1%}; {counts['cut']:,} examples were longer than a row and lost "
    f"{counts['cut_tokens']:,} tokens{labels}{store.skipped}"
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
