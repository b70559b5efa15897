# SPDX-License-Identifier: Apache-2.0
"""Loads a tokenizer: by name, from a file, or from its JSON object."""

import base64

from gpt2_jax.files import local_path, read_json_object
from gpt2_jax.tokenizer.byte_bpe import Gpt2Bpe
from gpt2_jax.tokenizer.characters import Characters
from gpt2_jax.tokenizer.huggingface import HuggingFace
from gpt2_jax.tokenizer.interface import Tokenizer
from gpt2_jax.tokenizer.sentencepiece import SentencePiece


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
      return HuggingFace(text, end)
    case {"kind": "sentencepiece", "proto": str(proto)}:
      return SentencePiece(base64.b64decode(proto))
    case {"kind": "characters", "alphabet": str(alphabet)}:
      return Characters(alphabet)
  raise ValueError(
    f"no tokenizer in {str(payload)[:60]!r}; "
    "its kind is gpt2, huggingface, sentencepiece or characters"
  )


def load_tokenizer(name_or_path: str) -> Tokenizer:
  """Loads the tokenizer "gpt2", a SentencePiece `.model` file, or a `.json` file of `to_json`.

  Raises ValueError for any other name, FileNotFoundError for a file that does not exist.
  """
  if name_or_path == "gpt2":
    return Gpt2Bpe()

  path = local_path(name_or_path)
  if path.suffix not in (".model", ".json"):
    raise ValueError(
      f"tokenizer {name_or_path!r} is none of gpt2, a SentencePiece .model file, a .json file"
    )
  if not path.is_file():
    raise FileNotFoundError(
      f"tokenizer {name_or_path}: no such file; gpt2-jax tokenize --train_tokenizer writes one"
    )

  try:
    if path.suffix == ".model":
      tokenizer = SentencePiece(path.read_bytes())
    else:
      tokenizer = from_json(read_json_object(path))

    # Tokenizers open their model at the first text: a damaged file should fail now.
    tokenizer.encode("")
  except ValueError as error:
    raise ValueError(f"tokenizer {name_or_path}: {error}") from error
  return tokenizer
