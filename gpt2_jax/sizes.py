# SPDX-License-Identifier: Apache-2.0
"""The published sizes of GPT-2, by the paper's names and today's."""

import difflib

from gpt2_jax.model import ModelConfig

SIZES = {
  "117M": ModelConfig(n_embd=768, n_head=12, n_layer=12),
  "345M": ModelConfig(n_embd=1024, n_head=16, n_layer=24),
  "762M": ModelConfig(n_embd=1280, n_head=20, n_layer=36),
  "1542M": ModelConfig(n_embd=1600, n_head=25, n_layer=48),
  "distilgpt2": ModelConfig(n_embd=768, n_head=12, n_layer=6),
}
ALIASES = {
  "117M": ("gpt2", "124M"),
  "345M": ("gpt2-medium", "355M"),
  "762M": ("gpt2-large", "774M"),
  "1542M": ("gpt2-xl", "1558M", "1.5B"),
}


def model_config(size: str) -> ModelConfig:
  """The ModelConfig of a published size, by the paper's name or today's.

  Raises ValueError on another, with the nearest.
  """
  names = {}
  for name, aliases in ALIASES.items():
    names |= dict.fromkeys(aliases, name)
  for name in SIZES:
    names[name] = name
  if size not in names:
    near = difflib.get_close_matches(size, names, 1, cutoff=0)[0]
    raise ValueError(
      f"unknown size {size[:80]!r}; did you mean {near!r}? Sizes are {', '.join(names)}"
    )
  return SIZES[names[size]]
