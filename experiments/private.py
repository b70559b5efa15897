# SPDX-License-Identifier: Apache-2.0
"""DP-SGD: what a step costs beside the plain one, and an audit of epsilon by canaries.

COMMAND   python experiments/private.py --data=data
          or a part of it: --only=cost, --only=audit
HARDWARE  two CPU cores, some ten minutes; extra [privacy], and jax-privacy for its auditor
EXPECT    README.md, "Private training": the audit's lower bounds below the accountant's epsilon

Under --data lies shakespeare/tinyshakespeare.txt. The audit trains one small model from scratch on
windows of it, and on canaries: windows of random characters, of which a coin lets in each one. Then
it looks which canaries the model likes better than others.

  exposure     log2 of how many of 10,000 other random windows there are for each that the model
               likes as much (Carlini et al. 2019); 95 % interval by bootstrap over the canaries
  lower bound  of epsilon, with 95 % confidence: from guesses which canaries were let in, in one run
               (Steinke et al. 2023), computed by jax_privacy
"""

import dataclasses
import os
import pathlib
import statistics
import sys
import time

if __name__ == "__main__":
  sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
  os.environ["JAX_PLATFORMS"] = os.environ.get("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from gpt2_jax.batch import Batch
from gpt2_jax.cli import shell
from gpt2_jax.compat import get_mesh
from gpt2_jax.configs import gpt2
from gpt2_jax.data.poisson import PoissonBatches
from gpt2_jax.files import progress
from gpt2_jax.loss import NextToken, last_hidden, next_token_nats
from gpt2_jax.model import ModelConfig
from gpt2_jax.runs.privacy import rdp_epsilon
from gpt2_jax.sharding import BATCH, make_mesh
from gpt2_jax.train import make_step

_DATA = flags.DEFINE_string("data", "data", "Folder with shakespeare/tinyshakespeare.txt.")
_ONLY = flags.DEFINE_enum("only", None, ["cost", "audit"], "One part of it.")
_ROUNDS = flags.DEFINE_integer("rounds", 7, "Of the cost: steps of each kind, in turn.")

DELTA = 1e-4
STEPS, EXPECTED, ROOM = 250, 64, 104
TEXTS, CANARIES, OTHERS, LENGTH = 600, 400, 10_000, 16
NOISES = (None, 0.0, 0.6, 1.0, 2.0)  # None: the plain gradient


@dataclasses.dataclass(frozen=True)
class Windows:
  """Rows of tokens [N, T + 1] as a store of windows, each by itself."""

  rows: np.ndarray
  path: str = "the audit's windows"

  def count_rows(self, n_ctx: int) -> int:
    return len(self.rows)

  def read(self, starts_N, length: int) -> np.ndarray:
    return self.rows[np.asarray(starts_N) // (length - 1)]


def config_of(n_vocab: int, n_ctx: int, width: int, layers: int, **knobs):
  config = gpt2.get_config()
  config.model.update(
    n_vocab=n_vocab, n_ctx=n_ctx, n_embd=width, n_head=4, n_layer=layers, dtype="float32"
  )
  config.update(learning_rate=3e-3, warmup_steps=20, clip_norm=0.0, weight_decay=0.0, b2=0.99)
  config.update_from_flattened_dict(knobs)
  return config


# The cost of a step


def cost() -> None:
  """Seconds of a step: plain in one part, plain an example at a time, private; they take turns."""
  rows, n_ctx = 16, 128
  for kind in ("lora", ""):
    steps = {}
    for name, parts, clip_norm in (("plain", 1, 0.0), ("microbatches", 16, 0.0), ("DP", 16, 1.0)):
      config = config_of(4096, n_ctx, 256, 4, batch_size=rows, microbatches=parts)
      config.adapter.kind = kind
      config.private.update(clip_norm=clip_norm, noise_multiplier=clip_norm, batch_size=rows)
      init, step = make_step(config, ModelConfig(**config.model))
      steps[name] = [step, jax.jit(init)(jax.random.key(0))]

    tokens = jax.random.randint(jax.random.key(1), (1, rows, n_ctx + 1), 0, 4096)
    batch = Batch(jax.device_put(tokens, NamedSharding(get_mesh(), P(None, *BATCH))))
    times = {name: [] for name in steps}
    for index in progress(range(_ROUNDS.value + 1), "rounds", "round"):
      for name, (step, state) in steps.items():
        begin = time.perf_counter()
        state, metrics, _ = step(state, batch, NextToken(), jnp.zeros(1, jnp.int32))
        jax.block_until_ready((state, metrics))
        steps[name][1] = state
        if index:  # the first one compiles
          times[name].append(time.perf_counter() - begin)
    line = ", ".join(
      f"{name} {statistics.median(t):.3f} s ({min(t):.3f}-{max(t):.3f})"
      for name, t in times.items()
    )
    print(f"{kind or 'all parameters'}: {line}", flush=True)


# The audit


def train(rows: np.ndarray, n_vocab: int, noise: float | None):
  """The model after all steps on these rows."""
  config = config_of(n_vocab, LENGTH, 64, 2, steps=STEPS, batch_size=ROOM)
  if noise is not None:
    config.microbatches = ROOM
    config.private.update(clip_norm=1.0, noise_multiplier=noise, batch_size=EXPECTED)
  init, step = make_step(config, ModelConfig(**config.model))
  state = jax.jit(init)(jax.random.key(0))
  batches = PoissonBatches(Windows(rows), LENGTH, ROOM, 0, EXPECTED)
  batches.check_room(STEPS)
  sharding = NamedSharding(get_mesh(), P(None, *BATCH))
  for batch in progress(batches.prefetch(0, STEPS, 1, sharding), f"noise {noise}", "step"):
    state, _, _ = step(state, batch, NextToken(), jnp.zeros(1, jnp.int32))
  return state.model


@jax.jit
def row_nats(model, tokens_BT):
  """Nats of each row, [B]."""
  x_BTD, context = last_hidden(model, Batch(tokens_BT))
  return next_token_nats(model, x_BTD, tokens_BT[:, 1:], context).sum(1)


def nats_of(model, rows: np.ndarray) -> np.ndarray:
  place = NamedSharding(get_mesh(), BATCH)
  parts = [row_nats(model, jax.device_put(part, place)) for part in np.array_split(rows, 8)]
  return np.concatenate(jax.device_get(parts))


def exposures(canaries: np.ndarray, others: np.ndarray) -> np.ndarray:
  """log2 of the others, over the rank of each canary among them."""
  rank = 1 + np.searchsorted(np.sort(others), canaries)
  return np.log2(len(others) + 1) - np.log2(rank)


def audit() -> None:
  from jax_privacy.auditing import CanaryScoreAuditor

  # 1. Text, and random windows: canaries that a coin lets in, and others that none of them saw.
  text = (pathlib.Path(_DATA.value) / "shakespeare/tinyshakespeare.txt").read_text()
  characters = sorted(set(text))
  ids = np.array([characters.index(c) for c in text[: TEXTS * LENGTH + 1]], np.int32)
  texts = np.stack([ids[i * LENGTH : (i + 1) * LENGTH + 1] for i in range(TEXTS)])
  draw = np.random.default_rng(0)
  random = draw.integers(0, len(characters), (CANARIES + OTHERS, LENGTH + 1)).astype(np.int32)
  is_in = draw.random(CANARIES) < 0.5
  canaries, others = random[:CANARIES], random[CANARIES:]
  rows = np.concatenate([texts, canaries[is_in]])
  held_out = np.stack(
    [ids[i * LENGTH + 5 : (i + 1) * LENGTH + 6] for i in range(TEXTS - 1)]
  )  # other cuts of the same text: a loss to compare the runs by, no test set

  # 2. A run for each noise.
  print("| noise | epsilon | exposure | lower bound | AUC | nats a character |")
  print("|---|---|---|---|---|---|")
  for noise in NOISES:
    model = train(rows, len(characters), noise)
    nats = nats_of(model, canaries)
    exposure = exposures(nats[is_in], nats_of(model, others))
    means = draw.choice(exposure, (2000, len(exposure))).mean(1)
    low, high = np.quantile(means, [0.025, 0.975])
    auditor = CanaryScoreAuditor(-nats[is_in], -nats[~is_in])
    bound = auditor.epsilon_one_run(0.05, DELTA)
    epsilon = rdp_epsilon(noise, EXPECTED / len(rows), STEPS, DELTA) if noise else np.inf
    print(
      f"| {'plain' if noise is None else noise} | {epsilon:.2f} | {exposure.mean():.2f} "
      f"[{low:.2f}, {high:.2f}] | {bound:.2f} | {auditor.attack_auroc():.3f} | "
      f"{nats_of(model, held_out).mean() / LENGTH:.3f} |",
      flush=True,
    )
    assert bound <= epsilon, "the audit refutes the accountant"


def main() -> None:
  with jax.set_mesh(make_mesh(1, 1, 1, devices=jax.devices()[:1])):
    if _ONLY.value in (None, "cost"):
      cost()
    if _ONLY.value in (None, "audit"):
      audit()


if __name__ == "__main__":
  shell.run(main, __doc__)
