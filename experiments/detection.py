# SPDX-License-Identifier: Apache-2.0
"""Detection of machine text: published areas, TF-IDF, and curves by length and by sampler.

COMMAND   python experiments/detection.py --data=data --out=runs/detection
HARDWARE  two CPU cores, some minutes
DATA      detection (XSum by GPT-2 XL) and shakespeare
EXPECT    published areas .864 (likelihood), .892 (log-rank), .918 (LRR), .583 (entropy), .993
          (Fast-DetectGPT); TF-IDF about .69

1. Published: the areas under the ROC of Fast-DetectGPT's own scores of 500 pairs, with intervals.
2. TF-IDF: gpt-2-output-dataset's baseline on the same pairs, by five folds of documents.
3. Curves: a character model is trained here on the first 90 % of Shakespeare. Human texts are the
   other 10 %, cut into documents; the model writes after the first 30 characters of each, by
   several samplers. It is also the detector. A verdict's threshold is that of the other half's
   documents.
4. Speed: tokens/s of the statistics against plain scoring, alternating.

An owner of GPT-2 XL's weights checks the published areas with
  gpt2-jax evaluate --model=gpt2-xl --tasks=machine_text,machine_text:lrr --data=data --download \\
    --out=runs/gpt2_xl
"""

import json
import os
import pathlib
import subprocess
import sys
import time

if __name__ == "__main__":
  sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

import jax
import matplotlib
import numpy as np
from absl import app, flags

from gpt2_jax.convert.pretrained import load_pretrained
from gpt2_jax.decoding import (
  Generation,
  Greedy,
  Sample,
  SlidingWindow,
  Temperature,
  TopK,
  TopP,
  for_inference,
  generate,
)
from gpt2_jax.evaluate.detection import CRITERIA, roc
from gpt2_jax.evaluate.scorers import Scorer
from gpt2_jax.evaluate.sweep.bootstrap import Interval, intervals
from gpt2_jax.evaluate.task import RollingLoglikelihood, Statistics, TokenStatistics
from gpt2_jax.evaluate.tasks import machine_text
from gpt2_jax.evaluate.tfidf import fit_tfidf
from gpt2_jax.model import GPT2, ModelConfig
from gpt2_jax.sharding import make_mesh
from gpt2_jax.tokenizer import Tokenizer

matplotlib.use("Agg")
from matplotlib import pyplot  # noqa: E402

_DATA = flags.DEFINE_string("data", None, "The folder of the datasets.", required=True)
_OUT = flags.DEFINE_string("out", None, "Where the run, texts and pictures go.", required=True)
_STEPS = flags.DEFINE_integer("steps", 3000, "Of the model's training.")
_TEXTS = flags.DEFINE_integer("texts", 108, "Documents of each kind.")

ROOT = pathlib.Path(__file__).parents[1]
ONE_MODEL = ("fast_detectgpt", "likelihood", "log_rank", "lrr", "rank", "entropy")
PUBLISHED = ("likelihood", "logrank", "lrr", "entropy", "rank", "sampling_discrepancy")
N_CTX, DOCUMENT, PROMPT = 128, 1000, 30
LENGTHS = (50, 100, 200, 300, 500, 700, 1000)
PURE = "pure sampling"
SAMPLERS = {
  "greedy": Greedy(),
  "temperature 0.7": Sample((Temperature(0.7),)),
  "top-k 5": Sample((TopK(5),)),
  "top-p 0.9": Sample((TopP(0.9),)),
  PURE: Sample(),
}

# ---- 1. published scores, 2. TF-IDF


def published_areas(data: pathlib.Path) -> dict:
  results = {}
  for name in PUBLISHED:
    content = json.loads((data / f"detection/published_xsum_{name}.json").read_text())
    predictions = content["predictions"]
    results[name] = by_document(np.array(predictions["real"]), np.array(predictions["samples"]))
    print(f"{name:22} {shown(results[name])} published {content['metrics']['roc_auc']:.3f}")
  return {name: value["auc"] for name, value in results.items()}


def by_document(human_N: np.ndarray, machine_N: np.ndarray) -> dict[str, Interval]:
  """Area, and true positives at 1 % false ones, with intervals over documents."""
  ones = np.ones(len(human_N))
  items = {"human": human_N, "machine": machine_N, "has_human": ones, "has_machine": ones}
  return intervals(machine_text.METRICS, items | {"items": ones}, resamples=2000)


def shown(scores: dict[str, Interval]) -> str:
  area, found = scores["auc"], scores["tpr_at_1_fpr"]
  return (
    f"AUC {area.value:.3f} [{area.low:.3f}, {area.high:.3f}], "
    f"TPR {found.value:.1f} [{found.low:.1f}, {found.high:.1f}] %"
  )


def tfidf_areas(data: pathlib.Path) -> dict:
  """The area in each of five folds of documents, for three shuffles; an eighth is held out."""
  rows = list(machine_text.read(data / "detection/xsum_gpt2-xl.json"))
  areas = []
  for seed in range(3):
    folds = np.array_split(np.random.default_rng(seed).permutation(len(rows)), 5)
    for number, fold in enumerate(folds):
      others = np.concatenate([folds[i] for i in range(5) if i != number])
      parts = [[rows[i] for i in part] for part in (others[50:], others[:50], fold)]
      train, held_out, (texts, labels) = map(machine_text.labelled_texts, parts)
      scores, is_machine = fit_tfidf(train, held_out).scores(texts), np.array(labels) == 1
      areas.append(roc(scores[~is_machine], scores[is_machine]).auc)
  areas = np.reshape(areas, (3, 5))
  print(
    f"TF-IDF, five folds: {areas.mean(1).round(3)}, of folds {areas.min():.3f}-{areas.max():.3f}"
  )
  return {"shuffles": areas.mean(1).tolist(), "folds": areas.ravel().tolist()}


# ---- 3. curves


def train_model(data: pathlib.Path, out: pathlib.Path) -> tuple[GPT2, Tokenizer]:
  """A character model of the first 90 % of Shakespeare; a run that is there is resumed."""
  text, tokenizer = data / "shakespeare/tinyshakespeare.txt", out / "characters.json"
  common = ["tokenize", f"--files={text}", f"--tokenizer={tokenizer}"]
  if not tokenizer.exists():
    first = ["--characters=:90%", "--train_tokenizer=characters", f"--out={out / 'train'}"]
    command(*common, *first)
    command(*common, "--characters=90%:", f"--out={out / 'validation'}")
  knobs = {
    "data.train": out / "train",
    "data.validation": out / "validation",
    "data.tokenizer": tokenizer,
    "model.n_ctx": N_CTX,
    "steps": _STEPS.value,
  }
  flags_of_knobs = [f"--config.{name}={value}" for name, value in knobs.items()]
  command("train", "--config=shakespeare", f"--workdir={out / 'run'}", *flags_of_knobs)
  mesh = make_mesh(1, 1, 1, jax.devices()[:1])
  return load_pretrained(str(out / "run"), mesh)


def command(*arguments: str) -> None:
  words = [sys.executable, "-m", "gpt2_jax", *arguments]
  environment = os.environ | {"PYTHONPATH": str(ROOT)}
  subprocess.run(words, check=True, env=environment, cwd=ROOT)


def write_documents(model: GPT2, tokenizer: Tokenizer, human: list[str]) -> dict[str, list[str]]:
  """By sampler, a document after the beginning of each human one."""
  decoder = for_inference(model)
  prompts = [tokenizer.encode(text[:PROMPT]) for text in human]
  written = {}
  for name, sampler in SAMPLERS.items():
    begin = time.perf_counter()
    generation = Generation(DOCUMENT - PROMPT, sampler, window=SlidingWindow(N_CTX // 2))
    completions = generate(decoder, prompts, generation=generation)
    written[name] = [
      tokenizer.decode([*prompt, *completion.tokens])
      for prompt, completion in zip(prompts, completions, strict=True)
    ]
    print(f"{name}: {time.perf_counter() - begin:.0f} s; {written[name][0][:120]!r}")
  return written


def prefix(statistics: Statistics, length: int) -> Statistics:
  """The statistics of the first `length` tokens, the first of which has none."""
  names = ("nats", "rank", "entropy", "mean", "variance")
  return Statistics(*(getattr(statistics, name)[: length - 1] for name in names))


def accuracy(human_N: np.ndarray, machine_N: np.ndarray) -> float:
  """The share of right verdicts, each half's by the threshold that is best on the other half."""
  right = []
  is_even = np.arange(len(human_N)) % 2 == 0
  for half in (is_even, ~is_even):
    curve = roc(human_N[~half], machine_N[~half])
    best = np.argmax(curve.true_positive_rate - curve.false_positive_rate)
    threshold = curve.thresholds[best]
    right += [*(human_N[half] < threshold), *(machine_N[half] >= threshold)]
  return 100 * float(np.mean(right))


def curves(data: pathlib.Path, out: pathlib.Path) -> dict:
  """Accuracy by length, for what was drawn from the model itself, and areas by sampler."""
  # 1. Texts, which are kept: the last 10 % of characters, of which the model has learned nothing.
  model, tokenizer = train_model(data, out)
  text = (data / "shakespeare/tinyshakespeare.txt").read_text()
  held_out = text[len(text) * 9 // 10 :]
  human = [held_out[i * DOCUMENT : (i + 1) * DOCUMENT] for i in range(_TEXTS.value)]
  path = out / "texts.json"
  if not path.exists():
    path.write_text(json.dumps({"human": human} | write_documents(model, tokenizer, human)))
  texts = json.loads(path.read_text())

  # 2. Statistics of all of them, in one pass.
  scorer = Scorer(model, tokenizer, batch_size=32)
  answers = {}
  for kind, of_kind in texts.items():
    answers[kind] = scorer.answers([TokenStatistics(text) for text in of_kind])

  def scores(kind: str, criterion: str, length: int) -> np.ndarray:
    return np.array([CRITERIA[criterion](prefix(answer, length)) for answer in answers[kind]])

  # 3. By length.
  by_length = {}
  for criterion in ONE_MODEL:
    of_criterion = {}
    for length in LENGTHS:
      pair = scores("human", criterion, length), scores(PURE, criterion, length)
      of_criterion[length] = {"accuracy": accuracy(*pair)} | by_document(*pair)
      print(
        f"{criterion:15} {length:5} {of_criterion[length]['accuracy']:.1f} %, "
        f"{shown(of_criterion[length])}"
      )
    by_length[criterion] = of_criterion

  # 4. By sampler, texts of 200 tokens, as XSum's are.
  by_sampler = {}
  for criterion in ONE_MODEL:
    human_N = scores("human", criterion, 200)
    of_criterion = {}
    for name in SAMPLERS:
      of_criterion[name] = by_document(human_N, scores(name, criterion, 200))
      print(f"{criterion:15} {name:16} {shown(of_criterion[name])}")
    by_sampler[criterion] = of_criterion
  draw(by_length, by_sampler, out)
  return {"by_length": by_length, "by_sampler": by_sampler}


def draw(by_length: dict, by_sampler: dict, out: pathlib.Path) -> None:
  figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4), layout="constrained")
  for number, (criterion, of_criterion) in enumerate(by_length.items()):
    values = [of_criterion[length]["accuracy"] for length in LENGTHS]
    left.plot(LENGTHS, values, marker="o", markersize=3, label=criterion, color=f"C{number}")
  left.axhline(50, linestyle=":", color="gray")
  left.set(xscale="log", xlabel="tokens", ylabel="right verdicts (%)", title="Pure sampling")
  left.set_xticks(LENGTHS, [str(length) for length in LENGTHS])
  left.minorticks_off()
  left.legend(fontsize=8)

  for number, of_criterion in enumerate(by_sampler.values()):
    areas = [of_criterion[name]["auc"] for name in SAMPLERS]
    values = np.array([area.value for area in areas])
    ends = np.abs(np.array([[area.low, area.high] for area in areas]).T - values)
    places = np.arange(len(areas)) + 0.12 * (number - 2.5)
    right.errorbar(places, values, ends, fmt="o", markersize=4, color=f"C{number}", capsize=2)
  right.axhline(0.5, linestyle=":", color="gray")
  right.set(ylabel="area under the ROC", title="200 tokens, 95 % intervals by document")
  right.set_xticks(range(len(SAMPLERS)), [name.replace(" ", "\n") for name in SAMPLERS])
  figure.savefig(out / "detection.png", dpi=100)


# ---- 4. speed


def speed(out: pathlib.Path) -> dict:
  """Tokens/s of the statistics and of plain scoring, alternating: medians, and the ratio's ends."""
  mesh = make_mesh(1, 1, 1, jax.devices()[:1])
  model, tokenizer = load_pretrained(str(out / "run"), mesh)
  wide = ModelConfig(n_vocab=50_257, n_ctx=256, n_embd=256, n_head=4, n_layer=4, dtype="float32")
  with jax.set_mesh(mesh):
    models = {"65 tokens": model, "GPT-2's 50,257 tokens": GPT2(wide, jax.random.key(0))}

  results = {}
  text = " ".join(["to be or not to be that is the question"] * 30)
  for name, model in models.items():
    n_ctx = model.config.n_ctx
    scorer = Scorer(model, tokenizer, batch_size=8)
    kinds = {"plain": RollingLoglikelihood, "statistics": TokenStatistics}
    seconds = {kind: [] for kind in kinds}
    for _ in range(10):
      for kind, request in kinds.items():
        requests = [request(text[i : i + n_ctx]) for i in range(32)]
        begin = time.perf_counter()
        scorer.answers(requests)
        seconds[kind].append(time.perf_counter() - begin)

    # The first calls compile.
    rates = {kind: 32 * n_ctx / np.array(of_kind[1:]) for kind, of_kind in seconds.items()}
    ratio = rates["statistics"] / rates["plain"]
    results[name] = {kind: float(np.median(rate)) for kind, rate in rates.items()}
    results[name] |= {"ratio": float(np.median(ratio)), "ends": [ratio.min(), ratio.max()]}
    print(name, results[name])
  return results


def main(_) -> None:
  data, out = pathlib.Path(_DATA.value).absolute(), pathlib.Path(_OUT.value).absolute()
  out.mkdir(parents=True, exist_ok=True)
  results = {}
  for name, run in {
    "published": lambda: published_areas(data),
    "tfidf": lambda: tfidf_areas(data),
    "curves": lambda: curves(data, out),
    "speed": lambda: speed(out),
  }.items():
    results[name] = run()
    # What is done is kept if the rest is not.
    (out / "results.json").write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
  app.run(main)
