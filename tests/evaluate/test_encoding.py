# SPDX-License-Identifier: Apache-2.0
"""Tokens of long texts: those of the whole text, in memory that a block bounds."""

import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest
import tokenizers

from gpt2_jax.evaluate import encoding
from gpt2_jax.tokenizer import Characters, Gpt2Bpe, HuggingFace

# Every border that GPT-2's pre-tokenizer knows: contractions, digits, punctuation, runs of spaces,
# line ends, other scripts, combining marks, and spaces that are not ASCII.
TEXT = (
  "It's 9:30, they'll say 'twas so...  Two  spaces\n\n\tand a tab \n 12345 67 , x_y=z ;\r\n"
  "naïve cafe\u0301 日本語 の 文 \u00a0 hard\u2003em \x1cfs \x85 nel 🙂 smile <|endoftext|> end \n"
) * 7


def trained(pre_tokenizer=None, normalizer=None, added=()) -> HuggingFace:
  tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
  byte_level = tokenizers.pre_tokenizers.ByteLevel
  tokenizer.pre_tokenizer = pre_tokenizer or byte_level(add_prefix_space=False)
  tokenizer.decoder = tokenizers.decoders.ByteLevel()
  if normalizer:
    tokenizer.normalizer = normalizer
  trainer = tokenizers.trainers.BpeTrainer(
    vocab_size=400,
    special_tokens=["<|endoftext|>"],
    initial_alphabet=byte_level.alphabet(),
    show_progress=False,
  )
  tokenizer.train_from_iterator([TEXT], trainer)
  tokenizer.add_tokens(list(added))
  return HuggingFace(tokenizer.to_str())


TOKENIZERS = {
  "huggingface": trained,
  "characters": lambda: Characters("".join(sorted(set(TEXT)))),
  "gpt2": Gpt2Bpe,
  # These may look across a border of blocks, and read a text in one piece.
  "prefix_space": lambda: trained(tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=True)),
  "digits": lambda: trained(tokenizers.pre_tokenizers.Digits(individual_digits=True)),
  "normalized": lambda: trained(normalizer=tokenizers.normalizers.Strip()),
  "added": lambda: trained(added=["spaces\n\n\tand"]),
}


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("block", [1, 7, 40])
def test_blocks_have_the_tokens_of_the_whole_text(monkeypatch, name, block):
  if name == "gpt2" and "TIKTOKEN_CACHE_DIR" not in os.environ:
    pytest.skip("TIKTOKEN_CACHE_DIR is not set: no vocabulary of GPT-2")
  tokenizer = TOKENIZERS[name]()
  whole, starts = tokenizer.encode_with_offsets(TEXT)
  monkeypatch.setattr(encoding, "BLOCK", block)

  texts = ["", TEXT, "a", TEXT[::-1], TEXT]
  for text, ids in zip(texts, encoding.encode_texts(tokenizer, texts), strict=True):
    assert ids.tolist() == tokenizer.encode(text) and ids.dtype == np.int32
  ids, block_starts = encoding.encode_with_starts(tokenizer, TEXT)
  assert ids.tolist() == list(whole) and block_starts.tolist() == list(starts)
  assert len(list(encoding._blocks(tokenizer, TEXT))) > (
    20 if name in ("huggingface", "characters", "gpt2") and block < 40 else 0
  )


def test_an_error_names_its_place_in_the_whole_text(monkeypatch):
  monkeypatch.setattr(encoding, "BLOCK", 5)
  tokenizer, text = Characters(" abc"), "a b c " * 9 + "a ? c"
  for encode in (lambda: encoding.encode_texts(tokenizer, ["a", text]),
                 lambda: encoding.encode_with_starts(tokenizer, text)):  # fmt: skip
    with pytest.raises(ValueError, match="'\\?' at position 56"):
      encode()


PEAK = """
import resource, sys
from gpt2_jax.evaluate import encoding
from gpt2_jax.tokenizer import HuggingFace
tokenizer = HuggingFace(open(sys.argv[1]).read())
text = "and the words of a long text, " * 100_000
tokenizer.encode("a")
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
[ids] = encoding.encode_texts(tokenizer, [text])
print(len(ids), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def test_the_memory_of_a_long_text_is_bounded(tmp_path):
  """Three million characters are a million tokens, 4 MB; the library alone would need 500 MB."""
  path = tmp_path / "tokenizer.json"
  path.write_text(trained().payload)
  root = pathlib.Path(__file__).parents[2]
  job = subprocess.run(
    [sys.executable, "-c", PEAK, str(path)], cwd=root, capture_output=True, text=True, timeout=120
  )
  assert job.returncode == 0, job.stderr
  n_tokens, peak = map(int, job.stdout.split())
  assert n_tokens > 1_000_000
  unit = 1 if sys.platform == "darwin" else 1024
  assert peak * unit < 200e6, f"{peak * unit / 1e6:.0f} MB for {n_tokens:,} tokens"
