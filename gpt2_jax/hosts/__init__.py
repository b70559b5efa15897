# SPDX-License-Identifier: Apache-2.0
"""What a run on many processes needs: they meet, agree, watch each other, and end together.

Process 0 keeps one TCP connection to every other process, on the port after the coordinator's. A process that dies, on
whatever line, closes its connection, and a machine that vanishes stops acknowledging: the kernel sees both without any
heartbeat of Python's, so a long compilation is never taken for death. Process 0 then tells the others whom they lost,
and each ends with that one line and exit status 75 in place of waiting in a collective for ever.

A process alone needs none of this: `gather` gives back what it got, `barrier` does nothing.
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

from gpt2_jax.hosts.crew import GRACE, LOST, PATIENCE, SILENT, Crew, say_error
from gpt2_jax.hosts.meeting import difference, meet
from gpt2_jax.hosts.place import Place, find_place, first_line

__all__ = ["LOST", "Notice", "Place", "barrier", "check_same", "find_place", "from_first", "gather", "is_first"]
__all__ += ["joined", "leave", "settled"]

_crew: Crew | None = None


@contextlib.contextmanager
def joined(place: Place | None, seconds: int = 300):
  """Makes this process one of those of a run, before JAX is used: all must have arrived within `seconds`.

  An error in this process ends the others, with its line. At the end all leave together.
  """
  global _crew
  if place is None:
    yield
    return
  try:
    crew = _crew = meet(place, seconds)
  except TimeoutError as error:
    say_error(str(error))
    sys.exit(LOST)
  crew.start()
  try:
    _initialize(place, seconds)
    yield
    crew.gather("the end", None, PATIENCE)
    jax.distributed.shutdown()
    crew.part()
  except BaseException as error:
    time.sleep(2)  # where another process died, this error came of it, and the crew's thread has the better line
    crew.fail(first_line(error))
    raise


def _initialize(place: Place, seconds: int):
  jax.config.update("jax_enable_preemption_service", False)  # SIGTERM is train.Stop's
  address = f"127.0.0.1:{relay(place.host, place.port)}" if place.process else place.coordinator
  try:
    jax.distributed.initialize(
      address,
      place.processes,
      place.process,
      cluster_detection_method="deactivate",
      initialization_timeout=seconds,
      heartbeat_timeout_seconds=3 * SILENT,  # the crew sees it earlier, and says it in one line
      shutdown_timeout_seconds=30,
    )
  except RuntimeError as error:
    raise OSError(f"JAX could not start at {place.coordinator}: {first_line(error)}; is the port in use?") from error


def relay(host: str, port: int) -> int:
  """A local port that leads to host:port, and stays open when that ends.

  JAX's client aborts its process, with a stack trace, in the millisecond in which it sees the coordinator's connection
  close. Behind the relay it does not see that, and the crew has the time to say who is gone.
  """
  server = socket.create_server(("127.0.0.1", 0))

  def pump(source: socket.socket, sink: socket.socket):
    with contextlib.suppress(OSError):  # a reset is an end
      while data := source.recv(1 << 16):
        sink.sendall(data)

  def carry(near: socket.socket):
    while True:
      with contextlib.suppress(OSError):  # process 0 opens the port a little later than we come
        far = socket.create_connection((host, port))
        break
      time.sleep(0.1)
    threading.Thread(target=pump, args=(far, near), daemon=True).start()
    pump(near, far)
    far.close()

  def serve():
    while True:
      threading.Thread(target=carry, args=(server.accept()[0],), daemon=True).start()

  threading.Thread(target=serve, daemon=True).start()
  return server.getsockname()[1]


def gather(what: str, value, seconds: float = PATIENCE) -> list:
  """Every process's `value` (as JSON has it), in their order; all must call it, on the main thread.

  If one does not arrive within `seconds`, the run ends, and the line says which one did not come to `what`.
  """
  return [value] if _crew is None else _crew.gather(what, value, seconds)


def is_first() -> bool:
  """Whether this is the process that writes for all."""
  return _crew is None or _crew.process == 0


def from_first(what: str, value):
  """Process 0's `value` on every process."""
  return gather(what, value if is_first() else None)[0]


def barrier(what: str, seconds: float = PATIENCE):
  """Waits until every process is here; names those that are not within `seconds`."""
  gather(what, None, seconds)


def check_same(what: str, facts: dict):
  """Raises ValueError, on every process alike, with the first difference between process 0's `facts` and another's."""
  first, *others = gather(what, facts)
  for process, other in enumerate(others, 1):
    if different := difference(first, other):
      raise ValueError(f"{_crew.name_of(process)} was started with another {what}: {different}; give all the same")


def leave(status: int):
  """Ends the process: with the others in mind if there are any, for JAX's own way out waits for them."""
  if _crew is None:
    sys.exit(status)
  _crew.wait_for_others(2 * GRACE)
  sys.stdout.flush()
  sys.stderr.flush()
  os._exit(status)


class Notice:
  """A number that any process may raise, brought to all by the step itself: its largest is a result like the loss."""

  def __init__(self, mesh: Mesh):
    self.sharding = NamedSharding(mesh, P(mesh.axis_names))
    self.arrays: dict[int, jax.Array] = {}

  def array(self, value: int) -> jax.Array:
    """This process's `value` in its part of an int32 array [devices]."""
    if value not in self.arrays:
      shape = (self.sharding.mesh.size,)
      self.arrays[value] = jax.make_array_from_callback(shape, self.sharding, lambda _: np.full(1, value, np.int32))
    return self.arrays[value]


def settled(arrays):
  """`arrays`; on several CPU devices not before they are computed.

  Two programs under way there can wait for each other for ever: gloo tells collectives apart by their order, and
  simulated devices share few threads.
  """
  if jax.device_count() > 1 and jax.default_backend() == "cpu":
    jax.block_until_ready(arrays)
  return arrays
