# SPDX-License-Identifier: Apache-2.0
"""What a run on many processes needs: they meet, agree, watch each other, and end together.

Process 0 keeps one TCP connection to every other process, on the port after the coordinator's. A process that dies, on
whatever line, closes its connection, and a machine that vanishes stops acknowledging: the kernel sees both without any
heartbeat of Python's, so a long compilation is never taken for death. Process 0 then tells the others whom they lost,
and each ends with that one line and exit status 75 in place of waiting in a collective for ever.

A process alone needs none of this: `gather` gives back what it got, `barrier` does nothing.
"""

import contextlib
import dataclasses
import functools
import hashlib
import importlib.metadata
import itertools
import json
import os
import pathlib
import platform
import select
import selectors
import socket
import sys
import threading
import time
import traceback

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

LOST = 75  # exit status EX_TEMPFAIL: nothing is wrong with the run, start the same command again
FAILED = 2  # exit status where another process refused its input or failed
VANISHED = 20  # seconds without an acknowledgement after which a machine is gone
SILENT = 120  # seconds without a word from a process that still acknowledges: it is stopped, or stuck in one C call
PING = 5  # seconds between words
PATIENCE = 600  # seconds that one process may come later than another to the same line
GRACE = 5  # seconds that a process has to end by itself when another one failed: often it fails alike
WAY_OUT = "start the same command again on every host, the run goes on from its newest checkpoint"


@dataclasses.dataclass(frozen=True)
class Place:
  """Which of how many processes this is, and where process 0 is found, HOST:PORT. It listens on PORT and PORT + 1."""

  coordinator: str
  processes: int
  process: int

  def __post_init__(self):
    host, _, port = self.coordinator.rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 65535:
      raise ValueError(f"--coordinator={self.coordinator} is not HOST:PORT with a port of 1 to 65534")
    if not 0 <= self.process < self.processes:
      raise ValueError(f"--process={self.process} is not one of --processes={self.processes}: they count from 0")

  @property
  def host(self) -> str:
    return self.coordinator.rpartition(":")[0].strip("[]")

  @property
  def port(self) -> int:
    return int(self.coordinator.rpartition(":")[2])


def find_place(coordinator: str | None, processes: int | None, process: int | None, seconds: int) -> Place | None:
  """The place that the flags give; without flags the one that a TPU machine knows, else None: a process alone.

  A TPU machine is asked as JAX asks it: a TPU VM's metadata server, GKE's environment, slices included.
  """
  given = {"--coordinator": coordinator, "--processes": processes, "--process": process}
  missing = [flag for flag, value in given.items() if value is None]
  if not missing:
    return Place(coordinator, processes, process)
  if len(missing) < len(given):
    raise ValueError(f"{' and '.join(missing)} missing: --coordinator, --processes and --process go together")
  return _tpu_place(seconds) if _on_tpu() else None


def _on_tpu() -> bool:
  from jax._src.cloud_tpu_init import running_in_cloud_tpu_vm  # chips on the PCI bus, and libtpu to drive them

  return running_in_cloud_tpu_vm and "tpu" in (jax.config.jax_platforms or "tpu")


def _tpu_place(seconds: int) -> Place | None:
  from jax._src.clusters import ClusterEnv

  try:
    known = os.environ.get("JAX_COORDINATOR_ADDRESS")
    found = ClusterEnv.auto_detect_unset_distributed_params(known, None, None, None, None, seconds)
  except (OSError, RuntimeError, ValueError) as error:
    raise ValueError(
      f"this TPU machine does not tell which of how many it is ({_first_line(error)}); "
      f"give --coordinator=HOST:PORT --processes=N --process=I, on a single one localhost:8482, 1 and 0"
    ) from error
  return None if None in found[:3] else Place(*found[:3])


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
    time.sleep(
      2
    )  # where another process died, this error is what came of it, and the crew's thread has the better line
    crew.fail(_first_line(error))
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
    raise OSError(f"JAX could not start at {place.coordinator}: {_first_line(error)}; is the port in use?") from error


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


class Link:
  """A connection that carries JSON lines."""

  def __init__(self, connection: socket.socket):
    self.connection, self.buffer, self.lock = connection, b"", threading.Lock()
    self.unread: list[list] = []
    self.heard, self.parted = time.monotonic(), False
    connection.settimeout(PING)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    limits = {
      "TCP_KEEPIDLE": 5,
      "TCP_KEEPINTVL": 5,
      "TCP_KEEPCNT": VANISHED // 5 - 1,
      "TCP_USER_TIMEOUT": VANISHED * 1000,
    }
    for name, value in limits.items():
      if hasattr(socket, name):  # Linux has them all
        connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)

  def send(self, *message):
    """What cannot be sent is not an error here: `receive` will see the end."""
    with self.lock, contextlib.suppress(OSError):
      self.connection.sendall(json.dumps(message).encode() + b"\n")

  def receive(self) -> list[list]:
    """The messages that are here. Raises OSError at the end of the connection, ValueError on what is no message."""
    data = self.connection.recv(1 << 16)
    if not data:
      raise ConnectionError("its connection closed")
    self.heard = time.monotonic()
    *lines, self.buffer = (self.buffer + data).split(b"\n")
    messages, self.unread = self.unread + [json.loads(line) for line in lines], []
    return messages

  def first(self) -> list:
    """The first message, waited for as long as the connection's time limit; others that came with it stay unread."""
    while not (messages := self.receive()):
      pass
    self.unread = messages[1:]
    return messages[0]

  def closed(self) -> bool:
    """Whether the other side is gone, of a link on which it has nothing to say yet."""
    return bool(select.select([self.connection], [], [], 0)[0])


class Crew(threading.Thread):
  """The processes of a run as this one sees them: process 0 has a link to each, the others one to process 0."""

  def __init__(self, place: Place, links: dict[int, Link], names: list[str]):
    super().__init__(name="crew", daemon=True)
    self.process, self.links, self.names = place.process, links, names
    self.calls, self.changed = itertools.count(), threading.Condition()
    self.values: dict[str, dict[int, object]] = {}  # of each `gather`, by process
    self.answers: dict[str, list] = {}
    self.verdict = self.deadline = None
    self.leaving = False

  def name_of(self, process: int) -> str:
    return f"process {process} ({self.names[process]})"

  # What the main thread calls.

  def gather(self, what: str, value, seconds: float) -> list:
    """The values of all processes, in their order. Ends the run if one of them does not come here in time."""
    key = f"{next(self.calls)} {what}"
    late = f"did not arrive at {what} within {seconds:g} s; {WAY_OUT}"
    if self.process:
      self.links[0].send("value", key, value)
      with self.changed:
        if self.changed.wait_for(lambda: key in self.answers, seconds + 2 * PING):
          return self.answers.pop(key)
      self._end_here(LOST, f"{self.name_of(0)} {late}")
    with self.changed:
      values = self.values.setdefault(key, {})
      values[0] = value
      self.changed.wait_for(lambda: len(values) == len(self.names), seconds)
    if missing := [self.name_of(i) for i in range(len(self.names)) if i not in values]:
      self._end_here(LOST, f"{', '.join(missing)} {late}")
    del self.values[key]
    answer = [values[i] for i in range(len(self.names))]
    self._tell("values", key, answer)
    return answer

  def part(self):
    """Says goodbye: from here on nobody is missed."""
    self.leaving = True
    self._tell("bye")

  def fail(self, line: str):
    """Tells the others that this process ends with an error; where one was lost before, that is the reason."""
    if self.verdict and self.verdict[0] == LOST:
      self._wait_for_the_end()
    self.leaving = True
    self._tell("end", FAILED, f"{self.name_of(self.process)}: {line}")

  def wait_for_others(self, seconds: float):
    """Process 0 goes last: JAX's clients abort where its coordination service ends before they do."""
    end = time.monotonic() + seconds
    while self.process == 0 and self.links and time.monotonic() < end:
      time.sleep(0.05)

  def _end_here(self, status: int, line: str):
    self._condemn(status, line)
    self._wait_for_the_end()

  def _wait_for_the_end(self):
    while True:
      time.sleep(PING)

  # What the thread does.

  def run(self):
    try:
      self._watch()
    except BaseException:  # unwatched, the run would hang at the next death
      traceback.print_exc()
      os._exit(1)

  def _watch(self):
    pinged = 0.0
    with selectors.DefaultSelector() as selector:
      for process, link in list(self.links.items()):
        selector.register(link.connection, selectors.EVENT_READ, process)
        self._take(process, link.unread)
      while not (self.leaving and not self.links):
        for key, _ in selector.select(0.1 if self.verdict else PING):
          if not self._hear(key.data):
            selector.unregister(key.fileobj)
        now = time.monotonic()
        if now - pinged > PING:
          pinged = now
          self._tell("ping")
        for process, link in self.links.items():
          if now - link.heard > SILENT:
            self._condemn(LOST, f"{self.name_of(process)} has not answered for {SILENT} s; {WAY_OUT}")
        if self.verdict and not self.leaving and (now > self.deadline or not self.links):
          self._exit(*self.verdict)

  def _hear(self, process: int) -> bool:
    """Whether the link is still there."""
    link = self.links[process]
    try:
      self._take(process, link.receive())
    except OSError as error:
      del self.links[process]
      if not link.parted:
        self._condemn(LOST, f"{self.name_of(process)} is gone: {_first_line(error)}; {WAY_OUT}")
      return False
    return True

  def _take(self, process: int, messages: list[list]):
    for kind, *rest in messages:
      if kind == "bye":
        self.links[process].parted = True
      elif kind == "end":
        self._condemn(*rest)
      elif kind in ("value", "values"):
        with self.changed:
          key, value = rest
          if kind == "value":
            self.values.setdefault(key, {})[process] = value
          else:
            self.answers[key] = value
          self.changed.notify_all()

  def _tell(self, *message):
    for link in list(self.links.values()):
      link.send(*message)

  def _condemn(self, status: int, line: str):
    """The run is over; the first reason counts. This thread ends the process, whatever the main thread hangs in."""
    if self.verdict or self.leaving:
      return
    grace = GRACE if status == FAILED else 0
    self.deadline = time.monotonic() + grace + (0 if self.process else GRACE)
    self.verdict = status, line
    if self.process == 0:
      self._tell("end", status, line)
    if not grace:
      say_error(line)

  def _exit(self, status: int, line: str):
    if status == FAILED:
      say_error(line)
    os._exit(status)


def say_error(line: str):
  """Past sys.stderr, whose lock a thread that hangs may hold."""
  os.write(2, f"\nerror: {line}\n".encode())  # the live line may stand there


_crew: Crew | None = None


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
    if different := _difference(first, other):
      raise ValueError(f"{_crew.name_of(process)} was started with another {what}: {different}; give all the same")


def _difference(first: dict, other: dict) -> str:
  names = [name for name in sorted(first.keys() | other.keys()) if first.get(name) != other.get(name)]
  told = [f"{name} is {str(first.get(name))[:80]} on process 0 and {str(other.get(name))[:80]} there" for name in names]
  return ", ".join(told[:1] + [f"{len(told) - 1} more"] * (len(told) > 1))


def leave(status: int):
  """Ends the process: with the others in mind if there are any, for JAX's own way out waits for them."""
  if _crew is None:
    sys.exit(status)
  _crew.wait_for_others(2 * GRACE)
  sys.stdout.flush()
  sys.stderr.flush()
  os._exit(status)


def meet(place: Place, seconds: int) -> Crew:
  """The crew, once every process has come, runs the same code, and no two claim one place.

  Raises OSError or ValueError with a line that names the processes that are missing or not like the others.
  """
  hello = {"process": place.process, "processes": place.processes, "host": socket.gethostname(), "code": versions()}
  return (_call_in if place.process else _welcome)(place, hello, time.monotonic() + seconds, seconds)


def _welcome(place: Place, hello: dict, end: float, seconds: int) -> Crew:
  """Process 0: waits for the others."""
  links, names = {}, {0: hello["host"]}

  def refuse(error: Exception, late: Link | None = None):
    for link in [*links.values(), *([late] if late else [])]:
      link.send("end", FAILED if isinstance(error, ValueError) else LOST, str(error))
    return error

  with _listen(place.port + 1) as server:
    while len(links) < place.processes - 1:
      server.settimeout(max(0.01, end - time.monotonic()))
      try:
        link = Link(server.accept()[0])
      except TimeoutError:
        missing = ", ".join(str(i) for i in range(place.processes) if i not in names)
        here = ", ".join(f"{i} ({names[i]})" for i in sorted(names))
        raise refuse(
          TimeoutError(f"process {missing} did not arrive within {seconds} s; here are {here}; start all, then again")
        ) from None
      try:
        _, other = link.first()
        for process in [process for process, earlier in links.items() if earlier.closed()]:  # and may be started again
          del links[process], names[process]
        problem = _misfit(hello, other, names)
      except (OSError, ValueError, TypeError, KeyError):
        continue  # not one of ours
      if problem:
        raise refuse(ValueError(problem), link)
      links[other["process"]], names[other["process"]] = link, other["host"]
  order = [names[i] for i in range(place.processes)]
  for link in links.values():
    link.send("names", order)
    link.heard = time.monotonic()
  return Crew(place, links, order)


def _misfit(hello: dict, other: dict, names: dict[int, str]) -> str | None:
  who = f"process {other['process']} ({other['host']})"
  if other["processes"] != hello["processes"]:
    return f"{who} was started as one of {other['processes']} processes, process 0 as one of {hello['processes']}"
  if other["process"] in names:
    return (
      f"two processes, on {names[other['process']]} and {other['host']}, were started as process {other['process']}"
    )
  if different := _difference(hello["code"], other["code"]):
    return f"{who} runs other code: {different}; install the same everywhere"
  return None


def _listen(port: int) -> socket.socket:
  try:
    if socket.has_dualstack_ipv6():
      return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=1024)
    return socket.create_server(("", port), backlog=1024)
  except OSError as error:
    raise OSError(f"port {port}, the one after --coordinator's, cannot be had: {error.strerror}") from error


def _call_in(place: Place, hello: dict, end: float, seconds: int) -> Crew:
  """Every other process: finds process 0, which may start later than this one."""
  while True:
    try:
      link = Link(socket.create_connection((place.host, place.port + 1), timeout=PING))
      link.send("hello", hello)
      link.connection.settimeout(max(PING, end + PING - time.monotonic()))
      kind, *rest = link.first()
      link.connection.settimeout(PING)
    except (OSError, ValueError) as error:
      if time.monotonic() > end:
        raise TimeoutError(
          f"process 0 did not answer at {place.host}:{place.port + 1} within {seconds} s ({_first_line(error)}); "
          f"is it started, and are --coordinator's port and the next one open?"
        ) from None
      time.sleep(0.2)
      continue
    if kind == "end":
      raise (ValueError if rest[0] == FAILED else TimeoutError)(rest[1])
    return Crew(place, {0: link}, rest[0])


@functools.cache
def versions() -> dict[str, str]:
  """What must be the same on every host."""
  code = hashlib.sha256()
  root = pathlib.Path(__file__).parent
  for path in sorted(root.rglob("*.py")):
    code.update(str(path.relative_to(root)).encode() + path.read_bytes())
  packages = {name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint")}
  return {"gpt2_jax": code.hexdigest()[:12], "python": platform.python_version()} | packages


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


def _first_line(error: BaseException) -> str:
  return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
