# SPDX-License-Identifier: Apache-2.0
"""Trains from text to samples on one small machine: tokenizer, token store, training, loss curve.

COMMAND   make demo   (or: python experiments/demo.py)
HARDWARE  two CPU cores, minutes

Every step is one of the commands of a real run; they are printed, ready to copy.
"""

import os
import pathlib
import shlex
import subprocess
import sys
import sysconfig

ROOT = pathlib.Path(__file__).resolve().parent.parent
OUT = "runs/demo"

# The text: Python's own standard library, which is on every machine that runs this.
STDLIB = sysconfig.get_path("stdlib")
FOLDERS = "asyncio collections concurrent ctypes curses dbm email encodings html http".split()
FOLDERS += "importlib json logging multiprocessing re sqlite3 tomllib unittest urllib".split()
FOLDERS += "wsgiref xml xmlrpc zoneinfo".split()
FILES = ",".join([f"{STDLIB}/*.py"] + [f"{STDLIB}/{folder}/**/*.py" for folder in FOLDERS])


def command(*arguments: str) -> None:
  """Prints a command and runs it; exits with its status if it failed."""
  words = []
  for argument in arguments:
    # The list of files is long.
    words.append(shlex.quote(argument if len(argument) < 120 else argument[:100] + "..."))
  print(f"\n$ python {' '.join(words)}", flush=True)

  status = subprocess.run([sys.executable, *arguments], cwd=ROOT).returncode
  if status:
    sys.exit(status)


def main() -> None:
  # 1. Train a tokenizer, and tokenize: 95 % for training, the rest for validation.
  tokenizer = f"--tokenizer={OUT}/data/python.model"
  corpus = (f"--files={FILES}", f"--data_dir={OUT}/data/tfds", tokenizer)
  os.makedirs(ROOT / OUT / "data", exist_ok=True)
  train_tokenizer = ("--train_tokenizer=sentencepiece", "--vocab_size=2048")
  command(
    "launch/tokenize.py",
    *corpus,
    *train_tokenizer,
    "--split=train[:95%]",
    f"--out={OUT}/data/train",
  )
  command("launch/tokenize.py", *corpus, "--split=train[95%:]", f"--out={OUT}/data/validation")

  # 2. Train the model.
  command("launch/train.py", "--config=configs/demo.py", f"--workdir={OUT}")

  # 3. Sample from it.
  command(
    "launch/sample.py",
    f"--model={OUT}",
    "--prompt=def __init__(self",
    "--prompt=class ",
    "--prompt=import ",
    "--n_new=100",
    "--temperature=0.7",
  )
  print(
    f"\nThe loss curve: {OUT}/loss.png. "
    f"Metrics: {OUT}/metrics.jsonl, and tensorboard --logdir {OUT}/tensorboard"
  )


if __name__ == "__main__":
  main()
