# SPDX-License-Identifier: Apache-2.0
"""What a run tells: metrics.jsonl and TensorBoard on process 0, one live line, throughput and MFU."""

import json
import math
import os
import pathlib
import sys
import time

import jax
from ml_collections import ConfigDict
from tensorboardX import SummaryWriter
from tqdm import tqdm

from gpt2_jax.chips import peak_flops
from gpt2_jax.model import ModelConfig


def flops_per_token(config: ModelConfig) -> int:
  """Training FLOPs of one token, 6 N + 12 L T D: PaLM (Chowdhery et al. 2022), appendix B.

  N counts the matrices that multiply (head included, wpe not); recomputation and the causal half are not discounted.
  """
  D, L = config.n_embd, config.n_layer
  return 6 * (12 * L * D * D + config.n_vocab * D) + 12 * L * config.n_ctx * D


def mfu(config: ModelConfig, tokens_per_second: float) -> float | None:
  """Model FLOPs utilization of all devices, or None where the device's peak is not known (a CPU)."""
  peak = peak_flops(jax.devices()[0].device_kind)
  return peak and tokens_per_second * flops_per_token(config) / (peak * jax.device_count())


class Metrics:
  """Appends to `workdir`/metrics.jsonl and TensorBoard; does nothing on processes other than 0.

  A run that goes on from checkpoint `step` drops the lines after it: they will be written again, the same.
  """

  def __init__(self, workdir: str, step: int, steps: int):
    self.active = jax.process_index() == 0
    if not self.active:
      return
    self.path = pathlib.Path(workdir) / "metrics.jsonl"
    self._keep(step)
    self.file = self.path.open("a", buffering=1)
    self.board = SummaryWriter(os.path.join(workdir, "tensorboard"), purge_step=step + 1)
    interval = 0.1 if sys.stderr.isatty() else 30.0
    self.bar = tqdm(total=steps, initial=step, unit="step", dynamic_ncols=True, mininterval=interval, smoothing=0.1)

  def _keep(self, step: int):
    """Leaves the whole lines up to `step`; a line that a kill tore off is not whole."""
    kept = []
    for line in self.path.read_text().splitlines() if self.path.exists() else []:
      try:
        if json.loads(line)["step"] <= step:
          kept.append(line + "\n")
      except ValueError:
        continue
    fresh = self.path.with_suffix(".tmp")
    fresh.write_text("".join(kept))
    fresh.replace(self.path)

  def write(self, step: int, **values):
    """One line; numbers that are not finite become null, None is left out."""
    if not self.active:
      return
    values = {name: value for name, value in values.items() if value is not None}
    finite = {k: v if not isinstance(v, float) or math.isfinite(v) else None for k, v in values.items()}
    self.file.write(json.dumps({"step": step} | finite) + "\n")
    for name, value in values.items():
      self.board.add_scalar(name, value, step)

  def show(self, step: int, **values):
    """Moves the live line to `step`."""
    if self.active:
      self.bar.set_postfix({name: f"{value:.4g}" for name, value in values.items() if value is not None}, refresh=False)
      self.bar.update(step - self.bar.n)

  def say(self, text: str):
    """A line of its own, above the live one."""
    if self.active:
      self.bar.write(text, file=sys.stderr)

  def flush(self):
    """All that was written is in the files."""
    if self.active:
      self.board.flush()  # metrics.jsonl is written line by line

  def close(self):
    if self.active:
      self.bar.close()
      self.file.close()
      self.board.close()


class Log:
  """Reads the metrics of calls that are over, writes every `log_every`-th step of them and moves the live line."""

  def __init__(self, metrics: Metrics, config: ConfigDict, model_config: ModelConfig):
    self.metrics, self.config, self.model_config = metrics, config, model_config
    self.mark = None

  def start_clock(self):
    """What comes after is step time; evaluation and saving before it are not."""
    self.mark = time.perf_counter()

  def read(self, last: int, stacked: dict):
    """Waits for the call that ended with step `last`. Raises FloatingPointError after max_skips in a row."""
    stacked = jax.device_get(stacked)
    now, count = time.perf_counter(), len(stacked["loss"])
    step_time = (now - self.mark) / count
    self.mark = now
    tokens_per_second = self.config.batch_size * self.model_config.n_ctx / step_time
    pace = {"tokens_per_second": tokens_per_second, "step_time": step_time}
    pace["mfu"] = mfu(self.model_config, tokens_per_second)
    for i, step in enumerate(range(last - count + 1, last + 1)):
      one = {name: values[i].item() for name, values in stacked.items()}
      if step % self.config.log_every == 0 or one["skips"]:
        self.metrics.write(step, **one, **pace)
      if one["skips"]:
        self.metrics.say(f"step {step}: loss or gradient is not finite, update skipped ({one['skips']} in a row)")
      if one["skips"] >= self.config.max_skips:
        raise FloatingPointError(
          f"step {step}: {one['skips']} updates in a row were not finite (max_skips); the last checkpoint is good: "
          f"lower --config.learning_rate in a new --workdir, or look at the data of these steps"
        )
    self.metrics.show(last, loss=stacked["loss"][-1], **{"tok/s": tokens_per_second, "mfu": pace["mfu"]})


class Profile:
  """A JAX trace of `count` steps under `workdir`/profile, from the third call on, when all is compiled."""

  def __init__(self, workdir: str, count: int):
    self.path, self.count, self.calls, self.since = os.path.join(workdir, "profile"), count, 0, None

  def before(self, step: int, state):
    """Starts or ends the trace if it is time; to be called before each dispatch."""
    self.calls += 1
    if self.count and self.calls == 3:
      jax.block_until_ready(state)
      jax.profiler.start_trace(self.path)
      self.since = step
    elif self.since is not None and step >= self.since + self.count:
      self.end(state)

  def end(self, state):
    """Ends the trace if one is running."""
    if self.since is not None:
      jax.block_until_ready(state)
      jax.profiler.stop_trace()
      self.count, self.since = 0, None


def plot_losses(workdir: str) -> str:
  """Draws metrics.jsonl, training and validation loss against the step; the path of the PNG."""
  from matplotlib.backends.backend_agg import FigureCanvasAgg
  from matplotlib.figure import Figure

  lines = [json.loads(line) for line in (pathlib.Path(workdir) / "metrics.jsonl").read_text().splitlines()]
  figure = Figure(figsize=(8, 5), layout="constrained")
  axes = figure.add_subplot(xlabel="step", ylabel="loss, nats per token", title=pathlib.Path(workdir).name)
  for name, label, style in (("loss", "training", "-"), ("val_loss", "validation", "o-")):
    points = [(line["step"], line[name]) for line in lines if line.get(name) is not None]
    if points:
      axes.plot(*zip(*points, strict=True), style, label=f"{label}, last {points[-1][1]:.3f}")
  axes.legend()
  axes.grid(alpha=0.3)
  path = os.path.join(workdir, "loss.png")
  FigureCanvasAgg(figure).print_png(path)
  return path
