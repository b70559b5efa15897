# SPDX-License-Identifier: Apache-2.0
"""The embedded default: this machine's own Python standard library, a small model, two CPU cores,
no download.

  make demo

`experiments/demo.py` prepares the data that this config names, trains, and samples.
"""

from ml_collections import ConfigDict

from gpt2_jax.configs import gpt2


def get_config() -> ConfigDict:
  config = gpt2.get_config("117M")
  config.model.update(
    n_vocab=2048, n_ctx=128, n_embd=192, n_head=4, n_layer=4, dtype="float32", unroll=4
  )
  config.data.update(
    train="runs/demo/data/train",
    validation="runs/demo/data/validation",
    tokenizer="runs/demo/data/python.model",
  )
  config.update(steps=900, batch_size=32, steps_per_call=10, learning_rate=3e-3, warmup_steps=50)
  config.update(log_every=10, eval_every=100, eval_windows=256, save_every=450, keep=1)
  return config
