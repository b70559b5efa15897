# SPDX-License-Identifier: Apache-2.0
"""Adapters: what is trained beside a frozen model, of the kind that `config.adapter` names."""

import jax

from gpt2_jax.finetune.lora import LoraSettings, add_lora
from gpt2_jax.finetune.prefix import add_prefix, add_prompt
from gpt2_jax.model import GPT2, name_of
from gpt2_jax.quantization import quantize_on_mesh

# The names of the arrays that each kind trains, as `trainable` takes them.
TRAINED_NAMES = {"lora": ("lora_a", "lora_b"), "prompt": ("prompt",), "prefix": ("prefix",)}


def add_adapter(model: GPT2, settings, key) -> GPT2:
  """The model with the adapter that `settings`, a config's `adapter`, asks for; as it is if none.

  With `quantize`, the frozen matrices become int8 first. The model's mesh is in force. Raises
  ValueError for what cannot be, with the rule.
  """
  if settings.quantize not in ("", "int8"):
    raise ValueError(f"adapter.quantize is {settings.quantize[:80]!r}; it is 'int8' or ''")
  if settings.quantize and settings.kind != "lora":
    raise ValueError("adapter.quantize is of LoRA; set --config.adapter.kind=lora, or leave it out")
  if not settings.kind:
    return model

  if settings.kind not in TRAINED_NAMES:
    kinds = ", ".join(TRAINED_NAMES)
    raise ValueError(f"adapter.kind is {settings.kind[:80]!r}; it is one of {kinds}, or ''")
  if settings.kind == "prompt":
    return add_prompt(model, settings.tokens, key)
  if settings.kind == "prefix":
    return add_prefix(model, settings.tokens, key)
  if settings.quantize:
    model = quantize_on_mesh(model)
  lora = LoraSettings(
    settings.rank, settings.alpha, settings.rslora, tuple(settings.targets), settings.dropout
  )
  return add_lora(model, lora, key)


def n_virtual(settings) -> int:
  """The virtual tokens of prompt and prefix tuning, which take positions of the context."""
  return settings.tokens if settings.kind in ("prompt", "prefix") else 0


def adapter_arrays(model: GPT2) -> dict[str, jax.Array]:
  """The adapter's trained arrays by name; none of a model without an adapter."""
  trained = {name for names in TRAINED_NAMES.values() for name in names}
  arrays = {}
  for path, leaf in jax.tree_util.tree_leaves_with_path(model):
    if name_of(path).split(".")[-1] in trained:
      arrays[name_of(path)] = leaf
  return arrays
