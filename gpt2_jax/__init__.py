# SPDX-License-Identifier: Apache-2.0
"""GPT-2 in JAX and Flax, TPU first. In three lines:

import gpt2_jax
model, tokenizer = gpt2_jax.load_pretrained("gpt2")  # or a path: any format, or the workdir of a run
print(gpt2_jax.complete(model, tokenizer, "Once upon a time", n_new=50))
"""

from gpt2_jax.decoding import (
  Continuation,
  Decoder,
  Greedy,
  LogitBias,
  MinNew,
  MinP,
  NoRepeatNgram,
  OccurrencePenalty,
  RepetitionPenalty,
  Sample,
  SlidingWindow,
  Temperature,
  TopK,
  TopP,
  Typical,
  complete,
  generate,
  ready,
  stream,
)
from gpt2_jax.decoding.beam import beam_search
from gpt2_jax.decoding.contrastive import contrastive_search
from gpt2_jax.decoding.speculation import speculative
from gpt2_jax.model import GPT2, SIZES, ModelConfig, model_config
from gpt2_jax.pretrained import load_pretrained, save_pretrained
from gpt2_jax.quantization import quantize
from gpt2_jax.sharding import make_mesh
from gpt2_jax.tokenizer import Characters, Gpt2Bpe, HuggingFace, SentencePiece, load_tokenizer

__all__ = [
  "GPT2",
  "SIZES",
  "Characters",
  "Continuation",
  "Decoder",
  "Gpt2Bpe",
  "Greedy",
  "HuggingFace",
  "LogitBias",
  "MinNew",
  "MinP",
  "ModelConfig",
  "NoRepeatNgram",
  "OccurrencePenalty",
  "RepetitionPenalty",
  "Sample",
  "SentencePiece",
  "SlidingWindow",
  "Temperature",
  "TopK",
  "TopP",
  "Typical",
  "beam_search",
  "complete",
  "contrastive_search",
  "generate",
  "load_pretrained",
  "load_tokenizer",
  "make_mesh",
  "model_config",
  "quantize",
  "ready",
  "save_pretrained",
  "speculative",
  "stream",
]
