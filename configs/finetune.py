# SPDX-License-Identifier: Apache-2.0
"""Fine-tuning of any checkpoint: all of its weights, or LoRA beside them.

  gpt2-jax train --config=finetune:lora --workdir=runs/mine --config.init_from=gpt2 \\
    --config.data.train=data/mine/train --config.data.validation=data/mine/validation

Architecture, vocabulary and tokenizer are the checkpoint's. recipes/forkme.py has applications over
this file: text, chat, story and so on. The recipe is that of Hu et al. 2021 ("LoRA", table 11:
GPT-2 M on E2E) but for its label smoothing, with a cosine for its linear decay, with gradients
clipped to a norm of 1, and with LoRA on the whole of c_attn, where theirs is on queries and values.
Learning rates of all weights are usually lower. Nobody has run GPT-2 M with this code yet:
experiments/README.md has what was measured, on small models.
"""

from ml_collections import ConfigDict, config_dict

from gpt2_jax.configs import gpt2

# Peak learning rate by what is trained.
LEARNING_RATES = {"full": 5e-5, "lora": 2e-4}


def get_config(trained: str = "full") -> ConfigDict:
  """`trained` follows the colon on the command line: full or lora."""
  if trained not in LEARNING_RATES:
    raise ValueError(f"nothing is trained by the name {trained[:40]!r}; take full or lora")

  # None is the checkpoint's. Of these only a shorter n_ctx and other dropout rates may be set.
  config = gpt2.get_config("117M")
  placeholder = config_dict.placeholder
  for name in ("n_vocab", "n_ctx", "n_embd", "n_head", "n_layer"):
    config.model[name] = placeholder(int)
  for name in ("embd_pdrop", "attn_pdrop", "resid_pdrop"):
    config.model[name] = placeholder(float)
  config.model.use_bias = placeholder(bool)
  config.model.gelu = placeholder(str)
  config.model.family = placeholder(str)
  config.init_from = "gpt2"
  config.data.tokenizer = ""

  # LoRA's rank and scale in the paper's table; its matrices are those of the attention.
  if trained == "lora":
    config.adapter.update(kind="lora", rank=4, alpha=32.0, targets=("c_attn",))

  config.update(steps=1000, warmup_steps=100, batch_size=8, learning_rate=LEARNING_RATES[trained])
  config.update(final_lr_fraction=0.0, b2=0.999, weight_decay=0.01)
  config.update(log_every=10, eval_every=100, eval_windows=0, save_every=100, keep=1, patience=5)
  return config
