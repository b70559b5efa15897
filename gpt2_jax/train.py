# SPDX-License-Identifier: Apache-2.0
"""Training: state in, state out, and the loop around it."""

import contextlib
import dataclasses
import functools
import hashlib
import json
import math
import os
import signal

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict
from tqdm import tqdm

import gpt2_jax.hosts as hosts
from gpt2_jax.checkpoint import Checkpoints, flat
from gpt2_jax.data import Batches, TokenStore, evaluation_batches
from gpt2_jax.loss import cross_entropy
from gpt2_jax.metrics import Log, Metrics, Profile, plot_losses
from gpt2_jax.model import GPT2, ModelConfig
from gpt2_jax.optimizer import adamw, schedule
from gpt2_jax.sharding import BATCH, ROWS, check_divides, make_mesh, platform
from gpt2_jax.tokenizer import load_tokenizer
from gpt2_jax.workdir import Workdir, alone_in, at


@functools.partial(
  jax.tree_util.register_dataclass, data_fields=["step", "skipped", "skips", "model", "opt_state"], meta_fields=[]
)
@dataclasses.dataclass(frozen=True)
class TrainState:
  """All that a step changes. `skipped` counts the updates that were not finite and not made, `skips` those in a row."""

  step: jax.Array
  skipped: jax.Array
  skips: jax.Array
  model: GPT2
  opt_state: optax.OptState


def init_state(key, model_config: ModelConfig, optimizer) -> TrainState:
  """The state before step 0."""
  model = GPT2(model_config, key)
  return TrainState(jnp.int32(0), jnp.int32(0), jnp.int32(0), model, optimizer.init(model))


def mean_nats(model: GPT2, tokens_BT, key=None):
  """Mean loss of predicting tokens 1.. from the ones before, in nats a token."""
  x_BTD, _ = model.hidden(tokens_BT[:, :-1], key)
  return cross_entropy(model.head(x_BTD), tokens_BT[:, 1:], model.config.n_vocab).mean()


def gradients(model: GPT2, tokens_BT, microbatches: int, key=None):
  """Loss and gradients of the whole batch, computed in `microbatches` slices, one after the other."""
  if microbatches == 1:
    return jax.value_and_grad(mean_nats)(model, tokens_BT, key)
  shape = (-1, microbatches, tokens_BT.shape[1])
  slices_MBT = jnp.reshape(tokens_BT, shape, out_sharding=P(ROWS, None, None)).swapaxes(0, 1)

  def add(total, item):
    m, slice_BT = item
    one = jax.value_and_grad(mean_nats)(model, slice_BT, key if key is None else jax.random.fold_in(key, m))
    return jax.tree.map(jnp.add, total, one), None

  zero = (jnp.float32(0), jax.tree.map(jnp.zeros_like, model))
  total, _ = jax.lax.scan(add, zero, (jnp.arange(microbatches), slices_MBT))
  return jax.tree.map(lambda x: x / microbatches, total)


def batch_hash(tokens_BT):
  """A uint32 that tells batches apart by tokens and their order, on any mesh: two runs saw the same data or did not."""
  B, T = tokens_BT.shape
  place_BT = (jnp.arange(B, dtype=jnp.uint32)[:, None] * T + jnp.arange(T, dtype=jnp.uint32)) * jnp.uint32(2654435761)
  return jnp.sum((tokens_BT.astype(jnp.uint32) + 1) * (place_BT | 1), dtype=jnp.uint32)


def train_step(state: TrainState, tokens_BT, *, optimizer, microbatches: int = 1, dropout_key=None, rate=None):
  """One update from tokens [B, T + 1]; metrics are scalars. An update that is not finite is not made."""
  key = None if dropout_key is None else jax.random.fold_in(dropout_key, state.step)
  loss, grads = gradients(state.model, tokens_BT, microbatches, key)
  norm = optax.tree.norm(grads)

  def update(model, opt_state):
    updates, opt_state = optimizer.update(grads, opt_state, model)
    return optax.apply_updates(model, updates), opt_state

  finite = jnp.isfinite(loss) & jnp.isfinite(norm)
  model, opt_state = jax.lax.cond(finite, update, lambda *old: old, state.model, state.opt_state)
  skips = jnp.where(finite, 0, state.skips + 1)
  skipped = state.skipped + ~finite
  metrics = {"loss": loss, "grad_norm": norm, "skipped": skipped, "skips": skips, "batch_hash": batch_hash(tokens_BT)}
  if rate is not None:  # the schedule that `optimizer` follows, to be told
    metrics["learning_rate"] = rate(state.step - state.skipped)
  return TrainState(state.step + 1, skipped, skips, model, opt_state), metrics


def train_call(state: TrainState, tokens_SBT, signals, **how):
  """What the loop dispatches: `train_steps`, and the largest of the numbers `signals`, [devices]."""
  state, metrics = train_steps(state, tokens_SBT, **how)
  return state, metrics, jnp.max(signals)


def train_steps(state: TrainState, tokens_SBT, **how):
  """`train_step` over the leading axis in one dispatch; metrics come stacked, [S]."""
  if tokens_SBT.shape[0] == 1:
    state, metrics = train_step(state, tokens_SBT[0], **how)
    return state, jax.tree.map(lambda x: x[None], metrics)
  return jax.lax.scan(functools.partial(train_step, **how), state, tokens_SBT)


# For the TPU's compiler. Products that wait for a gathered weight step by step around a ring ("windowed einsums") are
# slower than a gather beside the product before, by the compiler's own estimate.
COMPILER_OPTIONS = {"tpu": {"xla_jf_spmd_threshold_for_windowed_einsum_mib": 1_000_000}}


def build(config: ConfigDict, model_config: ModelConfig, platform: str):
  """The two functions of a run: `init(key)`, the state before step 0, and the jitted call of `steps_per_call` updates.

  `launch/plan.py` compiles the same call. Nothing is computed here but two keys, and no mesh needs to be in force.
  """
  rate = schedule(config.learning_rate, config.steps, config.warmup_steps, config.final_lr_fraction)
  optimizer = adamw(rate, config.b1, config.b2, config.weight_decay, config.clip_norm)
  init = functools.partial(init_state, model_config=model_config, optimizer=optimizer)
  how = {"optimizer": optimizer, "microbatches": config.microbatches, "rate": rate}
  dropout_key = jax.random.split(jax.random.key(config.seed))[1]
  options = COMPILER_OPTIONS.get(platform)
  call = functools.partial(train_call, **how, dropout_key=dropout_key)
  return init, jax.jit(call, donate_argnums=0, compiler_options=options)


@jax.jit
def evaluation_sums(model: GPT2, tokens_BT, real_B):
  """Sums over the real rows: nats and tokens. Divide last."""
  nats_BT = cross_entropy(model.head(model.hidden(tokens_BT[:, :-1])[0]), tokens_BT[:, 1:], model.config.n_vocab)
  return {"nats": jnp.sum(nats_BT * real_B[:, None]), "tokens": jnp.sum(real_B) * nats_BT.shape[1]}


def evaluate(model: GPT2, store: TokenStore, batch_size: int, windows: int) -> float:
  """Mean nats a token over the first `windows` windows of the store (0: all), in their order."""
  sharding = NamedSharding(jax.sharding.get_mesh(), BATCH)
  batches = evaluation_batches(store, model.config.n_ctx, batch_size, sharding, windows or None)
  sums = []
  quiet = None if hosts.is_first() else True  # None: where stderr is no terminal
  for tokens_BT, real_B in tqdm(batches, "evaluation", leave=False, disable=quiet, unit="batch"):
    sums.append(hosts.settled(evaluation_sums(model, tokens_BT, real_B)))
  sums = jax.device_get(sums)
  return sum(float(s["nats"]) for s in sums) / sum(int(s["tokens"]) for s in sums)


@jax.jit
def health(model: GPT2, tokens_BT):
  """Loss in nats and the RMS of the residual stream after each layer, [L], on tokens [B, T + 1]."""
  x_BTD, rms_L = model.hidden(tokens_BT[:, :-1])
  return cross_entropy(model.head(x_BTD), tokens_BT[:, 1:], model.config.n_vocab).mean(), rms_L


COUNTS = ("steps", "batch_size", "microbatches", "steps_per_call", "log_every", "eval_every", "save_every", "keep")
COUNTS += ("max_skips",)


class Stop:
  """SIGTERM or SIGINT, to any process, asks for an end: the step is finished and saved. A second one ends at once."""

  def __init__(self, mesh: Mesh):
    self.notice = hosts.Notice(mesh)

  def signals(self) -> jax.Array:
    """What this process was asked, for `train_call` to bring to all."""
    return self.notice.array(self.signal)

  def asked(self, largest: jax.Array | None) -> int:
    """The number of the signal, 0 for none: the same on all processes, as of the call that gave `largest`."""
    if jax.process_count() == 1:
      return self.signal
    return 0 if largest is None else int(jax.device_get(largest))

  def __enter__(self):
    self.signal = 0
    self.before = {number: signal.signal(number, self._ask) for number in (signal.SIGTERM, signal.SIGINT)}
    return self

  def _ask(self, number, frame):
    if self.signal:
      os._exit(128 + number)
    os.write(2, b"\nfinishing the step, then saving; a second signal ends at once\n")
    self.signal = number

  def __exit__(self, *_):
    for number, handler in self.before.items():
      signal.signal(number, handler)


def open_stores(config: ConfigDict, model_config: ModelConfig):
  """The training and validation stores and the tokenizer. Raises ValueError if they do not belong together."""
  tokenizer = load_tokenizer(config.data.tokenizer)
  if tokenizer.vocab_size != model_config.n_vocab:
    raise ValueError(
      f"the tokenizer {config.data.tokenizer} has {tokenizer.vocab_size} tokens, the model {model_config.n_vocab}; "
      f"set --config.model.n_vocab={tokenizer.vocab_size}"
    )
  stores = []
  for path in (config.data.train, config.data.validation):
    store = TokenStore.open(path)
    if store.fingerprint != tokenizer.fingerprint:
      raise ValueError(
        f"{path} was made with another tokenizer (fingerprint {store.fingerprint[:12]}, "
        f"{config.data.tokenizer} has {tokenizer.fingerprint[:12]}); set --config.data.tokenizer or tokenize again"
      )
    stores.append(store)
  return *stores, tokenizer


def tell_about(config: ConfigDict, train: TokenStore, validation: TokenStore, tokenizer) -> dict:
  """What is saved beside each state: config, tokenizer, and the manifests of the data (without their tokenizer)."""
  data = {}
  for name, store in (("train", train), ("validation", validation)):
    data[name] = {key: value for key, value in store.manifest.items() if key != "tokenizer"}
  return {"config": config.to_dict(), "tokenizer": tokenizer.to_json(), "data": data}


def identity(about: dict) -> dict:
  """The knobs, and short hashes of the data and the tokenizer."""
  content = {name: value for name, value in flat(about["data"]).items() if name.endswith("sha256")}
  facts = {"the data": content, "the tokenizer": about["tokenizer"]}
  return flat(about["config"]) | {name: digest(value) for name, value in facts.items()}


def digest(value) -> str:
  return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:12]


def say_start(metrics: Metrics, first: int, steps: int):
  """Where it runs, and from which step on."""
  mesh, processes, devices = jax.sharding.get_mesh(), jax.process_count(), jax.local_device_count()
  metrics.say(
    f"{processes} process{'es' * (processes > 1)} x {devices} device{'s' * (devices > 1)} "
    f"({jax.devices()[0].device_kind}), mesh {tuple(mesh.shape.values())}"
  )
  if first:
    metrics.say(f"going on from step {first}" if first < steps else f"all {first} steps were done before")


def say_health(metrics: Metrics, model: GPT2, tokens_BT):
  """The first line of a run: is the loss near ln V, and does the residual stream grow gently?"""
  loss, rms_L = jax.device_get(health(model, tokens_BT))
  expected = math.log(model.config.n_vocab)
  verdict = "as it should be" if abs(loss - expected) < 0.5 else "it should be near: look at data and initialization"
  scales = " ".join(f"{rms:.2f}" for rms in rms_L)
  metrics.say(f"health: loss {loss:.3f}, ln V {expected:.3f} ({verdict}); residual RMS by layer: {scales}")


def check_knobs(config: ConfigDict):
  """Raises ValueError on a count that is none, and unless every microbatch splits evenly over the mesh in force."""
  for name in COUNTS:
    if config[name] < 1:
      raise ValueError(f"{name} of {config[name]} is below 1; set --config.{name} (a large one is never)")
  for name in ("eval_windows", "profile_steps"):
    if config[name] < 0:
      raise ValueError(f"{name} of {config[name]} is below 0; set --config.{name}")
  if config.batch_size % config.microbatches:
    raise ValueError(
      f"batch_size of {config.batch_size} does not divide by microbatches of {config.microbatches}; "
      f"set --config.microbatches to a divisor"
    )
  check_divides(
    config.batch_size // config.microbatches,
    "a microbatch (batch_size / microbatches)",
    *ROWS,
    way_out="change --config.batch_size, --config.microbatches or --config.mesh",
  )


def run(config: ConfigDict, workdir: str) -> TrainState:
  """Trains as `config` says (configs/gpt2.py explains the knobs), from the newest checkpoint in `workdir` if any.

  `workdir` is a local path or gs://BUCKET/PATH, where nothing keeps two runs apart.

  Raises ValueError or OSError with one clear line on input that cannot be, FloatingPointError on a run that diverged.
  """
  at(workdir)  # refuses what can be no workdir before anything is done
  mesh = make_mesh(**config.mesh)
  with jax.set_mesh(mesh), Stop(mesh) as stop, contextlib.ExitStack() as held:
    model_config = ModelConfig(**config.model)
    check_knobs(config)
    init, call = build(config, model_config, platform())
    train, validation, tokenizer = open_stores(config, model_config)
    batches = Batches(train, model_config.n_ctx, config.batch_size, config.seed)
    key = jax.random.split(jax.random.key(config.seed))[0]
    about = tell_about(config, train, validation, tokenizer)
    hosts.check_same("config", {"workdir": workdir} | identity(about))
    held.enter_context(alone_in(workdir))
    checkpoints = Checkpoints(workdir, config.keep)
    state, first = checkpoints.newest(jax.eval_shape(init, key), about) or (jax.jit(init)(key), 0)
    folder = held.enter_context(Workdir(workdir))
    metrics = Metrics(folder.path, first, config.steps)
    log = Log(metrics, config, model_config)
    say_start(metrics, first, config.steps)
    try:
      profile = Profile(folder.path, config.profile_steps)
      for step, state, signals in segments(call, state, first, config, batches, log, stop, profile):  # noqa: B020
        val_loss = math.inf
        if due(step, config.eval_every, config):
          val_loss = evaluate(state.model, validation, config.batch_size // config.microbatches, config.eval_windows)
          metrics.write(step, val_loss=val_loss)
          metrics.say(f"step {step}: validation {val_loss:.4f} nats a token")
        number = stop.asked(signals)
        metrics.flush()
        folder.copy_up()  # before the checkpoint: who goes on from it finds the lines up to it
        if due(step, config.save_every, config) or number or val_loss < checkpoints.best:
          checkpoints.save(step, state, about, val_loss)
        if number:
          name = signal.Signals(number).name
          metrics.say(f"{name}: stopped and saved at step {step}; the same command goes on from there")
          break
    finally:
      metrics.close()
      checkpoints.close()
    if metrics.active:
      plot_losses(folder.path)
    return state


def due(step: int, every: int, config: ConfigDict) -> bool:
  """Whether a multiple of `every`, or the end, fell into the call that ended with `step`."""
  return step == config.steps or step // every > (step - config.steps_per_call) // every


def segments(call, state, step, config, batches, log, stop, profile):
  """Runs the steps; yields the step, its state and signals wherever something is to be done between two calls.

  The metrics of a call are read after the next one is dispatched, so that the device never waits for the host.
  """
  sharding = NamedSharding(jax.sharding.get_mesh(), P(None, *BATCH))
  past = signals = None
  log.start_clock()
  try:
    for tokens_SBT in batches.prefetch(step, config.steps, config.steps_per_call, sharding):
      if step == 0:
        rows = config.batch_size // config.microbatches
        say_health(log.metrics, state.model, jax.lax.slice_in_dim(tokens_SBT[0], 0, rows))
      profile.before(step, state)
      state, metrics, largest = call(state, tokens_SBT, stop.signals())
      if past:
        log.read(*past)
      asked, signals = stop.asked(signals), largest
      step += tokens_SBT.shape[0]
      past = step, metrics
      if due(step, config.eval_every, config) or due(step, config.save_every, config) or asked:
        log.read(*past)
        past = None
        yield step, state, signals
        log.start_clock()
  finally:
    profile.end(state)
