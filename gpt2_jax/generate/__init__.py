# SPDX-License-Identifier: Apache-2.0
"""Continuing texts: the cache, the samplers, and the ways to search."""

from gpt2_jax.generate.cache import Decoder, ready
from gpt2_jax.generate.samplers import Greedy, Sample, Temperature, TopK, TopP
from gpt2_jax.generate.tokens import generate

__all__ = ["Decoder", "Greedy", "Sample", "Temperature", "TopK", "TopP", "generate", "ready"]
