# SPDX-License-Identifier: Apache-2.0
"""Distillation against the language model's loss alone, on Shakespeare and WikiText-2.

COMMAND   python experiments/distill.py --set=shakespeare --data=data --out=runs/distill
          and the same with --set=wikitext2; --dtype=bfloat16 for a GPU
HARDWARE  one GPU, minutes a set with --steps=400 --teacher_steps=1000; on two cores --width=64,
          --batch=16, --steps=200, --teacher_steps=600 take half an hour
EXPECT    README.md, "Distillation": the paired differences with their intervals

Under --data lie the published files, shakespeare/tinyshakespeare.txt and
wikitext2/wiki.{valid,test}.tokens. Shakespeare is characters, 80, 10 and 10 % of them to train,
validate and test. Of WikiText-2 the published test file trains, since the training file is not
here; the halves of the published validation file validate and test. Its tokens are 2,048 pieces of
SentencePiece.

The protocol. A teacher of 12 layers is trained from scratch, and its best evaluation is kept. A
student is its layers 0, 2, 4, 7, 9 and 11 with its embeddings and last norm. From this one start it
learns by DistilGPT-2's objective ("distilled") or by the language model's ("lm"). Each takes the
learning rate with the lowest validation loss of a seed that is not compared: rates are tried three
to a factor of ten, until the best one has a worse one on either side. A seed sets the order of the
data and the dropout, so a pair with one seed sees the same rows. "lm, equal time" takes as many
steps more as a distilled step takes longer, on the same machine. Test losses are the language
model's, after the last step. Acceptance is that of speculative decoding with the student as draft.
Finished runs are kept in --out, and the same command goes on.
"""

import dataclasses
import functools
import json
import os
import pathlib
import statistics
import sys
import time

if __name__ == "__main__":
  sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import flags

from gpt2_jax.batch import Batch
from gpt2_jax.cli import shell
from gpt2_jax.decoding import Greedy, make_sampler
from gpt2_jax.decoding.speculative import speculative
from gpt2_jax.files import atomic_write, local_path, read_json_object
from gpt2_jax.finetune.distill import Distill
from gpt2_jax.loss import NextToken
from gpt2_jax.model import GPT2, ModelConfig
from gpt2_jax.optimizer import adamw
from gpt2_jax.runs.origin import take_layers
from gpt2_jax.sharding import make_mesh
from gpt2_jax.tokenizer import train_characters, train_sentencepiece
from gpt2_jax.train import init_state, scan_steps

_DATA = flags.DEFINE_string("data", "data", "Folder of the published files.")
_OUT = flags.DEFINE_string("out", "runs/distill", "Folder for the results, a JSON file a set.")
_SET = flags.DEFINE_enum("set", "shakespeare", ["shakespeare", "wikitext2"], "The text.")
_SEEDS = flags.DEFINE_integer("seeds", 5, "Seeds that are compared.", lower_bound=2)
_STEPS = flags.DEFINE_integer("steps", 600, "Steps of a student.", lower_bound=20)
_TEACHER_STEPS = flags.DEFINE_integer(
  "teacher_steps", 1500, "Steps of the teacher.", lower_bound=20
)
_WIDTH = flags.DEFINE_integer("width", 192, "Width of both models; heads have 32.", lower_bound=32)
_BATCH = flags.DEFINE_integer("batch", 64, "Rows of 128 tokens in a step.", lower_bound=1)
_DTYPE = flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "Of activations.")

LAYERS = (0, 2, 4, 7, 9, 11)
N_CTX, DROPOUT, PIECES = 128, 0.1, 2048
CALL = 20  # steps of one dispatch
RATES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
TEACHER_RATE, FIRST_RATE, SEARCH_SEED = 1e-3, 1e-3, 100
PROMPTS, PROMPT, N_NEW, DRAFT = 16, 32, 64, 4  # of speculative decoding
ADAMW = {"b1": 0.9, "b2": 0.99, "weight_decay": 0.1, "clip_norm": 1.0}


def read_splits(name: str, data: pathlib.Path) -> tuple[dict[str, np.ndarray], int]:
  """The tokens of a set's splits, and the size of its vocabulary."""
  if name == "shakespeare":
    text = (data / "shakespeare" / "tinyshakespeare.txt").read_text()
    low, high = int(len(text) * 0.8), int(len(text) * 0.9)
    texts = {"train": text[:low], "validation": text[low:high], "test": text[high:]}
    tokenizer = train_characters([text])
  else:
    train, valid = (
      (data / "wikitext2" / f"wiki.{part}.tokens").read_text() for part in ("test", "valid")
    )
    half = len(valid) // 2
    texts = {"train": train, "validation": valid[:half], "test": valid[half:]}
    tokenizer = train_sentencepiece([train], PIECES)
  splits = {split: np.array(tokenizer.encode(text), np.int32) for split, text in texts.items()}
  return splits, tokenizer.vocab_size


def cosine(peak, steps):
  """Linear warmup over a tenth of the steps, and a cosine to a tenth of the peak; both may be
  traced, so that one compiled step serves every rate and length."""

  def rate(count):
    warmup = (count + 1) / (steps / 10)
    done = jnp.clip(count / steps, 0, 1)
    return peak * jnp.minimum(warmup, 0.55 + 0.45 * jnp.cos(jnp.pi * done))

  return rate


@functools.partial(jax.jit, donate_argnums=0)
def train_call(state, batches: Batch, objective, peak, steps, key):
  """CALL updates in one dispatch; the losses, [CALL]."""
  optimizer = adamw(cosine(peak, steps), **ADAMW)
  state, metrics = scan_steps(state, batches, objective, optimizer=optimizer, dropout_key=key)
  return state, metrics["loss"]


@functools.partial(jax.jit, static_argnums=1)
def initial_state(model: GPT2, config: ModelConfig):
  model = jax.tree.map(jnp.copy, model)  # the state is donated, and the start is used again
  return init_state(None, config, adamw(optax.constant_schedule(1.0), **ADAMW), model=model)


@jax.jit
def batch_sums(model: GPT2, tokens_BT):
  return NextToken()(model, Batch(tokens_BT))


@dataclasses.dataclass
class Bench:
  """A set's tokens, its teacher and its start; results by name, in a file."""

  splits: dict[str, np.ndarray]
  config: ModelConfig  # the student's
  file: pathlib.Path
  teacher: GPT2 | None = None
  start: GPT2 | None = None

  def results(self) -> dict:
    return read_json_object(self.file) if self.file.exists() else {}

  def keep(self, name: str, value) -> None:
    """Writes one result at once: what is finished stays."""
    self.file.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(self.file, overwrite=True) as partial:
      partial.write_text(json.dumps(self.results() | {name: value}, indent=1) + "\n")
    print(f"{name}: {value}", flush=True)

  def loss(self, model: GPT2, split: str) -> float:
    """Nats a token over the windows of a split that fill whole batches."""
    tokens, rows = self.splits[split], _BATCH.value
    starts = np.arange(0, len(tokens) - N_CTX - 1, N_CTX)
    rows = min(rows, len(starts))
    totals = []
    for first in range(0, len(starts) - rows + 1, rows):
      windows = starts[first : first + rows, None] + np.arange(N_CTX + 1)
      totals.append(batch_sums(model, tokens[windows]))
    totals = jax.device_get(totals)
    return float(sum(t["nats"] for t in totals) / sum(t["tokens"] for t in totals))

  def train(self, start: GPT2, objective, peak: float, steps: int, seed: int, watch=None):
    """The model after `steps`, and the median seconds of a step; `watch(model)` sees it on its way,
    ten times."""
    tokens, rng = self.splits["train"], np.random.default_rng(seed)
    state = initial_state(start, start.config)
    calls, seconds = -(-steps // CALL), []
    for call in range(calls):
      starts = rng.integers(0, len(tokens) - N_CTX, (CALL, _BATCH.value, 1))
      batches = Batch(tokens[starts + np.arange(N_CTX + 1)])
      begin = time.perf_counter()
      state, losses = train_call(
        state, batches, objective, peak, float(calls * CALL), jax.random.key(seed)
      )
      losses.block_until_ready()
      seconds.append((time.perf_counter() - begin) / CALL)
      if watch is not None and (call + 1) % max(1, calls // 10) == 0:
        watch(state.model)
    return state.model, statistics.median(seconds[1:] or seconds)

  def make_teacher(self) -> None:
    """Trains the teacher, keeps its best evaluation, and takes the student's start from it."""
    config = dataclasses.replace(self.config, n_layer=12)
    best = {"loss": np.inf}

    def watch(model):
      loss = self.loss(model, "validation")
      print(f"teacher: validation {loss:.4f}", flush=True)
      if loss < best["loss"]:
        best.update(loss=loss, model=jax.tree.map(jnp.copy, model))

    random = jax.jit(GPT2, static_argnums=0)(config, jax.random.key(0))
    self.train(random, NextToken(), TEACHER_RATE, _TEACHER_STEPS.value, 0, watch)
    self.teacher, self.start = best["model"], take_layers(best["model"], LAYERS)
    self.keep("teacher test loss", self.loss(self.teacher, "test"))
    self.keep("start test loss", self.loss(self.start, "test"))
    self.keep("start acceptance", self.acceptance(self.start))

  def objective(self, arm: str):
    return Distill(self.teacher) if arm == "distilled" else NextToken()

  def best_rate(self, arm: str) -> float:
    """The learning rate with the lowest validation loss; both of its neighbours are worse."""

    def validation_loss(place: int) -> float:
      name = f"{arm} rate {RATES[place]:g} validation"
      if name not in self.results():
        model, _ = self.train(
          self.start, self.objective(arm), RATES[place], _STEPS.value, SEARCH_SEED
        )
        self.keep(name, self.loss(model, "validation"))
      return self.results()[name]

    place = RATES.index(FIRST_RATE)
    while True:
      near = [p for p in (place - 1, place, place + 1) if 0 <= p < len(RATES)]
      best = min(near, key=validation_loss)
      if best == place:
        return RATES[place]
      place = best

  def run(self, arm: str, rate: float, steps: int, seed: int, name: str) -> None:
    """Keeps the test loss, the seconds of a step and the acceptance of one student."""
    if f"{name} {seed}" in self.results():
      return
    model, seconds = self.train(self.start, self.objective(arm), rate, steps, seed)
    result = {"test": self.loss(model, "test"), "seconds": seconds, "steps": steps}
    self.keep(f"{name} {seed}", result | self.acceptance(model))

  def acceptance(self, draft: GPT2) -> dict[str, float]:
    """Of proposals that the teacher accepts: greedy, and sampled at a temperature of 1."""
    tokens = self.splits["test"]
    starts = np.linspace(0, len(tokens) - PROMPT - 1, PROMPTS).astype(int)
    prompts = [tokens[start : start + PROMPT].tolist() for start in starts]
    rates = {}
    for name, sampler in (("greedy", Greedy()), ("sampled", make_sampler())):
      answer = speculative(self.teacher, draft, prompts, N_NEW, DRAFT, sampler)
      rates[name] = answer.acceptance
    return rates


def t_interval(differences: np.ndarray) -> str:
  """The mean of paired differences with Student's 95 % interval."""
  from scipy import stats

  mean = differences.mean()
  error = differences.std(ddof=1) / np.sqrt(len(differences))
  reach = stats.t.ppf(0.975, len(differences) - 1) * error
  return f"{mean:+.4f} ({mean - reach:+.4f} to {mean + reach:+.4f})"


def table(results: dict, seeds: range) -> str:
  """A row for each arm, and the paired differences to the distilled one."""
  arms = ("distilled", "lm", "lm, equal time")
  values = {}
  for arm in arms:
    for key in ("test", "greedy", "sampled", "seconds", "steps"):
      values[arm, key] = np.array([results[f"{arm} {seed}"][key] for seed in seeds])

  lines = [
    f"teacher {results['teacher test loss']:.4f}, start {results['start test loss']:.4f}, "
    f"acceptance of the start {results['start acceptance']}",
    "| arm | steps | ms a step | test loss | distilled - arm | accepted, greedy | sampled |",
    "|---|---|---|---|---|---|---|",
  ]
  for arm in arms:
    test, milliseconds = values[arm, "test"], 1e3 * np.median(values[arm, "seconds"])
    cells = [arm, str(values[arm, "steps"][0]), f"{milliseconds:.2f}"]
    cells.append(f"{test.mean():.4f} ({test.min():.4f}-{test.max():.4f})")
    cells.append("" if arm == arms[0] else t_interval(values[arms[0], "test"] - test))
    for key in ("greedy", "sampled"):
      cell = f"{values[arm, key].mean():.3f}"
      if arm != arms[0]:
        cell += f"; distilled - it {t_interval(values[arms[0], key] - values[arm, key])}"
      cells.append(cell)
    lines.append(f"| {' | '.join(cells)} |")
  return "\n".join(lines)


def main() -> None:
  # 1. The text, the sizes, and the teacher; it is trained anew where the command goes on.
  if _WIDTH.value % 32:
    raise ValueError(f"--width={_WIDTH.value} is no multiple of 32, the width of a head")
  splits, n_vocab = read_splits(_SET.value, local_path(_DATA.value))
  drops = dict.fromkeys(("embd_pdrop", "resid_pdrop"), DROPOUT)
  config = ModelConfig(
    n_vocab, N_CTX, _WIDTH.value, _WIDTH.value // 32, len(LAYERS), dtype=_DTYPE.value, **drops
  )
  file = local_path(_OUT.value) / f"{_SET.value}.json"
  bench, seeds = Bench(splits, config, file), range(_SEEDS.value)
  tokens = {split: len(array) for split, array in splits.items()}
  print(f"{_SET.value}: {tokens} of {n_vocab:,}; {jax.devices()[0].device_kind}", flush=True)

  with jax.set_mesh(make_mesh(1, 1, 1, jax.devices()[:1])):
    bench.make_teacher()

    # 2. Equal steps.
    rates = {arm: bench.best_rate(arm) for arm in ("distilled", "lm")}
    bench.keep("rates", rates)
    for seed in seeds:
      for arm, rate in rates.items():
        bench.run(arm, rate, _STEPS.value, seed, arm)

    # 3. Equal wall time, by the steps' own times.
    seconds = {}
    for arm in rates:
      times = [bench.results()[f"{arm} {seed}"]["seconds"] for seed in seeds]
      seconds[arm] = statistics.median(times)
    longer = round(_STEPS.value * seconds["distilled"] / seconds["lm"] / CALL) * CALL
    for seed in seeds:
      bench.run("lm", rates["lm"], longer, seed, "lm, equal time")
  print(table(bench.results(), seeds))


if __name__ == "__main__":
  shell.run(main, __doc__)
