# SPDX-License-Identifier: Apache-2.0
"""The model of the tests of recipes: bytes as tokens, and <|endoftext|>."""

from gpt2_jax.model import ModelConfig

LETTERS = [*map(chr, range(33, 127)), "\u0120", "\u010a"]
N_CTX = 256
CONFIG = ModelConfig(
  n_vocab=len(LETTERS) + 1, n_ctx=N_CTX, n_embd=128, n_head=2, n_layer=1, dtype="float32"
)
