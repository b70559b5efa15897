# SPDX-License-Identifier: Apache-2.0
"""Is this checkout slower than another one? The CPU bench of both, taking turns.

COMMAND   git worktree add /tmp/before v1 && python experiments/regression.py --before=/tmp/before
              all rows; --only=train takes those with "train" in their name
HARDWARE  the machine at hand; a quarter of an hour on two cores
EXPECT    a ratio near 1; README.md, "Speed on the CPU"

Each side of a row is a process of its own that imports its own checkout's package. The two take
turns, so whatever else the machine does hits both. Weights are random. Exits with 1 if the median
ratio of a row is below --least.
"""

import dataclasses
import functools
import os
import pathlib
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

if __name__ == "__main__":
  # The checkout of the side that this process is, in place of experiments/.
  here = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
  sys.path[0] = os.environ.get("REGRESSION_CHECKOUT", here)
  os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import numpy as np
import optax
from absl import flags

from configs import gpt2, shakespeare
from gpt2_jax.batch import Batch
from gpt2_jax.cli import shell
from gpt2_jax.decoding import for_inference, generate
from gpt2_jax.files import local_path
from gpt2_jax.loss import NextToken
from gpt2_jax.model import GPT2, ModelConfig
from gpt2_jax.optimizer import adamw
from gpt2_jax.quantization import quantize
from gpt2_jax.sharding import make_mesh
from gpt2_jax.train import init_state, scan_steps

HERE = pathlib.Path(__file__).resolve().parent.parent
PROMPT, N_NEW = 32, 64
ADAMW = {"b1": 0.9, "b2": 0.95, "weight_decay": 0.1, "clip_norm": 1.0}
CALLS = 2  # of a turn: the first is not timed, for a side runs slower just after another one


@dataclasses.dataclass(frozen=True)
class Training:
  """Training steps of a shape: 124M's, or with `is_tiny` that of configs/shakespeare.py."""

  name: str
  batch: int
  context: int
  dtype: str
  is_tiny: bool = False

  def make_call(self) -> tuple[Callable[[], None], int]:
    """A call of the compiled step, and its tokens."""
    # 1. The config as it is shipped; layers are unrolled, as `make bench` has them.
    config = shakespeare.get_config() if self.is_tiny else gpt2.get_config("117M")
    sizes = {"n_ctx": self.context, "dtype": self.dtype, "unroll": config.model.n_layer}
    config.model.update(sizes)
    model_config = ModelConfig(**config.model)

    # 2. The state, and the batches of one call.
    optimizer = adamw(optax.constant_schedule(config.learning_rate), **ADAMW)
    init = functools.partial(init_state, model_config=model_config, optimizer=optimizer)
    state = jax.jit(init)(jax.random.key(0))
    step = jax.jit(functools.partial(scan_steps, optimizer=optimizer), donate_argnums=0)
    shape = (config.steps_per_call, self.batch, self.context + 1)
    tokens_SBT = np.random.default_rng(0).integers(0, config.model.n_vocab, shape, np.int32)

    def call():
      nonlocal state
      state, metrics = step(state, Batch(tokens_SBT), NextToken())
      jax.block_until_ready((state, metrics))

    return call, config.steps_per_call * self.batch * self.context


@dataclasses.dataclass(frozen=True)
class Generation:
  """Greedy decoding at 124M."""

  name: str
  batch: int
  dtype: str  # of the weights

  def make_call(self) -> tuple[Callable[[], None], int]:
    """A call of `generate`, and the tokens that it makes."""
    dtype = "bfloat16" if self.dtype == "bfloat16" else "float32"
    config = ModelConfig(**dict(gpt2.get_config("117M").model) | {"dtype": dtype})
    model = jax.jit(GPT2, static_argnums=0)(config, jax.random.key(0))
    model = for_inference(quantize(model) if self.dtype == "int8" else model)
    shape = (self.batch, PROMPT)
    prompts = np.random.default_rng(0).integers(0, config.n_vocab, shape).tolist()
    return functools.partial(generate, model, prompts, N_NEW), self.batch * N_NEW


ROWS = (
  Training("train 124M 1 x 1024 float32", 1, 1024, "float32"),
  Training("train 124M 4 x 256 float32", 4, 256, "float32"),
  Training("train 124M 1 x 1024 bfloat16", 1, 1024, "bfloat16"),
  Training("train 124M 4 x 256 bfloat16", 4, 256, "bfloat16"),
  Training("train tiny 12 x 64 float32", 12, 64, "float32", is_tiny=True),
  Generation("generate 124M batch 1 float32", 1, "float32"),
  Generation("generate 124M batch 8 float32", 8, "float32"),
  Generation("generate 124M batch 1 bfloat16", 1, "bfloat16"),
  Generation("generate 124M batch 8 bfloat16", 8, "bfloat16"),
  Generation("generate 124M batch 1 int8", 1, "int8"),
)

_BEFORE = flags.DEFINE_string("before", None, "A checkout to compare this one with.")
_ONLY = flags.DEFINE_string("only", "", "Rows whose name has this in it.")
_ROUNDS = flags.DEFINE_integer("rounds", 5, "Turns of each side.", lower_bound=1)
_LEAST = flags.DEFINE_float("least", 0.97, "The least median ratio of a row that is no regression.")
_SIDE = flags.DEFINE_string("side", None, "The row that this process computes (set by the script).")


class Side:
  """A process that computes a row with one checkout's package, a turn for each line it gets."""

  def __init__(self, checkout: pathlib.Path, row: str):
    tunables = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
    environment = os.environ | tunables | {"REGRESSION_CHECKOUT": str(checkout)}
    self.process = subprocess.Popen(
      [sys.executable, __file__, f"--side={row}"],
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      text=True,
      env=environment,
    )
    self.turn()  # compiles

  def turn(self) -> float:
    """Tokens/s of a turn."""
    self.process.stdin.write("\n")
    self.process.stdin.flush()
    answer = self.process.stdout.readline()
    if not answer:
      raise RuntimeError(f"the process of a side ended with {self.process.wait()}, see above")
    return float(answer)

  def close(self) -> None:
    self.process.stdin.close()
    self.process.wait()


def serve(name: str) -> None:
  """The process of a side: for each line of stdin it runs a turn and prints tokens/s."""
  row = next(row for row in ROWS if row.name == name)
  with jax.set_mesh(make_mesh(1, 1, 1)):
    call, tokens = row.make_call()
    for _ in sys.stdin:
      for _ in range(CALLS):
        begin = time.perf_counter()
        call()
      print(tokens / (time.perf_counter() - begin), flush=True)


def compare(row, before: pathlib.Path) -> list[float]:
  """Ratios of this checkout's tokens/s over the other's, a round each; prints a line."""
  sides = [Side(before, row.name), Side(HERE, row.name)]
  rates = ([], [])
  for number in range(_ROUNDS.value):
    # Each round in the other order: whatever drifts hits both.
    for side in (0, 1) if number % 2 == 0 else (1, 0):
      rates[side].append(sides[side].turn())
  for side in sides:
    side.close()

  ratios = [after / earlier for earlier, after in zip(*rates, strict=True)]
  medians = [f"{statistics.median(values):>10,.0f}" for values in rates]
  spread = f"{min(ratios):.2f}-{max(ratios):.2f}"
  print(f"{row.name:<32}{''.join(medians)}{statistics.median(ratios):>8.2f}  {spread}", flush=True)
  return ratios


def main() -> None:
  if _SIDE.value:
    serve(_SIDE.value)
    return
  if _BEFORE.value is None:
    raise ValueError("--before is a checkout to compare with, such as /tmp/before; see --help")
  before = local_path(_BEFORE.value)
  if not (before / "gpt2_jax" / "model.py").is_file():
    raise FileNotFoundError(f"{before} is no checkout of this project; git worktree add makes one")
  rows = [row for row in ROWS if _ONLY.value in row.name]
  if not rows:
    raise ValueError(f"--only={_ONLY.value} is in no row; there are {len(ROWS)}, see --help")

  print(f"{'tokens/s, median of rounds':<32}{'before':>10}{'this':>10}{'ratio':>8}  min-max")
  slower = []
  for row in rows:
    if statistics.median(compare(row, before)) < _LEAST.value:
      slower.append(row.name)
  if slower:
    print(f"slower than {_LEAST.value} of before: {', '.join(slower)}")
    sys.exit(1)


if __name__ == "__main__":
  shell.run(main, __doc__)
