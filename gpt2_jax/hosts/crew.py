# SPDX-License-Identifier: Apache-2.0
"""The processes of a run as one of them sees them: links that carry JSON lines, and a thread that watches them."""

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

from gpt2_jax.hosts.place import Place, first_line

LOST = 75  # exit status EX_TEMPFAIL: nothing is wrong with the run, start the same command again
FAILED = 2  # exit status where another process refused its input or failed
VANISHED = 20  # seconds without an acknowledgement after which a machine is gone
SILENT = 120  # seconds without a word from a process that still acknowledges: it is stopped, or stuck in one C call
PING = 5  # seconds between words
PATIENCE = 600  # seconds that one process may come later than another to the same line
GRACE = 5  # seconds that a process has to end by itself when another one failed: often it fails alike
WAY_OUT = "start the same command again on every host, the run goes on from its newest checkpoint"


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
    end = time.monotonic() + self.connection.gettimeout()
    while not (messages := self.receive()):
      if time.monotonic() > end or len(self.buffer) > 1 << 20:
        raise TimeoutError("no message came")
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
        # Process 0 judges who is late, by a clock that may have started after this one.
        if self.changed.wait_for(lambda: key in self.answers, 2 * seconds + 2 * PING):
          return self.answers.pop(key)
      self._end_here(LOST, f"{self.name_of(0)} {late}")
    with self.changed:
      values = self.values.setdefault(key, {})
      values[0] = json.loads(json.dumps(value))  # as the others' come
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
        self._condemn(LOST, f"{self.name_of(process)} is gone: {first_line(error)}; {WAY_OUT}")
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
