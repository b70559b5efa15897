# SPDX-License-Identifier: Apache-2.0
"""Watermarks: false positives on human text, detection by length and after edits, price.

COMMAND   python experiments/watermark.py --data=DATA --out=watermark.json
HARDWARE  two CPU cores, some minutes
DATA      wikitext2, ptb, shakespeare and nanoGPT's checkpoint of Shakespeare's characters

1. False positives: all disjoint windows of 200 tokens (GPT-2's) of human texts, the share whose
   p-value is at most 1 % and 0.1 %; its interval is by document, 20 windows in a row.
2. Gumbel: 10^6 draws against the model's distribution (chi-square), p-values of random texts
   against the uniform distribution (Kolmogorov and Smirnov).
3. Detection: texts of nanoGPT's character model, at temperature 1. The share that is detected at
   p <= 0.1 %, by length and after a part of the words was deleted; the loss of what was written
   under the model itself, and tokens/s.
4. Price: milliseconds of each filter for a row and a step, at GPT-2's vocabulary.
"""

import dataclasses
import json
import pathlib
import time

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags
from scipy import stats

from gpt2_jax.convert.pretrained import load_pretrained
from gpt2_jax.decoding import Generation, History, Sample, TopP, for_inference, generate
from gpt2_jax.decoding.watermark import GreenListWatermark, GumbelWatermark, SynthIdWatermark
from gpt2_jax.decoding.watermark_transformers import TransformersGreenList, TransformersSynthId
from gpt2_jax.evaluate.watermark_detection import detect
from gpt2_jax.sharding import make_mesh
from gpt2_jax.tokenizer import load_tokenizer

_DATA = flags.DEFINE_string("data", None, "The folder of the datasets.", required=True)
_OUT = flags.DEFINE_string("out", None, "Where the results go, as JSON.")
_TEXTS = flags.DEFINE_integer("texts", 128, "Texts of each watermark.")
_LENGTH = flags.DEFINE_integer("length", 400, "Characters of a text.")
_DRAWS = flags.DEFINE_integer("draws", 1_000_000, "Draws of the chi-square test.")
_WINDOWS = flags.DEFINE_integer("windows", 0, "Windows of each human text; 0 is all.")

KEY = 20_230_124
WATERMARKS = {
  "none": None,
  "green, delta 2": GreenListWatermark(KEY),
  "green, self hash": GreenListWatermark(KEY, context=3, self_hash=True),
  "gumbel": GumbelWatermark(KEY),
  "synthid, 30 layers": SynthIdWatermark(KEY),
}
MARKED = {name: watermark for name, watermark in WATERMARKS.items() if watermark is not None}
HUMAN = {
  "WikiText-2": "wikitext2/wiki.*.tokens",
  "PTB": "ptb/ptb.*.txt",
  "Shakespeare": "shakespeare/tinyshakespeare.txt",
}
WINDOW, DOCUMENT = 200, 20
LEVELS = (0.01, 0.001)


def false_positives(data: pathlib.Path) -> dict:
  """Of each human text and watermark: windows, and the share at each level with its interval."""
  tokenizer = load_tokenizer("gpt2")
  rng = np.random.default_rng(0)
  results = {}
  for title, pattern in HUMAN.items():
    text = "".join(path.read_text() for path in sorted(data.glob(pattern)))
    tokens = np.array(tokenizer.encode(text))
    windows = np.split(tokens[: len(tokens) // WINDOW * WINDOW], len(tokens) // WINDOW)
    windows = windows[: _WINDOWS.value or None]
    for name, watermark in MARKED.items():
      for how in ("once", "all", "a key each"):
        p_values = []
        for number, window in enumerate(windows):
          # Windows share n-grams, whose hashes are one draw of a key: with a key each they are not.
          key = KEY + (number if how == "a key each" else 0)
          keyed = dataclasses.replace(watermark, key=key)
          p_values.append(detect(keyed, window, count_repeated=how == "all").p_value)
        shares = [share_below(np.array(p_values), level, rng) for level in LEVELS]
        results[f"{title}, {name}, {how}"] = [len(windows), *shares]
        print(f"{title:12} {name:20} {how:10} {len(windows):5} {shares}")
  return results


def share_below(p_values: np.ndarray, level: float, rng) -> dict:
  """The share at most `level`, a bootstrap interval over documents, and the binomial's tail."""
  is_below = p_values <= level
  n_documents = -(-len(is_below) // DOCUMENT)
  documents = np.array_split(is_below, n_documents)
  sums = np.array([[part.sum(), len(part)] for part in documents])
  drawn = sums[rng.integers(0, n_documents, (2000, n_documents))].sum(1)
  low, high = np.quantile(drawn[:, 0] / drawn[:, 1], (0.025, 0.975))
  tail = stats.binom.sf(is_below.sum() - 1, len(is_below), level)
  values = {"share": is_below.mean(), "low": low, "high": high, "tail": tail}
  return {name: round(float(value), 5) for name, value in values.items()}


def draws_of_gumbel() -> dict:
  """Chi-square of draws after random contexts, and the KS test of random texts' p-values."""
  watermark = MARKED["gumbel"]
  logits_V = jnp.asarray(np.random.default_rng(1).normal(size=100) * 2, jnp.float32)

  @jax.jit
  @jax.vmap
  def draw(context_C):
    return jnp.argmax(watermark(logits_V, History(context_C, 0, 4, 4)))

  rng = np.random.default_rng(0)
  counts = np.zeros(100)
  for _ in range(max(1, _DRAWS.value // 10_000)):
    contexts = rng.integers(0, 50_257, (10_000, 4)).astype(np.int32)
    counts += np.bincount(draw(contexts), minlength=100)
  p_V = np.asarray(jax.nn.softmax(logits_V), float)
  chi = stats.chisquare(counts, p_V / p_V.sum() * counts.sum())

  texts = rng.integers(0, 50_257, (2000, WINDOW))
  ks = stats.kstest([detect(watermark, text).p_value for text in texts], "uniform")
  result = {"draws": int(counts.sum()), "chi2": chi.statistic, "chi2_p": chi.pvalue}
  result |= {"ks": ks.statistic, "ks_p": ks.pvalue}
  print(result)
  return {name: float(value) for name, value in result.items()}


def detection(data: pathlib.Path) -> dict:
  """Of each watermark: loss, tokens/s, and the share that is detected by length and after edits."""
  mesh = make_mesh(1, 1, 1, jax.devices()[:1])
  model, tokenizer = load_pretrained(str(data / "checkpoints/nanogpt"), mesh)
  decoder = for_inference(model)
  text = (data / HUMAN["Shakespeare"]).read_text()
  # A prompt for each text: one and the same has one continuation under Gumbel's.
  places = np.random.default_rng(0).integers(0, len(text) - 16, _TEXTS.value)
  prompts = [tokenizer.encode(text[place : place + 16]) for place in places]
  n_ctx = decoder.model.config.n_ctx
  # Texts of a short context are generated in parts: each begins with the end of the last.
  n_new = n_ctx // 2
  results = {}
  for name, watermark in WATERMARKS.items():
    sampler = Sample(() if watermark is None else (watermark,))
    rows, nats, seconds = write_texts(decoder, prompts, sampler, n_new)
    results[name] = {"nats": nats, "tokens_per_second": rows.size / seconds}
    if watermark is not None:
      results[name] |= detected(watermark, rows, tokenizer)
    print(name, results[name])
  return results


def write_texts(decoder, prompts, sampler, n_new: int) -> tuple[np.ndarray, float, float]:
  """Texts [N, length] behind the prompts, their nats a token, and seconds without compiling."""
  texts, logprobs, seconds = [[] for _ in prompts], [], []
  for part in range(1 + -(-_LENGTH.value // n_new)):
    generation = Generation(n_new, sampler, seed=part, logprobs=True)
    begin = time.perf_counter()
    completions = generate(decoder, prompts, generation=generation)
    seconds.append(time.perf_counter() - begin)
    for text, completion in zip(texts, completions, strict=True):
      text += completion.tokens
      logprobs += completion.logprobs
    prompts = [text[-n_new:] for text in texts]
  rows = np.array(texts)[:, : _LENGTH.value]
  return rows, -float(np.mean(logprobs)), float(np.median(seconds)) * _LENGTH.value / n_new


def detected(watermark, rows: np.ndarray, tokenizer) -> dict:
  """The share of texts with p <= 0.1 %."""

  def share(texts) -> float:
    return float(np.mean([detect(watermark, text).p_value <= 0.001 for text in texts]))

  result = {}
  for length in (25, 50, 100, 200, 400):
    result[f"{length} tokens"] = share(rows[:, :length])
  rng = np.random.default_rng(0)
  for part in (0.1, 0.3, 0.5):
    edited = []
    for row in rows:
      words = tokenizer.decode(row).split(" ")
      kept = [word for word in words if rng.random() >= part]
      edited.append(tokenizer.encode(" ".join(kept)))
    result[f"{part:.0%} of the words deleted"] = share(edited)
  return result


def price() -> dict:
  """Milliseconds of a filter for a row and a step, at GPT-2's vocabulary: the median."""
  logits_BV = jnp.asarray(np.random.default_rng(0).normal(size=(8, 50_257)), jnp.float32)
  tokens_BW = np.random.default_rng(1).integers(0, 50_257, (8, 1024)).astype(np.int32)
  slow = {"transformers' green list, on the host": TransformersGreenList(50_257)}
  slow["transformers' synthid, 30 layers"] = TransformersSynthId(tuple(range(1, 31)))
  results = {}
  for name, watermark in (MARKED | slow | {"top-p, to compare": TopP(0.9)}).items():

    @jax.jit
    @jax.vmap
    def apply(logits_V, tokens_W, watermark=watermark):
      return watermark(logits_V, History(tokens_W, 0, 4, 1000))

    seconds = []
    for call in range(21):
      # Other contexts each time: the host keeps the lists that it has made.
      other_BW = (tokens_BW + call) % 50_257
      begin = time.perf_counter()
      apply(logits_BV, other_BW).block_until_ready()
      seconds.append((time.perf_counter() - begin) / len(logits_BV))
    results[name] = float(np.median(seconds[1:])) * 1000
    print(f"{name:40} {results[name]:.3f} ms a row and step")
  return results


def main(_) -> None:
  data = pathlib.Path(_DATA.value)
  results = {}
  for name, run in {
    "false_positives": lambda: false_positives(data),
    "gumbel": draws_of_gumbel,
    "price": price,
    "detection": lambda: detection(data),
  }.items():
    results[name] = run()
    # What is done is kept if the rest is not.
    if _OUT.value:
      pathlib.Path(_OUT.value).write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
  app.run(main)
