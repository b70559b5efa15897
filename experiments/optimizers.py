# SPDX-License-Identifier: Apache-2.0
"""AdamW against Muon on Shakespeare's characters and on WikiText-2: steps to the same loss.

COMMAND   python experiments/optimizers.py --data=data --out=runs/optimizers
          or a part of it: --only=shakespeare; --layers, --width, --steps, --batch set the size
HARDWARE  one GPU, two minutes; two CPU cores at --layers=2 --width=64 --steps=200 --batch=12
EXPECT    README.md, "AdamW against Muon"

Under --data lie the published files: shakespeare/tinyshakespeare.txt, whose last tenth validates,
and wikitext2/wiki.{valid,test}.tokens. WikiText-2's validation file trains a SentencePiece of 2,048
pieces and the model, and its test file validates: the training file is not needed.

The protocol. Both optimizers have the same model, clip, weight decay, batches, and a cosine with a
warmup over a tenth of the steps. Each takes the learning rate with the lowest validation loss after
the last step of seed 100: rates a factor of two apart, upwards and downwards from 4e-3 until the
best one has a worse one on either side. Then it runs with seeds 0 to 4. A seed sets the weights and
the order of the data: a pair with one seed begins alike and sees the same batches. Intervals are
Student's, of the differences of pairs. The better one's steps to the other's last loss are counted
along its own cosine, whose rate is still high there: a run that ended there would need fewer.
"""

import functools
import json
import os
import pathlib
import sys
import time

if __name__ == "__main__":
  sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

import jax
import jax.numpy as jnp
import numpy as np
import scipy.stats
from absl import flags

from gpt2_jax.batch import Batch
from gpt2_jax.cli import shell
from gpt2_jax.files import atomic_write, local_path, read_json_object
from gpt2_jax.loss import NextToken, mean_loss
from gpt2_jax.model import GPT2, ModelConfig
from gpt2_jax.muon import muon
from gpt2_jax.optimizer import adamw
from gpt2_jax.schedules import cosine
from gpt2_jax.sharding import make_mesh
from gpt2_jax.tokenizer import train_characters, train_sentencepiece
from gpt2_jax.train import init_state, scan_steps

SETS = ("shakespeare", "wikitext2")
ARMS = ("adamw", "muon")

_DATA = flags.DEFINE_string("data", "data", "Folder of the published files, a folder for each set.")
_OUT = flags.DEFINE_string("out", "runs/optimizers", "Folder for results.json.")
_ONLY = flags.DEFINE_enum("only", None, SETS, "One part of it.")
_SEEDS = flags.DEFINE_integer("seeds", 5, "Seeds that are compared.")
_STEPS = flags.DEFINE_integer("steps", 500, "Updates of a run.")
_BATCH = flags.DEFINE_integer("batch", 32, "Windows in an update.")
_CONTEXT = flags.DEFINE_integer("context", 128, "Tokens of a window.")
_LAYERS = flags.DEFINE_integer("layers", 4, "Blocks of the model.")
_WIDTH = flags.DEFINE_integer("width", 256, "Width of the model; heads are 64 wide.")

# AdamW's recipe as configs/gpt2.py has it; Muon's momentum beside it.
RECIPE = {"b1": 0.9, "b2": 0.95, "weight_decay": 0.1, "clip_norm": 1.0}
MOMENTUM = 0.95
FIRST_RATE = 4e-3
SEARCH_SEED = 100
CALL = 25  # updates in one dispatch, and between evaluations
VALIDATION_WINDOWS = 256


def read_tokens(name: str, data: pathlib.Path) -> tuple[np.ndarray, np.ndarray, int]:
  """Training and validation tokens of a set, and the size of the vocabulary."""
  if name == "shakespeare":
    text = (data / name / "tinyshakespeare.txt").read_text()
    cut = len(text) * 9 // 10
    train, validation, tokenizer = text[:cut], text[cut:], train_characters([text])
  else:
    train = (data / name / "wiki.valid.tokens").read_text()
    validation = (data / name / "wiki.test.tokens").read_text()
    tokenizer = train_sentencepiece([train], 2048)
  encoded = [np.array(tokenizer.encode(text), np.int32) for text in (train, validation)]
  return *encoded, tokenizer.vocab_size


def windows(tokens: np.ndarray, rows: int, *seed: int) -> np.ndarray:
  """Random windows, int32 [rows, context + 1]; the same for the same seed."""
  starts = np.random.default_rng(seed).integers(0, len(tokens) - _CONTEXT.value, (rows, 1))
  return tokens[starts + np.arange(_CONTEXT.value + 1)]


class Trainer:
  """The runs of one set: each optimizer's step is compiled once, for any rate and seed."""

  def __init__(self, name: str, data: pathlib.Path):
    self.train, validation, n_vocab = read_tokens(name, data)
    self.validation_BT = windows(validation, VALIDATION_WINDOWS, 0)
    self.config = ModelConfig(
      n_vocab=n_vocab,
      n_ctx=_CONTEXT.value,
      n_embd=_WIDTH.value,
      n_head=max(1, _WIDTH.value // 64),
      n_layer=_LAYERS.value,
      dtype="float32",
    )
    steps = _STEPS.value
    self.shape = cosine(1.0, steps, steps // 10, 0.1)

  def optimizer(self, arm: str, rate):
    """The optimizer of an arm; the peak learning rate may be traced."""

    def schedule(step):
      return rate * self.shape(step)

    if arm == "adamw":
      return adamw(schedule, **RECIPE)
    return muon(schedule, **RECIPE, momentum=MOMENTUM, head_size=self.config.head_size)

  @functools.cached_property
  def init(self):
    """init(arm, key): the state before step 0; its weights are the same for both arms."""

    def init(arm, key):
      return init_state(key, self.config, self.optimizer(arm, 1.0), model=GPT2(self.config, key))

    return jax.jit(init, static_argnums=0)

  @functools.cached_property
  def step(self):
    """step(arm, state, tokens_SBT, rate): the state after S updates."""

    def step(arm, state, tokens_SBT, rate):
      return scan_steps(state, Batch(tokens_SBT), NextToken(), optimizer=self.optimizer(arm, rate))[
        0
      ]

    return jax.jit(step, static_argnums=0, donate_argnums=1)

  @functools.cached_property
  def evaluate(self):
    return jax.jit(lambda model, tokens_BT: mean_loss(NextToken(), model, Batch(tokens_BT))[0])

  def run(self, arm: str, rate: float, seed: int) -> dict:
    """Validation losses after each call, and the median time of an update, ms."""
    state, curve, times = self.init(arm, jax.random.key(seed)), [], []
    for first in range(0, _STEPS.value, CALL):
      calls = [windows(self.train, _BATCH.value, seed, step) for step in range(first, first + CALL)]
      start = time.perf_counter()
      state = jax.block_until_ready(self.step(arm, state, np.stack(calls), jnp.float32(rate)))
      times.append((time.perf_counter() - start) / CALL)
      curve.append([first + CALL, float(self.evaluate(state.model, self.validation_BT))])
    return {"curve": curve, "step_ms": 1e3 * float(np.median(times))}


class Results:
  """The runs that are done, in results.json: the same command goes on where it was stopped."""

  def __init__(self, folder: pathlib.Path, settings: dict):
    self.path = folder / "results.json"
    folder.mkdir(parents=True, exist_ok=True)
    self.content = {"settings": settings, "runs": {}}
    if self.path.exists():
      self.content = read_json_object(self.path)
      if self.content["settings"] != settings:
        raise ValueError(f"{self.path} is of other flags; take another --out")

  def get(self, trainer: Trainer, name: str, arm: str, rate: float, seed: int) -> dict:
    """A run, made if it is not there."""
    key = f"{name} {arm} {rate:g} {seed}"
    runs = self.content["runs"]
    if key not in runs:
      runs[key] = trainer.run(arm, rate, seed)
      self.save()
      print(f"{key}: {last_loss(runs[key]):.4f}, {runs[key]['step_ms']:.2f} ms a step", flush=True)
    return runs[key]

  def save(self) -> None:
    with atomic_write(self.path, overwrite=True) as partial:
      partial.write_text(json.dumps(self.content, indent=1) + "\n")


def last_loss(run: dict) -> float:
  """The validation loss after the last step; infinite for a run that diverged."""
  loss = run["curve"][-1][1]
  return loss if np.isfinite(loss) else np.inf


def search(trainer: Trainer, results: Results, name: str, arm: str) -> float:
  """The learning rate whose neighbours, a factor of two away, are worse."""
  losses = {}

  def try_rate(power: int) -> float:
    rate = FIRST_RATE * 2.0**power
    losses[power] = last_loss(results.get(trainer, name, arm, rate, SEARCH_SEED))
    return losses[power]

  for power in (-1, 0, 1):
    try_rate(power)
  while (best := min(losses, key=losses.get)) in (min(losses), max(losses)):
    try_rate(best - 1 if best == min(losses) else best + 1)
  return FIRST_RATE * 2.0**best


def steps_to(curve: list, loss: float) -> float:
  """The step at which a curve first comes down to a loss, between evaluations on a line."""
  before = None
  for step, value in curve:
    if value <= loss:
      if before is None:
        return step
      part = (before[1] - loss) / (before[1] - value)
      return before[0] + part * (step - before[0])
    before = step, value
  return np.nan


def interval(values) -> dict:
  """The mean and Student's 95 % interval of it."""
  values = np.asarray(values, np.float64)
  half = 0.0
  if len(values) > 1:
    half = scipy.stats.t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / len(values) ** 0.5
  mean = float(values.mean())
  return {"mean": mean, "low": mean - float(half), "high": mean + float(half)}


def compare(trainer: Trainer, results: Results, name: str) -> dict:
  """Searches both rates, runs the seeds, and compares them pair by pair."""
  rates = {arm: search(trainer, results, name, arm) for arm in ARMS}
  runs = {arm: [] for arm in ARMS}
  for seed in range(_SEEDS.value):
    for arm in ARMS:
      runs[arm].append(results.get(trainer, name, arm, rates[arm], seed))

  losses = {arm: np.array([last_loss(run) for run in runs[arm]]) for arm in ARMS}
  better, worse = sorted(ARMS, key=lambda arm: losses[arm].mean())
  steps = [
    steps_to(run["curve"], loss) for run, loss in zip(runs[better], losses[worse], strict=True)
  ]
  return {
    "rates": rates,
    "loss": {arm: interval(losses[arm]) for arm in ARMS},
    "muon less adamw": interval(losses["muon"] - losses["adamw"]),
    "better": better,
    f"steps of {better} to the last loss of {worse}": interval(steps),
    "step_ms": {arm: float(np.median([run["step_ms"] for run in runs[arm]])) for arm in ARMS},
  }


def main():
  data, out = local_path(_DATA.value), local_path(_OUT.value)
  device = jax.devices()[0]
  names = [_ONLY.value] if _ONLY.value else SETS
  knobs = (_STEPS, _BATCH, _CONTEXT, _LAYERS, _WIDTH)
  settings = {knob.name: knob.value for knob in knobs} | {"device": device.device_kind}
  results = Results(pathlib.Path(out), settings)
  with jax.set_mesh(make_mesh(1, 1, 1, devices=[device])):
    for name in names:
      start = time.perf_counter()
      trainer = Trainer(name, pathlib.Path(data))
      results.content[name] = compare(trainer, results, name)
      results.content[name]["seconds"] = time.perf_counter() - start
      results.save()
      print(json.dumps({name: results.content[name]}, indent=1), flush=True)


if __name__ == "__main__":
  shell.run(main, __doc__)
