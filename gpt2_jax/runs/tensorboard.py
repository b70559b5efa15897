# SPDX-License-Identifier: Apache-2.0
"""TensorBoard's event file of a run: grouped scalars, the two losses in one chart, texts."""

import contextlib
import os
import textwrap
import time
from collections.abc import Callable

from gpt2_jax.files import first_line

# The tag of each number of metrics.jsonl. TensorBoard sorts the groups by their names: losses come
# first.
TAGS = {
  "val_loss": "eval/loss",
  "loss": "train/loss",
  "grad_norm": "update/grad_norm",
  "learning_rate": "update/learning_rate",
  "skipped": "update/skipped",
  "tokens_seen": "update/tokens_seen",
  "mfu": "utilization/mfu",
  "step_time": "utilization/step_time",
  "tokens_per_second": "utilization/tokens_per_second",
}

# What tells runs apart, and what `skipped` has already: for metrics.jsonl only.
NOT_DRAWN = ("batch_hash", "skips")

# The tab "custom scalars" draws both losses in one chart.
LAYOUT = {"loss": {"train and eval": ["Multiline", [TAGS["loss"], TAGS["val_loss"]]]}}


def by_tag(values: dict) -> dict:
  """Numbers by their tags; another sum of the objective belongs to the training loss."""
  tagged = {}
  for name, value in values.items():
    if name not in NOT_DRAWN:
      tagged[TAGS.get(name, f"train/{name}")] = value
  return tagged


class TensorBoard:
  """Writes an event file for TensorBoard, a convenience: at the first error it is given up.

  tensorboardX's SummaryWriter has a thread and a queue. When a full disk ends the thread, the queue
  fills, and who writes waits for ever. So its event file is written here, by the caller's thread.
  """

  FLUSH_SECONDS = 60

  def __init__(self, folder: str, step: int, say: Callable[[str], None]):
    # Imported here because the import sets an environment variable.
    from tensorboardX import event_file_writer, proto, summary

    self.folder = folder
    self.say = say
    self.proto = proto
    self.summary = summary
    self.file = None
    self.flushed = time.monotonic()

    # What an earlier run wrote after `step` is purged. The number of this process keeps the files
    # of two runs that start within one second apart.
    event = proto.event_pb2.Event
    session = event(step=step + 1, wall_time=time.time(), file_version="brain.Event:2")
    session.session_log.status = proto.event_pb2.SessionLog.START
    with self._giving_up():
      os.makedirs(folder, exist_ok=True)
      self.file = event_file_writer.EventsWriter(
        os.path.join(folder, "events"), filename_suffix=f".{os.getpid()}"
      )
      self.file.write_event(session)
    self._write(step, summary.custom_scalars(LAYOUT))
    self.flush()

  @contextlib.contextmanager
  def _giving_up(self):
    try:
      yield
    except OSError as error:
      self.file = None
      self.say(f"TensorBoard in {self.folder} is given up ({first_line(error)}); the run goes on")

  def _write(self, step: int, summary):
    if self.file is not None:
      event = self.proto.event_pb2.Event(step=step, wall_time=time.time(), summary=summary)
      with self._giving_up():
        self.file.write_event(event)

  def write(self, step: int, values: dict):
    """Writes numbers of one step."""
    summary_pb2 = self.proto.summary_pb2
    for tag, value in by_tag(values).items():
      scalar = summary_pb2.Summary.Value(tag=tag, simple_value=value)
      self._write(step, summary_pb2.Summary(value=[scalar]))
    if time.monotonic() > self.flushed + self.FLUSH_SECONDS:
      self.flush()

  def write_text(self, step: int, tag: str, text: str):
    """Writes a text, which is shown as it stands: TensorBoard would take it for Markdown."""
    self._write(step, self.summary.text(tag, textwrap.indent(text, "    ", lambda line: True)))

  def flush(self):
    if self.file is not None:
      self.flushed = time.monotonic()
      with self._giving_up():
        self.file.flush()

  def close(self):
    if self.file is not None:
      with self._giving_up():
        self.file.close()
