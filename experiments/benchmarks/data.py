# SPDX-License-Identifier: Apache-2.0
"""How fast batches come from a store, and what the run's own loop costs around the step."""

import contextlib
import functools
import os
import statistics
import tempfile
import time
import types

import jax
import numpy as np
import optax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from configs import gpt2
from experiments.benchmarks.rounds import random_tokens, tell
from experiments.benchmarks.training import ADAMW, LEARNING_RATE
from gpt2_jax.compat import get_mesh
from gpt2_jax.data import Batches, encode_corpus
from gpt2_jax.loss import NextToken
from gpt2_jax.model import ModelConfig
from gpt2_jax.optimizer import adamw
from gpt2_jax.runs.metrics import Log, Metrics, Profile
from gpt2_jax.runs.setup import Setup
from gpt2_jax.sharding import BATCH
from gpt2_jax.tokenizer import Characters
from gpt2_jax.train import init_state, scan_steps, train_loop

DATA_BATCH, DATA_TARGET, LOOP_TARGET = (512, 1024), 5e6, 0.02
LOOP_STEPS = 6


def random_store(path: str, n_tokens: int):
  """A store of random characters: 64 documents, written by the project's own tokenizing job."""
  alphabet = Characters("".join(map(chr, range(48, 48 + 64))))
  size = n_tokens // 64
  letters = random_tokens(64, size, n_vocab=64).astype(np.uint8) + 48
  return encode_corpus(
    [row.tobytes().decode() for row in letters], alphabet, path, {"random": n_tokens}, processes=1
  )


def read_rate(store, rounds: int) -> list[float]:
  """Tokens/s of batches on the device, in the order of the law, by the run's own prefetch; one
  value a round."""
  B, T = DATA_BATCH
  calls = 16
  sharding = NamedSharding(get_mesh(), P(None, *BATCH))
  rates = []
  for number in range(rounds):
    batches = Batches(store, T, B, seed=number)
    begin = time.perf_counter()
    for batch in batches.prefetch(0, calls, 1, sharding):
      jax.block_until_ready(batch)
    rates.append(calls * B * T / (time.perf_counter() - begin))
    tell(f"data: round {number + 1}/{rounds}: {rates[-1]:,.0f} tokens/s")
  return rates


class Clock:
  """Adds up the seconds spent under each name."""

  def __init__(self):
    self.seconds = dict.fromkeys(("next batch", "dispatch", "logging", "waiting"), 0.0)

  @contextlib.contextmanager
  def __call__(self, name: str):
    begin = time.perf_counter()
    yield
    self.seconds[name] += time.perf_counter() - begin


class TimedBatches:
  """The first LOOP_STEPS batches, whose `next` is on the clock."""

  def __init__(self, batches: Batches, clock: Clock):
    self.batches, self.clock = batches, clock

  def prefetch(self, first_step: int, last_step: int, *args):
    ahead = self.batches.prefetch(first_step, first_step + LOOP_STEPS, *args)
    while True:
      with self.clock("next batch"):
        item = next(ahead, None)
      if item is None:
        return
      yield item


class TimedLog(Log):
  """A Log whose waiting for the device and whose own work are apart."""

  def __init__(self, clock: Clock, *args):
    super().__init__(*args)
    self.clock = clock

  def read(self, last: int, stacked: dict):
    with self.clock("waiting"):
      jax.block_until_ready(stacked)
    with self.clock("logging"):
      super().read(last, stacked)


def loop_config():
  config = gpt2.get_config("124M")
  config.update(batch_size=1, steps=10**9, log_every=1, warmup_steps=1)
  config.update(eval_every=10**9, save_every=10**9)  # TimedBatches ends before
  return config


def loop_round(state, call, store, clock: Clock, ahead: list[bool]):
  """LOOP_STEPS steps by the run's own loop; the state and the seconds they took."""
  config, model = loop_config(), state.model.config
  past = []

  def timed(state, batches, objective, signals):
    with clock("dispatch"):
      state, metrics = call(state, batches, objective)
    ahead.extend(not loss.is_ready() for loss in past)  # was the step before still under way?
    past[:] = [metrics["loss"]]
    return state, metrics, signals

  with tempfile.TemporaryDirectory() as workdir:
    metrics = Metrics(workdir, 1, config.steps)
    setup = Setup(
      config=config,
      state=state,
      base=None,
      objective=NextToken(),
      first_step=1,
      batches=TimedBatches(Batches(store, model.n_ctx, config.batch_size, config.seed), clock),
      validation=None,
      tokenizer=None,
      metadata={},
      checkpoints=None,
      workdir=types.SimpleNamespace(upload=lambda: None),
      metrics=metrics,
      log=TimedLog(clock, metrics, config, model, None),
      profile=Profile(workdir, 0, metrics.say),
      # SIGTERM ends it as it ends any script
      stop=types.SimpleNamespace(signals=lambda: 0, received=lambda largest: 0),
    )
    begin = time.perf_counter()
    state = jax.block_until_ready(train_loop(setup, timed, NextToken()))
    seconds = time.perf_counter() - begin
    metrics.close()
  return state, seconds


def loop_overhead(store, rounds: int) -> dict:
  """Shares of the run's own loop at 124M, bfloat16, 1 x 1024, beside the bare jitted step, taking
  turns."""
  config = loop_config()
  model = ModelConfig(**config.model)
  optimizer = adamw(optax.constant_schedule(LEARNING_RATE), **ADAMW)
  state = jax.jit(functools.partial(init_state, model_config=model, optimizer=optimizer))(
    jax.random.key(0)
  )
  call = jax.jit(functools.partial(scan_steps, optimizer=optimizer), donate_argnums=0)
  sharding = NamedSharding(get_mesh(), P(None, *BATCH))
  fixed = jax.device_put(random_tokens(1, 1, model.n_ctx + 1), sharding)
  state, _ = jax.block_until_ready(call(state, fixed))
  tell("loop: step ready")
  clock, ahead, bare, loop = Clock(), [], [], []
  for number in range(rounds):
    begin = time.perf_counter()
    for _ in range(LOOP_STEPS):
      state, _ = jax.block_until_ready(call(state, fixed))
    bare.append(time.perf_counter() - begin)
    state, seconds = loop_round(state, call, store, clock, ahead)
    loop.append(seconds)
    tell(
      f"loop: round {number + 1}/{rounds}: bare {bare[-1]:.2f} s, loop {loop[-1]:.2f} s "
      f"for {LOOP_STEPS} steps"
    )
  shares = {name: seconds / sum(loop) for name, seconds in clock.seconds.items()}
  return {
    "shares": shares,
    "ahead": sum(ahead) / len(ahead),
    "bare_seconds": bare,
    "loop_seconds": loop,
  }


def bench_data(rounds: int) -> dict:
  rounds = max(rounds, 3)
  with tempfile.TemporaryDirectory() as folder:
    tell("data: writing a store")
    store = random_store(os.path.join(folder, "store"), 1 << 25)
    rates = read_rate(store, rounds)
    found = loop_overhead(store, min(rounds, 3))
  B, T = DATA_BATCH
  print(
    f"data: batches of {B} x {T} at {statistics.median(rates):,.0f} tokens/s "
    f"({min(rates):,.0f}-{max(rates):,.0f}); target {DATA_TARGET:,.0f}"
  )
  work = {name: share for name, share in found["shares"].items() if name != "waiting"}
  ratios = [a / b - 1 for a, b in zip(found["loop_seconds"], found["bare_seconds"], strict=True)]
  print(
    f"loop: the host works {sum(work.values()):.2%} of the time ("
    + ", ".join(f"{name} {share:.2%}" for name, share in work.items())
    + f"), target below {LOOP_TARGET:.0%}; the next step was dispatched before the last was "
    f"over in {found['ahead']:.0%} of steps; loop against bare steps "
    f"{statistics.median(ratios):+.1%} ({min(ratios):+.1%} to {max(ratios):+.1%})",
    flush=True,
  )
  return {"data_tokens_per_second": rates} | found
