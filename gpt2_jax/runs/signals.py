# SPDX-License-Identifier: Apache-2.0
"""Preemption and Ctrl-C: SIGTERM or SIGINT on any process stops the run after a saved step."""

import os
import signal

import jax
from jax.sharding import Mesh

import gpt2_jax.distributed as distributed


class StopSignal:
  """SIGTERM or SIGINT, to any process, asks for an end: the step is finished and saved.

  A second one ends the process at once. Use it as a context.
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
    self.before = {}
    for number in (signal.SIGTERM, signal.SIGINT):
      self.before[number] = signal.signal(number, self._receive)
    return self

  def _receive(self, number, frame):
    if self.number:
      os._exit(128 + number)
    os.write(2, b"\nfinishing the step, then saving; a second signal ends at once\n")
    self.number = number

  def __exit__(self, *_):
    for number, handler in self.before.items():
      signal.signal(number, handler)
