# SPDX-License-Identifier: Apache-2.0
"""Loads a tokenizer: by name, from a file, or from its JSON object."""

import base64
import pathlib

from gpt2_jax.files import local_path, read_json_object
from gpt2_jax.tokenizer.byte_bpe import Gpt2Bpe
from gpt2_jax.tokenizer.characters import Characters
from gpt2_jax.tokenizer.companion_files import read_companions
from gpt2_jax.tokenizer.folder import (
  TOKENIZER_JSON,
  VOCABULARIES,
  read_folder,
  read_tokenizer_json,
  read_word_pieces,
)
from gpt2_jax.tokenizer.gpt1_bpe import Gpt1Bpe
from gpt2_jax.tokenizer.huggingface import HuggingFace
from gpt2_jax.tokenizer.interface import Tokenizer
from gpt2_jax.tokenizer.sentencepiece import SentencePiece

# For tokenizers that no other file of a folder can hold.
OWN_TOKENIZER = "gpt2_jax_tokenizer.json"


def from_json(payload: dict) -> Tokenizer:
  """Makes a tokenizer from its JSON object: the inverse of `to_json`.

  Raises ValueError for an object of another shape. The tokenizer opens at its first text.
  """
  match payload:
    case {"kind": "gpt2"}:
      return Gpt2Bpe()
    case {"kind": "huggingface", "payload": str(text)}:
      end = payload.get("end")
      # The type itself, since True is an int to isinstance.
      if end is not None and (type(end) is not int or end < 0):
        raise ValueError(f"the end of a text is {str(end)[:40]!r}; it is a token's id, or null")
      config, limit = payload.get("config"), payload.get("limit")
      if config is not None and not isinstance(config, str):
        raise ValueError(f"the config is {str(config)[:40]!r}; it is JSON in a string, or null")
      if limit is not None and (type(limit) is not int or limit < 1):
        raise ValueError(f"the limit of the ids is {str(limit)[:40]!r}; it is a size, or null")
      return HuggingFace(text, end, config, limit)
    case {"kind": "sentencepiece", "proto": str(proto)}:
      return SentencePiece(base64.b64decode(proto))
    case {"kind": "gpt1", "vocabulary": str(vocabulary), "merges": str(merges)}:
      special_tokens = payload.get("special_tokens") or []
      if not isinstance(special_tokens, list) or not all(map(_is_text, special_tokens)):
        raise ValueError(f"special_tokens is {str(special_tokens)[:40]!r}; it is a list of texts")
      return Gpt1Bpe(vocabulary, merges, tuple(special_tokens))
    case {"kind": "characters", "alphabet": str(alphabet)}:
      return Characters(alphabet)
  raise ValueError(
    f"no tokenizer in {str(payload)[:60]!r}; "
    "its kind is gpt2, huggingface, sentencepiece, gpt1 or characters"
  )


def _is_text(value: object) -> bool:
  return isinstance(value, str)


def load_tokenizer(name_or_path: str) -> Tokenizer:
  """Loads the tokenizer "gpt2", or one of a file or a folder.

  A file is a SentencePiece `.model`, a `.json` of `to_json`, Hugging Face's tokenizer.json, or
  WordPiece's vocab.txt. A folder has files that transformers reads. Raises ValueError for any other
  name and for a damaged one, FileNotFoundError for a file that does not exist.
  """
  if name_or_path == "gpt2":
    return Gpt2Bpe()

  path = local_path(name_or_path)
  if not path.is_dir():
    if path.suffix not in (".model", ".json", ".txt"):
      raise ValueError(
        f"tokenizer {name_or_path!r} is none of gpt2, a SentencePiece .model file, a .json file, "
        f"WordPiece's vocab.txt, a folder with one of them"
      )
    if not path.is_file():
      raise FileNotFoundError(
        f"tokenizer {name_or_path}: no such file; gpt2-jax tokenize --train_tokenizer writes one"
      )

  try:
    tokenizer = _read_path(path)
    # Tokenizers open their model at the first text: a damaged file should fail now.
    tokenizer.encode("")
  except ValueError as error:
    raise ValueError(f"tokenizer {name_or_path}: {error}") from error
  return tokenizer


def read_tokenizer_folder(path: pathlib.Path) -> Tokenizer | None:
  """The tokenizer of a folder's files, this project's own first; None where there is none."""
  if (path / OWN_TOKENIZER).is_file():
    return from_json(read_json_object(path / OWN_TOKENIZER))
  return read_folder(path)


def _read_path(path: pathlib.Path) -> Tokenizer:
  """The tokenizer of a file or a folder. Raises ValueError for one that holds none."""
  if path.is_dir():
    tokenizer = read_tokenizer_folder(path)
    if tokenizer is None:
      raise ValueError(f"the folder has no tokenizer ({', '.join(VOCABULARIES)})")
    return tokenizer

  if path.suffix == ".model":
    return SentencePiece(path.read_bytes())
  if path.suffix == ".txt":
    return read_word_pieces(path)

  # What tokenizer.json says of itself, not its name, decides.
  payload = read_json_object(path)
  if "kind" not in payload and isinstance(payload.get("model"), dict):
    is_in_folder = path.name == TOKENIZER_JSON
    return read_tokenizer_json(path, read_companions(path.parent) if is_in_folder else None)
  if payload and all(type(i) is int for i in payload.values()):
    raise ValueError(
      "a vocabulary without its merges does not say how a text is cut; give the folder in which "
      "both lie"
    )
  return from_json(payload)
