# SPDX-License-Identifier: Apache-2.0
"""Tokenizers: byte-level BPE of GPT-2, Hugging Face, SentencePiece, and single characters.

All share the interface `Tokenizer`. The libraries behind them are imported at the first use.
"""

from gpt2_jax.tokenizer.byte_bpe import Gpt2Bpe, byte_alphabet
from gpt2_jax.tokenizer.characters import Characters, train_characters
from gpt2_jax.tokenizer.huggingface import HuggingFace
from gpt2_jax.tokenizer.interface import EOT, Tokenizer, check_unicode
from gpt2_jax.tokenizer.load import from_json, load_tokenizer
from gpt2_jax.tokenizer.sentencepiece import SentencePiece, train_sentencepiece

__all__ = [
  "EOT",
  "Characters",
  "Gpt2Bpe",
  "HuggingFace",
  "SentencePiece",
  "Tokenizer",
  "byte_alphabet",
  "check_unicode",
  "from_json",
  "load_tokenizer",
  "train_characters",
  "train_sentencepiece",
]
