# SPDX-License-Identifier: Apache-2.0
"""The train step with gradient accumulation, state in, state out; and the training loop, `run`."""

import contextlib
import dataclasses
import functools

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict

from gpt2_jax import compiler_options
from gpt2_jax.batch import Batch, accumulate, batch_hash
from gpt2_jax.compat import get_mesh
from gpt2_jax.files import announce, user_path
from gpt2_jax.finetune.init_from import resolve_model
from gpt2_jax.finetune.start import build_on, initial_model, restored, saved_part, trained_names
from gpt2_jax.finetune.trainable import merge, partition, trainable_mask
from gpt2_jax.loss import mean_loss, per_token
from gpt2_jax.model import GPT2, ModelConfig
from gpt2_jax.muon import make_optimizer
from gpt2_jax.private import make_aggregator
from gpt2_jax.runs import knobs
from gpt2_jax.runs.limits import check_batch, check_kernel, check_update_fits, out_of_memory
from gpt2_jax.runs.origin import find_origin
from gpt2_jax.runs.setup import Setup, finish, set_up
from gpt2_jax.runs.signals import stop_line
from gpt2_jax.runs.teacher import abstract_objective
from gpt2_jax.runs.validation import (
  log_initial_loss,
  out_of_patience,
  save_if_sound,
  validate,
)
from gpt2_jax.runs.workdir import as_path
from gpt2_jax.schedules import make_schedule
from gpt2_jax.sharding import BATCH, make_mesh
from gpt2_jax.unreduced import all_reduce_gradients, defer_reduction, zero_gradients


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
  """All that a step changes. The counts are of updates that were not finite, and not made."""

  step: jax.Array
  skipped_total: jax.Array
  skipped_in_a_row: jax.Array
  model: GPT2
  opt_state: optax.OptState


def init_state(
  key, model_config: ModelConfig, optimizer, trainable=("*",), model=None
) -> TrainState:
  """The state before step 0: random weights or those of `model`, and optimizer state for what is
  trained."""
  model = GPT2(model_config, key) if model is None else model
  trained, _ = partition(model, trainable_mask(model, trainable))
  return TrainState(jnp.int32(0), jnp.int32(0), jnp.int32(0), model, optimizer.init(trained))


def gradients(objective, trained, frozen, batch: Batch, microbatches: int, key=None):
  """Sums of the objective, and the gradient of its nats a token in what is trained.

  Gradient accumulation: the batch is computed in `microbatches` parts, one after the other. The
  sums and gradients of the parts add up, and the division by the tokens comes last.
  """
  # Gradients add up on each replica, and over replicas once, at the end.
  trained = defer_reduction(trained)

  # One part: the mean itself is differentiated, so that no pass over the gradients divides them.
  def mean_of(trained):
    return mean_loss(objective, merge(trained, frozen), batch, key)

  if microbatches == 1:
    (_, sums), grads = jax.value_and_grad(mean_of, has_aux=True)(trained)
    return sums, all_reduce_gradients(grads)

  # Several: sums are differentiated, for the parts may hold different numbers of tokens.
  def sums_of(trained, batch, key):
    sums = objective(merge(trained, frozen), batch, key)
    return sums["nats"], sums

  def sums_and_grads(microbatch, key):
    (_, sums), grads = jax.value_and_grad(sums_of, has_aux=True)(trained, microbatch, key)
    return sums, grads

  zero = zero_gradients(trained)
  sums, grads = accumulate(sums_and_grads, batch, microbatches, key, zero)
  return sums, jax.tree.map(lambda x: per_token(x, sums), all_reduce_gradients(grads))


def train_step(
  state: TrainState,
  batch: Batch,
  objective,
  *,
  optimizer,
  microbatches: int = 1,
  trainable: tuple[str, ...] = ("*",),
  dropout_key=None,
  rate: optax.Schedule | None = None,
  aggregate=gradients,
):
  """One update; metrics are scalars. `rate` is for the log; `aggregate` makes the gradients."""
  # 1. Sums and gradients. What is frozen has neither a gradient nor optimizer state.
  key = None if dropout_key is None else jax.random.fold_in(dropout_key, state.step)
  trained, frozen = partition(state.model, trainable_mask(state.model, trainable))
  sums, grads = aggregate(objective, trained, frozen, batch, microbatches, key)
  loss, grad_norm = per_token(sums["nats"], sums), optax.tree.norm(grads)

  # 2. Apply the update, unless it is not finite: one bad batch must not poison the weights. `cond`
  #    and not `where`, so that a skipped step copies nothing.
  def apply_update(trained, opt_state):
    updates, opt_state = optimizer.update(grads, opt_state, trained)
    return optax.apply_updates(trained, updates), opt_state

  def keep(trained, opt_state):
    return trained, opt_state

  # A finite gradient can make an update that is not, at an absurd learning rate. The norm is one
  # pass over what the update reads; no array of the update's size is kept for it. Muon gives it a
  # bound: its iterations are for updates that are made.
  optimizer = optax.with_extra_args_support(optimizer)
  updates, _ = optimizer.update(grads, state.opt_state, trained, is_bound=True)
  is_finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
  is_finite &= jnp.isfinite(optax.tree.norm(updates))
  trained, opt_state = jax.lax.cond(is_finite, apply_update, keep, trained, state.opt_state)

  # 3. Count skipped steps: in all (reported), and in a row (the loop gives up after max_skips).
  skipped_total = state.skipped_total + ~is_finite
  skipped_in_a_row = jnp.where(is_finite, 0, state.skipped_in_a_row + 1)

  # 4. What is logged: the loss, the objective's other sums per token, and what tells runs apart.
  metrics = {"loss": loss, "grad_norm": grad_norm, "batch_hash": batch_hash(batch.tokens_BT)}
  for name in sums.keys() - {"nats", "tokens"}:
    metrics[name] = per_token(sums[name], sums)
  metrics |= {"skipped": skipped_total, "skips": skipped_in_a_row}
  if rate is not None:
    metrics["learning_rate"] = rate(state.step - state.skipped_total)
  model = merge(trained, frozen)
  return TrainState(state.step + 1, skipped_total, skipped_in_a_row, model, opt_state), metrics


def scan_steps(state: TrainState, batches: Batch, objective, **options):
  """`train_step` over the batches' leading axis, in one dispatch; metrics are stacked, [S]."""
  if batches.tokens_BT.shape[0] == 1:
    batch = jax.tree.map(lambda x: x[0], batches)
    state, metrics = train_step(state, batch, objective, **options)
    return state, jax.tree.map(lambda x: x[None], metrics)

  def step(state, batch):
    return train_step(state, batch, objective, **options)

  return jax.lax.scan(step, state, batches)


def step_with_signals(state: TrainState, batches: Batch, objective, signals, **options):
  """What the loop dispatches: `scan_steps`, and the largest of the numbers `signals`, [devices]."""
  state, metrics = scan_steps(state, batches, objective, **options)
  return state, metrics, jnp.max(signals)


def make_step(config: ConfigDict, model_config: ModelConfig, options: dict | None = None):
  """The two functions of a run: `init(key, model)`, the state before step 0, and the jitted step,
  `step(state, batches, objective, signals)`, of `steps_per_call` updates.

  `model` is the `initial_model`, by default made from the key. `gpt2-jax plan` compiles the same
  step; `compiler_options.for_mesh` gives its options. Nothing is computed here but two keys, and
  no mesh needs to be in force.
  """
  rate = make_schedule(config)
  optimizer = make_optimizer(config, rate, model_config.head_size)
  trainable = trained_names(config)

  def init(key, model=None):
    model = initial_model(config, model_config, key) if model is None else model
    return init_state(key, model_config, optimizer, trainable, model)

  step = functools.partial(
    step_with_signals,
    optimizer=optimizer,
    microbatches=config.microbatches,
    trainable=trainable,
    dropout_key=jax.random.split(jax.random.key(config.seed))[1],
    rate=rate,
    aggregate=make_aggregator(config.private, gradients),
  )
  return init, jax.jit(step, donate_argnums=0, compiler_options=options)


def is_due(step: int, every: int, config: ConfigDict) -> bool:
  """Whether a multiple of `every`, or the end, fell into the call that ended with `step`."""
  return step == config.steps or step // every > (step - config.steps_per_call) // every


def train_loop(setup: Setup, jitted_step, objective) -> TrainState:
  """Runs the steps from `setup.first_step` on, until the last one or a signal."""
  config, metrics, stop = setup.config, setup.metrics, setup.stop
  state, step = setup.state, setup.first_step
  sharding = NamedSharding(get_mesh(), P(None, *BATCH))
  pending = signals = None  # the call whose metrics are not read yet; the newest call's signals

  last_step = step if out_of_patience(setup) else config.steps
  setup.log.start_clock()
  for batches in setup.batches.prefetch(step, last_step, config.steps_per_call, sharding):
    # 1. Dispatch the next call.
    log_initial_loss(setup, state.model, batches, step)
    setup.profile.before(step, state)
    with setup.log.compiling():
      state, call_metrics, new_signals = jitted_step(state, batches, objective, stop.signals())
    step += batches.tokens_BT.shape[0]

    # 2. Log the call before it, whose metrics are there: the device never waits for the host.
    if pending:
      setup.log.read(*pending)
    pending = step, call_metrics
    signal_number, signals = stop.received(signals), new_signals
    evaluates = is_due(step, config.eval_every, config)
    saves = is_due(step, config.save_every, config)
    if not (evaluates or saves or signal_number):
      continue

    # 3. Something needs this state: wait for the call, and evaluate.
    setup.log.read(*pending)
    pending = val_loss = None
    if evaluates:
      val_loss = validate(setup, state.model, objective, step)
    is_last = evaluates and out_of_patience(setup)

    # 4. Save. The metrics go first: who resumes from the checkpoint finds the lines up to it.
    signal_number = stop.received(signals)
    metrics.flush()
    setup.workdir.upload()
    is_best = val_loss is not None and val_loss < setup.checkpoints.best
    if saves or signal_number or is_best or is_last:
      is_saved = save_if_sound(setup, step, state, objective, val_loss, bool(signal_number))

    # 5. Stop where a signal or the validation loss asks for it.
    if signal_number:
      metrics.say(stop_line(signal_number, step, is_saved))
    if signal_number or is_last:
      break
    setup.log.start_clock()
  setup.profile.end(state)
  return state


def first_state(setup: Setup, model_config: ModelConfig, init, key, objective) -> Setup:
  """Adds the state that training begins with: restored, from a checkpoint, or random.

  What starts from a checkpoint is evaluated as such, before there is any optimizer state.
  """
  config, state, model = setup.config, setup.state, None
  if setup.base is not None:
    with announce("placing the checkpoint's parameters"):
      model = build_on(config, model_config, key, setup.base)
    if state is None:
      validate(setup, model, objective, 0)

  if state is not None:
    state = restored(config, state, model)
  else:
    with announce("initializing the parameters"):
      state = jax.jit(init, donate_argnums=1)(key, model)
  return dataclasses.replace(setup, state=state, base=None)


def run(config: ConfigDict, workdir: str) -> TrainState:
  """Trains as `config` says (configs/gpt2.py has the knobs). Resumes from the newest checkpoint.

  `workdir` is a local path or gs://BUCKET/PATH, where nothing keeps two runs apart. Raises
  ValueError or OSError with one clear line on input that cannot be, FloatingPointError on a run
  that diverged.
  """
  with contextlib.ExitStack() as resources:
    # 1. Refuse what can be refused before anything is done.
    workdir = user_path(workdir)
    as_path(workdir)
    knobs.check(config)
    with announce("starting JAX on its devices"):
      mesh = make_mesh(**config.mesh)
    resources.enter_context(jax.set_mesh(mesh))
    origin = find_origin(config, workdir)
    config = config if origin is None else resolve_model(config, origin)
    model_config = ModelConfig(**config.model)
    objective = abstract_objective(config, model_config)
    check_batch(config)
    check_kernel(model_config)
    options = compiler_options.for_mesh(mesh, config.compiler_options, config.model.n_embd)
    init, jitted_step = make_step(config, model_config, options)
    key = jax.random.split(jax.random.key(config.seed))[0]
    abstract_state = jax.eval_shape(init, key)
    check_update_fits(config, model_config, abstract_state, objective)
    resources.enter_context(out_of_memory(config, model_config, abstract_state, objective))

    # 2. Open the data and the workdir; resume, or start.
    abstract_saved = saved_part(config, abstract_state)
    setup = set_up(config, model_config, workdir, abstract_saved, resources, origin, objective)

    # 3. Train. The picture is drawn once metrics and checkpoints are closed, whole.
    with setup.writers:
      setup = first_state(setup, model_config, init, key, setup.objective)
      state = train_loop(setup, jitted_step, setup.objective)
    finish(setup, int(state.step))
    return state
