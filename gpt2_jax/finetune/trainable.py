# SPDX-License-Identifier: Apache-2.0
"""Fine-tuning of some parameters: a trainable mask by name, and the frozen rest.

What is frozen is outside gradients and optimizer state.
"""

import fnmatch

import jax

from gpt2_jax.model import name_of


def trainable_mask(model, patterns: tuple[str, ...]):
  """A tree like `model`, True where a pattern matches a parameter's name, or one part of it.

  ("*",) trains all, ("h.*", "ln_f.*") all but the embeddings, ("b",) the biases. Raises ValueError
  for a pattern that matches nothing, and where an int8 weight would be trained.
  """

  def matches(name: str, pattern: str) -> bool:
    return fnmatch.fnmatchcase(name, pattern) or pattern in name.split(".")

  names = [name_of(path) for path, _ in jax.tree_util.tree_leaves_with_path(model)]
  for pattern in patterns or ("",):
    if not any(matches(name, pattern) for name in names):
      raise ValueError(
        f"trainable has {pattern!r}, which matches no parameter; names are such as wte, "
        f'h.attn.c_attn.w, and ("*",) is all'
      )
  mask = [any(matches(name, pattern) for pattern in patterns) for name in names]

  # An int8 weight passes gradients on and has none: it would stay as it is, without a word.
  for name, is_trained in zip(names, mask, strict=True):
    if is_trained and name.endswith((".q_OI", ".scale_O")):
      raise ValueError(
        f"trainable has {name}, and an int8 model has no gradient; train an adapter "
        f"(--config.adapter.kind=lora), or the float32 model and quantize what comes out"
      )
  return jax.tree.unflatten(jax.tree.structure(model), mask)


def partition(model, mask):
  """(trained, frozen): two trees like `model`, each with None in the other's places."""
  trained = jax.tree.map(lambda x, is_trained: x if is_trained else None, model, mask)
  frozen = jax.tree.map(lambda x, is_trained: None if is_trained else x, model, mask)
  return trained, frozen


def merge(trained, frozen):
  """The model that `partition` took apart."""
  return jax.tree.map(
    lambda x, y: y if x is None else x, trained, frozen, is_leaf=lambda x: x is None
  )
