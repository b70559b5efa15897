# SPDX-License-Identifier: Apache-2.0
"""The zero-shot sweep: models x tasks, with error bars, beside the paper's figures.

  gpt2-jax evaluate --model=gpt2 --task=lambada --task=blimp_anaphor_number_agreement \\
    --data=data --out=runs/zero_shot

All knobs are here. --model and --task take the place of the lists, and may be given many times.
"""

from ml_collections import ConfigDict

# The tasks of the GPT-2 paper.
PAPER_TASKS = (
  "lambada:openai_stop_words",
  "lambada:openai_last_word",
  "lambada:openai_last_piece",
  "cbt_cn",
  "cbt_ne",
  "wikitext2",
  "ptb",
  "enwik8",
  "text8",
  "wikitext103",
  "lm1b",
  "winograd273",
  "coqa",
  "cnn_dailymail",
  "wmt14_en_fr:paper_prompt",
  "wmt14_fr_en:paper_prompt",
  "natural_questions:paper_prompt",
)


def get_config() -> ConfigDict:
  return ConfigDict(
    {
      # A published name, a checkpoint's path, or the workdir of a run, whose latest checkpoint
      # counts. A step may follow a workdir: runs/117M@1000, runs/117M@best, or runs/117M@all for
      # each checkpoint that was kept. Behind it, an adapter of peft's: gpt2+adapters/mine. A null
      # model, random weights of a size or of a checkpoint's shape: random:117M@SEED.
      "models": ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl"),
      # task, task:protocol, or task:protocol:shots. An empty protocol is the task's first.
      # `gpt2-jax evaluate --list` shows all.
      "tasks": PAPER_TASKS,
      # folder with a folder for each dataset, in its published form
      "data": "data",
      # where TFDS keeps the datasets that are not in `data`; empty is TFDS's own default
      "tfds_dir": "",
      # first items of each task that are scored; 0 is all
      "limit": 0,
      # rows in one call, over all devices
      "batch_size": 32,
      # tokens that each window over a long text predicts: 1 gives all the context there is, 0 is
      # n_ctx
      "stride": 0,
      # of activations and matmuls: float32 or bfloat16
      "dtype": "float32",
      # of few-shot examples, of sampling, and of the resamples
      "seed": 0,
      # of the bootstrap, and of the coins behind p-values
      "resamples": 10_000,
      # with --overlap: an item counts as seen if more than this share of its n-grams is in the
      # training corpus
      "seen_above": 0.0,
      # also writes report.md: one page with a picture of each task, and the table
      "page": False,
      # -1 takes the devices that are left
      "mesh": {"replica": 1, "data": -1, "model": 1},
    }
  )
