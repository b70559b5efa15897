# SPDX-License-Identifier: Apache-2.0
"""How the processes of a run meet, before JAX is used: every one has come, and they are alike."""

import functools
import hashlib
import importlib.metadata
import pathlib
import platform
import socket
import time

from gpt2_jax.hosts.crew import FAILED, LOST, PING, Crew, Link
from gpt2_jax.hosts.place import Place, first_line


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
  if different := difference(hello["code"], other["code"]):
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
      link.connection.settimeout(seconds + 2 * PING)  # process 0 may have come later, and judges who is late
      kind, *rest = link.first()
      link.connection.settimeout(PING)
    except (OSError, ValueError) as error:
      if time.monotonic() > end:
        raise TimeoutError(
          f"process 0 did not answer at {place.host}:{place.port + 1} within {seconds} s ({first_line(error)}); "
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
  root = pathlib.Path(__file__).parents[1]
  for path in sorted(root.rglob("*.py")):
    code.update(str(path.relative_to(root)).encode() + path.read_bytes())
  packages = {name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint")}
  return {"gpt2_jax": code.hexdigest()[:12], "python": platform.python_version()} | packages


def difference(first: dict, other: dict) -> str:
  names = [name for name in sorted(first.keys() | other.keys()) if first.get(name) != other.get(name)]
  told = [f"{name} is {str(first.get(name))[:80]} on process 0 and {str(other.get(name))[:80]} there" for name in names]
  return ", ".join(told[:1] + [f"{len(told) - 1} more"] * (len(told) > 1))
