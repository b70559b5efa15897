# SPDX-License-Identifier: Apache-2.0
"""Fine-tuning on plain text, such as one author's: the model then writes like it.

gpt2-jax tokenize --files=input.txt --characters=:90% --out=data/text/train
gpt2-jax tokenize --files=input.txt --characters=90%: --out=data/text/validation
gpt2-jax train --config=finetune_text:lora --workdir=runs/text --config.init_from=gpt2
"""

from ml_collections import ConfigDict

from gpt2_jax.configs import finetune


def get_config(trained: str = "full") -> ConfigDict:
  """`trained` follows the colon on the command line: full or lora."""
  config = finetune.get_config(trained)
  config.data.update(train="data/text/train", validation="data/text/validation")

  # A book is a few hundred windows: it is learned by heart within a few epochs.
  config.update(steps=500, warmup_steps=50, eval_every=50, save_every=50, sample_tokens=64)
  return config
