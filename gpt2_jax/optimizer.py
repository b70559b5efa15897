# SPDX-License-Identifier: Apache-2.0
"""AdamW with weight decay by name. Schedules are in schedules.py, Muon is muon.py.

The recipe is GPT-3's as nanoGPT uses it, since the GPT-2 paper gives none.
"""

import jax
import optax

from gpt2_jax.model import name_of

# Matrices, by name: stacked over layers, a LayerNorm gain has two dimensions too.
DECAYED = ("w", "wte", "wpe", "lora_a", "lora_b", "prompt", "prefix")


def decayed(model):
  """The weight decay mask: a tree like `model`, True where weight decay applies."""
  return jax.tree_util.tree_map_with_path(
    lambda path, _: name_of(path).split(".")[-1] in DECAYED, model
  )


def adamw(
  learning_rate: optax.Schedule, b1: float, b2: float, weight_decay: float, clip_norm: float
):
  """AdamW after a clip to the global norm (0: none); its state is float32, sharded as the
  parameters are, and named, for the names are a checkpoint's."""
  adam = ("adam", optax.scale_by_adam(b1, b2, eps=1e-8))
  return descend([adam], learning_rate, weight_decay, clip_norm)


def descend(directions: list, learning_rate: optax.Schedule, weight_decay: float, clip_norm: float):
  """The update by named directions of clipped gradients, with weight decay."""
  clip = [("clip", optax.clip_by_global_norm(clip_norm))] if clip_norm else []
  return optax.named_chain(
    *clip,
    *directions,
    ("weight_decay", optax.add_decayed_weights(weight_decay, decayed)),
    ("learning_rate", optax.scale_by_learning_rate(learning_rate)),
  )
