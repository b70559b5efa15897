# SPDX-License-Identifier: Apache-2.0
"""What a model does to the world: models x detection, bias, memorization, on one page.

  gpt2-jax evaluate --config=responsible --data=data --download --skip_missing \\
    --out=runs/responsible

report.md is the page, with a picture of each task. The same command resumes. `memorization` reads
the training data of the models: put its texts or its token store into data/memorization. A set that
is not there is left out by --skip_missing, and the page says so.
"""

from ml_collections import ConfigDict

from gpt2_jax.configs import zero_shot

# A null model stands beside the models: random weights have a score, too.
MODELS = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl", "random:gpt2@0")

DETECTION = (
  "machine_text:fast_detectgpt",
  "machine_text:likelihood",
  "machine_text:log_rank",
  "machine_text:lrr",
  "machine_text:rank",
  "machine_text:entropy",
)
BIAS = (
  "crows_pairs:valid",
  "crows_pairs:by_type",
  "winobias:coreference",
  "winobias:sentence",
  "winogender",
  "bold:gender",
  "bold:race",
  "bold:religious_ideology",
  "bold:political_ideology",
  "bold:profession",
)
MEMORIZATION = ("memorization:k32", "memorization:k50")


def get_config() -> ConfigDict:
  config = zero_shot.get_config()
  config.update(models=MODELS, tasks=(*DETECTION, *BIAS, *MEMORIZATION), page=True)
  return config
