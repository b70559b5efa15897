# SPDX-License-Identifier: Apache-2.0
"""Private fine-tuning: LoRA by DP-SGD; the log and the checkpoints tell the epsilon it spends.

  gpt2-jax train --config=private --workdir=runs/private --config.init_from=gpt2 \\
    --config.data.train=data/mine/train --config.data.validation=data/mine/validation

For one device, or several on the `model` axis: on D parts of a batch microbatches are
batch_size / D. An example is a row: a window of text, or one prompt and response that was
tokenized with --nopack. Extra [privacy]. Nobody has run it with GPT-2's weights yet:
experiments/README.md has what was measured, on small models.
"""

from ml_collections import ConfigDict

from gpt2_jax.configs import finetune


def get_config() -> ConfigDict:
  config = finetune.get_config("lora")

  # 64 of the examples are expected in a batch, which has room for 112; a microbatch is one.
  config.private.update(clip_norm=1.0, noise_multiplier=1.0, batch_size=64)
  config.update(batch_size=112, microbatches=112)

  # The noise of the sum is in every direction: no second clip, no decay to it, a higher rate.
  config.update(clip_norm=0.0, weight_decay=0.0, learning_rate=5e-4)
  return config
