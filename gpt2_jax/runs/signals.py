# SPDX-License-Identifier: Apache-2.0
"""Preemption and Ctrl-C: SIGTERM or SIGINT on any process stops the run after a saved step."""

import contextlib
import os
import signal
import threading

import jax
from jax.sharding import Mesh

import gpt2_jax.distributed as distributed


class StopSignal:
  """SIGTERM or SIGINT, to any process, asks for an end: the step is finished and saved.

  A second one ends the process at once. Use it as a context, on the main thread.

  Python runs a signal's handler on the main thread, and only once that is back in Python: not while
  XLA compiles, or a read waits for a disk. So a thread of its own hears of signals through a pipe,
  which Python's C code writes to at once.
  """

  def __init__(self, mesh: Mesh):
    self.flag = distributed.SignalFlag(mesh)

  def signals(self) -> jax.Array:
    """The signal that this process received, for the step to bring to all."""
    return self.flag.array(self.number)

  def received(self, largest: jax.Array | None) -> int:
    """The number of the signal, 0 for none.

    It is the same on all processes, as of the step that gave `largest`, so that they stop together.
    """
    if jax.process_count() == 1:
      return self.number
    return 0 if largest is None else int(jax.device_get(largest))

  def __enter__(self):
    self.number = 0
    self.reader, self.writer = os.pipe()
    os.set_blocking(self.writer, False)
    self.thread = threading.Thread(target=self._listen, name="signals", daemon=True)
    self.thread.start()

    # The handlers do nothing: that they are Python's is what makes it write into the pipe.
    self.pipe_before = signal.set_wakeup_fd(self.writer, warn_on_full_buffer=False)
    self.before = {}
    for number in (signal.SIGTERM, signal.SIGINT):
      self.before[number] = signal.signal(number, lambda number, frame: None)
    return self

  def _listen(self):
    """Reads the numbers of signals from the pipe, until its end."""
    while numbers := os.read(self.reader, 1):
      number = numbers[0]
      if number not in (signal.SIGTERM, signal.SIGINT):
        continue
      name = signal.Signals(number).name
      if self.number:
        _tell(f"{name} again: ended at once, the last checkpoint is whole")
        os._exit(128 + number)
      self.number = number
      _tell(
        f"{name}: finishing what is under way (a step, an evaluation, a compilation), then saving; "
        f"a second signal ends at once"
      )

  def __exit__(self, *_):
    for number, handler in self.before.items():
      signal.signal(number, handler)
    signal.set_wakeup_fd(self.pipe_before)
    os.close(self.writer)
    self.thread.join()
    os.close(self.reader)


def _tell(text: str):
  # Past sys.stderr, whose lock the main thread may hold; and whatever stderr is, the signal counts.
  with contextlib.suppress(OSError):
    os.write(2, f"\n{text}\n".encode())


def stop_line(number: int, step: int, is_saved: bool) -> str:
  """What a run says that a signal has stopped at `step`."""
  done = "stopped and saved" if is_saved else "stopped"
  where = "there" if is_saved else "the newest checkpoint"
  return (
    f"{signal.Signals(number).name}: {done} at step {step}; the same command resumes from {where}"
  )
