# SPDX-License-Identifier: Apache-2.0
"""Fine-tuning on prompts and completions: of each example only the completion is learned.

  gpt2-jax tokenize --examples=train.jsonl --template=plain --n_ctx=512 --out=data/prompt/train
  gpt2-jax tokenize --examples=validation.jsonl --template=plain --n_ctx=512 \\
    --out=data/prompt/validation
  gpt2-jax train --config=finetune_prompt:lora --workdir=runs/prompt --config.init_from=gpt2

A line of train.jsonl is {"prompt": "Translate to French: cat\\nFrench:", "completion": " chat"}.
"""

from ml_collections import ConfigDict

from gpt2_jax.configs import finetune


def get_config(trained: str = "full") -> ConfigDict:
  """`trained` follows the colon on the command line: full or lora."""
  config = finetune.get_config(trained)
  config.data.update(train="data/prompt/train", validation="data/prompt/validation")
  config.model.n_ctx = 512  # the rows that examples were packed into
  return config
