# SPDX-License-Identifier: Apache-2.0
"""The tokenizer in a checkpoint's folder: tokenizer.json, or a vocabulary and its merges by either of their names."""

import json
import pathlib

from gpt2_jax.convert.files import read_json, reason
from gpt2_jax.tokenizer import EOT, Gpt2Bpe, HuggingFace, Tokenizer, byte_alphabet, from_json

OURS = "gpt2_jax_tokenizer.json"  # for tokenizers that the other names cannot hold
PAIRS = (("vocab.json", "merges.txt"), ("encoder.json", "vocab.bpe"))  # Hugging Face's names, OpenAI's


def read_vocabulary(path: pathlib.Path, n_vocab: int) -> Tokenizer | None:
  """The tokenizer of a folder, or else the usual one for `n_vocab` tokens.

  Raises ValueError for a damaged one, and for one with more tokens than the model has.
  """
  try:
    found = _read(path)
    size = 0 if found is None else found.vocab_size
  except Exception as error:  # the tokenizers library raises plain Exception
    raise ValueError(f"the vocabulary in {path} is damaged ({reason(error)}); fetch it again") from error
  if size > n_vocab:
    raise ValueError(f"the vocabulary in {path} has {size:,} tokens, and the model {n_vocab:,}")
  return found or usual_tokenizer(n_vocab)


def _read(path: pathlib.Path) -> Tokenizer | None:
  if (path / OURS).is_file():
    return from_json(read_json(path / OURS))
  if (path / "tokenizer.json").is_file():
    return HuggingFace((path / "tokenizer.json").read_text(encoding="utf-8"))
  for vocab, merges in PAIRS:
    if (path / vocab).is_file() and (path / merges).is_file():
      lines = (path / merges).read_text(encoding="utf-8").split("\n")
      pairs = [tuple(line.split()) for line in lines[lines[0].startswith("#version") :] if line]
      return HuggingFace.from_merges(read_json(path / vocab), pairs)
  return None


def usual_tokenizer(n_vocab: int) -> Tokenizer | None:
  """GPT-2's where the model has its vocabulary, padded or not; else None."""
  return Gpt2Bpe() if n_vocab in (50257, 50304) else None


def write_vocabulary(tokenizer: Tokenizer | None, path: pathlib.Path, n_ctx: int) -> None:
  """Writes the files by which `transformers`, or at least `read_vocabulary`, finds the tokenizer again."""
  if isinstance(tokenizer, Gpt2Bpe):
    alphabet = byte_alphabet()
    text = lambda piece: "".join(alphabet[byte] for byte in piece)  # noqa: E731
    vocab = {EOT if i == tokenizer.eot else text(piece): i for piece, i in tokenizer.vocab().items()}
    pairs = [(text(a), text(b)) for a, b in tokenizer.merges()]
    (path / "vocab.json").write_text(json.dumps(vocab), encoding="utf-8")
    (path / "merges.txt").write_text("\n".join(["#version: 0.2", *map(" ".join, pairs), ""]), encoding="utf-8")
    tokenizer = HuggingFace.from_merges(vocab, pairs)
  if isinstance(tokenizer, HuggingFace):
    (path / "tokenizer.json").write_text(tokenizer.payload, encoding="utf-8")
    end = tokenizer.end_token
    special = {} if end is None else dict.fromkeys(("bos_token", "eos_token", "unk_token"), end)
    kind = "GPT2Tokenizer" if special else "PreTrainedTokenizerFast"  # which does not add a token of its own
    about = special | {"tokenizer_class": kind, "model_max_length": n_ctx}
    (path / "tokenizer_config.json").write_text(json.dumps(about, indent=2) + "\n")
  if tokenizer is not None and (not isinstance(tokenizer, HuggingFace) or tokenizer.end is not None):
    (path / OURS).write_text(json.dumps(tokenizer.to_json()))
