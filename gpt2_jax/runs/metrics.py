# SPDX-License-Identifier: Apache-2.0
"""Metrics of a run: metrics.jsonl, TensorBoard, a progress line, throughput, MFU, a loss curve."""

import json
import math
import os
import pathlib
import sys
import time

import jax
from ml_collections import ConfigDict
from tqdm import tqdm

from gpt2_jax.chips import peak_flops
from gpt2_jax.files import atomic_write
from gpt2_jax.model import ModelConfig


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


class Metrics:
  """Appends to `workdir`/metrics.jsonl and TensorBoard; does nothing on processes other than 0.

  A run that resumes from checkpoint `step` drops the lines after it: they will be written again,
  the same.
  """

  def __init__(self, workdir: str, step: int, steps: int):
    self.active = jax.process_index() == 0
    if not self.active:
      return

    # Line-buffered: a kill must not lose what was written.
    self.path = pathlib.Path(workdir) / "metrics.jsonl"
    self._drop_after(step)
    self.file = self.path.open("a", buffering=1)

    # Imported here because the import sets an environment variable.
    from tensorboardX import SummaryWriter

    self.board = SummaryWriter(os.path.join(workdir, "tensorboard"), purge_step=step + 1)

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

  def _drop_after(self, step: int):
    """Keeps the whole lines up to `step`; a line that a kill tore off is not whole."""
    lines = self.path.read_text().splitlines() if self.path.exists() else []
    kept = []
    for line in lines:
      try:
        if json.loads(line)["step"] <= step:
          kept.append(line + "\n")
      except ValueError:
        continue
    with atomic_write(self.path, overwrite=True) as partial:
      partial.write_text("".join(kept))

  def write(self, step: int, **values):
    """Writes one line; None is left out, and numbers that are not finite become null."""
    if not self.active:
      return
    values = {name: value for name, value in values.items() if value is not None}

    # JSON has neither NaN nor infinity; TensorBoard draws them.
    line = {"step": step}
    for name, value in values.items():
      is_finite = not isinstance(value, float) or math.isfinite(value)
      line[name] = value if is_finite else None
    self.file.write(json.dumps(line) + "\n")
    for name, value in values.items():
      self.board.add_scalar(name, value, step)

  def show(self, step: int, **values):
    """Moves the progress line to `step`."""
    if not self.active:
      return
    texts = {name: f"{value:.4g}" for name, value in values.items() if value is not None}
    self.bar.set_postfix(texts, refresh=False)
    self.bar.update(step - self.bar.n)

  def say(self, text: str):
    """Prints a line of its own, above the progress line."""
    if self.active:
      self.bar.write(text, file=sys.stderr)

  def flush(self):
    """Flushes TensorBoard's file; metrics.jsonl is written line by line."""
    if self.active:
      self.board.flush()

  def close(self):
    if self.active:
      self.bar.close()
      self.file.close()
      self.board.close()


class Log:
  """Reads the metrics of finished calls, writes every `log_every`-th step, moves the progress line.

  A call is one dispatch of `steps_per_call` steps; their metrics come stacked.
  """

  def __init__(self, metrics: Metrics, config: ConfigDict, model_config: ModelConfig):
    self.metrics = metrics
    self.config = config
    self.model_config = model_config
    self.last_time: float | None = None

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
      skips = values["skips"]
      if step % self.config.log_every == 0 or skips:
        self.metrics.write(step, **values, **throughput)
      if skips:
        self.metrics.say(
          f"step {step}: loss or gradient is not finite, update skipped ({skips} in a row)"
        )
      if skips >= self.config.max_skips:
        raise FloatingPointError(
          f"step {step}: {skips} updates in a row were not finite (max_skips); the last "
          f"checkpoint is good: lower --config.learning_rate in a new --workdir, or look at the "
          f"data of these steps"
        )

    # 3. The progress line shows the last of them.
    self.metrics.show(
      last, loss=stacked["loss"][-1], **{"tok/s": tokens_per_second, "mfu": throughput["mfu"]}
    )


class Profile:
  """A JAX profiler trace of `count` steps under `workdir`/profile, from the third call on.

  By then all is compiled.
  """

  def __init__(self, workdir: str, count: int):
    self.path = os.path.join(workdir, "profile")
    self.count = count
    self.calls = 0
    self.first_step: int | None = None  # of the trace under way

  def before(self, step: int, state):
    """Starts or ends the trace if it is time; to be called before each dispatch."""
    self.calls += 1
    if self.count and self.calls == 3:
      # without the steps that were dispatched before
      jax.block_until_ready(state)
      jax.profiler.start_trace(self.path)
      self.first_step = step
    elif self.first_step is not None and step >= self.first_step + self.count:
      self.end(state)

  def end(self, state):
    """Ends the trace if one is running; there is one a run."""
    if self.first_step is not None:
      jax.block_until_ready(state)
      jax.profiler.stop_trace()
      self.count = 0
      self.first_step = None


def plot_losses(workdir: str) -> str:
  """Plots the loss curve: training and validation loss against the step. Returns the PNG's path."""
  # Figure and canvas, not pyplot: it keeps global state, and looks for a display.
  from matplotlib.backends.backend_agg import FigureCanvasAgg
  from matplotlib.figure import Figure

  folder = pathlib.Path(workdir)
  lines = list(map(json.loads, (folder / "metrics.jsonl").read_text().splitlines()))

  figure = Figure(figsize=(8, 5), layout="constrained")
  axes = figure.add_subplot(xlabel="step", ylabel="loss, nats per token", title=folder.name)
  for name, label, style in (("loss", "training", "-"), ("val_loss", "validation", "o-")):
    points = [(line["step"], line[name]) for line in lines if line.get(name) is not None]
    if points:
      axes.plot(*zip(*points, strict=True), style, label=f"{label}, last {points[-1][1]:.3f}")
  axes.legend()
  axes.grid(alpha=0.3)

  path = os.path.join(workdir, "loss.png")
  FigureCanvasAgg(figure).print_png(path)
  return path
