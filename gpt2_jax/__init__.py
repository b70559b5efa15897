# SPDX-License-Identifier: Apache-2.0
"""GPT-2 in JAX and Flax, TPU first. In three lines:

import gpt2_jax
model, tokenizer = gpt2_jax.load_pretrained("gpt2")  # or a path: a checkpoint, a run's workdir
print(gpt2_jax.complete(model, tokenizer, "Once upon a time", temperature=0.8, top_k=40))

Its names are imported when they are first asked for: `gpt2-jax --help` needs no JAX.
"""

import importlib
import importlib.util
import sys
from typing import TYPE_CHECKING

__version__ = "0.1.0"  # setup.py reads it here

if TYPE_CHECKING:  # what editors and pages of the API read
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
  from gpt2_jax.inspection.heads import attention_weights
  from gpt2_jax.inspection.plots import plot_attention, plot_next_tokens, plot_surprise
  from gpt2_jax.inspection.predictions import next_tokens, score
  from gpt2_jax.model import GPT2
  from gpt2_jax.quantization import quantize
  from gpt2_jax.sharding import make_mesh
  from gpt2_jax.sizes import SIZES, ModelConfig, model_config
  from gpt2_jax.tokenizer import Characters, Gpt2Bpe, HuggingFace, SentencePiece, load_tokenizer

# Where each public name is defined.
_MODULES = {
  "Characters": "gpt2_jax.tokenizer",
  "Completion": "gpt2_jax.decoding",
  "FrequencyPenalty": "gpt2_jax.decoding",
  "GPT2": "gpt2_jax.model",
  "Generation": "gpt2_jax.decoding",
  "Gpt2Bpe": "gpt2_jax.tokenizer",
  "Greedy": "gpt2_jax.decoding",
  "HuggingFace": "gpt2_jax.tokenizer",
  "InferenceModel": "gpt2_jax.decoding",
  "LogitBias": "gpt2_jax.decoding",
  "MinNewTokens": "gpt2_jax.decoding",
  "MinP": "gpt2_jax.decoding",
  "ModelConfig": "gpt2_jax.sizes",
  "NoRepeatNgram": "gpt2_jax.decoding",
  "PresencePenalty": "gpt2_jax.decoding",
  "RepetitionPenalty": "gpt2_jax.decoding",
  "SIZES": "gpt2_jax.sizes",
  "Sample": "gpt2_jax.decoding",
  "SentencePiece": "gpt2_jax.tokenizer",
  "SlidingWindow": "gpt2_jax.decoding",
  "Temperature": "gpt2_jax.decoding",
  "TopK": "gpt2_jax.decoding",
  "TopP": "gpt2_jax.decoding",
  "TypicalP": "gpt2_jax.decoding",
  "attention_weights": "gpt2_jax.inspection.heads",
  "beam_search": "gpt2_jax.decoding.beam",
  "complete": "gpt2_jax.decoding",
  "contrastive_search": "gpt2_jax.decoding.contrastive",
  "for_inference": "gpt2_jax.decoding",
  "generate": "gpt2_jax.decoding",
  "load_pretrained": "gpt2_jax.convert.pretrained",
  "load_tokenizer": "gpt2_jax.tokenizer",
  "make_mesh": "gpt2_jax.sharding",
  "model_config": "gpt2_jax.sizes",
  "next_tokens": "gpt2_jax.inspection.predictions",
  "plot_attention": "gpt2_jax.inspection.plots",
  "plot_next_tokens": "gpt2_jax.inspection.plots",
  "plot_surprise": "gpt2_jax.inspection.plots",
  "quantize": "gpt2_jax.quantization",
  "save_pretrained": "gpt2_jax.convert.pretrained",
  "score": "gpt2_jax.inspection.predictions",
  "speculative": "gpt2_jax.decoding.speculative",
  "stream": "gpt2_jax.decoding",
  "stream_rows": "gpt2_jax.decoding",
}

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
  "attention_weights",
  "beam_search",
  "complete",
  "contrastive_search",
  "for_inference",
  "generate",
  "load_pretrained",
  "load_tokenizer",
  "make_mesh",
  "model_config",
  "next_tokens",
  "plot_attention",
  "plot_next_tokens",
  "plot_surprise",
  "quantize",
  "save_pretrained",
  "score",
  "speculative",
  "stream",
  "stream_rows",
]


def __getattr__(name: str):
  """Imports a public name, or a module of the package, at its first use (PEP 562)."""
  if name in _MODULES:
    value = vars(importlib.import_module(_MODULES[name]))[name]
  elif not name.startswith("_") and importlib.util.find_spec(f"gpt2_jax.{name}"):
    value = importlib.import_module(f"gpt2_jax.{name}")
  else:
    # With these two, Python names the nearest.
    package = sys.modules[__name__]
    raise AttributeError(f"module 'gpt2_jax' has no attribute {name!r}", name=name, obj=package)
  globals()[name] = value
  return value


def __dir__() -> list[str]:
  return sorted({*globals(), *__all__})
