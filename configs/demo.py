# SPDX-License-Identifier: Apache-2.0
"""The embedded default: this machine's own Python standard library, a small model, two CPU cores,
no download.

  make demo

`experiments/demo.py` prepares the data that this config names, times ten steps, trains the longer
of two lengths that this machine has time for, and samples.
"""

from ml_collections import ConfigDict

from gpt2_jax.configs import gpt2

# Steps by the name of the length.
STEPS = {"long": 900, "short": 200}


def get_config(length: str = "long") -> ConfigDict:
  """`length` follows the colon on the command line: long or short."""
  if length not in STEPS:
    raise ValueError(f"there is no length {length[:40]!r} of the demo; take long or short")

  config = gpt2.get_config("117M")
  config.model.update(
    n_vocab=2048, n_ctx=128, n_embd=192, n_head=4, n_layer=4, dtype="float32", unroll=4
  )
  config.data.update(
    train="runs/demo/data/train",
    validation="runs/demo/data/validation",
    tokenizer="runs/demo/data/python.model",
  )
  config.update(batch_size=32, steps_per_call=10, learning_rate=3e-3, log_every=10)
  config.update(eval_windows=256, sample_tokens=32, keep=1)

  # A few evaluations, and a checkpoint in the middle.
  steps = STEPS[length]
  config.update(steps=steps, warmup_steps=steps // 18)
  config.update(eval_every=50 if length == "short" else 100, save_every=steps // 2)
  return config
