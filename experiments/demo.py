# SPDX-License-Identifier: Apache-2.0
"""Trains from text to samples on one small machine: tokenizer, token store, training, loss curve.

COMMAND   make demo   (or: python experiments/demo.py)
HARDWARE  two CPU cores, five minutes at most

Every step is one of the commands of a real run; they are printed, ready to copy. The same command
goes on where it was broken off.
"""

import json
import os
import pathlib
import shlex
import shutil
import subprocess
import sys
import sysconfig
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent
OUT = "runs/demo"
PYTHON = sys.executable.removeprefix(f"{ROOT}/")  # as the printed commands name it

# The text: Python's own standard library, which is on every machine that runs this.
STDLIB = pathlib.Path(sysconfig.get_path("stdlib"))
FOLDERS = "asyncio collections concurrent ctypes curses dbm email encodings html http".split()
FOLDERS += "importlib json logging multiprocessing re sqlite3 tomllib unittest urllib".split()
FOLDERS += "wsgiref xml xmlrpc zoneinfo".split()

# The validation loss to expect, in nats a token, by the length of the run. It depends on the
# machine's Python version, whose library is the text.
EXPECTED = {"long": 2.5, "short": 3.7}

# The long run is taken where its steps need at most as many seconds: the rest of the demo, from the
# tokenizer to the samples, takes less than two minutes on slow cores.
SECONDS_OF_STEPS = 200


def command(*arguments: str) -> None:
  """Prints a command and runs it; exits with its status if it failed."""
  print(f"\n$ {shlex.join([PYTHON, *arguments])}", flush=True)
  status = subprocess.run([sys.executable, *arguments], cwd=ROOT).returncode
  if status:
    sys.exit(status)


def copy_text(folder: pathlib.Path) -> None:
  """Copies the text into `folder`, 9 MB of Python, so that one short pattern names it."""
  for path in sorted(STDLIB.glob("*.py")):
    shutil.copy2(path, folder)
  for path in sorted(STDLIB.glob("*/**/*.py")):
    name = path.relative_to(STDLIB)
    if name.parts[0] in FOLDERS:
      (folder / name).parent.mkdir(parents=True, exist_ok=True)
      shutil.copy2(path, folder / name)


def choose_length(workdir: pathlib.Path) -> str:
  """The length of the run in `workdir`; of a new one, the longer that this machine has time for."""
  from configs.demo import STEPS

  # 1. A run that was broken off goes on as it began: its config says how.
  config_file = workdir / "train_config.json"
  if config_file.is_file():
    steps = json.loads(config_file.read_text()).get("steps")
    for length in STEPS:
      if STEPS[length] == steps:
        return length

  # 2. Time ten steps.
  print("\ntiming ten steps on this machine, half a minute at most", flush=True)
  seconds = seconds_of_ten_steps()
  length = "long" if seconds * STEPS["long"] / 10 <= SECONDS_OF_STEPS else "short"
  print(
    f"ten steps take {seconds:.1f} s: the {length} run, {STEPS[length]} steps, about "
    f"{seconds * STEPS[length] / 600:.0f} min; validation loss to expect: {EXPECTED[length]:.1f}"
  )
  return length


def seconds_of_ten_steps() -> float:
  """Seconds of one call of the demo's train step, which makes ten updates, once it is compiled."""
  import jax
  import jax.numpy as jnp

  from configs import demo
  from gpt2_jax.batch import Batch
  from gpt2_jax.loss import NextToken
  from gpt2_jax.model import ModelConfig
  from gpt2_jax.sharding import make_mesh
  from gpt2_jax.train import make_step

  config = demo.get_config("long")
  with jax.set_mesh(make_mesh(**config.mesh)):
    init, step = make_step(config, ModelConfig(**config.model))
    state = jax.jit(init)(jax.random.key(0))
    shape = (config.steps_per_call, config.batch_size, config.model.n_ctx + 1)
    batches, signals = Batch(jnp.zeros(shape, jnp.int32)), jnp.zeros(1, jnp.int32)

    # The first call compiles.
    for _ in range(2):
      begin = time.perf_counter()
      state, metrics, _ = step(state, batches, NextToken(), signals)
      jax.block_until_ready((state, metrics))
  return time.perf_counter() - begin


def main() -> None:
  # On the CPU, whatever else is there; and no backend says that it looked for its chip in vain.
  os.environ.setdefault("JAX_PLATFORMS", "cpu")
  sys.path.insert(0, str(ROOT))
  workdir = ROOT / OUT
  begin = time.monotonic()

  # 1. Train a tokenizer, and tokenize: 95 % for training, the rest for validation.
  (workdir / "text").mkdir(parents=True, exist_ok=True)
  (workdir / "data").mkdir(exist_ok=True)
  copy_text(workdir / "text")
  tokenizer = f"--tokenizer={OUT}/data/python.model"
  corpus = (f"--files={OUT}/text/**/*.py", f"--data_dir={OUT}/data/tfds", tokenizer)
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
  length = choose_length(workdir)
  command("launch/train.py", f"--config=configs/demo.py:{length}", f"--workdir={OUT}")

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
    f"\nDone in {(time.monotonic() - begin) / 60:.1f} minutes. The loss curve: {OUT}/loss.png; "
    f"the numbers: {OUT}/metrics.jsonl"
  )


if __name__ == "__main__":
  main()
