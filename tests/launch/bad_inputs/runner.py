# SPDX-License-Identifier: Apache-2.0
"""Runs command lines in a worker process under a time limit, and judges how each of them ended."""

import dataclasses
import json
import os
import pathlib
import re
import select
import shlex
import shutil
import subprocess
import sys
import time

import jax

ROOT = pathlib.Path(__file__).parents[3]
SECONDS = 30  # for a row, and what works may take longer: it compiles
SECONDS_OF_CONTROL = 120
START = 90  # more for the first of a worker: it imports, and may compile
LENGTH = 1000  # characters of a line of an error
HUNG = "hung"
CRASHED = "crashed"

# A command may remember prepared datasets and fonts, and a lock outlives its holder.
CACHES = re.compile(
  r"home/(tensorflow_datasets(?!.*incomplete)|\.cache|\.config)\b|(.*/)?(\.?lock$|__pycache__)"
)

# A sweep tells of each cell as it fails, before it tells that none is left.
CELL = re.compile(r"\[\d+/\d+\] failed ")
# What takes more than three seconds says so, which on a slow machine may be anything.
WAITING = re.compile(r"(loading|compiling|generating|opening|reading|importing|starting) ")


@dataclasses.dataclass(frozen=True)
class Row:
  """A command line, and what its error must say; `says` of None is a control, which must work."""

  command: str
  name: str
  says: str | None
  flags: tuple[str, ...]
  stdin: str = ""
  # A sweep goes on without a cell that cannot be computed: status 1, and a line for the cell.
  may_fail_cells: bool = False
  # A run that diverges was a run: its workdir may be there.
  may_write: bool = False

  def __str__(self):
    return f"{self.command}: {self.name}"


def rows(command: str, base: str, table: list[tuple], **options) -> list[Row]:
  """Rows from (name, says, flags) or (name, says, flags, stdin); `base` goes before the flags."""
  made = []
  for name, says, flags, *stdin in table:
    line = flags if isinstance(flags, list) else shlex.split(flags)
    made.append(Row(command, name, says, (*shlex.split(base), *line), *stdin, **options))
  names = [row.name for row in made]
  assert len(set(names)) == len(names), "two rows of one name"
  return made


@dataclasses.dataclass(frozen=True)
class Result:
  """How a command line ended: its exit status, HUNG or CRASHED; stdout, stderr; seconds."""

  status: int | str
  out: str
  err: str
  seconds: float


class Worker:
  """Runs scripts in one process, in `folder`; another one takes its place after a hang or crash."""

  def __init__(self, folder: pathlib.Path, streams: pathlib.Path, start: float = START):
    self.folder, self.streams, self.start = folder, streams, start
    self.process = None

  def run(self, script, flags, stdin: str = "", seconds: float = SECONDS) -> Result:
    """Runs `python SCRIPT FLAGS`; a script without a slash is one of launch/."""
    script = str(script) if "/" in str(script) else str(ROOT / "launch" / f"{script}.py")
    if self.process is None:
      self._start()
      seconds += self.start
    # surrogateescape: a terminal may send bytes that are no text.
    (self.streams / "in").write_bytes(stdin.encode("utf-8", "surrogateescape"))
    for name in ("out", "err"):
      (self.streams / name).write_bytes(b"")

    begin = time.monotonic()
    request = {"script": script, "arguments": list(flags), "folder": str(self.streams)}
    self.process.stdin.write(json.dumps(request) + "\n")
    self.process.stdin.flush()
    status = self._wait(seconds)
    took = time.monotonic() - begin
    out, err = ((self.streams / x).read_text("utf-8", "backslashreplace") for x in ("out", "err"))
    return Result(status, out, err, took)

  def environment(self) -> dict[str, str]:
    """What the commands find in their environment, and nothing else."""
    home = self.folder / "home"
    # No kubectl on the path, no Hub, and what XLA has compiled in another run.
    environment = {"PATH": str(home), "HOME": str(home), "TMPDIR": str(self.folder / "tmp")}
    environment |= {"PYTHONPATH": str(ROOT), "LANG": "C.UTF-8", "HF_HUB_OFFLINE": "1"}
    environment |= {"JAX_PLATFORMS": "cpu", "TF_CPP_MIN_LOG_LEVEL": "2"}
    environment["JAX_COMPILATION_CACHE_DIR"] = jax.config.jax_compilation_cache_dir or ""
    environment["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.05"
    return environment

  def _start(self) -> None:
    pipe = subprocess.PIPE
    self.process = subprocess.Popen(
      [sys.executable, str(pathlib.Path(__file__).with_name("worker.py"))],
      cwd=self.folder,
      env=self.environment(),
      stdin=pipe,
      stdout=pipe,
      text=True,
      start_new_session=True,
    )

  def _wait(self, seconds: float) -> int | str:
    ready, _, _ = select.select([self.process.stdout], [], [], seconds)
    answer = self.process.stdout.readline() if ready else None
    if answer:
      return json.loads(answer)

    # Without an answer the process is gone, by its own exit or by a signal; or it hangs.
    if ready:
      status = self.process.wait()
      self.process = None
      return status if status > 0 else CRASHED
    self.close()
    return HUNG

  def close(self) -> None:
    """Ends the worker, whatever it does."""
    if self.process is not None:
      self.process.kill()
      self.process.wait()
      self.process = None


class Sandbox:
  """A folder in which command lines run; it can be put back to what it was at `seal`."""

  def __init__(self, folder: pathlib.Path):
    self.folder, self.copy = folder / "sandbox", folder / "copy"
    for path in (self.folder, self.folder / "home", self.folder / "tmp"):
      path.mkdir()
    (self.folder / "configs").symlink_to(ROOT / "configs")

  def seal(self) -> None:
    """Remembers all that is there."""
    shutil.copytree(self.folder, self.copy, symlinks=True)
    self.sealed = self.snapshot()

  def snapshot(self) -> dict[str, tuple]:
    """What tells a change of any file: kind, size and time of all paths but of `CACHES`."""
    state = {}
    for parent, folders, files in os.walk(self.folder):
      for name in folders + files:
        path = os.path.join(parent, name)
        relative = os.path.relpath(path, self.folder)
        if CACHES.match(relative) or relative == "tmp" or relative.startswith("tmp/"):
          continue
        facts = os.lstat(path)
        is_folder = name in folders
        state[relative] = (facts.st_mode, 0 if is_folder else (facts.st_size, facts.st_mtime_ns))
    return state

  def restore(self) -> list[str]:
    """Puts back what has changed since `seal`, and returns the names of it."""
    now = self.snapshot()
    changed = sorted(x for x in now.keys() | self.sealed.keys() if now.get(x) != self.sealed.get(x))
    for name in changed:
      path = self.folder / name
      if path.is_dir() and not path.is_symlink() and name not in self.sealed:
        shutil.rmtree(path)
      elif os.path.lexists(path) and not (path.is_dir() and not path.is_symlink()):
        path.unlink()
      if name in self.sealed and (self.copy / name).is_dir():
        path.mkdir(exist_ok=True)
      elif name in self.sealed:
        shutil.copy2(self.copy / name, path)
    return changed


def judge(row: Row, result: Result, changed: list[str]) -> list[str]:
  """What is wrong with how a row ended; an empty list is as it should be."""
  if result.status in (HUNG, CRASHED):
    return [f"{result.status} after {result.seconds:.0f} s"]
  faults = []
  if "Traceback" in result.err + result.out:
    faults.append("traceback")
  if row.command == "console":
    return faults + _judge_session(row, result)

  lines = _lines(result.err)
  if row.says is None:
    if result.status != 0 or any(line.startswith("error:") for line in lines):
      faults.append(f"a control failed with status {result.status}")
    return faults

  # 1. The status, and the one line.
  failed_cell = row.may_fail_cells and result.status == 1
  if result.status == 0:
    faults.append("silent")
  elif result.status != 2 and not failed_cell and not faults:
    faults.append(f"status {result.status}")
  if failed_cell:
    errors = [line for line in lines if "failed " in line]
  else:
    errors = [line for line in lines if line.startswith("error: ")]
    expected = [line for line in lines if CELL.match(line) or WAITING.match(line)]
    others = [line for line in lines if line not in errors + expected]
    if others and not row.may_write and "traceback" not in faults:
      faults.append(f"{len(others)} other lines")
  if len(errors) != 1 and result.status != 0 and "traceback" not in faults:
    faults.append(f"{len(errors)} lines of an error")

  # 2. What it says, and how long.
  if errors and row.says.lower() not in errors[-1].lower():
    faults.append(f"says nothing of {row.says!r}")
  if errors and max(map(len, errors)) > LENGTH:
    faults.append(f"a line of {max(map(len, errors)):,} characters")

  # 3. Nothing is written.
  if changed and not row.may_write and not failed_cell:
    faults.append(f"written: {', '.join(changed[:3])}")
  return faults


def _judge_session(row: Row, result: Result) -> list[str]:
  """A bad line at the console: one line, and the session goes on with all its texts."""
  faults = []
  errors = [line for line in _lines(result.out) if "error: " in line]
  if row.says is None:
    return ["a control failed"] if errors or result.status else []
  if result.status != 0:
    faults.append(f"the session ended with status {result.status}")
  if result.out.count(FIRST_TEXT) < 2:
    faults.append("the texts of the session are lost")
  if len(errors) != 1:
    faults.append(f"{len(errors)} lines of an error" if errors else "silent")
  elif row.says.lower() not in errors[0].lower():
    faults.append(f"says nothing of {row.says!r}")
  if errors and max(map(len, errors)) > LENGTH:
    faults.append(f"a line of {max(map(len, errors)):,} characters")
  return faults


# What a session begins with, and shows again at its end.
FIRST_TEXT = "Aleph"


def _lines(text: str) -> list[str]:
  """The lines of a terminal: a progress bar overwrites itself, and leaves its last state."""
  shown = []
  for line in text.split("\n"):
    line = line.rsplit("\r", 1)[-1].strip()
    if line and not re.search(r"\d+%\|.*\[.*\]|\d+ ?\w+ \[\d\d:\d\d", line):
      shown.append(line)
  return shown


def check(row: Row, worker: Worker, sandbox: Sandbox) -> None:
  """Runs a row in its sandbox, puts the sandbox back, and fails with what was wrong."""
  script = "sample" if row.command == "console" else row.command
  seconds = SECONDS if row.says is not None else SECONDS_OF_CONTROL
  result = worker.run(script, row.flags, row.stdin, seconds)
  faults = judge(row, result, sandbox.restore())
  shown = f"{result.out[-300:]}{result.err[-1200:]}"
  # Some flags hold what is no character, which pytest could not write.
  line = shlex.join(row.flags).encode("utf-8", "backslashreplace").decode()
  assert not faults, f"{row} {line}: {'; '.join(faults)}\n{shown}"
