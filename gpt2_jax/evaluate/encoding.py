# SPDX-License-Identifier: Apache-2.0
"""Encodes long texts in blocks: the tokens of the whole text, in bounded memory.

A tokenizer's library needs a hundred bytes and more for each token while it encodes a text. Here it
sees a block at a time. Blocks end where a token ends, whatever follows; a tokenizer of which that
is not known encodes a text in one piece.
"""

import json
import re
from collections.abc import Iterator, Sequence

import numpy as np

from gpt2_jax.tokenizer import Characters, Gpt2Bpe, HuggingFace, Tokenizer

BLOCK = 1 << 17  # characters
GROUP = 8  # blocks that are encoded together, by as many threads as the library has

# GPT-2's pre-tokenizer takes runs of letters, of digits, or of other characters, with at most one
# space before them. Each ends before white space, and no rule looks back.
CUT = re.compile(r"[!-~\w](?=[ \n])")


def encode_texts(tokenizer: Tokenizer, texts: Sequence[str]) -> list[np.ndarray]:
  """The tokens of each text, int32 arrays, as `encode_batch` gives them."""
  # 1. All texts in blocks, each with the number of its text.
  numbers = []
  blocks = []
  arrays = []
  size = 0
  for number, text in enumerate(texts):
    for _, block in _blocks(tokenizer, text):
      numbers.append(number)
      blocks.append(block)
      size += len(block)

      # 2. Enough for a group: encode it, and keep only the numbers of its tokens.
      if size >= GROUP * BLOCK:
        arrays += _encode_group(tokenizer, blocks, texts, numbers[len(arrays) :])
        blocks = []
        size = 0
  arrays += _encode_group(tokenizer, blocks, texts, numbers[len(arrays) :])

  # 3. Join the blocks of each text. An empty one has none.
  of_texts = [[np.zeros(0, np.int32)] for _ in texts]
  for number, array in zip(numbers, arrays, strict=True):
    of_texts[number].append(array)
  return list(map(np.concatenate, of_texts))


def encode_with_starts(tokenizer: Tokenizer, text: str) -> tuple[np.ndarray, np.ndarray]:
  """The tokens of a text, int32, and the character at which each begins, int64."""
  ids = [np.zeros(0, np.int32)]
  starts = [np.zeros(0, np.int64)]
  for begin, block in _blocks(tokenizer, text):
    try:
      block_ids, block_starts = tokenizer.encode_with_offsets(block)
    except ValueError:
      # The error names a place in the block. That of the whole text names the place in it.
      tokenizer.encode(text)
      raise
    ids.append(np.array(block_ids, np.int32))
    starts.append(begin + np.asarray(block_starts, np.int64))
  return np.concatenate(ids), np.concatenate(starts)


def _encode_group(
  tokenizer: Tokenizer, blocks: list[str], texts: Sequence[str], numbers: list[int]
) -> list[np.ndarray]:
  """The tokens of some blocks; `numbers` are those of their texts."""
  try:
    encoded = tokenizer.encode_batch(blocks)
  except ValueError:
    # As above: the error of a whole text comes first.
    for number in dict.fromkeys(numbers):
      tokenizer.encode(texts[number])
    raise
  return [np.array(ids, np.int32) for ids in encoded]


def _blocks(tokenizer: Tokenizer, text: str) -> Iterator[tuple[int, str]]:
  """The blocks of a text, each with the character at which it begins."""
  if len(text) <= BLOCK or not _has_known_cuts(tokenizer):
    yield 0, text
    return

  begin = 0
  while begin < len(text):
    cut = CUT.search(text, begin + BLOCK - 1)
    end = cut.end() if cut else len(text)
    yield begin, text[begin:end]
    begin = end


def _has_known_cuts(tokenizer: Tokenizer) -> bool:
  """Whether the tokens of a text are those of its parts between CUTs."""
  match tokenizer:
    case Characters() | Gpt2Bpe():
      return True
    case HuggingFace(payload):
      return _is_gpt2_bpe(json.loads(payload))
  # SentencePiece adds up scores over a whole text.
  return False


def _is_gpt2_bpe(content: dict) -> bool:
  """Whether a tokenizer.json has GPT-2's pre-tokenizer, and nothing before it."""
  splitter = content.get("pre_tokenizer") or {}
  is_gpt2 = (
    splitter.get("type") == "ByteLevel"
    and splitter.get("add_prefix_space") is False
    and splitter.get("use_regex", True)
  )
  # Added tokens that are not special are looked for in the text, across words.
  only_special = all(token["special"] for token in content.get("added_tokens") or ())
  has_dropout = content["model"].get("dropout")
  return bool(is_gpt2 and only_special and not content.get("normalizer") and not has_dropout)
