# SPDX-License-Identifier: Apache-2.0
"""AdamW with learning rate warmup, cosine decay and weight decay.

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


def schedule(
  learning_rate: float, steps: int, warmup_steps: int, final_lr_fraction: float
) -> optax.Schedule:
  """Learning rate: linear warmup from lr / (warmup + 1) to lr, then a cosine to
  `final_lr_fraction` of it at `steps`."""
  if warmup_steps >= steps:
    raise ValueError(
      f"warmup_steps of {warmup_steps} leaves nothing of {steps} steps; "
      f"set --config.warmup_steps lower"
    )
  return optax.warmup_cosine_decay_schedule(
    learning_rate / (warmup_steps + 1),
    learning_rate,
    warmup_steps,
    steps,
    learning_rate * final_lr_fraction,
  )


def adamw(
  learning_rate: optax.Schedule, b1: float, b2: float, weight_decay: float, clip_norm: float
):
  """AdamW after a clip to the global norm (0: none); its state is float32, sharded as the
  parameters are, and named, for the names are a checkpoint's."""
  clip = [("clip", optax.clip_by_global_norm(clip_norm))] if clip_norm else []
  return optax.named_chain(
    *clip,
    ("adam", optax.scale_by_adam(b1, b2, eps=1e-8)),
    ("weight_decay", optax.add_decayed_weights(weight_decay, decayed)),
    ("learning_rate", optax.scale_by_learning_rate(learning_rate)),
  )
