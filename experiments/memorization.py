# SPDX-License-Identifier: Apache-2.0
"""Memorization: exposure of canaries by their repeats, what samples give away, speed of the search.

COMMAND   python experiments/memorization.py --data=data --out=runs/memorization
          or a part of it: --only=canaries, extraction, search; --only=published --store=STORE
HARDWARE  two CPU cores, some minutes
EXPECT    README.md, "Memorization"

Under --data lie the published files: shakespeare/tinyshakespeare.txt, and memorization/
extracted_samples.md, the examples that Carlini et al. (2021) found in GPT-2 XL.

1. Canaries. "My ID is 90751", a line of its own among Shakespeare's lines, 1, 2, 4 to 64 times, ten
   secrets of each; ten more are never trained on, and a thousand further ones check those. A
   character model is trained on all, and all 100,000 secrets are ranked. Intervals are BCa, over
   the ten.
2. Extraction. The model's samples, ranked by each metric; the smaller model has one layer. Of the
   first tenth of each ranking, de-duplicated, and of all samples: how many have 30 characters in a
   row that are in the training text, by a search of its token store.
3. Search. A store of random tokens, and 1, 100 and 10,000 sequences of 50 of its tokens: GB/s of
   the search and of a naive one (bytes.find of each over the store in memory), taking turns, the
   median of --rounds; by the clock, and by the seconds of processor time, which other work on the
   machine changes less. Peak memory, in processes of their own, also over a quarter of the store.
4. Published. Which of the published examples' bold parts are in a token store, verbatim.
"""

import functools
import json
import multiprocessing
import os
import pathlib
import re
import sys
import tempfile
import time
from collections.abc import Sequence

if __name__ == "__main__":
  sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from experiments.published_samples import read_published_samples
from gpt2_jax.batch import Batch
from gpt2_jax.cli import shell
from gpt2_jax.data.token_store import TokenStore
from gpt2_jax.data.tokenize_corpus import encode_corpus
from gpt2_jax.evaluate.memorization.canaries import (
  DIGITS,
  CanarySpace,
  draw_secrets,
  exposure,
  mean_exposure,
  plant,
  score_space,
)
from gpt2_jax.evaluate.memorization.extraction import (
  extraction_metrics,
  find_verbatim,
  rank_texts,
  sample_texts,
)
from gpt2_jax.evaluate.memorization.search import find_tokens
from gpt2_jax.evaluate.scorers import Scorer
from gpt2_jax.files import atomic_write, local_path, progress, read_json_object
from gpt2_jax.loss import NextToken
from gpt2_jax.model import GPT2, ModelConfig
from gpt2_jax.optimizer import adamw
from gpt2_jax.schedules import cosine
from gpt2_jax.sharding import make_mesh
from gpt2_jax.tokenizer import Characters, train_characters
from gpt2_jax.train import init_state, scan_steps

PARTS = ("canaries", "extraction", "search", "published")

_DATA = flags.DEFINE_string("data", "data", "Folder of the published files.")
_OUT = flags.DEFINE_string("out", "runs/memorization", "Folder for results.json and the picture.")
_ONLY = flags.DEFINE_enum("only", None, PARTS, "One part of it.")
_STORE = flags.DEFINE_string("store", None, "The token store that `published` searches.")
_STEPS = flags.DEFINE_integer("steps", 1000, "Updates of the model.", lower_bound=50)
_LAYERS = flags.DEFINE_integer("layers", 2, "Layers, and heads of 32, of the model.", lower_bound=1)
_CHARACTERS = flags.DEFINE_integer(
  "characters", 400_000, "Characters of Shakespeare that are read.", lower_bound=1000
)
_SAMPLES = flags.DEFINE_integer("samples", 1000, "Samples that are ranked.", lower_bound=10)
_MILLIONS = flags.DEFINE_integer("millions", 40, "Tokens of the store, in millions.", lower_bound=4)
_ROUNDS = flags.DEFINE_integer("rounds", 5, "Rounds of the search.", lower_bound=1)

SPACE = CanarySpace("My ID is {}\n", length=5)
REPEATS, EACH, SEED = (0, 1, 2, 4, 8, 16, 32, 64), 10, 0
N_CTX, BATCH, CALL, RATE = 64, 32, 50, 2e-3
MATCH = 30  # characters in a row that are no chance


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


@functools.cache
def trained(data: pathlib.Path) -> tuple:
  """The planted text, its secrets, the tokenizer, the model and what training it said."""
  text = (data / "shakespeare" / "tinyshakespeare.txt").read_text()[: _CHARACTERS.value]
  secrets = draw_secrets(SPACE, REPEATS, EACH, SEED)
  planted = "".join(plant(text.splitlines(keepends=True), SPACE, secrets, SEED))
  tokenizer = train_characters([planted, SPACE.text(0), DIGITS])
  tokens = np.array(tokenizer.encode(planted), np.int32)

  config = model_config(tokenizer.vocab_size, _LAYERS.value)
  begin = time.perf_counter()
  model, loss = train(config, tokens, _STEPS.value)
  epochs = _STEPS.value * BATCH * N_CTX / len(tokens)
  said = {"loss": loss, "epochs": epochs, "train_seconds": time.perf_counter() - begin}
  return planted, secrets, tokenizer, model, said


def model_config(n_vocab: int, size: int) -> ModelConfig:
  """`size` layers and heads of 32."""
  return ModelConfig(
    n_vocab=n_vocab, n_ctx=N_CTX, n_embd=32 * size, n_head=size, n_layer=size, dtype="float32"
  )


def canaries(data: pathlib.Path, out: pathlib.Path) -> dict:
  """Exposure by repeats, and the picture."""
  _, secrets, tokenizer, model, said = trained(data)
  begin = time.perf_counter()
  nats_R = score_space(Scorer(model, tokenizer, batch_size=128), SPACE)
  result = said | {"secrets": len(SPACE), "score_seconds": time.perf_counter() - begin}

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
  axes.legend(loc="upper left", bbox_to_anchor=(0, 0.9))
  with atomic_write(path, overwrite=True) as partial:
    figure.savefig(partial, dpi=120, format="png")
  plt.close(figure)


def extraction(data: pathlib.Path, out: pathlib.Path) -> dict:
  """Of the first texts of each ranking, and of all samples: the share that is verbatim in part."""
  planted, _, tokenizer, model, _ = trained(data)
  tokens = np.array(tokenizer.encode(planted), np.int32)
  small, _ = train(model_config(tokenizer.vocab_size, 1), tokens, _STEPS.value // 2)
  scorer, smaller = Scorer(model, tokenizer, 128), Scorer(small, tokenizer, 128)

  texts = sample_texts(scorer, _SAMPLES.value, N_CTX - 2, ("\n",))
  with tempfile.TemporaryDirectory() as folder:
    store = encode_corpus([planted], tokenizer, folder, {}, 1)
    verbatim = find_verbatim(store, tokenizer, texts, MATCH)
  is_verbatim_N = np.array([found.tokens > 0 for found in verbatim])
  result = {"all": [len(texts), float(is_verbatim_N.mean())]}
  for name, metric_N in extraction_metrics(scorer, texts, {"small": smaller}).items():
    first = rank_texts(texts, metric_N, len(texts) // 10)
    result[name] = [len(first), float(is_verbatim_N[first].mean())]
  return result


class RandomDocuments(Sequence):
  """Documents of a million random characters, each made when it is read."""

  def __init__(self, n: int, alphabet: str):
    self.n, self.letters = n, np.array(list(alphabet))

  def __len__(self) -> int:
    return self.n

  def __getitem__(self, i: int) -> str:
    if not 0 <= i < self.n:
      raise IndexError(i)
    return "".join(np.random.default_rng(i).choice(self.letters, 1_000_000))


def search(data: pathlib.Path, out: pathlib.Path) -> dict:
  """GB/s of the search and of a naive one, taking turns, and the memory of both."""
  alphabet = "".join(map(chr, range(0x4E00, 0x4E00 + 1000)))
  result, paths = {}, []
  for n in (_MILLIONS.value // 4, _MILLIONS.value):
    paths.append(str(out / f"store_{n}"))
    encode_corpus(RandomDocuments(n, alphabet), Characters(alphabet), paths[-1], {"n": n}, 1)
  store = TokenStore.open(paths[-1])
  nbytes = 2 * len(store)
  rng = np.random.default_rng(SEED)
  for count in (1, 100, 10_000):
    sequences = store.read(rng.integers(0, len(store) - 50, count), 50).tolist()
    # Naively, ten thousand would take a hundred times as long as a hundred.
    sides = {"search": find_counts} | ({"naive": find_naively} if count <= 100 else {})
    rates = {name: [] for name in sides}
    for _ in range(_ROUNDS.value):
      counts = []
      for name, side in sides.items():
        begin = np.array([time.perf_counter(), time.process_time()])
        counts.append(side(store, sequences))
        seconds = np.array([time.perf_counter(), time.process_time()]) - begin
        rates[name].append(nbytes / 1e9 / seconds)
      assert all(each == counts[0] for each in counts)
    for name, of_rounds in rates.items():
      for clock, values in zip(("s", "processor s"), np.transpose(of_rounds), strict=True):
        key = f"{count} sequences, {name}, GB/{clock}"
        result[key] = [float(np.median(values)), float(min(values)), float(max(values))]

  for path in paths:
    for side in (find_counts, find_naively):
      size = len(TokenStore.open(path))
      result[f"{size} tokens, {side.__name__}, peak MiB more"] = peak_memory(path, side)
  return result


def find_counts(store: TokenStore, sequences: list[list[int]]) -> list[int]:
  return [found.count for found in find_tokens(store, sequences)]


def find_naively(store: TokenStore, sequences: list[list[int]]) -> list[int]:
  """bytes.find of each sequence over the store in memory."""
  content = b"".join(block.tobytes() for _, block in store.blocks(1 << 20, 0))
  counts = []
  for sequence in sequences:
    needle, count, place = np.array(sequence, np.uint16).tobytes(), 0, -1
    while (place := content.find(needle, place + 1)) >= 0:
      count += place % 2 == 0
    counts.append(count)
  return counts


def peak_memory(path: str, side) -> float:
  """MiB by which a search of ten sequences raises the peak memory of a new process."""
  context = multiprocessing.get_context("spawn")
  with context.Pool(1) as pool:
    return pool.apply(_peak_memory, (path, side))


def _peak_memory(path: str, side) -> float:
  store = TokenStore.open(path)
  sequences = store.read(range(0, 1000, 100), 50).tolist()
  # The imports have had a higher peak: Linux forgets it.
  pathlib.Path("/proc/self/clear_refs").write_text("5")
  before = _memory("VmRSS")
  side(store, sequences)
  return _memory("VmHWM") - before


def _memory(name: str) -> float:
  """A line of this process' status, in MiB."""
  status = pathlib.Path("/proc/self/status").read_text()
  return int(re.search(rf"{name}:\s+(\d+) kB", status)[1]) / 1024


def published(data: pathlib.Path, out: pathlib.Path) -> dict:
  """Which of the published samples' memorized parts are in --store, in runs of 20 tokens."""
  samples = read_published_samples(data / "memorization" / "extracted_samples.md")
  parts = [part for sample in samples for part in sample.parts]
  store = TokenStore.open(_STORE.value)
  found = find_verbatim(store, store.tokenizer, parts, 20)
  lines = {part[:60]: [f.tokens, f.documents] for part, f in zip(parts, found, strict=True)}
  n_found = sum(each.tokens > 0 for each in found)
  return {"parts": len(parts), "found": n_found} | {k: v for k, v in lines.items() if v[0]}


def main() -> None:
  data, out = local_path(_DATA.value), local_path(_OUT.value)
  path = out / "results.json"
  results = read_json_object(path) if path.exists() else {}
  parts = {"canaries": canaries, "extraction": extraction, "search": search}
  if _STORE.value is not None:
    parts["published"] = published
  with jax.set_mesh(make_mesh(1, 1, 1, jax.devices()[:1])):
    for name, part in parts.items():
      if _ONLY.value not in (None, name):
        continue
      results[name] = part(data, out)
      print(name, json.dumps(results[name], indent=1), flush=True)
      # What is done is kept if the rest is not.
      with atomic_write(path, overwrite=True) as partial:
        partial.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
  shell.run(main, __doc__)
