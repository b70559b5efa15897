# SPDX-License-Identifier: Apache-2.0
"""Main text of a page: trafilatura in precision mode, or resiliparse ("fast").

A page may hang, crash or blow up its extractor. So a process of its own does the work
(extraction_process.py), with limits on CPU time and memory, and is started anew after an accident.
"""

import dataclasses
import functools
import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import threading
from multiprocessing.connection import Connection
from typing import ClassVar

from gpt2_jax.data.webtext.document import Document, Drop, drop

PROGRAM = pathlib.Path(__file__).with_name("extraction_process.py")


@dataclasses.dataclass(frozen=True)
class Extract:
  """Main text of the HTML; a document that is text already passes."""

  name: ClassVar[str] = "extract"

  extractor: str = "precise"
  seconds: float = 30  # CPU time of a page; ten times as much by the clock
  memory: int = 4 << 30  # bytes of address space

  def __call__(self, document: Document) -> Document | Drop:
    if document.html is None:
      return document
    status, text = _process_of(os.getpid(), self.memory).extract(
      document.html, self.extractor, self.seconds
    )
    if status != "+":
      return drop(status, document)
    if not text.strip():
      return drop("no_main_text", document)
    return dataclasses.replace(document, text=text, html=None)


class _Process:
  """A process that extracts one page after another. Threads take turns."""

  def __init__(self, memory: int):
    self._memory = memory
    self._lock = threading.Lock()
    self._process = None
    self._connection = None

  def extract(self, page: bytes, extractor: str, seconds: float) -> tuple[str, str]:
    """("+", the text), or (a reason, "")."""
    settings = json.dumps({"extractor": extractor, "seconds": seconds}).encode()
    with self._lock:
      if self._process is None or self._process.poll() is not None:
        self._start()
      try:
        self._connection.send_bytes(settings)
        self._connection.send_bytes(page)
        answer = self._connection.recv_bytes()
      except (EOFError, OSError):
        return self._reason_of_death(), ""
    if answer[:1] == b"+":
      return "+", answer[1:].decode("utf-8")
    return answer[1:].decode().split()[0], ""

  def _start(self) -> None:
    ours, theirs = socket.socketpair()
    command = [sys.executable, "-P", str(PROGRAM), str(theirs.fileno()), str(self._memory)]
    # Its messages are about somebody's page, and many.
    self._process = subprocess.Popen(
      command, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    theirs.close()
    self._connection = Connection(ours.detach())

  def _reason_of_death(self) -> str:
    """Why the process has ended."""
    self._connection.close()
    try:
      status = self._process.wait(timeout=10)
    except subprocess.TimeoutExpired:
      self._process.kill()
      status = self._process.wait()
    self._process = None
    if status in (-signal.SIGPROF, -signal.SIGALRM):
      return "extract_timeout"
    return "extract_crash"


def check_extractor(extractor: str) -> None:
  """Raises ValueError or ImportError, before hours of reading, for one that is not there."""
  packages = {"precise": "trafilatura", "fast": "resiliparse.extract.html2text"}
  if extractor not in packages:
    raise ValueError(f"extract.extractor is precise or fast, not {extractor[:40]!r}")
  try:
    __import__(packages[extractor])
  except ImportError as error:
    raise ImportError(
      f"the extractor {extractor} needs {packages[extractor].partition('.')[0]}: "
      "pip install 'gpt2_jax[webtext]'"
    ) from error


@functools.cache
def _process_of(pid: int, memory: int) -> _Process:
  """One for each process: a fork must not share its parent's connection."""
  return _Process(memory)
