# SPDX-License-Identifier: Apache-2.0
"""GPT-2 from scratch, any published size.

  gpt2-jax train --config=gpt2:117M --workdir=runs/117M \\
    --config.data.train=data/train --config.data.validation=data/validation

The batch is the paper's 512 x 1024 tokens; the rest of the recipe is GPT-3's (Brown et al. 2020,
table 2.1) as nanoGPT uses it, since the GPT-2 paper gives none. Nobody has run this to its end with
this code yet: no number to expect stands here.
"""

import dataclasses

from ml_collections import ConfigDict

from gpt2_jax.sizes import model_config


def get_config(size: str = "117M") -> ConfigDict:
  """`size` follows the colon on the command line: 117M, 345M, 762M, 1542M, distilgpt2, or today's
  names."""
  model = model_config(size)
  learning_rate = {768: 6e-4, 1024: 3e-4, 1280: 2.5e-4, 1600: 2e-4}[model.n_embd]
  return ConfigDict(
    {
      "seed": 0,  # of parameters, dropout and the order of the data
      "model": dataclasses.asdict(model),  # see ModelConfig; --config.model.remat=dots and so on
      "data": {
        "train": "data/train",  # token store, from gpt2-jax tokenize; local or gs://
        "validation": "data/validation",  # token store to validate on
        "tokenizer": "gpt2",  # or a .model, a .json, a vocab.txt, a folder; must be the stores'
      },
      **finetuning(),
      "mesh": {"replica": 1, "data": -1, "model": 1},  # -1 takes the devices that are left
      "steps": 600_000,  # updates; the schedule ends there
      "batch_size": 512,  # windows in one update, over all devices
      "microbatches": 1,  # gradient accumulation: parts of a batch, in turn; divides batch_size
      "steps_per_call": 1,  # updates in one dispatch; more helps where a step takes milliseconds
      "compiler_options": "auto",  # of XLA: auto, none, or auto,NAME=VALUE,...
      "learning_rate": learning_rate,  # peak learning rate
      "schedule": "cosine",  # or wsd: warmup, stable, decay, which can branch (branch_from)
      "warmup_steps": 2000,
      "decay_steps": 0,  # of wsd: the last steps, in which the learning rate decays
      "decay_form": "1-sqrt",  # of wsd: 1-sqrt or linear
      "final_lr_fraction": 0.1,  # of the peak, at the end of the schedule
      "branch_from": "",  # workdir@step of a run to go on from in a new workdir; empty is none
      "optimizer": "adamw",  # or muon, for the blocks' matrices: same learning rate, same decay
      "momentum": 0.95,  # of muon
      "b1": 0.9,
      "b2": 0.95,
      "weight_decay": 0.1,  # on matrices only
      "z_loss": 0.0,  # weight of the squared logsumexp of the logits; PaLM has 1e-4
      "attention_entropy": 0.0,  # weight of the attention's entropy (EAR); its paper has 0.01
      "clip_norm": 1.0,  # largest global norm of the gradient; 0 is no clipping
      "trainable": ("*",),  # names of what is trained, as ("*",) or ("ln_f.*",)
      "patience": 0,  # evaluations without a better one, then the run ends; 0 is never
      "max_skips": 10,  # updates in a row that may be not finite before the run stops
      "log_every": 10,  # steps between lines of metrics.jsonl
      "eval_every": 1000,  # steps between evaluations
      "eval_windows": 512,  # first windows of the validation store that are scored; 0 is all
      # steps between checkpoints; an evaluation that is the best so far saves too
      "save_every": 1000,
      "keep": 3,  # newest checkpoints kept; the best one stays besides
      "profile_steps": 0,  # steps of a JAX trace in workdir/profile
      "sample_tokens": 0,  # tokens of a sample that each evaluation shows; 0 is none
      "wandb_project": "",  # at Weights & Biases, through extra [wandb]; empty is none
    }
  )


def finetuning() -> dict:
  """The knobs of fine-tuning, with which a run from scratch trains all of a random model."""
  return {
    "init_from": "",  # checkpoint to start from: a name, a path, workdir@step; empty is random
    "adapter": {
      "kind": "",  # "lora", "prompt" or "prefix": what is trained beside a frozen model
      "rank": 8,  # of LoRA: columns of its matrices
      "alpha": 16.0,  # of LoRA: its product is scaled by alpha / rank
      "rslora": False,  # of LoRA: scale by alpha / sqrt(rank)
      "targets": ("c_attn",),  # of LoRA: the matrices it is added to
      "dropout": 0.0,  # of LoRA: dropout rate of its input
      "tokens": 20,  # of prompt and prefix: virtual tokens
      "quantize": "",  # of LoRA: "int8" for the frozen matrices
    },
    "classify": {
      "classes": 0,  # labels of a head on the last token; 0 is a language model
      "form": "",  # "similarity" or "choice": examples of several texts, as GPT-1 has them
      "lm_weight": 0.5,  # of the language model's loss beside the labels', as GPT-1 has it
    },
    "distill": {
      "teacher": "",  # checkpoint to learn from, as init_from; empty is none
      "layers": "",  # layers of init_from that the student starts with, as "0,2,4"; empty is all
      "dtype": "float32",  # of the teacher's matrices: float32, bfloat16, int8
      "sharded": True,  # the teacher is split over data, as the student is
      "temperature": 2.0,  # of the distributions that are compared
      "kl_weight": 5.0,  # of T^2 KL(teacher || student)
      "lm_weight": 2.0,  # of the language model's loss
      "cos_weight": 1.0,  # of 1 - cosine of the last hidden states
    },
  }
