# SPDX-License-Identifier: Apache-2.0
"""Fine-tuning on conversations: of each, the assistant's turns are learned.

  gpt2-jax tokenize --examples=train.jsonl --template=dialogpt --n_ctx=256 --out=data/chat/train
  gpt2-jax tokenize --examples=validation.jsonl --template=dialogpt --n_ctx=256 \\
    --out=data/chat/validation
  gpt2-jax train --config=finetune_chat:lora --workdir=runs/chat --config.init_from=gpt2

A line of train.jsonl is {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant",
"content": "Hello!"}]}. --loss=all learns the user's turns, too, as DialoGPT does.
"""

from ml_collections import ConfigDict

from gpt2_jax.configs import finetune


def get_config(trained: str = "full") -> ConfigDict:
  """`trained` follows the colon on the command line: full or lora."""
  config = finetune.get_config(trained)
  config.data.update(train="data/chat/train", validation="data/chat/validation")
  config.model.n_ctx = 256  # the rows that examples were packed into
  config.update(steps=2000, warmup_steps=200)
  return config
