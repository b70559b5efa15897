# SPDX-License-Identifier: Apache-2.0
"""The tokenizer in a checkpoint's folder: read, compared with the model, written for others."""

import contextlib
import dataclasses
import json
import pathlib
from collections.abc import Iterator

from gpt2_jax.files import first_line, note, summarize
from gpt2_jax.tokenizer import (
  EOT,
  OWN_TOKENIZER,
  Characters,
  Gpt1Bpe,
  Gpt2Bpe,
  HuggingFace,
  SentencePiece,
  Tokenizer,
  byte_alphabet,
  characters_as_json,
  check_tokenizer_json,
  read_tokenizer_folder,
  sentencepiece_as_json,
)
from gpt2_jax.tokenizer.companion_files import CONFIG
from gpt2_jax.tokenizer.gpt1_bpe import HUGGING_FACE_FILES

N_GPT2 = 50257


def read_vocabulary(path: pathlib.Path, n_vocab: int) -> Tokenizer | None:
  """Reads the tokenizer of a folder, or takes GPT-2's for a folder without any and `n_vocab` of it.

  Raises ValueError for a damaged one, for one of a kind that is not read, and for one with more
  tokens than the model has. Where only added tokens are beyond the model, a text with one is
  refused later, which a line on stderr says.
  """
  with checked(path):
    tokenizer = read_tokenizer_folder(path)
  if tokenizer is None:
    tokenizer = default_tokenizer(n_vocab)
    if tokenizer is not None:
      note(f"{path} has no tokenizer and {n_vocab:,} tokens: GPT-2's are assumed")
    return tokenizer
  tokenizer = _limited(tokenizer, n_vocab, path)
  check_tokenizer(tokenizer, n_vocab, path)
  return tokenizer


def _limited(tokenizer: Tokenizer, n_vocab: int, path: pathlib.Path) -> Tokenizer:
  """The tokenizer, which refuses the tokens that were added without resizing the model."""
  with checked(path):
    if not isinstance(tokenizer, HuggingFace) or tokenizer.largest_id < n_vocab:
      return tokenizer
    beyond = tokenizer.added_from(n_vocab)
    if beyond is None:
      return tokenizer

  listed = summarize((f"{token!r} {i}" for token, i in beyond.items()), 4, each=40)
  note(
    f"{path} has {len(beyond):,} added tokens beyond the model's {n_vocab:,} ({listed}); a text "
    f"that holds one is refused"
  )
  return dataclasses.replace(tokenizer, limit=n_vocab)


@contextlib.contextmanager
def checked(path: pathlib.Path) -> Iterator[None]:
  """Makes one line of what a damaged tokenizer at `path` raises."""
  try:
    yield
  except ValueError as error:
    raise ValueError(
      f"the vocabulary in {path} cannot be used ({first_line(error, 400)})"
    ) from error


def check_tokenizer(tokenizer: Tokenizer, n_vocab: int, path: pathlib.Path) -> None:
  """Opens the tokenizer of `path`. Raises ValueError if it is damaged, or larger than the model."""
  with checked(path):
    vocab_size = tokenizer.vocab_size
    # Ids need not be those from 0 on: one that the model lacks would read another's embedding.
    largest = tokenizer.largest_id if isinstance(tokenizer, HuggingFace) else vocab_size - 1

    end = tokenizer.eot
    if isinstance(tokenizer, HuggingFace) and end is not None and tokenizer.end_token is None:
      raise ValueError(f"a text ends with id {end}, which is no token")

  if vocab_size > n_vocab:
    raise ValueError(
      f"the vocabulary in {path} has {vocab_size:,} tokens, and the model {n_vocab:,}"
    )
  if largest >= n_vocab:
    raise ValueError(
      f"the vocabulary in {path} has a token with id {largest}, and the model {n_vocab:,} tokens"
    )


def check_pair(tokenizer: Tokenizer, n_vocab: int) -> None:
  """Raises ValueError if a model of `n_vocab` tokens and its tokenizer would not load again."""
  largest = tokenizer.vocab_size - 1
  if isinstance(tokenizer, HuggingFace):
    check_tokenizer_json(tokenizer.payload, "the tokenizer")
    is_readable = tokenizer.added_from(n_vocab) is not None
    largest = min(tokenizer.largest_id, n_vocab - 1) if is_readable else tokenizer.largest_id
  if largest >= n_vocab:
    raise ValueError(
      f"the tokenizer has ids up to {largest:,}, and the model {n_vocab:,} tokens: they could not "
      f"be loaded again; give the model's own tokenizer, or None"
    )


def default_tokenizer(n_vocab: int) -> Tokenizer | None:
  """GPT-2's tokenizer for a model of its vocabulary, padded to a multiple of 64 or not."""
  return Gpt2Bpe() if n_vocab in (N_GPT2, 50304) else None


def write_vocabulary(tokenizer: Tokenizer | None, path: pathlib.Path, n_ctx: int) -> None:
  """Writes the tokenizer's files, which `transformers` loads with the same ids.

  Where tokenizer.json cannot say a kind (`as_tokenizer_json` is None), only `read_vocabulary` does.
  """
  # GPT-1's is a pair of files, and the class says how to read it.
  if isinstance(tokenizer, Gpt1Bpe):
    _write_gpt1(tokenizer, path, n_ctx)
    return

  # 1. GPT-2's BPE also as the older pair of files.
  if isinstance(tokenizer, Gpt2Bpe):
    tokenizer = _write_vocab_and_merges(tokenizer, path)

  # 2. tokenizer.json, and the config that transformers wants with it.
  converted = as_tokenizer_json(tokenizer)
  if converted is not None:
    (path / "tokenizer.json").write_text(converted.payload, encoding="utf-8")
    config = _transformers_config(converted, n_ctx)
    text = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
    (path / "tokenizer_config.json").write_text(text, encoding="utf-8")

  # 3. What these files cannot say, and `read_vocabulary` reads first: another kind, another end.
  fits = isinstance(tokenizer, HuggingFace) and tokenizer.end_token in (
    EOT,
    config.get("eos_token"),
  )
  if tokenizer is not None and not fits:
    (path / OWN_TOKENIZER).write_text(json.dumps(tokenizer.to_json()))


def _write_gpt1(tokenizer: Gpt1Bpe, path: pathlib.Path, n_ctx: int) -> None:
  contents = (tokenizer.vocabulary, tokenizer.merges)
  for name, content in zip(HUGGING_FACE_FILES, contents, strict=True):
    (path / name).write_text(content, encoding="utf-8")
  config = {
    "tokenizer_class": "OpenAIGPTTokenizer",
    "unk_token": "<unk>",
    "model_max_length": n_ctx,
    "additional_special_tokens": list(tokenizer.special_tokens),
  }
  (path / CONFIG).write_text(json.dumps(config, indent=2) + "\n")


def as_tokenizer_json(tokenizer: Tokenizer) -> HuggingFace | None:
  """The tokenizer as a tokenizer.json with the same ids; None if there is no such form."""
  try:
    match tokenizer:
      case HuggingFace():
        return tokenizer
      case Characters():
        return characters_as_json(tokenizer)
      case SentencePiece():
        return sentencepiece_as_json(tokenizer)
  except ValueError:
    # The two libraries cut its texts in two ways.
    return None
  return None


def _transformers_config(tokenizer: HuggingFace, n_ctx: int) -> dict:
  """The content of tokenizer_config.json: what was beside the tokenizer, or what it says itself."""
  if tokenizer.config is not None:
    config = json.loads(tokenizer.config)
  elif tokenizer.end_token is not None:
    config = dict.fromkeys(("bos_token", "eos_token", "unk_token"), tokenizer.end_token)
  else:
    config = {}
  if tokenizer.config is None:
    # A text that is decoded is what was encoded, spaces before commas included.
    config["clean_up_tokenization_spaces"] = False
  config.setdefault("model_max_length", n_ctx)

  # GPT2Tokenizer builds GPT-2's byte-level BPE anew, whatever tokenizer.json says besides, and adds
  # <|endoftext|> for what is not named. The other class reads the file as it is.
  payload = json.loads(tokenizer.payload)
  is_named = all(config.get(name) for name in ("bos_token", "eos_token", "unk_token"))
  if is_named and _is_gpt2_bpe(payload):
    config["tokenizer_class"] = "GPT2Tokenizer"
    config["add_prefix_space"] = payload["pre_tokenizer"]["add_prefix_space"]
  else:
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
  return config


def _is_gpt2_bpe(payload: dict) -> bool:
  """Whether a tokenizer.json is GPT-2's byte-level BPE, with any vocabulary."""
  model = payload["model"]
  switches = ("unk_token", "byte_fallback", "ignore_merges", "fuse_unk", "dropout")
  switches += ("continuing_subword_prefix", "end_of_word_suffix")
  is_plain = model.get("type") == "BPE" and not any(model.get(name) for name in switches)

  pre_tokenizer = payload.get("pre_tokenizer") or {}
  cuts_as_gpt2 = pre_tokenizer.get("type") == "ByteLevel" and pre_tokenizer.get("use_regex", True)
  decoder = payload.get("decoder") or {}
  return (
    is_plain
    and cuts_as_gpt2
    and decoder.get("type") == "ByteLevel"
    and payload.get("normalizer") is None
  )


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
