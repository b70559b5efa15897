# SPDX-License-Identifier: Apache-2.0
"""The zero-shot sweep: models x tasks, with error bars, beside the paper's figures.

  python launch/evaluate.py --model=gpt2 --task=lambada --task=blimp_anaphor_number_agreement \\
    --data=data --out=runs/zero_shot

All knobs stand here; --model and --task, as often as one likes, take the place of the lists.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
  return ConfigDict(
    {
      # A published name, a checkpoint's path, or the workdir of a run, whose newest checkpoint counts; a step may
      # follow a workdir: runs/117M@1000, runs/117M@best, or runs/117M@all for each checkpoint that was kept.
      "models": ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl"),
      # task, task:protocol, or task:protocol:shots, where the protocol may be empty: the task's first;
      # `python launch/evaluate.py --list` shows all. These are the paper's.
      "tasks": (
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
        "wmt14_en_fr::5",
        "wmt14_fr_en::5",
        "natural_questions::5",
      ),
      "data": "data",  # folder with a folder for each dataset, in its published form
      "tfds_dir": "",  # where TFDS keeps the sets that are not there; empty is its own default
      "limit": 0,  # first items of each task that are scored, and drawn from as examples; 0 is all
      "batch_size": 32,  # rows in one call, over all devices
      "stride": 0,  # tokens that each window over a long text predicts; 1 gives all the context there is, 0 is n_ctx
      "dtype": "float32",  # of activations and products: float32 or bfloat16
      "seed": 0,  # of examples, of draws, and of the resamples
      "resamples": 10_000,  # of the bootstrap, and of the coins behind p-values
      "seen_above": 0.0,  # with --overlap: an item counts as seen if more than this share of its n-grams was found
      "mesh": {"replica": 1, "data": -1, "model": 1},  # -1 takes the devices that are left
    }
  )
