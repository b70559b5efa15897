# SPDX-License-Identifier: Apache-2.0
"""Rendezvous of a run's processes before JAX starts: all have arrived, and run the same code."""

import functools
import importlib.metadata
import pathlib
import platform
import socket
import time

from gpt2_jax.distributed.process import Process
from gpt2_jax.distributed.process_group import (
  EXIT_FAILED,
  EXIT_RETRY,
  HEARTBEAT_INTERVAL,
  Link,
  ProcessGroup,
)
from gpt2_jax.files import first_line, sha256, summarize


def rendezvous(process_info: Process, seconds: int) -> ProcessGroup:
  """Rendezvous: waits until every process has arrived, and returns the process group.

  All must run the same code, and no two may claim one rank. Raises OSError or ValueError with a
  line that names the processes that are missing or not like the others.
  """
  hello = {
    "process": process_info.process_index,
    "processes": process_info.process_count,
    "host": socket.gethostname(),
    "code": versions(),
  }
  deadline = time.monotonic() + seconds
  if process_info.process_index == 0:
    return _accept_all(process_info, hello, deadline, seconds)
  return _connect(process_info, hello, deadline, seconds)


def _accept_all(process_info: Process, hello: dict, deadline: float, seconds: int) -> ProcessGroup:
  """Process 0: accepts a connection from every other process."""
  links: dict[int, Link] = {}
  hosts = {0: hello["host"]}

  # 1. Accept until all are here. Any refusal goes to everyone who is, so that all end alike.
  with _listen(process_info.port + 1) as server:
    while len(links) < process_info.process_count - 1:
      server.settimeout(max(0.01, deadline - time.monotonic()))
      try:
        link = Link(server.accept()[0])
      except TimeoutError:
        problem = _who_is_missing(hosts, process_info.process_count, seconds)
        _refuse(links.values(), EXIT_RETRY, problem)
        raise TimeoutError(problem) from None

      try:
        _, peer = link.receive_first()
        _forget_closed(links, hosts)
        problem = _mismatch(hello, peer, hosts)
      except (OSError, ValueError, TypeError, KeyError):
        # a port scanner or a health check, not one of ours
        continue

      if problem:
        _refuse([*links.values(), link], EXIT_FAILED, problem)
        raise ValueError(problem)
      links[peer["process"]] = link
      hosts[peer["process"]] = peer["host"]

  # 2. Tell all who is here. The heartbeat counts from now: some have waited for long.
  names = [hosts[i] for i in range(process_info.process_count)]
  for link in links.values():
    link.send("names", names)
    link.last_heard = time.monotonic()
  return ProcessGroup(process_info, links, names)


def _refuse(links, status: int, problem: str) -> None:
  for link in links:
    link.send("end", status, problem)


def _who_is_missing(hosts: dict[int, str], process_count: int, seconds: int) -> str:
  missing = summarize(i for i in range(process_count) if i not in hosts)
  here = summarize(f"{i} ({hosts[i]})" for i in sorted(hosts))
  return (
    f"process {missing} did not arrive within {seconds} s; here are {here}; start all, then again"
  )


def _forget_closed(links: dict[int, Link], hosts: dict[int, str]) -> None:
  """Drops those who arrived and have died since: they may be started again."""
  for process in list(links):
    if links[process].is_closed():
      del links[process]
      del hosts[process]


def _mismatch(hello: dict, peer: dict, hosts: dict[int, str]) -> str | None:
  """Why a process that has arrived is refused; None if it fits."""
  name = f"process {peer['process']} ({peer['host']})"

  # 1. Its flags: every rank once, and one number of processes.
  if peer["processes"] != hello["processes"]:
    return (
      f"{name} was started as one of {peer['processes']} processes, "
      f"process 0 as one of {hello['processes']}"
    )
  if peer["process"] in hosts:
    return (
      f"two processes, on {hosts[peer['process']]} and {peer['host']}, "
      f"were started as process {peer['process']}"
    )

  # 2. Its code: other versions compile other collectives, which would hang.
  if different := difference(hello["code"], peer["code"]):
    return f"{name} runs other code: {different}; install the same everywhere"
  return None


def _listen(port: int) -> socket.socket:
  try:
    if socket.has_dualstack_ipv6():
      return socket.create_server(
        ("", port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=1024
      )
    return socket.create_server(("", port), backlog=1024)
  except OSError as error:
    raise OSError(
      f"port {port}, the one after --coordinator's, cannot be had: {error.strerror}"
    ) from error


def _connect(process_info: Process, hello: dict, deadline: float, seconds: int) -> ProcessGroup:
  """Every other process: connects to process 0, which may start later than this one."""
  address = (process_info.host, process_info.port + 1)
  while True:
    try:
      link = Link(socket.create_connection(address, timeout=HEARTBEAT_INTERVAL))
      link.send("hello", hello)

      # Process 0 may have come later than this one, and judges by its clock who is late.
      link.connection.settimeout(seconds + 2 * HEARTBEAT_INTERVAL)
      kind, *rest = link.receive_first()
      link.connection.settimeout(HEARTBEAT_INTERVAL)
    except (OSError, ValueError) as error:
      if time.monotonic() > deadline:
        raise TimeoutError(
          f"process 0 did not answer at {address[0]}:{address[1]} within {seconds} s "
          f"({first_line(error)}); is it started, and are --coordinator's port and the next one "
          f"open?"
        ) from None
      time.sleep(0.2)
      continue

    if kind == "end":
      status, problem = rest
      raise (ValueError if status == EXIT_FAILED else TimeoutError)(problem)
    return ProcessGroup(process_info, {0: link}, rest[0])


@functools.cache
def versions() -> dict[str, str]:
  """What must be the same on every host: this package's source, Python, and JAX's libraries."""
  root = pathlib.Path(__file__).parents[1]
  source = b""
  for path in sorted(root.rglob("*.py")):
    source += str(path.relative_to(root)).encode() + path.read_bytes()

  packages = {}
  for name in ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint"):
    packages[name] = importlib.metadata.version(name)
  return {"gpt2_jax": sha256(source)[:12], "python": platform.python_version()} | packages


def difference(first: dict, other: dict) -> str:
  """The first entry in which process 0's facts and another's differ, and how many more do."""
  lines = []
  for name in sorted(first.keys() | other.keys()):
    ours, theirs = first.get(name), other.get(name)
    if ours != theirs:
      lines.append(f"{name} is {str(ours)[:80]} on process 0 and {str(theirs)[:80]} there")

  if len(lines) > 1:
    return f"{lines[0]}, {len(lines) - 1} more"
  return ", ".join(lines)
