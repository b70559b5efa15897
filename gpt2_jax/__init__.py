# SPDX-License-Identifier: Apache-2.0
"""GPT-2 in JAX and Flax, TPU first. In three lines:

import gpt2_jax
model, tokenizer = gpt2_jax.load_pretrained("gpt2")  # or a path: a checkpoint, a run's workdir
print(gpt2_jax.complete(model, tokenizer, "Once upon a time", temperature=0.8, top_k=40))
"""

from gpt2_jax.convert.pretrained import load_pretrained, save_pretrained
from gpt2_jax.decoding import (
  Completion,
  FrequencyPenalty,
  Generation,
  Greedy,
  InferenceModel,
  LogitBias,
  MinNewTokens,
  MinP,
  NoRepeatNgram,
  PresencePenalty,
  RepetitionPenalty,
  Sample,
  SlidingWindow,
  Temperature,
  TopK,
  TopP,
  TypicalP,
  complete,
  for_inference,
  generate,
  stream,
  stream_rows,
)
from gpt2_jax.decoding.beam import beam_search
from gpt2_jax.decoding.contrastive import contrastive_search
from gpt2_jax.decoding.speculative import speculative
from gpt2_jax.model import GPT2, ModelConfig
from gpt2_jax.quantization import quantize
from gpt2_jax.sharding import make_mesh
from gpt2_jax.sizes import SIZES, model_config
from gpt2_jax.tokenizer import Characters, Gpt2Bpe, HuggingFace, SentencePiece, load_tokenizer

__all__ = [
  "GPT2",
  "SIZES",
  "Characters",
  "Completion",
  "FrequencyPenalty",
  "Generation",
  "Gpt2Bpe",
  "Greedy",
  "HuggingFace",
  "InferenceModel",
  "LogitBias",
  "MinNewTokens",
  "MinP",
  "ModelConfig",
  "NoRepeatNgram",
  "PresencePenalty",
  "RepetitionPenalty",
  "Sample",
  "SentencePiece",
  "SlidingWindow",
  "Temperature",
  "TopK",
  "TopP",
  "TypicalP",
  "beam_search",
  "complete",
  "contrastive_search",
  "for_inference",
  "generate",
  "load_pretrained",
  "load_tokenizer",
  "make_mesh",
  "model_config",
  "quantize",
  "save_pretrained",
  "speculative",
  "stream",
  "stream_rows",
]
