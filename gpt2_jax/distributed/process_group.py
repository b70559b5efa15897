# SPDX-License-Identifier: Apache-2.0
"""The process group as one process sees it: links of JSON lines, a heartbeat, one common end."""

import contextlib
import itertools
import json
import os
import select
import selectors
import socket
import threading
import time
import traceback

from gpt2_jax.distributed.process import Process
from gpt2_jax.files import first_line, parse_json, summarize

# Exit status EX_TEMPFAIL: nothing is wrong with the run, start the same command again.
EXIT_RETRY = 75
# Exit status where another process refused its input or failed.
EXIT_FAILED = 2
# Seconds without a TCP acknowledgement after which a machine is gone.
TCP_TIMEOUT = 20
# Seconds without a heartbeat from a process whose machine still acknowledges: it is stopped, or
# stuck in one C call.
HEARTBEAT_TIMEOUT = 120
# Seconds between heartbeats.
HEARTBEAT_INTERVAL = 5
# Seconds that one process may come later than another to the same barrier or all-gather.
BARRIER_TIMEOUT = 600
# Seconds that a process has to end by itself when another one failed: often it fails alike.
GRACE_PERIOD = 5
WAY_OUT = "start the same command again on every host, the run resumes from its newest checkpoint"


class Link:
  """A TCP connection that carries JSON lines and notices that the other machine is gone."""

  def __init__(self, connection: socket.socket):
    self.connection = connection
    self.buffer = b""
    self.lock = threading.Lock()  # heartbeats come from one thread, values from another
    self.unread: list[list] = []
    self.last_heard = time.monotonic()
    self.said_goodbye = False

    # The kernel probes the other machine, and so sees it vanish while Python is busy elsewhere.
    connection.settimeout(HEARTBEAT_INTERVAL)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    limits = {
      "TCP_KEEPIDLE": 5,
      "TCP_KEEPINTVL": 5,
      "TCP_KEEPCNT": TCP_TIMEOUT // 5 - 1,
      "TCP_USER_TIMEOUT": TCP_TIMEOUT * 1000,
    }
    for name, value in limits.items():
      # Linux has them all, other systems some
      if hasattr(socket, name):
        connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)

  def send(self, *message):
    """Sends a message. A failure is not an error here: `receive` will see the end."""
    with self.lock, contextlib.suppress(OSError):
      self.connection.sendall(json.dumps(message).encode() + b"\n")

  def receive(self) -> list[list]:
    """Receives the messages that are here. Raises OSError at the end of the connection.

    Raises ValueError on what is no message.
    """
    data = self.connection.recv(1 << 16)
    if not data:
      raise ConnectionError("its connection closed")
    self.last_heard = time.monotonic()

    # The last line may be incomplete: it waits in the buffer for its rest.
    *lines, self.buffer = (self.buffer + data).split(b"\n")
    messages = self.unread + [parse_json(line, "a message") for line in lines]
    self.unread = []
    return messages

  def receive_first(self) -> list:
    """Receives the first message, within the connection's time limit.

    Others that came with it stay unread, for the thread that will watch this link.
    """
    deadline = time.monotonic() + self.connection.gettimeout()
    while not (messages := self.receive()):
      # A stranger may send bytes without end.
      if time.monotonic() > deadline or len(self.buffer) > 1 << 20:
        raise TimeoutError("no message came")
    self.unread = messages[1:]
    return messages[0]

  def is_closed(self) -> bool:
    """Whether the other side is gone, of a link on which it has nothing to say yet."""
    readable, _, _ = select.select([self.connection], [], [], 0)
    return bool(readable)


class ProcessGroup(threading.Thread):
  """The process group as this process sees it: all-gather of JSON, heartbeat, a common end.

  Process 0 has a link to each process, the others have one to process 0. The main thread gathers,
  and this thread watches the links. It can end the process whatever the main thread hangs in.
  """

  def __init__(self, process_info: Process, links: dict[int, Link], names: list[str]):
    super().__init__(name="process group", daemon=True)
    self.process_index = process_info.process_index
    self.links = links
    self.names = names

    # All-gathers are numbered, so that two of one name are told apart.
    self.calls = itertools.count()
    self.changed = threading.Condition()
    self.values: dict[str, dict[int, object]] = {}  # on process 0: of each all-gather, by process
    self.answers: dict[str, list] = {}  # on the others: of each all-gather, from process 0

    # How the run ends, if it does before its time: exit status and line, and when at the latest.
    self.verdict: tuple[int, str] | None = None
    self.deadline: float | None = None
    self.leaving = False

  def name_of(self, process: int) -> str:
    return f"process {process} ({self.names[process]})"

  # What the main thread calls.

  def all_gather(self, what: str, value, seconds: float) -> list:
    """All-gathers the processes' values, in their order; ends the run if one comes too late."""
    key = f"{next(self.calls)} {what}"
    late = f"did not arrive at {what} within {seconds:g} s; {WAY_OUT}"
    if self.process_index == 0:
      return self._gather_and_answer(key, value, seconds, late)

    self.links[0].send("value", key, value)
    with self.changed:
      # Process 0 judges who is late, by a clock that may have started after this one.
      patience = 2 * seconds + 2 * HEARTBEAT_INTERVAL
      if self.changed.wait_for(lambda: key in self.answers, patience):
        return self.answers.pop(key)
    self._end_run_and_wait(EXIT_RETRY, f"{self.name_of(0)} {late}")

  def _gather_and_answer(self, key: str, value, seconds: float, late: str) -> list:
    """Process 0's part: waits for every value, then sends all of them to everyone."""
    with self.changed:
      values = self.values.setdefault(key, {})
      values[0] = json.loads(json.dumps(value))  # as the others' come
      self.changed.wait_for(lambda: len(values) == len(self.names), seconds)

    missing = [self.name_of(i) for i in range(len(self.names)) if i not in values]
    if missing:
      self._end_run_and_wait(EXIT_RETRY, f"{summarize(missing)} {late}")

    del self.values[key]
    answer = [values[i] for i in range(len(self.names))]
    self._send_all("values", key, answer)
    return answer

  def say_goodbye(self):
    """Leaves the group: from here on this process is not missed."""
    self.leaving = True
    self._send_all("bye")

  def fail(self, line: str):
    """Tells the others that this process ends with an error.

    If a process was lost before, that is the reason, and its line is the one to show.
    """
    if self.verdict and self.verdict[0] == EXIT_RETRY:
      self._wait_for_exit()
    self.leaving = True
    self._send_all("end", EXIT_FAILED, f"{self.name_of(self.process_index)}: {line}")

  def wait_for_others(self, seconds: float):
    """Waits on process 0 until the others are gone.

    JAX's clients abort if its coordination service ends before they do.
    """
    deadline = time.monotonic() + seconds
    while self.process_index == 0 and self.links and time.monotonic() < deadline:
      time.sleep(0.05)

  def _end_run_and_wait(self, status: int, line: str):
    self._end_run(status, line)
    self._wait_for_exit()

  def _wait_for_exit(self):
    # The watching thread ends the process.
    while True:
      time.sleep(HEARTBEAT_INTERVAL)

  # What the watching thread does.

  def run(self):
    try:
      self._watch()
    except BaseException:
      # unwatched, the run would hang at the next death
      traceback.print_exc()
      os._exit(1)

  def _watch(self):
    last_ping = 0.0
    with selectors.DefaultSelector() as selector:
      # 1. What came with the first message of a link has not been handled yet.
      for process, link in list(self.links.items()):
        selector.register(link.connection, selectors.EVENT_READ, process)
        self._take(process, link.unread)

      while not (self.leaving and not self.links):
        # 2. Receive. Once the run is to end, look more often: its deadline is near.
        for key, _ in selector.select(0.1 if self.verdict else HEARTBEAT_INTERVAL):
          if not self._receive(key.data):
            selector.unregister(key.fileobj)

        # 3. Heartbeat: send ours, and look for a process that has fallen silent.
        now = time.monotonic()
        if now - last_ping > HEARTBEAT_INTERVAL:
          last_ping = now
          self._send_all("ping")
        self._check_heartbeats(now)

        # 4. End this process, once it had its time to end by itself, or all others are gone.
        if self.verdict and not self.leaving and (now > self.deadline or not self.links):
          self._exit(*self.verdict)

  def _check_heartbeats(self, now: float):
    for process, link in self.links.items():
      if now - link.last_heard > HEARTBEAT_TIMEOUT:
        problem = f"{self.name_of(process)} has not answered for {HEARTBEAT_TIMEOUT} s"
        self._end_run(EXIT_RETRY, f"{problem}; {WAY_OUT}")

  def _receive(self, process: int) -> bool:
    """Receives from a process. Returns whether its link is still there."""
    link = self.links[process]
    try:
      self._take(process, link.receive())
    except OSError as error:
      del self.links[process]
      if not link.said_goodbye:
        problem = f"{self.name_of(process)} is gone: {first_line(error)}"
        self._end_run(EXIT_RETRY, f"{problem}; {WAY_OUT}")
      return False
    return True

  def _take(self, process: int, messages: list[list]):
    for kind, *rest in messages:
      if kind == "bye":
        self.links[process].said_goodbye = True
      elif kind == "end":
        self._end_run(*rest)
      elif kind in ("value", "values"):
        key, value = rest
        with self.changed:
          if kind == "value":
            self.values.setdefault(key, {})[process] = value
          else:
            self.answers[key] = value
          self.changed.notify_all()

  def _send_all(self, *message):
    for link in list(self.links.values()):
      link.send(*message)

  def _end_run(self, status: int, line: str):
    """Ends the run on every process. The first reason counts.

    A process whose neighbour failed gets time to end by itself, with an error of its own. Process 0
    waits a little longer, for JAX's clients abort without it.
    """
    if self.verdict or self.leaving:
      return
    grace = GRACE_PERIOD if status == EXIT_FAILED else 0
    wait_for_clients = GRACE_PERIOD if self.process_index == 0 else 0
    self.deadline = time.monotonic() + grace + wait_for_clients
    self.verdict = status, line

    if self.process_index == 0:
      self._send_all("end", status, line)
    if not grace:
      write_error(line)

  def _exit(self, status: int, line: str):
    if status == EXIT_FAILED:
      write_error(line)
    os._exit(status)


def write_error(line: str):
  """Writes an error past sys.stderr, whose lock a thread that hangs may hold."""
  # the progress line may stand there, hence the newline before
  os.write(2, f"\nerror: {line}\n".encode())
