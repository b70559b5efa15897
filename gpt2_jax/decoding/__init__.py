# SPDX-License-Identifier: Apache-2.0
"""Continuing texts: the cache, the samplers, and the ways to search."""

from gpt2_jax.decoding.cache import Decoder, ready
from gpt2_jax.decoding.samplers import (
  Greedy,
  History,
  LogitBias,
  MinNew,
  MinP,
  NoRepeatNgram,
  OccurrencePenalty,
  RepetitionPenalty,
  Sample,
  Temperature,
  TopK,
  TopP,
  Typical,
)
from gpt2_jax.decoding.text import complete, stream, stream_rows
from gpt2_jax.decoding.tokens import Continuation, SlidingWindow, generate

__all__ = [
  "Continuation",
  "Decoder",
  "Greedy",
  "History",
  "LogitBias",
  "MinNew",
  "MinP",
  "NoRepeatNgram",
  "OccurrencePenalty",
  "RepetitionPenalty",
  "Sample",
  "SlidingWindow",
  "Temperature",
  "TopK",
  "TopP",
  "Typical",
  "complete",
  "generate",
  "ready",
  "stream",
  "stream_rows",
]
