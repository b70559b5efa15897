# SPDX-License-Identifier: Apache-2.0
"""Validation loss of a run, and the loss of its first batch before training."""

import contextlib
import math

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

import gpt2_jax.distributed as distributed
from gpt2_jax.batch import Batch
from gpt2_jax.compat import get_mesh
from gpt2_jax.data.stores import RowSource
from gpt2_jax.files import announce, progress
from gpt2_jax.finetune.start import saved_part
from gpt2_jax.loss import next_token_nats
from gpt2_jax.model import GPT2
from gpt2_jax.runs.metrics import evaluations_since_best
from gpt2_jax.runs.samples import log_sample
from gpt2_jax.runs.setup import Setup
from gpt2_jax.sharding import BATCH

# A model that knows nothing has a loss of ln V. One that diverged may have 1e16, which is finite.
ABSURD = 100


@jax.jit
def evaluation_sums(model: GPT2, batch: Batch, objective):
  """The objective's sums without dropout; divide last."""
  return objective(model, batch)


def validation_loss(
  model: GPT2, objective, store: RowSource, batch_size: int, windows: int
) -> float:
  """Mean nats a token over the first `windows` windows of the store (0: all), in their order."""
  return validation_means(model, objective, store, batch_size, windows)["nats"]


def validation_means(
  model: GPT2, objective, store: RowSource, batch_size: int, windows: int
) -> dict[str, float]:
  """`validation_loss`, and each other sum of the objective a token: a classifier's accuracy."""
  sharding = NamedSharding(get_mesh(), BATCH)
  batches = store.evaluation_batches(model.config.n_ctx, batch_size, sharding, windows or None)
  quiet = None if distributed.is_primary() else True  # None: where stderr is no terminal
  sums = []
  for batch in progress(batches, "evaluation", "batch", disable=quiet):
    waiting = contextlib.nullcontext() if sums else announce("compiling the evaluation, seconds")
    with waiting:
      sums.append(distributed.block_until_ready(evaluation_sums(model, batch, objective)))
  sums = jax.device_get(sums)
  totals = {name: sum(float(s[name]) for s in sums) for name in sums[0]}
  tokens = totals.pop("tokens")

  # Regularizers are trained on, and are no part of a validation loss.
  totals["nats"] -= totals.get("z_loss", 0.0) + totals.get("entropy_loss", 0.0)
  return {name: total / tokens for name, total in totals.items()}


def validate(setup: Setup, model: GPT2, objective, step: int) -> float:
  """The validation loss of a run at `step`, in batches of a microbatch's rows; it is logged, with a
  sample."""
  rows = setup.config.batch_size // setup.config.microbatches  # what fits at once
  windows = setup.config.eval_windows
  means = validation_means(model, objective, setup.validation, rows, windows)
  val_loss = means.pop("nats")
  setup.metrics.write(step, val_loss=val_loss, **{f"val_{name}": x for name, x in means.items()})
  others = "".join(f", {name} {value:.4f}" for name, value in means.items())
  setup.metrics.say(f"step {step}: validation {val_loss:.4f} nats a token{others}")
  log_sample(setup, model, step)
  return val_loss


def save_if_sound(
  setup: Setup, step: int, state, objective, val_loss: float | None, in_a_hurry: bool
) -> bool:
  """Saves a checkpoint, unless the state is broken: it would push out one that is whole.

  A state is broken after an update that was skipped, and where its validation loss is not finite or
  absurd. Where `val_loss` is None, the loss over one batch of windows tells, unless the run is
  `in_a_hurry`: that may have to be compiled. Returns whether it was saved. Raises
  FloatingPointError if the state is the run's last, and broken.
  """
  # 1. Is the state broken?
  loss = val_loss
  if loss is None and not in_a_hurry:
    rows = setup.config.batch_size // setup.config.microbatches
    loss = validation_loss(state.model, objective, setup.validation, rows, rows)
  problem = None
  if setup.log.skips:
    problem = f"the last {setup.log.skips} updates were not finite"
  elif loss is not None and not loss < ABSURD * math.log(state.model.config.n_vocab):
    problem = f"its validation loss is {loss:.3g} nats a token"

  # 2. Save, or say why not.
  if problem is None:
    val_loss = math.inf if val_loss is None else val_loss
    setup.checkpoints.save(step, saved_part(setup.config, state), setup.metadata, val_loss)
    return True
  line = f"step {step}: not saved, for {problem}; {setup.log.last_good()}"
  if step == setup.config.steps:
    raise FloatingPointError(f"{line}; lower --config.learning_rate in a new --workdir")
  setup.metrics.say(line)
  return False


def out_of_patience(setup: Setup) -> bool:
  """Early stopping: whether the last `patience` evaluations were no better than one before them.

  metrics.jsonl tells, so that a run which resumes counts on. Says so where it is.
  """
  patience = setup.config.patience
  if not patience:
    return False
  waited = evaluations_since_best(setup.workdir.path) if distributed.is_primary() else None
  waited = distributed.broadcast("the evaluations since the best", waited)
  if waited < patience:
    return False
  setup.metrics.say(
    f"the validation loss has not been better for {waited} evaluations (patience): the run ends; "
    f"its best checkpoint is kept"
  )
  return True


@jax.jit
def initial_loss(model: GPT2, batch: Batch):
  """Nats a token of a batch, and the RMS of the residual stream after each layer, [L]."""
  x_BTD = model.embed(batch.tokens_BT[:, :-1], batch.positions_BT)
  x_BTD, rms_L, _ = model.hidden(x_BTD, attend=model.self_attend(batch.segments_BT))
  nats_BT = next_token_nats(model, x_BTD, batch.tokens_BT[:, 1:])
  if batch.weights_BT is None:
    return nats_BT.mean(), rms_L
  total = jnp.maximum(batch.weights_BT.sum(), 1e-9)
  return (nats_BT * batch.weights_BT).sum() / total, rms_L


def log_initial_loss(setup: Setup, model: GPT2, batches: Batch, step: int):
  """The first line of a run, at step 0: is the loss near ln V, and does the residual stream grow
  gently?

  It is the loss of the first microbatch of the first step. Weights of a checkpoint are to be better
  than random ones.
  """
  if step:
    return
  is_random = not setup.config.init_from
  rows = setup.config.batch_size // setup.config.microbatches
  batch = jax.tree.map(lambda x: jax.lax.slice_in_dim(x[0], 0, rows), batches)
  with announce("compiling the forward pass, seconds"):
    loss, rms_L = jax.device_get(initial_loss(model, batch))
  expected = math.log(model.config.n_vocab)
  verdict = "as it should be"
  if is_random and abs(loss - expected) >= 0.5:
    verdict = "expected near ln V: look at data and initialization"
  elif not is_random and not loss < expected:
    verdict = "a trained checkpoint is expected below ln V: is it this data's?"

  scales = " ".join(f"{rms:.2f}" for rms in rms_L)
  setup.metrics.say(
    f"health: loss {loss:.3f}, ln V {expected:.3f} ({verdict}); residual RMS by layer: {scales}"
  )
