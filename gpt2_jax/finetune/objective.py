# SPDX-License-Identifier: Apache-2.0
"""The objective and the head that a config asks for."""

from ml_collections import ConfigDict

from gpt2_jax.finetune.attention_entropy import entropy_objective
from gpt2_jax.finetune.classify import Classifier, Classify, add_head, check_classes
from gpt2_jax.finetune.distill import distill_objective
from gpt2_jax.finetune.several_texts import SEVERAL, ClassifySeveral
from gpt2_jax.model import GPT2
from gpt2_jax.z_loss import next_token_objective


def make_objective(config: ConfigDict):
  """The objective that a config trains: next tokens (perhaps with a regularizer), labels where it
  has classes, or a teacher's distribution; its teacher is loaded later, see runs/teacher.py."""
  form, classes = config.classify.form, config.classify.classes
  check_classes(classes)
  if form not in ("", *SEVERAL):
    raise ValueError(f"classify.form is {form[:80]!r}; it is one of {', '.join(SEVERAL)}, or ''")
  if form and not classes:
    raise ValueError(
      f"classify.form is {form!r}, and there are no labels; set --config.classify.classes"
    )
  if config.attention_entropy:
    return entropy_objective(config)
  if config.distill.teacher and classes:
    raise ValueError(
      f"classify.classes is {classes}, and distill.teacher is set: a run has one objective; leave "
      f"one of them out"
    )
  if config.z_loss and (classes or config.distill.teacher):
    other = "classes" if classes else "a teacher"
    raise ValueError(
      f"z_loss is {config.z_loss:g}, which is of a language model's loss, and this run has "
      f"{other}; set --config.z_loss=0"
    )
  if config.distill.teacher:
    return distill_objective(config.distill)
  if form:
    return ClassifySeveral(form, classes, float(config.classify.lm_weight))
  if classes:
    return Classify(classes, float(config.classify.lm_weight))
  return next_token_objective(float(config.z_loss))


def add_configured_head(model: GPT2, settings: ConfigDict, key) -> GPT2:
  """The model with the head that `settings`, a config's `classify`, asks for; as it is if none."""
  if settings.classes and settings.form == "choice":
    return Classifier(model, 1, key)  # one logit for each answer
  return add_head(model, settings.classes, key)
