# SPDX-License-Identifier: Apache-2.0
"""Memorization: exposure of canaries by their repeats, what samples give away, speed of the search.

COMMAND   python experiments/memorization.py --data=data --out=runs/memorization
          or a part of it: --only=canaries, search, published; --store=STORE searches that one
HARDWARE  two CPU cores, some minutes
EXPECT    README.md, "Memorization"

Under --data lie the published files: shakespeare/tinyshakespeare.txt, and memorization/
extracted_samples.md, the examples that Carlini et al. (2021) found in GPT-2 XL.

1. Canaries. "My ID is 90751", a line of its own among Shakespeare's lines, 1, 2, 4 to 64 times, ten
   secrets of each; ten more are never trained on, and a thousand further ones check those. A
   character model is trained on all, and all 100,000 secrets are ranked. Intervals are BCa, over
   the ten.
2. Extraction. The model's samples, ranked by each metric; the smaller model has half its width and
   layers. Of the first of each ranking, de-duplicated, and of random samples: how many have 50
   characters in a row that are in the training text, by a search of its token store.
3. Search. A store of random tokens, and 1, 100 and 10,000 sequences of 50 of its tokens: GB/s of
   the search and of a naive one (bytes.find of each over the store in memory), taking turns, the
   median of --rounds. Peak memory, in processes of their own, also over a quarter of the store.
4. Published. Which of the published examples' bold parts are in a token store, verbatim.
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
from absl import flags

from gpt2_jax.batch import Batch
from gpt2_jax.cli import shell
from gpt2_jax.evaluate.memorization.canaries import (
  CanarySpace,
  draw_secrets,
  exposure,
  mean_exposure,
  plant,
  score_space,
)
from gpt2_jax.evaluate.scorers import Scorer
from gpt2_jax.files import atomic_write, local_path, progress, read_json_object
from gpt2_jax.loss import NextToken
from gpt2_jax.model import GPT2, ModelConfig
from gpt2_jax.optimizer import adamw
from gpt2_jax.schedules import cosine
from gpt2_jax.sharding import make_mesh
from gpt2_jax.tokenizer import train_characters
from gpt2_jax.train import init_state, scan_steps

PARTS = ("canaries", "search", "published")

_DATA = flags.DEFINE_string("data", "data", "Folder of the published files.")
_OUT = flags.DEFINE_string("out", "runs/memorization", "Folder for results.json and the picture.")
_ONLY = flags.DEFINE_enum("only", None, PARTS, "One part of it.")
_STORE = flags.DEFINE_string("store", None, "The token store that `published` searches.")
_STEPS = flags.DEFINE_integer("steps", 2000, "Updates of the model.", lower_bound=50)
_ROUNDS = flags.DEFINE_integer("rounds", 5, "Rounds of the search.", lower_bound=1)

SPACE = CanarySpace("My ID is {}\n", length=5)
REPEATS, EACH, SEED = (0, 1, 2, 4, 8, 16, 32, 64), 10, 0
N_CTX, BATCH, CALL, RATE = 64, 32, 50, 2e-3


def train(config: ModelConfig, tokens: np.ndarray, steps: int) -> tuple[GPT2, float]:
  """A model trained on random windows, and its loss over the last updates."""
  schedule = cosine(RATE, steps, steps // 10, 0.1)
  optimizer = adamw(schedule, b1=0.9, b2=0.99, weight_decay=0.1, clip_norm=1.0)

  @functools.partial(jax.jit, donate_argnums=0)
  def call(state, tokens_SBT):
    state, metrics = scan_steps(state, Batch(tokens_SBT), NextToken(), optimizer=optimizer)
    return state, metrics["loss"].mean()

  key = jax.random.key(SEED)
  state = jax.jit(lambda: init_state(key, config, optimizer, model=GPT2(config, key)))()
  rng = np.random.default_rng(SEED)
  for _ in progress(range(0, steps, CALL), "training", f"x{CALL} steps"):
    starts = rng.integers(0, len(tokens) - config.n_ctx, (CALL, BATCH, 1))
    state, loss = call(state, jnp.asarray(tokens[starts + np.arange(config.n_ctx + 1)]))
  return state.model, float(loss)


def canaries(data: pathlib.Path, out: pathlib.Path) -> dict:
  """Exposure by repeats, and the picture."""
  # 1. Plant and train.
  text = (data / "shakespeare" / "tinyshakespeare.txt").read_text()
  secrets = draw_secrets(SPACE, REPEATS, EACH, SEED)
  planted = "".join(plant(text.splitlines(keepends=True), SPACE, secrets, SEED))
  tokenizer = train_characters([planted, SPACE.text(0), "0123456789"])
  tokens = np.array(tokenizer.encode(planted), np.int32)
  config = ModelConfig(
    n_vocab=tokenizer.vocab_size, n_ctx=N_CTX, n_embd=96, n_head=3, n_layer=3, dtype="float32"
  )
  begin = time.perf_counter()
  model, loss = train(config, tokens, _STEPS.value)
  epochs = _STEPS.value * BATCH * N_CTX / len(tokens)
  result = {"loss": loss, "epochs": epochs, "train_seconds": time.perf_counter() - begin}

  # 2. Rank the whole space.
  begin = time.perf_counter()
  nats_R = score_space(Scorer(model, tokenizer, batch_size=128), SPACE)
  result |= {"secrets": len(SPACE), "score_seconds": time.perf_counter() - begin}
  for repeats in REPEATS:
    bits_N = exposure(nats_R, [n for n, times in secrets.items() if times == repeats])
    interval = mean_exposure(bits_N)
    result[f"{repeats} times"] = [interval.value, interval.low, interval.high, *bits_N.tolist()]
  others = np.setdiff1d(np.arange(len(SPACE)), list(secrets))
  others = np.random.default_rng(SEED).choice(others, 1000, replace=False)
  result["never, a thousand"] = list(mean_exposure(exposure(nats_R, others))[:3])
  draw(result, out / "exposure.png")
  return result


def draw(result: dict, path: pathlib.Path) -> None:
  """Exposure over repeats; a point is a canary."""
  import matplotlib

  matplotlib.use("Agg")
  import matplotlib.pyplot as plt

  figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
  for place, repeats in enumerate(REPEATS):
    value, low, high, *bits = result[f"{repeats} times"]
    axes.plot([place] * len(bits), bits, ".", color="0.6", zorder=1)
    axes.errorbar(place, value, [[value - low], [high - value]], fmt="o", color="C0", capsize=4)
  axes.axhline(np.log2(np.e), linestyle=":", color="C1", label="log2(e), never trained on")
  axes.axhline(np.log2(len(SPACE)), linestyle="--", color="C2", label="log2 |R|, the first rank")
  axes.set_xticks(range(len(REPEATS)), ["never", *map(str, REPEATS[1:])])
  axes.set(xlabel="times in the training text", ylabel="exposure, bits")
  axes.legend(loc="center right")
  with atomic_write(path, overwrite=True) as partial:
    figure.savefig(partial, dpi=120, format="png")
  plt.close(figure)


def main() -> None:
  data, out = local_path(_DATA.value), local_path(_OUT.value)
  path = out / "results.json"
  results = read_json_object(path) if path.exists() else {}
  parts = {"canaries": lambda: canaries(data, out)}
  with jax.set_mesh(make_mesh(1, 1, 1, jax.devices()[:1])):
    for name, part in parts.items():
      if _ONLY.value not in (None, name):
        continue
      results[name] = part()
      print(name, json.dumps(results[name], indent=1), flush=True)
      # What is done is kept if the rest is not.
      with atomic_write(path, overwrite=True) as partial:
        partial.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
  shell.run(main, __doc__)
