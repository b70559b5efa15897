# SPDX-License-Identifier: Apache-2.0
"""The knobs of a training config: each declared once, with its type, its range and its help.

The declaration checks the values at the start, explains them in `--help`, and decides what a
resumed run may change. The values are in configs/; what a model's knobs may be, ModelConfig says.
"""

import dataclasses
import difflib
import json
import math
import numbers

from gpt2_jax.files import user_path

FLOAT32_MAX = 3.4028234e38


@dataclasses.dataclass(frozen=True)
class Knob:
  """One knob: its type, its range from `low` to `high`, and what it is for."""

  type: type
  help: str
  low: float = -math.inf
  high: float = math.inf
  below_high: bool = False  # whether `high` itself is out
  above_low: bool = False  # whether `low` itself is out
  resumable: bool = False  # whether a resumed run may change it: it says how, not what, is computed
  branchable: bool = False  # whether a branch of a run may change it: it is of what comes after
  added: object = None  # what runs did before this knob was there

  def problem(self, value) -> str | None:
    """What is wrong with a value, or None."""
    if not self._is_of_type(value):
      name = "tuple of names" if self.type is tuple else self.type.__name__
      return f"is not of type {name}"
    if self.type is str and len(value) > 1000:
      return "is longer than 1,000 characters"
    if self.type not in (int, float):
      return None
    # Steps run in 32 bits: what is larger would be infinite there, or another number.
    if not abs(value) <= FLOAT32_MAX:
      return "is not a finite number of 32 bits"
    if self.type is int and self.high == math.inf and value > 2**31 - 1:
      return "is not below 2^31"
    too_low = value <= self.low if self.above_low else value < self.low
    too_high = value >= self.high if self.below_high else value > self.high
    return f"is not {self.range()}" if too_low or too_high else None

  def _is_of_type(self, value) -> bool:
    if self.type is bool or isinstance(value, bool):
      return self.type is bool and isinstance(value, bool)
    if self.type is float:
      return isinstance(value, numbers.Real)
    if self.type is int:
      return isinstance(value, numbers.Integral)
    if self.type is tuple:
      return isinstance(value, tuple | list) and all(isinstance(name, str) for name in value)
    return isinstance(value, self.type)

  def range(self) -> str:
    """The range in words: "at least 0 and below 1"."""
    low = f"{'above' if self.above_low else 'at least'} {self.low:g}"
    high = f"{'below' if self.below_high else 'at most'} {self.high:g}"
    if self.high == 2**32 - 1:
      high = "below 2^32"
    if self.high == 2**28:
      high = "at most 2^28"
    bounds = []
    if self.low > -math.inf:
      bounds.append(low)
    if self.high < math.inf:
      bounds.append(high)
    return " and ".join(bounds)

  def allowed(self) -> str:
    """Type and range, for `--help`: "int at least 1"."""
    return f"{self.type.__name__} {self.range()}".strip()


def _count(help: str, low: int = 1, resumable: bool = False) -> Knob:
  return Knob(int, help, low, resumable=resumable)


def _model(type: type, help: str, resumable: bool = False) -> Knob:
  return Knob(type, help, resumable=resumable)


def _dimension(help: str) -> Knob:
  """A size that arrays have four times at most: XLA counts in 32 bits."""
  return Knob(int, help, 1, 2**28)


KNOBS = {
  "seed": Knob(int, "of parameters, dropout and the order of the data", 0, 2**32 - 1),
  # The model, see ModelConfig, which says what each may be.
  "model.n_vocab": _dimension("tokens of the vocabulary: the tokenizer's"),
  "model.n_ctx": _dimension("context: tokens of a window"),
  "model.n_embd": _dimension("width"),
  "model.n_head": _model(int, "attention heads; they divide the width"),
  "model.n_layer": _model(int, "blocks"),
  "model.use_bias": _model(bool, "biases in Linear and LayerNorm"),
  "model.gelu": _model(str, "tanh, or erf for nanoGPT's checkpoints"),
  "model.embd_pdrop": _model(float, "dropout rate of the embeddings"),
  "model.attn_pdrop": _model(float, "dropout rate of the attention probabilities"),
  "model.resid_pdrop": _model(float, "dropout rate of what joins the residual stream"),
  "model.dtype": _model(str, "mixed precision: bfloat16, or float32", resumable=True),
  "model.pad_heads": _model(bool, "zero heads up to what the model axis divides", resumable=True),
  "model.attention": _model(str, "kernel: auto, chunked, fused, splash, cudnn", resumable=True),
  "model.cross_entropy": _model(
    str, "kernel of the head and its loss: auto, plain, fused", resumable=True
  ),
  "model.remat": _model(str, "recomputed backward: none, dots, attention, full", resumable=True),
  "model.unroll": _model(int, "layers a step of the scan", resumable=True),
  "model.family": Knob(str, "gpt2, or gpt1: the architecture", added="gpt2"),
  # The data: where it lies may change, what it is may not (the manifests' hashes are compared).
  "data.train": Knob(str, "token store to train on, local or gs://", resumable=True),
  "data.validation": Knob(str, "token store to validate on", resumable=True),
  "data.tokenizer": Knob(str, "the stores' tokenizer: gpt2, a .model or a .json", resumable=True),
  # Fine-tuning. What a checkpoint is, is compared by its SHA-256: it may move.
  "init_from": Knob(
    str,
    "checkpoint to start from: a name, a path, or workdir@step; empty is random weights",
    resumable=True,
    added="",
  ),
  "adapter.kind": Knob(
    str, "lora, prompt or prefix: what is trained beside a frozen model", added=""
  ),
  "adapter.rank": Knob(int, "of LoRA: columns of its matrices", 1, 2**16, added=8),
  "adapter.alpha": Knob(
    float, "of LoRA: its product is scaled by alpha / rank", 0, added=16.0, above_low=True
  ),
  "adapter.rslora": Knob(bool, "of LoRA: scale by alpha / sqrt(rank)", added=False),
  "adapter.targets": Knob(tuple, "of LoRA: the matrices it is added to", added=("c_attn",)),
  "adapter.dropout": Knob(
    float, "of LoRA: dropout rate of its input", 0, 1, below_high=True, added=0.0
  ),
  "adapter.tokens": Knob(int, "of prompt and prefix: virtual tokens", 1, 2**20, added=20),
  "adapter.quantize": Knob(str, "of LoRA: int8 for the frozen matrices; empty is none", added=""),
  "classify.classes": Knob(
    int, "labels of a head on the last token; 0 is a language model", 0, 2**20, added=0
  ),
  "classify.form": Knob(
    str, "of several texts at once: similarity, or choice; empty is one text", added=""
  ),
  "classify.lm_weight": Knob(
    float, "of the language model's loss beside the labels'", 0, added=0.5
  ),
  # Distillation. A teacher is compared by its SHA-256: it may move.
  "distill.teacher": Knob(
    str, "checkpoint to learn from, as init_from; empty is none", resumable=True, added=""
  ),
  "distill.layers": Knob(
    str, "layers of init_from that the student starts with, as 0,2,4; empty is all", added=""
  ),
  "distill.dtype": Knob(
    str, "of the teacher's matrices: float32, bfloat16, int8", resumable=True, added="float32"
  ),
  "distill.sharded": Knob(
    bool, "the teacher is split over data, as the student is", resumable=True, added=True
  ),
  "distill.temperature": Knob(
    float, "of the distributions that are compared", 0, added=2.0, above_low=True
  ),
  "distill.kl_weight": Knob(float, "of T^2 KL(teacher || student)", 0, added=5.0),
  "distill.lm_weight": Knob(float, "of the language model's loss", 0, added=2.0),
  "distill.cos_weight": Knob(float, "of 1 - cosine of the last hidden states", 0, added=1.0),
  # The mesh; make_mesh says which sizes multiply.
  "mesh.replica": _count("data parallelism across slices; -1 is the rest", -1, True),
  "mesh.data": _count("FSDP: data parallelism with sharded parameters", -1, True),
  "mesh.model": _count("tensor parallelism", -1, True),
  # The recipe.
  "steps": Knob(int, "updates; the schedule ends there", 1, branchable=True),
  "batch_size": _count("windows in one update, over all devices"),
  "microbatches": _count("gradient accumulation: parts of a batch, in turn", resumable=True),
  "steps_per_call": _count("updates in one dispatch", resumable=True),
  "compiler_options": Knob(
    str, "of XLA: auto, none, or auto,NAME=VALUE,...", resumable=True, added="auto"
  ),
  "learning_rate": Knob(float, "peak learning rate", 0, above_low=True),
  "schedule": Knob(str, "cosine, or wsd: warmup, stable, decay", branchable=True, added="cosine"),
  "warmup_steps": _count("steps of linear warmup", 0),
  "decay_steps": Knob(
    int, "of wsd: the last steps, in which the rate decays", 0, branchable=True, added=0
  ),
  "decay_form": Knob(str, "of wsd: 1-sqrt or linear", branchable=True, added="1-sqrt"),
  "final_lr_fraction": Knob(
    float, "of the peak, at the end of the schedule", 0, 1, branchable=True
  ),
  "branch_from": Knob(
    str,
    "workdir@step of a run to go on from in a new workdir; empty is none",
    branchable=True,
    added="",
  ),
  "optimizer": Knob(str, "adamw, or muon for the blocks' matrices", added="adamw"),
  "momentum": Knob(float, "of muon", 0, 1, below_high=True, added=0.95),
  "b1": Knob(float, "AdamW's decay of the mean", 0, 1, below_high=True),
  "b2": Knob(float, "AdamW's decay of the square", 0, 1, below_high=True),
  "weight_decay": Knob(float, "on matrices only", 0),
  "z_loss": Knob(float, "weight of the squared logsumexp of the logits", 0, added=0.0),
  "attention_entropy": Knob(float, "weight of the attention's entropy (EAR)", 0, added=0.0),
  "clip_norm": Knob(float, "largest global norm of the gradient; 0 is no clipping", 0),
  "trainable": Knob(tuple, 'names of what is trained, as ("*",) or ("ln_f.*",)', added=("*",)),
  "patience": Knob(
    int,
    "evaluations without a better one, then the run ends; 0 is never",
    0,
    resumable=True,
    added=0,
  ),
  "max_skips": _count("updates in a row that may be not finite", resumable=True),
  # What is written, and when. A large number is never.
  "log_every": _count("steps between lines of metrics.jsonl", resumable=True),
  "eval_every": _count("steps between evaluations", resumable=True),
  "eval_windows": Knob(
    int, "first validation windows that are scored; 0 is all", 0, branchable=True
  ),
  "save_every": _count("steps between checkpoints; the best evaluation saves too", resumable=True),
  "keep": _count("newest checkpoints kept; the best one stays besides", resumable=True),
  "profile_steps": _count("steps of a JAX trace in workdir/profile", 0, True),
  "sample_tokens": Knob(
    int, "tokens of a sample at each evaluation; 0 is none", 0, resumable=True, added=0
  ),
  "wandb_project": Knob(
    str, "project at Weights & Biases, by extra [wandb]; empty is none", resumable=True, added=""
  ),
}

# What a branch of a run may change, besides what a resumed run may.
BRANCHABLE = tuple(name for name, knob in KNOBS.items() if knob.branchable)


def flatten(config: dict, prefix: str = "") -> dict:
  """Knobs by their dotted names."""
  items = {}
  for name, value in config.items():
    if hasattr(value, "items"):
      items |= flatten(value, f"{prefix}{name}.")
    else:
      items[prefix + name] = value
  return items


def unflatten(values: dict) -> dict:
  """Groups of knobs from their dotted names: the inverse of `flatten`."""
  groups = {}
  for name, value in values.items():
    *parents, last = name.split(".")
    group = groups
    for parent in parents:
      group = group.setdefault(parent, {})
    group[last] = value
  return groups


def data_paths(config) -> dict[str, str]:
  """The knobs of `data`, with ~ expanded. Raises ValueError for an empty path, with its knob.

  Where a run starts from a checkpoint, the tokenizer may be empty: it is the checkpoint's.
  """
  paths = {}
  for name, path in config["data"].items():
    if name == "tokenizer" and not path and config["init_from"]:
      paths[name] = ""
      continue
    try:
      paths[name] = user_path(path)
    except ValueError as error:
      raise ValueError(f"data.{name}: {error}; set --config.data.{name}") from error
  return paths


def check(config) -> None:
  """Raises ValueError on a knob that is unknown, missing, of another type or out of range.

  `config` is a dict or a ConfigDict; a config file may return anything.
  """
  if not hasattr(config, "items"):
    raise ValueError(
      f"get_config gives a value of type {type(config).__name__}, not a ConfigDict; "
      f"begin with configs/gpt2.py"
    )
  values = flatten(config)
  for name in values:
    if name not in KNOBS:
      near = difflib.get_close_matches(name, KNOBS, 1, cutoff=0)[0]
      raise ValueError(f"the config has a knob {name[:80]!r} that nothing reads; is it {near}?")
  for name, knob in KNOBS.items():
    if name not in values:
      raise ValueError(f"the config has no {name} ({knob.help}); begin with configs/gpt2.py")
    is_checkpoints = name.startswith("model.") and values[name] is None
    if is_checkpoints and values.get("init_from"):
      continue
    if is_checkpoints:
      raise ValueError(
        f"{name} is None, which is the checkpoint's, and the run starts from none; "
        f"set --config.init_from, or --config.{name}"
      )
    problem = knob.problem(values[name])
    if problem:
      value = str(values[name])[:80]
      raise ValueError(f"{name} of {value} {problem}; set --config.{name} ({knob.help})")


def differences(saved: dict, config: dict, branches: bool = False) -> list[str]:
  """Knobs that a resumed run may not change, or a branch, and that differ: `name: old -> new`."""
  old, new = (flatten(json.loads(json.dumps(x))) for x in (saved, config))  # tuples as lists
  lines = []
  for name in sorted(old.keys() | new.keys()):
    knob = KNOBS.get(name)
    if knob and name not in old and knob.added is not None:
      old[name] = json.loads(json.dumps(knob.added))
    is_free = knob and (knob.resumable or branches and knob.branchable)
    if old.get(name) != new.get(name) and not is_free:
      lines.append(f"{name}: {str(old.get(name))[:80]} -> {str(new.get(name))[:80]}")
  return lines
