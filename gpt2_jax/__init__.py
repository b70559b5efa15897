# SPDX-License-Identifier: Apache-2.0
"""GPT-2 in JAX and Flax, TPU first. In reading order:

import jax, gpt2_jax
jax.set_mesh(gpt2_jax.make_mesh())
model, tokenizer = gpt2_jax.load("runs/117M")
print(tokenizer.decode(gpt2_jax.generate(model, [tokenizer.encode("Hello")], 50)[0]))
"""

from gpt2_jax.checkpoint import load
from gpt2_jax.generate import Decoder, Greedy, Sample, Temperature, TopK, TopP, generate, ready
from gpt2_jax.model import GPT2, SIZES, ModelConfig, model_config
from gpt2_jax.sharding import make_mesh
from gpt2_jax.tokenizer import Characters, Gpt2Bpe, SentencePiece, load_tokenizer

__all__ = [
  "GPT2",
  "SIZES",
  "Characters",
  "Decoder",
  "Gpt2Bpe",
  "Greedy",
  "ModelConfig",
  "Sample",
  "SentencePiece",
  "Temperature",
  "TopK",
  "TopP",
  "generate",
  "load",
  "load_tokenizer",
  "make_mesh",
  "model_config",
  "ready",
]
