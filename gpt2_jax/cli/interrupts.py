# SPDX-License-Identifier: Apache-2.0
"""Ctrl-C (SIGINT): a plain end during the imports, KeyboardInterrupt in main, an end at once if it
comes twice.

Python raises KeyboardInterrupt between two of its own instructions. A compilation of XLA is one
instruction, and may take minutes; so a second Ctrl-C is looked at by a thread.
"""

import contextlib
import math
import os
import signal
import threading
import time
from collections.abc import Iterator

# Seconds that Python has for raising a Ctrl-C before it counts as unanswered.
PATIENCE = 0.2


def end_process() -> None:
  """Lets Ctrl-C end this process without a traceback, until `raise_interrupts`.

  A process that was started with Ctrl-C ignored, in the background of a shell, goes on ignoring it.
  """
  if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@contextlib.contextmanager
def raise_interrupts() -> Iterator[None]:
  """SIGINT raises KeyboardInterrupt while the context lasts; afterwards it ends the process.

  A second one that comes before the first could be raised ends the process with status 130.
  """
  is_main = threading.current_thread() is threading.main_thread()
  if not is_main or signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    yield
    return

  watch = _Watch()
  signal.signal(signal.SIGINT, watch.receive)
  before = signal.set_wakeup_fd(watch.write_end, warn_on_full_buffer=False)
  threading.Thread(target=watch.run, daemon=True).start()
  try:
    yield
  finally:
    signal.set_wakeup_fd(before)
    # A Ctrl-C while the interpreter shuts down would be a traceback.
    signal.signal(signal.SIGINT, signal.SIG_DFL)


class _Watch:
  """A thread that sees each signal as the kernel delivers it, also while Python cannot raise it."""

  def __init__(self):
    self.read_end, self.write_end = os.pipe()
    os.set_blocking(self.write_end, False)
    self.raised_at = -math.inf

    # A forked process has a copy of the pipe's end, and gets the terminal's Ctrl-C, too.
    os.register_at_fork(after_in_child=_forget_pipe)

  def receive(self, number, frame):
    self.raised_at = time.monotonic()
    raise KeyboardInterrupt

  def run(self) -> None:
    unanswered = 0
    while True:
      for number in os.read(self.read_end, 16):
        time.sleep(PATIENCE)

        # Others may have their own handler for a while, as the training loop has. What was raised
        # a moment ago has answered this one, too.
        is_ours = number == signal.SIGINT and signal.getsignal(signal.SIGINT) == self.receive
        if not is_ours or self.raised_at > time.monotonic() - 1:
          unanswered = 0
          continue

        unanswered += 1
        if unanswered > 1:
          os.write(2, b"interrupted\n")
          os._exit(130)
        os.write(2, b"stopping after this compilation or step; Ctrl-C again ends at once\n")


def _forget_pipe() -> None:
  if threading.current_thread() is threading.main_thread():
    signal.set_wakeup_fd(-1)
