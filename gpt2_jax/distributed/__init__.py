# SPDX-License-Identifier: Apache-2.0
"""Runs on many processes: rendezvous, all-gather and broadcast of JSON, barrier, a common exit.

Process 0 keeps one TCP connection to every other process, on the port after the coordinator's. A
process that dies, on whatever line, closes its connection. A machine that vanishes stops
acknowledging. The kernel sees both without any heartbeat of Python's, so a long compilation is
never taken for death. Process 0 then tells the others whom they lost. Each ends with that one line
and exit status 75, and does not wait in a collective for ever.

A process alone needs none of this: `all_gather_json` gives back what it got, `barrier` does
nothing.
"""

import contextlib
import os
import socket
import sys
import threading
import time

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from gpt2_jax.distributed import rendezvous
from gpt2_jax.distributed.process import Process, find_process
from gpt2_jax.distributed.process_group import (
  BARRIER_TIMEOUT,
  EXIT_RETRY,
  GRACE_PERIOD,
  HEARTBEAT_TIMEOUT,
  ProcessGroup,
  write_error,
)
from gpt2_jax.files import announce_if, first_line

__all__ = [
  "EXIT_RETRY",
  "Process",
  "SignalFlag",
  "all_gather_json",
  "alone",
  "barrier",
  "block_until_ready",
  "broadcast",
  "check_same",
  "exit",
  "find_process",
  "initialize",
  "is_primary",
]

_group: ProcessGroup | None = None


@contextlib.contextmanager
def initialize(process_info: Process | None, seconds: int = 300):
  """Initializes the process group, then JAX: all processes must arrive within `seconds`.

  An error in this process ends the others, with its line. At the end all leave together. Does
  nothing for a process alone (None).
  """
  global _group
  if process_info is None:
    yield
    return

  # 1. Meet. Who is missing may come at the next try, hence the status.
  try:
    group = _group = rendezvous.rendezvous(process_info, seconds)
  except TimeoutError as error:
    write_error(str(error))
    sys.exit(EXIT_RETRY)
  group.start()
  announce_if(process_info.process_index == 0)

  # 2. Run, and leave together: JAX's shutdown would wait for those who are late.
  try:
    _initialize_jax(process_info, seconds)
    yield
    group.all_gather("the end", None, BARRIER_TIMEOUT)
    jax.distributed.shutdown()
    group.say_goodbye()
  except BaseException as error:
    # If another process died, this error came of it, and the group's thread has the better line:
    # give it the time to see that.
    time.sleep(2)
    group.fail(first_line(error))
    raise


def _initialize_jax(process_info: Process, seconds: int):
  # JAX's preemption service would take SIGTERM, which the training loop handles itself: it
  # finishes the step and saves.
  jax.config.update("jax_enable_preemption_service", False)

  address = process_info.coordinator
  if process_info.process_index > 0:
    address = f"127.0.0.1:{relay(process_info.host, process_info.port)}"
  try:
    jax.distributed.initialize(
      address,
      process_info.process_count,
      process_info.process_index,
      cluster_detection_method="deactivate",
      initialization_timeout=seconds,
      # the group sees a death earlier, and says it in one line
      heartbeat_timeout_seconds=3 * HEARTBEAT_TIMEOUT,
      shutdown_timeout_seconds=30,
    )
  except RuntimeError as error:
    raise OSError(
      f"JAX could not start at {process_info.coordinator}: {first_line(error)}; is the port in use?"
    ) from error


def relay(host: str, port: int) -> int:
  """Relays a local port, which it returns, to host:port; it stays open when that side ends.

  JAX's client aborts its process, with a stack trace, in the millisecond in which it sees the
  coordinator's connection close. Behind the relay it does not see that. The process group then has
  the time to say who is gone.
  """
  server = socket.create_server(("127.0.0.1", 0))

  def pump(source: socket.socket, sink: socket.socket):
    # a reset of the connection is an end like any other
    with contextlib.suppress(OSError):
      while data := source.recv(1 << 16):
        sink.sendall(data)

  def connect() -> socket.socket:
    # process 0 opens the port a little later than we come
    while True:
      with contextlib.suppress(OSError):
        return socket.create_connection((host, port))
      time.sleep(0.1)

  def carry(near: socket.socket):
    far = connect()
    threading.Thread(target=pump, args=(far, near), daemon=True).start()
    pump(near, far)

    # `near` is left open: this is what the relay is for.
    far.close()

  def serve():
    while True:
      near, _ = server.accept()
      threading.Thread(target=carry, args=(near,), daemon=True).start()

  threading.Thread(target=serve, daemon=True).start()
  return server.getsockname()[1]


@contextlib.contextmanager
def alone():
  """Each process for itself: in the context nobody is waited for, and everyone is primary.

  Processes may then load models and write files of their own at different times. The group still
  sees a death, and ends all.
  """
  global _group
  group, _group = _group, None
  try:
    yield
  finally:
    _group = group


def all_gather_json(what: str, value, seconds: float = BARRIER_TIMEOUT) -> list:
  """All-gathers `value` (as JSON has it) from every process, by rank.

  All must call it, on the main thread. If one does not arrive within `seconds`, the run ends, and
  the line says which one did not come to `what`.
  """
  if _group is None:
    return [value]
  return _group.all_gather(what, value, seconds)


def is_primary() -> bool:
  """Whether this is the primary process, process 0 (rank 0), which writes for all."""
  return _group is None or _group.process_index == 0


def broadcast(what: str, value):
  """Broadcasts process 0's `value` (as JSON has it) to every process."""
  return all_gather_json(what, value if is_primary() else None)[0]


def barrier(what: str, seconds: float = BARRIER_TIMEOUT):
  """Barrier: waits until every process is here; names those that are not within `seconds`."""
  all_gather_json(what, None, seconds)


def check_same(what: str, facts: dict):
  """Checks that every process has the same `facts`.

  Raises ValueError, on every process alike, with the first difference between process 0's and
  another's.
  """
  first, *others = all_gather_json(what, facts)
  for process, other in enumerate(others, 1):
    if different := rendezvous.difference(first, other):
      raise ValueError(
        f"{_group.name_of(process)} was started with another {what}: {different}; give all the same"
      )


def exit(status: int):
  """Exits the process; process 0 of several waits for the others to exit first."""
  if _group is None:
    sys.exit(status)
  _group.wait_for_others(2 * GRACE_PERIOD)

  # Past JAX's own way out, which waits in a collective shutdown for processes that are gone.
  sys.stdout.flush()
  sys.stderr.flush()
  os._exit(status)


class SignalFlag:
  """A SIGTERM (preemption) on any process, seen by all: an all-reduce (max) inside the train step.

  Each process puts its number into its part of an array, and the step returns the largest, a result
  like the loss. So all processes stop at the same step, without a collective of their own.
  """

  def __init__(self, mesh: Mesh):
    self.sharding = NamedSharding(mesh, P(mesh.axis_names))
    self.arrays: dict[int, jax.Array] = {}

  def array(self, value: int) -> jax.Array:
    """This process's `value` in its part of an int32 array [devices]."""
    if value not in self.arrays:
      shape = (self.sharding.mesh.size,)
      self.arrays[value] = jax.make_array_from_callback(
        shape, self.sharding, lambda _: np.full(1, value, np.int32)
      )
    return self.arrays[value]


def block_until_ready(arrays):
  """Blocks until `arrays` are computed, on several CPU devices only; returns them.

  Two programs under way there can wait for each other for ever: gloo tells collectives apart by
  their order, and simulated devices share few threads.
  """
  if jax.device_count() > 1 and jax.default_backend() == "cpu":
    jax.block_until_ready(arrays)
  return arrays
