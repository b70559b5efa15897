# SPDX-License-Identifier: Apache-2.0
"""AdamW with warmup and cosine decay: GPT-3's recipe as nanoGPT uses it, since the GPT-2 paper gives none."""

import jax
import optax

from gpt2_jax.model import name_of

DECAYED = ("w", "wte", "wpe")  # matrices, by name: stacked over layers, a LayerNorm gain has two dimensions too


def decayed(model):
  """A tree like `model`, True where weight decay applies."""
  return jax.tree_util.tree_map_with_path(lambda path, _: name_of(path).split(".")[-1] in DECAYED, model)


def schedule(learning_rate: float, steps: int, warmup_steps: int, final_lr_fraction: float) -> optax.Schedule:
  """Linear from lr / (warmup + 1) to lr over `warmup_steps`, then a cosine to `final_lr_fraction` of it at `steps`."""
  if warmup_steps >= steps:
    raise ValueError(f"warmup_steps of {warmup_steps} leaves nothing of {steps} steps; set --config.warmup_steps lower")
  return optax.warmup_cosine_decay_schedule(
    learning_rate / (warmup_steps + 1), learning_rate, warmup_steps, steps, learning_rate * final_lr_fraction
  )


def adamw(learning_rate: optax.Schedule, b1: float, b2: float, weight_decay: float, clip_norm: float):
  """Clip to the global norm, then AdamW; the state is float32 and sharded like the parameters."""
  return optax.chain(
    optax.clip_by_global_norm(clip_norm),
    optax.adamw(learning_rate, b1=b1, b2=b2, eps=1e-8, weight_decay=weight_decay, mask=decayed),
  )
