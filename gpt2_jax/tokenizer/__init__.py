# SPDX-License-Identifier: Apache-2.0
"""Tokenizers: byte-level BPE of GPT-2, Hugging Face's files, SentencePiece, single characters.

All share the interface `Tokenizer`. The libraries behind them are imported at the first use.
"""

from gpt2_jax.tokenizer.as_tokenizer_json import characters_as_json, sentencepiece_as_json
from gpt2_jax.tokenizer.byte_bpe import Gpt2Bpe, byte_alphabet
from gpt2_jax.tokenizer.characters import Characters, train_characters
from gpt2_jax.tokenizer.folder import check_tokenizer_json
from gpt2_jax.tokenizer.gpt1_bpe import Gpt1Bpe
from gpt2_jax.tokenizer.huggingface import HuggingFace
from gpt2_jax.tokenizer.interface import EOT, Tokenizer, check_unicode
from gpt2_jax.tokenizer.load import OWN_TOKENIZER, from_json, load_tokenizer, read_tokenizer_folder
from gpt2_jax.tokenizer.sentencepiece import SentencePiece, train_sentencepiece

__all__ = [
  "EOT",
  "OWN_TOKENIZER",
  "Characters",
  "Gpt1Bpe",
  "Gpt2Bpe",
  "HuggingFace",
  "SentencePiece",
  "Tokenizer",
  "byte_alphabet",
  "characters_as_json",
  "check_tokenizer_json",
  "check_unicode",
  "from_json",
  "load_tokenizer",
  "read_tokenizer_folder",
  "sentencepiece_as_json",
  "train_characters",
  "train_sentencepiece",
]
