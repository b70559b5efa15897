# SPDX-License-Identifier: Apache-2.0
"""Fine-tuning against LoRA on E2E and Shakespeare, and SST-2 against TF-IDF, from one small model.

COMMAND   python experiments/finetune.py --data=data --out=runs/finetune
          or a part of it: --only=e2e, --only=shakespeare, --only=sst2
HARDWARE  two CPU cores, some 40 minutes; the extra [experiments] brings scikit-learn
EXPECT    README.md, "Fine-tuning": the differences with their intervals

Under --data lie the published files: wikitext2/wiki.{valid,test}.tokens, ptb/ptb.{valid,test}.txt
and lambada/lambada_test.jsonl, on which the model is trained first; e2e/{valid,test}.txt of
microsoft/LoRA, shakespeare/tinyshakespeare.txt, sst2/{train,dev}.tsv.

The protocol. Of E2E's validation file nine tenths of the meaning representations train and the rest
validates; the test file tests. Of Shakespeare it is 80, 10 and 10 % of the characters. On each set
each method takes the learning rate with the lowest validation loss, the mean of seeds 100 and 101.
Rates are tried three to a factor of ten, upwards and downwards until the best one has a worse one
on either side. Then it runs with seeds 0 to 4. A seed sets the order of the data, and of LoRA its
first matrices: a pair with one seed sees the same batches. What is compared is the test loss after
the last step. The same command resumes.
"""

import dataclasses
import json
import os
import pathlib
import shlex
import subprocess
import sys

if __name__ == "__main__":
  sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
  os.environ["JAX_PLATFORMS"] = os.environ.get("JAX_PLATFORMS", "cpu")

import jax
import numpy as np
from absl import flags

from experiments.e2e_files import read_pairs, references, to_examples
from gpt2_jax.cli import shell
from gpt2_jax.configs import finetune
from gpt2_jax.data.templates import PLAIN, ExampleEncoder, Message
from gpt2_jax.evaluate.metric import percent
from gpt2_jax.evaluate.sweep.bootstrap import intervals, paired_differences
from gpt2_jax.files import atomic_write, local_path, read_json_object
from gpt2_jax.finetune.classify import Classify, label_log_probs
from gpt2_jax.tokenizer import load_tokenizer

ROOT = pathlib.Path(__file__).resolve().parent.parent

_DATA = flags.DEFINE_string("data", "data", "Folder of the published files, a folder for each set.")
_OUT = flags.DEFINE_string("out", "runs/finetune", "Folder for stores, runs and results.json.")
_ONLY = flags.DEFINE_enum("only", None, ["e2e", "shakespeare", "sst2"], "One part of it.")


def command(*arguments: str) -> None:
  """Prints a command of gpt2-jax and runs it; exits with its status if it failed."""
  print(f"\n$ {shlex.join(['gpt2-jax', *arguments])}", flush=True)
  words = [sys.executable, "-m", "gpt2_jax", *arguments]
  environment = os.environ | {"PYTHONPATH": str(ROOT)}
  status = subprocess.run(words, env=environment).returncode
  if status:
    sys.exit(status)


def write_once(path: pathlib.Path, text: str) -> None:
  """Writes a text file that this experiment derives; one that is there stays."""
  if not path.exists():
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as partial:
      partial.write_text(text)


# Pre-training.


def pretraining_text(data: pathlib.Path) -> str:
  """WikiText-2, PTB and LAMBADA, one after the other, as they were published."""
  parts = []
  for name in ("wiki.valid.tokens", "wiki.test.tokens"):
    parts.append((data / "wikitext2" / name).read_text())
  for name in ("ptb.valid.txt", "ptb.test.txt"):
    parts.append((data / "ptb" / name).read_text())
  for line in (data / "lambada" / "lambada_test.jsonl").read_text().splitlines():
    parts.append(json.loads(line)["text"] + "\n")
  return "".join(parts)


def pretrain(data: pathlib.Path, out: pathlib.Path) -> str:
  """Trains the small model that everything starts from. Returns its workdir."""
  write_once(out / "text" / "pretraining.txt", pretraining_text(data))
  corpus = ["tokenize", f"--files={out}/text/pretraining.txt"]
  tokenizer = f"--tokenizer={out}/words.model"
  train_tokenizer = ["--train_tokenizer=sentencepiece", "--vocab_size=2048"]
  command(
    *corpus, "--characters=:98%", *train_tokenizer, tokenizer, f"--out={out}/pretraining/train"
  )
  command(*corpus, "--characters=98%:", tokenizer, f"--out={out}/pretraining/validation")

  stores = store_knobs(out / "pretraining") + [f"--config.data.tokenizer={out}/words.model"]
  command("train", "--config=gpt2:117M", f"--workdir={out}/base", *PRETRAINING, *stores)
  return f"{out}/base"


def knobs(**values) -> list[str]:
  """Knobs of a config as flags; `model_` in front is the model's."""
  return [f"--config.{name.replace('model_', 'model.', 1)}={x}" for name, x in values.items()]


def store_knobs(folder: pathlib.Path) -> list[str]:
  return [f"--config.data.{name}={folder}/{name}" for name in ("train", "validation")]


SMALL = {"n_vocab": 2048, "n_ctx": 128, "n_embd": 96, "n_head": 4, "n_layer": 2, "unroll": 2}
PRETRAINING = [
  *knobs(**{f"model_{name}": size for name, size in SMALL.items()}, model_dtype="float32"),
  *knobs(steps=1000, batch_size=16, steps_per_call=10, learning_rate=2e-3, warmup_steps=100),
  *knobs(log_every=50, eval_every=250, eval_windows=0, save_every=250, keep=1),
]


# Fine-tuning, all weights and LoRA.

RATES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0)
FIRST_RATE = {"full": 3e-3, "lora": 1e-2}  # where the search begins
SEEDS, SEARCH_SEEDS = range(5), (100, 101)


@dataclasses.dataclass(frozen=True)
class Task:
  """A folder with stores to train, validate and test on, and what a run on them changes."""

  name: str
  folder: pathlib.Path
  knobs: dict


@dataclasses.dataclass(frozen=True)
class Bench:
  """Trains, and keeps the losses of finished runs in a file."""

  base: str
  out: pathlib.Path

  @property
  def results_file(self) -> pathlib.Path:
    return self.out / "results.json"

  def results(self) -> dict:
    return read_json_object(self.results_file) if self.results_file.exists() else {}

  def loss(self, task: Task, trained: str, learning_rate: float, seed: int, split: str) -> float:
    """The loss over a split, nats a scored token, after the last step of a run."""
    name = f"{task.name} {trained} {learning_rate:g} {seed} {split}"
    results = self.results()
    if name not in results:
      state = self.train(task, trained, learning_rate, seed)
      results[name] = split_loss(state.model, task, split)
      with atomic_write(self.results_file, overwrite=True) as partial:
        partial.write_text(json.dumps(results, indent=2) + "\n")
    print(f"{name}: {results[name]:.4f}", flush=True)
    return results[name]

  def train(self, task: Task, trained: str, learning_rate: float, seed: int):
    """The last state of a run; one that was finished is read again."""
    from gpt2_jax import train

    config = finetune.get_config(trained)
    config.init_from = self.base
    config.update(seed=seed, learning_rate=learning_rate, **RECIPE)
    config.model.dtype = "float32"
    config.adapter.update(rank=8, alpha=16.0, targets=("c_attn", "c_proj", "c_fc"))
    config.data.update(train=f"{task.folder}/train", validation=f"{task.folder}/validation")
    config.update_from_flattened_dict(task.knobs)
    workdir = self.out / "runs" / f"{task.name}_{trained}_{learning_rate:g}_{seed}"
    state = train.run(config, str(workdir))
    if int(state.step) < config.steps:
      sys.exit("stopped and saved; the same command resumes")
    return state

  def best_rate(self, task: Task, trained: str) -> float:
    """The learning rate with the lowest validation loss, of seeds that are not compared."""

    def mean_loss(place: int) -> float:
      rate = RATES[place]
      runs = [self.loss(task, trained, rate, seed, "validation") for seed in SEARCH_SEEDS]
      return sum(runs) / len(runs)

    # From the first rate, walk to the better neighbour until both are worse.
    place = RATES.index(FIRST_RATE[trained])
    losses = {place: mean_loss(place)}
    while True:
      for neighbour in (place - 1, place + 1):
        if 0 <= neighbour < len(RATES) and neighbour not in losses:
          losses[neighbour] = mean_loss(neighbour)
      best = min(losses, key=losses.get)
      if best == place:
        return RATES[place]
      place = best


RECIPE = {"steps": 150, "warmup_steps": 15, "batch_size": 16, "steps_per_call": 10}
RECIPE |= {"log_every": 50, "eval_every": 150, "save_every": 150, "keep": 1, "patience": 0}


def split_loss(model, task: Task, split: str) -> float:
  """Nats a scored token of a split; for a classifier the objective's, which has both parts."""
  from gpt2_jax.data.stores import open_store
  from gpt2_jax.loss import NextToken
  from gpt2_jax.runs.validation import validation_loss

  store = open_store(f"{task.folder}/{split}")
  classes = task.knobs.get("classify.classes", 0)
  objective = Classify(classes) if classes else NextToken()
  with jax.set_mesh(model.mesh):
    return validation_loss(model, objective, store, RECIPE["batch_size"], 0)


def compare(bench: Bench, task: Task) -> str:
  """One row of the table: the test losses of both methods, and the difference's interval."""
  rates = {trained: bench.best_rate(task, trained) for trained in FIRST_RATE}
  losses = {}
  for trained in FIRST_RATE:
    runs = [bench.loss(task, trained, rates[trained], seed, "test") for seed in SEEDS]
    losses[trained] = np.array(runs)

  low, high = t_interval(losses["lora"] - losses["full"])
  cells = [task.name]
  for trained in FIRST_RATE:
    spread = f"{losses[trained].min():.4f}-{losses[trained].max():.4f}"
    cells.append(f"{losses[trained].mean():.4f} ({spread}), rate {rates[trained]:g}")
  difference = (losses["lora"] - losses["full"]).mean()
  cells.append(f"{difference:+.4f} ({low:+.4f} to {high:+.4f})")
  return f"| {' | '.join(cells)} |"


def t_interval(differences: np.ndarray) -> tuple[float, float]:
  """Student's 95 % interval of the mean of paired differences."""
  from scipy import stats

  error = differences.std(ddof=1) / np.sqrt(len(differences))
  reach = stats.t.ppf(0.975, len(differences) - 1) * error
  return differences.mean() - reach, differences.mean() + reach


# Data of each task.


def shakespeare(data: pathlib.Path, out: pathlib.Path) -> Task:
  """80, 10 and 10 % of the characters, as plain text."""
  folder = out / "shakespeare"
  slices = {"train": ":80%", "validation": "80%:90%", "test": "90%:"}
  for split, characters in slices.items():
    file = f"--files={data}/shakespeare/tinyshakespeare.txt"
    tokenizer = f"--tokenizer={out}/words.model"
    command("tokenize", file, f"--characters={characters}", tokenizer, f"--out={folder}/{split}")
  return Task("shakespeare", folder, {})


def tokenize_examples(text: str, folder: pathlib.Path, split: str, out: pathlib.Path) -> None:
  """Packs JSON lines into a store of the small model's context."""
  file = folder / f"{split}.jsonl"
  write_once(file, text)
  command(
    "tokenize",
    f"--examples={file}",
    "--template=dialogpt",
    f"--n_ctx={SMALL['n_ctx']}",
    f"--tokenizer={out}/words.model",
    f"--out={folder}/{split}",
  )


def e2e(data: pathlib.Path, out: pathlib.Path) -> Task:
  """No meaning representation is in two splits."""
  pairs = read_pairs(data / "e2e" / "valid.txt")
  inputs = list(references(pairs))
  held_out = set(inputs[::10])
  splits = {
    "train": [pair for pair in pairs if pair[0] not in held_out],
    "validation": [pair for pair in pairs if pair[0] in held_out],
    "test": read_pairs(data / "e2e" / "test.txt"),
  }
  for split, split_pairs in splits.items():
    tokenize_examples(to_examples(split_pairs), out / "e2e", split, out)
  return Task("e2e", out / "e2e", {})


# SST-2.


def read_sst2(path: pathlib.Path) -> tuple[list[str], np.ndarray]:
  """Sentences and labels of a published file."""
  rows = [line.rsplit("\t", 1) for line in path.read_text().splitlines()]
  return [sentence for sentence, _ in rows], np.array([int(label) for _, label in rows])


def tfidf_correct(train, test) -> np.ndarray:
  """Which test sentences a TF-IDF logistic regression gets right, 0 or 1 each.

  Words and pairs of them; the penalty is chosen by five-fold cross-validation on `train`.
  """
  from sklearn.feature_extraction.text import TfidfVectorizer
  from sklearn.linear_model import LogisticRegression
  from sklearn.model_selection import GridSearchCV
  from sklearn.pipeline import make_pipeline

  words = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, token_pattern=r"\S+")
  pipeline = make_pipeline(words, LogisticRegression(max_iter=1000))
  model = GridSearchCV(pipeline, {"logisticregression__C": (0.3, 1, 3, 10, 30)}, cv=5)
  sentences, labels = train
  return (model.fit(sentences, labels).predict(test[0]) == test[1]).astype(float)


def sst2(data: pathlib.Path, out: pathlib.Path, bench: Bench) -> str:
  """Accuracies on the held-out sentences, and the paired difference, with bootstrap intervals."""
  train, test = (read_sst2(data / "sst2" / name) for name in ("train.tsv", "dev.tsv"))
  sentences, labels = train
  is_held_out = np.arange(len(labels)) % 10 == 0
  folder = out / "sst2"
  for split, rows in {"train": ~is_held_out, "validation": is_held_out}.items():
    lines = []
    for index in np.flatnonzero(rows):
      lines.append(json.dumps({"text": sentences[index], "label": int(labels[index])}))
    tokenize_examples("\n".join(lines) + "\n", folder, split, out)

  # 1. The classifier, all weights: five seeds, whose answers are averaged.
  task = Task("sst2", folder, {"classify.classes": 2})
  rate = bench.best_rate(task, "full")
  runs = [classifier_correct(bench.train(task, "full", rate, seed).model, test) for seed in SEEDS]

  # 2. Beside the baseline, sentence by sentence.
  ones = np.ones(len(test[1]))
  ours = {"right": np.mean(runs, 0), "items": ones}
  theirs = {"right": tfidf_correct(train, test), "items": ones}
  accuracy = {"accuracy": percent("right")}
  lines = []
  for name, items in (("GPT-2, five seeds", ours), ("TF-IDF", theirs)):
    interval = intervals(accuracy, items)["accuracy"]
    lines.append(f"{name}: {interval.value:.1f} % ({interval.low:.1f}-{interval.high:.1f})")
  difference = paired_differences(accuracy, ours, theirs)["accuracy"]
  low, high = difference.low, difference.high
  lines.append(f"difference {difference.value:+.1f} ({low:+.1f} to {high:+.1f}), rate {rate:g}")
  return "\n".join(lines)


def classifier_correct(model, test) -> np.ndarray:
  """Which sentences a classifier gets right, 0 or 1 each."""
  sentences, labels = test
  tokenizer = load_tokenizer(str(local_path(_OUT.value) / "words.model"))
  encoder = ExampleEncoder(PLAIN, tokenizer)
  rows = []
  for sentence in sentences:
    ids = encoder.encode((Message(None, sentence),)).ids
    rows.append(ids[: model.config.n_ctx].tolist())
  return (label_log_probs(model, rows).argmax(-1) == labels).astype(float)


def main() -> None:
  data, out = local_path(_DATA.value), local_path(_OUT.value)
  bench = Bench(pretrain(data, out), out)
  parts = [_ONLY.value] if _ONLY.value else ["e2e", "shakespeare", "sst2"]

  results = []
  if "e2e" in parts:
    results.append(compare(bench, e2e(data, out)))
  if "shakespeare" in parts:
    results.append(compare(bench, shakespeare(data, out)))
  if "sst2" in parts:
    results.append(sst2(data, out, bench))
  print("\n".join(results))


if __name__ == "__main__":
  shell.run(main, __doc__)
