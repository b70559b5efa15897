# SPDX-License-Identifier: Apache-2.0
"""Text generation: the KV cache, samplers, streaming, and the searches (beam, contrastive)."""

from gpt2_jax.decoding.generate import generate
from gpt2_jax.decoding.generation_config import Completion, Generation, SlidingWindow
from gpt2_jax.decoding.kv_cache import InferenceModel, for_inference
from gpt2_jax.decoding.samplers import (
  FrequencyPenalty,
  Greedy,
  History,
  LogitBias,
  MinNewTokens,
  MinP,
  NoRepeatNgram,
  PresencePenalty,
  RepetitionPenalty,
  Sample,
  Temperature,
  TopK,
  TopP,
  TypicalP,
  make_sampler,
)
from gpt2_jax.decoding.stream import complete, stream, stream_rows

__all__ = [
  "Completion",
  "FrequencyPenalty",
  "Generation",
  "Greedy",
  "History",
  "InferenceModel",
  "LogitBias",
  "MinNewTokens",
  "MinP",
  "NoRepeatNgram",
  "PresencePenalty",
  "RepetitionPenalty",
  "Sample",
  "SlidingWindow",
  "Temperature",
  "TopK",
  "TopP",
  "TypicalP",
  "complete",
  "for_inference",
  "generate",
  "make_sampler",
  "stream",
  "stream_rows",
]
