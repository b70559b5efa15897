# SPDX-License-Identifier: Apache-2.0
"""GPT-1 from scratch, by its paper's recipe.

  gpt2-jax tokenize --files=books/*.txt --tokenizer=models/gpt1 --out=data/train
  gpt2-jax train --config=gpt1 --workdir=runs/gpt1

models/gpt1 is a folder with GPT-1's vocabulary: OpenAI's encoder_bpe_40000.json and
vocab_40000.bpe, or Hugging Face's openai-gpt. Source: Radford et al. 2018, section 4.1: batches of
64 x 512 tokens, 100 epochs of BooksCorpus, Adam with a peak learning rate of 2.5e-4, 2,000 steps of
linear warmup and a cosine to 0, dropout of 0.1, weight decay of 0.01 on matrices. The paper says
nothing of clipping; OpenAI's fine-tuning clips to a norm of 1. 100 epochs of its billion tokens are
about 3,000,000 steps. Nobody has run this to its end with this code: no number to expect stands
here.
"""

import dataclasses

from ml_collections import ConfigDict

from gpt2_jax.configs import gpt2
from gpt2_jax.sizes import GPT1_CONFIG


def get_config() -> ConfigDict:
  config = gpt2.get_config("117M")
  config.model.update(dataclasses.asdict(GPT1_CONFIG))
  config.data.tokenizer = "models/gpt1"
  config.update(steps=3_000_000, batch_size=64, warmup_steps=2000, final_lr_fraction=0.0)
  config.update(learning_rate=2.5e-4, b1=0.9, b2=0.999, weight_decay=0.01)
  return config
