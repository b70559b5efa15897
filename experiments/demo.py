# SPDX-License-Identifier: Apache-2.0
"""The whole way on one small machine: text -> tokenizer -> token store -> training -> loss curve -> samples.

COMMAND   make demo   (or: python experiments/demo.py)
HARDWARE  two CPU cores, minutes

Every step is one of the commands a real run uses; they are printed, to be copied.
"""

import os
import pathlib
import shlex
import subprocess
import sys
import sysconfig

ROOT = pathlib.Path(__file__).resolve().parent.parent
STDLIB = sysconfig.get_path("stdlib")
FOLDERS = "asyncio collections concurrent ctypes curses dbm email encodings html http importlib json logging".split()
FOLDERS += "multiprocessing re sqlite3 tomllib unittest urllib wsgiref xml xmlrpc zoneinfo".split()
FILES = ",".join([f"{STDLIB}/*.py"] + [f"{STDLIB}/{folder}/**/*.py" for folder in FOLDERS])
OUT = "runs/demo"


def command(*arguments: str) -> None:
  """Shows a command and runs it; ends with its status if it failed."""
  shown = " ".join(shlex.quote(a if len(a) < 120 else a[:100] + "...") for a in arguments)
  print(f"\n$ python {shown}", flush=True)
  status = subprocess.run([sys.executable, *arguments], cwd=ROOT).returncode
  if status:
    sys.exit(status)


def main() -> None:
  tokenizer = f"--tokenizer={OUT}/data/python.model"
  prepared = (f"--files={FILES}", f"--data_dir={OUT}/data/tfds", tokenizer)
  os.makedirs(ROOT / OUT / "data", exist_ok=True)
  learn = ("--train_tokenizer=sentencepiece", "--vocab_size=2048")
  command("launch/tokenize.py", *prepared, *learn, "--split=train[:95%]", f"--out={OUT}/data/train")
  command("launch/tokenize.py", *prepared, "--split=train[95%:]", f"--out={OUT}/data/validation")
  command("launch/train.py", "--config=configs/demo.py", f"--workdir={OUT}")
  prompts = ("def __init__(self", "class ", "import ")
  command("launch/sample.py", f"--model={OUT}", *(f"--prompt={p}" for p in prompts), "--n_new=100", "--temperature=0.7")
  print(f"\nThe loss curve: {OUT}/loss.png. Metrics: {OUT}/metrics.jsonl, and tensorboard --logdir {OUT}/tensorboard")


if __name__ == "__main__":
  main()
