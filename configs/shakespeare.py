# SPDX-License-Identifier: Apache-2.0
"""nanoGPT's character-level CPU run on tiny Shakespeare, or on any text file, for comparison.

  gpt2-jax tokenize --files=input.txt --characters=:90% --train_tokenizer=characters \\
    --tokenizer=data/shakespeare/characters.json --out=data/shakespeare/train
  gpt2-jax tokenize --files=input.txt --characters=90%: \\
    --tokenizer=data/shakespeare/characters.json --out=data/shakespeare/validation
  gpt2-jax train --config=shakespeare --workdir=runs/shakespeare

nanoGPT reaches 1.898 nats a character with these settings (its GELU is erf and its LayerNorms have
no bias).
"""

from ml_collections import ConfigDict

from gpt2_jax.configs import gpt2


def get_config() -> ConfigDict:
  config = gpt2.get_config("117M")
  config.model.update(
    n_vocab=65, n_ctx=64, n_embd=128, n_head=4, n_layer=4, dtype="float32", unroll=4
  )
  config.data.update(
    train="data/shakespeare/train",
    validation="data/shakespeare/validation",
    tokenizer="data/shakespeare/characters.json",
  )
  config.update(
    steps=2000, batch_size=12, steps_per_call=50, learning_rate=1e-3, warmup_steps=100, b2=0.99
  )
  config.update(log_every=50, eval_every=500, eval_windows=0, save_every=500, keep=1)
  return config
