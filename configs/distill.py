# SPDX-License-Identifier: Apache-2.0
"""Distillation by DistilGPT-2's recipe: a student with half of its teacher's layers.

  gpt2-jax train --config=distill --workdir=runs/distilled --config.distill.teacher=gpt2 \\
    --config.data.train=data/train --config.data.validation=data/validation

The student starts with six of the teacher's twelve layers, its embeddings and its last norm. Other
students: `distill.layers` for a teacher of another depth; `init_from` another checkpoint, with
`distill.layers=''`; or, with `init_from=''` too, random weights of the sizes in `model`, which then
may have another width, with `distill.cos_weight=0`.

The weights of the losses, temperature, learning rate, clipping and the share of warmup are those of
Hugging Face's script (transformers, examples/research_projects/distillation), which has a linear
schedule and Adam's epsilon of 1e-6. Its example trains DistilBERT, with the positions frozen
(trainable=("wte", "h.*", "ln_f.*")); the command of DistilGPT-2 was not published. Nobody has run
this to its end with this code yet: experiments/README.md has what was measured, on small models.
"""

from ml_collections import ConfigDict

from gpt2_jax.configs import finetune


def get_config() -> ConfigDict:
  config = finetune.get_config("full")
  config.distill.update(teacher="gpt2", layers="0,2,4,7,9,11", dtype="bfloat16")
  # The student's weights are the teacher's, unless init_from says something else.
  config.init_from = config.distill.get_oneway_ref("teacher")

  config.update(steps=100_000, warmup_steps=5000, batch_size=256, learning_rate=5e-4)
  config.update(b2=0.999, weight_decay=0.0, clip_norm=5.0, patience=0)
  config.update(log_every=10, eval_every=1000, eval_windows=512, save_every=1000, keep=3)
  return config
