# SPDX-License-Identifier: Apache-2.0
"""A LoRA step of 124M (rank 8 on c_attn and c_proj): ours, peft on torch, and our full step."""

import dataclasses

import jax
import peft

from experiments.benchmarks.opponent import our_model, their_model
from experiments.benchmarks.rounds import Row, alternate, forget, random_tokens, tell
from experiments.benchmarks.training import our_train, their_train
from gpt2_jax.finetune.adapter import TRAINED_NAMES
from gpt2_jax.finetune.lora import LoraSettings, add_lora
from gpt2_jax.sizes import model_config

SHAPES = ((1, 1024), (4, 256))
TARGETS = ("c_attn", "c_proj")


def bench_lora(rounds: int) -> list[Row]:
  rows = []
  for B, T in SHAPES:
    # 1. The same base on three sides; both adapters begin with b = 0.
    config = model_config("124M")
    theirs = their_model(config)
    config = dataclasses.replace(config, dtype="float32", unroll=config.n_layer)
    ours = our_model(theirs, config)
    settings = LoraSettings(8, 16.0, targets=TARGETS)
    adapted = jax.jit(lambda model, s=settings: add_lora(model, s, jax.random.key(0)))(ours)
    lora = peft.LoraConfig(
      r=8, lora_alpha=16, target_modules=list(TARGETS), fan_in_fan_out=True, task_type="CAUSAL_LM"
    )
    theirs = peft.get_peft_model(theirs, lora)

    # 2. The sides. Before the first update the losses are the base's.
    tokens_BT = random_tokens(B, T + 1)
    sides = {
      "ours": our_train(adapted, tokens_BT, TRAINED_NAMES["lora"]),
      "peft": their_train(theirs, tokens_BT, "float32", compiled=False),
      "our full": our_train(ours, tokens_BT),
    }
    del ours, adapted
    losses = {side: round(step(), 5) for side, step in sides.items()}
    tell(f"loss before the first update: {losses}")
    rows.append(alternate(f"lora 124M {B} x {T} float32", "-", B * T, sides, rounds))
    forget(sides)
  return rows
