# SPDX-License-Identifier: Apache-2.0
"""Metrics of a run: metrics.jsonl, its boards, a progress line, throughput, MFU, a loss curve."""

import contextlib
import json
import math
import os
import pathlib
import sys
import time
from collections.abc import Callable, Sequence
from typing import Protocol

import jax
import numpy as np
from ml_collections import ConfigDict
from tqdm import tqdm

import gpt2_jax.distributed as distributed
from gpt2_jax.chips import peak_flops
from gpt2_jax.files import announce, atomic_write, first_line, parse_json_object
from gpt2_jax.model import ModelConfig
from gpt2_jax.runs.tensorboard import TensorBoard


def flops_per_token(config: ModelConfig) -> int:
  """Training FLOPs of one token, 6 N + 12 L T D: PaLM (Chowdhery et al. 2022), appendix B.

  N counts the weights of matmuls: the head is one, the lookups in wte and wpe are none. Neither
  recomputation nor the causal half is discounted.
  """
  D, L = config.n_embd, config.n_layer
  return 6 * (12 * L * D * D + config.n_vocab * D) + 12 * L * config.n_ctx * D


def mfu(config: ModelConfig, tokens_per_second: float) -> float | None:
  """Model FLOPs utilization (MFU) of all devices; None if the device's peak is unknown (a CPU)."""
  peak = peak_flops(jax.devices()[0].device_kind)
  return peak and tokens_per_second * flops_per_token(config) / (peak * jax.device_count())


def read_metrics(path: pathlib.Path) -> tuple[list[tuple[bytes, dict]], list[int]]:
  """Reads a metrics.jsonl: each line as it stands and as an object, and the numbers of damaged
  lines.

  A last line without its end was torn off by a kill: it is neither.
  """
  *rows, _ = path.read_bytes().split(b"\n")
  lines, damaged = [], []
  for number, row in enumerate(rows, 1):
    try:
      line = parse_json_object(row, "a line")
    except ValueError:
      line = {}

    # A bool is an int to Python, and no step.
    if type(line.get("step")) is int:
      lines.append((row + b"\n", line))
    else:
      damaged.append(number)
  return lines, damaged


def _points(lines: list[tuple[bytes, dict]], name: str) -> list[tuple[int, float]]:
  """Step and value of each line that has a finite number under that name."""
  points = []
  for _, line in lines:
    value = line.get(name)
    if isinstance(value, float) and math.isfinite(value):
      points.append((line["step"], value))
  return points


def best_and_last(workdir: str) -> tuple[tuple[int, float], tuple[int, float]] | None:
  """Step and value of the least and of the newest validation loss in metrics.jsonl, if any."""
  lines, _ = read_metrics(pathlib.Path(workdir) / "metrics.jsonl")
  points = _points(lines, "val_loss")
  if not points:
    return None
  return min(points, key=lambda point: point[1]), points[-1]


def evaluations_since_best(workdir: str) -> int:
  """How many evaluations in a row, up to the newest, were no better than one before them."""
  lines, _ = read_metrics(pathlib.Path(workdir) / "metrics.jsonl")
  losses = [value for _, value in _points(lines, "val_loss")]
  return len(losses) - 1 - losses.index(min(losses)) if losses else 0


def damage(path: pathlib.Path, damaged: list[int]) -> str:
  """One line about damaged lines, for a message."""
  return f"{path}: {len(damaged):,} damaged lines are left out, the first is line {damaged[0]:,}"


class Board(Protocol):
  """What shows a run besides metrics.jsonl. None of its errors ends the run."""

  def write(self, step: int, values: dict): ...

  def write_text(self, step: int, tag: str, text: str): ...

  def flush(self): ...

  def close(self): ...


class Metrics:
  """Appends to `workdir`/metrics.jsonl and boards; does nothing on processes other than 0.

  A run that resumes from checkpoint `step` drops the lines after it: they will be written again,
  the same. Raises OSError where metrics.jsonl cannot be written.
  """

  def __init__(self, workdir: str, step: int, steps: int):
    self.active = distributed.is_primary()
    if not self.active:
      return

    # Line-buffered: a kill must not lose what was written.
    self.path = pathlib.Path(workdir) / "metrics.jsonl"
    with self._disk():
      damaged = self._drop_after(step)
      self.file = self.path.open("a", buffering=1)

    # A log file gets a line each half minute, not ten a second.
    interval = 0.1 if sys.stderr.isatty() else 30.0
    self.bar = tqdm(
      total=steps,
      initial=step,
      unit="step",
      dynamic_ncols=True,
      mininterval=interval,
      smoothing=0.1,
    )
    if damaged:
      self.say(damage(self.path, damaged))
    self.boards: list[Board] = [TensorBoard(os.path.join(workdir, "tensorboard"), step, self.say)]

  @contextlib.contextmanager
  def _disk(self):
    try:
      yield
    except OSError as error:
      raise OSError(
        f"{self.path} cannot be written ({first_line(error)}); make room and start again, "
        f"the run resumes from its newest checkpoint"
      ) from error

  def _drop_after(self, step: int) -> list[int]:
    """Keeps the whole lines up to `step`. Returns the numbers of the damaged ones."""
    lines, damaged = read_metrics(self.path) if self.path.exists() else ([], [])
    kept = [row for row, line in lines if line["step"] <= step]
    with atomic_write(self.path, overwrite=True) as partial:
      partial.write_bytes(b"".join(kept))
    return damaged

  def write(self, step: int, **values):
    """Writes one line; None is left out, and numbers that are not finite become null."""
    if not self.active:
      return
    values = {name: value for name, value in values.items() if value is not None}

    # JSON has neither NaN nor infinity; boards draw them.
    line = {"step": step}
    for name, value in values.items():
      is_finite = not isinstance(value, float) or math.isfinite(value)
      line[name] = value if is_finite else None
    with self._disk():
      self.file.write(json.dumps(line) + "\n")
    for board in self.boards:
      board.write(step, values)

  def write_text(self, step: int, tag: str, text: str):
    """Shows a text on the boards; metrics.jsonl holds numbers only."""
    if self.active:
      for board in self.boards:
        board.write_text(step, tag, text)

  def show(self, step: int, **values):
    """Moves the progress line to `step`."""
    if not self.active:
      return
    texts = {name: f"{value:.4g}" for name, value in values.items() if value is not None}
    # A terminal that is gone, or a log file on a full disk, ends no run.
    with contextlib.suppress(OSError):
      self.bar.set_postfix(texts, refresh=False)
      self.bar.update(step - self.bar.n)

  def say(self, text: str):
    """Prints a line of its own, above the progress line."""
    if self.active:
      with contextlib.suppress(OSError):
        self.bar.write(text, file=sys.stderr)

  def flush(self):
    """Flushes the boards; metrics.jsonl is written line by line."""
    if self.active:
      for board in self.boards:
        board.flush()

  def close(self):
    if not self.active:
      return
    with contextlib.suppress(OSError):
      self.bar.close()
    for board in self.boards:
      board.close()
    with self._disk():
      self.file.close()


class Log:
  """Reads the metrics of finished calls, writes every `log_every`-th step, moves the progress line.

  A call is one dispatch of `steps_per_call` steps; their metrics come stacked. `checkpoints` are
  those that a run which diverged can be told to resume from.
  """

  def __init__(self, metrics: Metrics, config: ConfigDict, model_config: ModelConfig, checkpoints):
    self.metrics = metrics
    self.config = config
    self.model_config = model_config
    self.checkpoints = checkpoints
    self.last_time: float | None = None
    self.skips = 0  # updates that were skipped in a row, up to the last step that was read
    self.updates = 0  # that were made since the run started or resumed
    self.is_compiled = False

  def compiling(self) -> contextlib.AbstractContextManager:
    """Announces the first call of the step, which compiles it; does nothing for the others."""
    if self.is_compiled:
      return contextlib.nullcontext()
    self.is_compiled = True
    return announce("compiling the training step, about a minute for a large model")

  def start_clock(self):
    """Starts the step time anew: evaluation and saving, which came before, do not count."""
    self.last_time = time.perf_counter()

  def read(self, last: int, stacked: dict):
    """Waits for the call that ended with step `last`, and logs its steps.

    Raises FloatingPointError after max_skips skipped updates in a row.
    """
    # 1. The step time is that of the whole call: the device runs its steps without the host.
    stacked = jax.device_get(stacked)
    now = time.perf_counter()
    count = len(stacked["loss"])
    step_time = (now - self.last_time) / count
    self.last_time = now
    tokens_per_second = self.config.batch_size * self.model_config.n_ctx / step_time
    throughput = {
      "tokens_per_second": tokens_per_second,
      "step_time": step_time,
      "mfu": mfu(self.model_config, tokens_per_second),
    }

    # 2. Write the steps that are due, and every skipped one, for it explains what follows.
    for i, step in enumerate(range(last - count + 1, last + 1)):
      values = {name: array[i].item() for name, array in stacked.items()}
      skips = self.skips = values["skips"]
      self.updates += not skips
      if step % self.config.log_every == 0 or skips:
        tokens_seen = step * self.config.batch_size * self.model_config.n_ctx
        self.metrics.write(step, **values, **throughput, tokens_seen=tokens_seen)
      if skips:
        self.metrics.say(
          f"step {step}: loss, gradient or update is not finite, update skipped ({skips} in a row)"
        )
      if skips >= self.config.max_skips:
        raise FloatingPointError(
          f"step {step}: {skips} updates in a row were not finite (max_skips); {self.last_good()}; "
          f"lower --config.learning_rate in a new --workdir, or look at the data of these steps"
        )

    # 3. The progress line shows the last of them.
    self.metrics.show(
      last, loss=stacked["loss"][-1], **{"tok/s": tokens_per_second, "mfu": throughput["mfu"]}
    )

  def last_good(self) -> str:
    """The newest checkpoint, for a message: none is ever saved of a state that is broken."""
    steps = self.checkpoints.steps()
    if not steps:
      return "no checkpoint was saved before"
    # Another program may have saved it.
    if not self.updates:
      return (
        f"no update after checkpoint {steps[0]} was finite: move it away to resume from another"
      )
    return f"checkpoint {steps[0]} is good"


class Profile:
  """A JAX profiler trace of `count` steps under `workdir`/profile, from the third call on.

  By then all is compiled. A trace that cannot be written is given up, with one line.
  """

  def __init__(self, workdir: str, count: int, say: Callable[[str], None]):
    self.path = os.path.join(workdir, "profile")
    self.count = count
    self.say = say
    self.calls = 0
    self.first_step: int | None = None  # of the trace under way

  def before(self, step: int, state):
    """Starts or ends the trace if it is time; to be called before each dispatch."""
    self.calls += 1
    if self.count and self.calls == 3:
      # without the steps that were dispatched before
      jax.block_until_ready(state)
      with self._giving_up():
        jax.profiler.start_trace(self.path)
        self.first_step = step
    elif self.first_step is not None and step >= self.first_step + self.count:
      self.end(state)

  def end(self, state):
    """Ends the trace if one is running; there is one a run."""
    if self.first_step is not None:
      self.count = 0
      self.first_step = None
      jax.block_until_ready(state)
      with self._giving_up():
        jax.profiler.stop_trace()

  @contextlib.contextmanager
  def _giving_up(self):
    try:
      yield
    # JAX's profiler raises RuntimeError where it cannot write.
    except (OSError, RuntimeError) as error:
      self.say(f"the trace in {self.path} is given up ({first_line(error)}); the run goes on")


def _running_mean(values: Sequence[float], window: int) -> np.ndarray:
  """The mean of each value and of those before it, `window` in all where there are as many."""
  sums = np.concatenate([[0.0], np.cumsum(values)])
  ends = np.arange(1, len(values) + 1)
  begins = np.maximum(ends - window, 0)
  return (sums[ends] - sums[begins]) / (ends - begins)


def plot_losses(workdir: str) -> str:
  """Plots the loss curve: training and validation loss against the step. Returns the PNG's path.

  Steps whose loss is not finite, and damaged lines, are left out.
  """
  # Figure and canvas, not pyplot: it keeps global state, and looks for a display.
  from matplotlib.backends.backend_agg import FigureCanvasAgg
  from matplotlib.figure import Figure

  folder = pathlib.Path(workdir)
  lines, _ = read_metrics(folder / "metrics.jsonl")

  figure = Figure(figsize=(8, 4.5), dpi=150, layout="constrained")
  axes = figure.add_subplot(xlabel="step", ylabel="loss, nats per token")
  axes.set_title(folder.name, loc="left", fontweight="bold")
  axes.spines[["top", "right"]].set_visible(False)
  axes.grid(alpha=0.25)

  # 1. The training loss, of one batch each, is noisy: pale, with its running mean over it.
  points = _points(lines, "loss")
  if points:
    steps, losses = zip(*points, strict=True)
    window = max(1, len(points) // 30)
    axes.plot(steps, losses, color="tab:blue", alpha=0.3, linewidth=1)
    means = _running_mean(losses, window)
    axes.plot(steps, means, color="tab:blue", label=f"training, last {means[-1]:.3f}")

  # 2. The validation loss. Where it rises while the other falls, the run overfits: the best is
  #    marked.
  points = _points(lines, "val_loss")
  if points:
    label = f"validation, last {points[-1][1]:.3f}"
    axes.plot(*zip(*points, strict=True), "o-", color="tab:orange", markersize=4, label=label)
    step, best = min(points, key=lambda point: point[1])
    style = {"markersize": 10, "markerfacecolor": "none", "markeredgewidth": 1.5}
    label = f"best validation {best:.3f}, step {step:,}"
    axes.plot([step], [best], "o", color="tab:red", label=label, **style)
  if axes.lines:
    axes.legend(frameon=False)

  path = folder / "loss.png"
  with atomic_write(path, overwrite=True) as partial:
    FigureCanvasAgg(figure).print_png(partial)
  return str(path)
