# SPDX-License-Identifier: Apache-2.0
"""Provenance of a distillation's teacher: opened, compared with the student, loaded, recorded.

A checkpoint of the student does not hold its teacher; it names it, with its SHA-256.
"""

import dataclasses
import functools
import warnings

import jax
from ml_collections import ConfigDict

from gpt2_jax.compat import get_mesh
from gpt2_jax.files import announce
from gpt2_jax.finetune.distill import Distill, as_teacher
from gpt2_jax.finetune.init_from import Origin, base_sha256, open_origin
from gpt2_jax.finetune.objective import make_objective
from gpt2_jax.finetune.start import reconfigure
from gpt2_jax.gpt1 import new_model
from gpt2_jax.model import GPT2, ModelConfig
from gpt2_jax.runs.origin import planned_origin
from gpt2_jax.sharding import concrete
from gpt2_jax.tokenizer import Tokenizer


def abstract_objective(config: ConfigDict, model_config: ModelConfig):
  """The objective of a config, with shapes in place of a teacher's arrays; the mesh is in force.

  Of a published teacher nothing is downloaded. Raises ValueError where the teacher cannot teach
  this student.
  """
  objective = make_objective(config)
  if not isinstance(objective, Distill):
    return objective
  origin = planned_origin(config.distill.teacher)
  check_teacher(origin, config, model_config)
  make = functools.partial(new_model, teacher_config(origin, model_config))
  build = functools.partial(as_teacher, settings=config.distill)
  teacher = jax.eval_shape(lambda: build(make(jax.random.key(0))))
  return dataclasses.replace(objective, teacher=concrete(teacher, get_mesh()))


def check_teacher(origin: Origin, config: ConfigDict, student: ModelConfig) -> None:
  """Raises ValueError, in one line, unless a teacher has the student's vocabulary, its context, and
  its width where hidden states are compared."""
  name, teacher = origin.name[:160], origin.config
  if teacher.n_vocab != student.n_vocab:
    raise ValueError(
      f"the teacher {name} has {teacher.n_vocab:,} tokens, and the student {student.n_vocab:,}: "
      f"their distributions are over one vocabulary; give another --config.distill.teacher, or "
      f"train the student with the teacher's tokenizer"
    )
  if teacher.n_ctx < student.n_ctx:
    raise ValueError(
      f"the teacher {name} has a context of {teacher.n_ctx:,}, and the student {student.n_ctx:,}; "
      f"set --config.model.n_ctx={teacher.n_ctx}, or less"
    )
  if config.distill.cos_weight and teacher.n_embd != student.n_embd:
    raise ValueError(
      f"distill.cos_weight is {config.distill.cos_weight:g}, which compares hidden states of one "
      f"width: the teacher {name} has {teacher.n_embd:,}, and the student {student.n_embd:,}; "
      f"set --config.distill.cos_weight=0"
    )


def teacher_config(origin: Origin, student: ModelConfig) -> ModelConfig:
  """The teacher's architecture, computed as the student is; nothing of it is kept for a backward
  pass."""
  return dataclasses.replace(
    origin.config,
    n_ctx=student.n_ctx,
    dtype=student.dtype,
    unroll=min(student.unroll, origin.config.n_layer),
    attention="auto",
    remat="none",
    pad_heads=True,
  )


def load_teacher(
  objective, config: ConfigDict, model_config: ModelConfig, tokenizer: Tokenizer
) -> tuple[object, dict | None]:
  """The objective with the teacher's arrays on the mesh in force, and what a checkpoint records of
  the teacher; None for an objective without one.

  Raises ValueError for a teacher of another tokenizer.
  """
  if not isinstance(objective, Distill):
    return objective, None

  # 1. The whole teacher, with its tokenizer.
  with announce(f"loading the teacher {config.distill.teacher}, seconds to a minute"):
    origin = open_origin(config.distill.teacher)
    check_teacher(origin, config, model_config)
    theirs = origin.tokenizer
    if theirs is not None and theirs.fingerprint != tokenizer.fingerprint:
      raise ValueError(
        f"the teacher {origin.name[:160]} has a tokenizer (fingerprint {theirs.fingerprint[:12]}) "
        f"other than the data's ({tokenizer.fingerprint[:12]}): its distribution is of other "
        f"tokens; give another --config.distill.teacher, or the data in its tokens"
      )
    model = origin.load(get_mesh(), model_config.dtype)
    record = {"name": origin.name, "sha256": base_sha256(model)}

  # 2. In the dtype and the sharding that it teaches in.
  def build(model: GPT2) -> GPT2:
    return as_teacher(reconfigure(model, teacher_config(origin, model_config)), config.distill)

  with warnings.catch_warnings():
    # What becomes bfloat16 or int8 is an array of its own.
    warnings.filterwarnings("ignore", "Some donated buffers were not usable")
    teacher = jax.jit(build, donate_argnums=0)(model)
  return dataclasses.replace(objective, teacher=teacher), record
