# SPDX-License-Identifier: Apache-2.0
"""The workdir of a run: a folder here, or under gs:// with a scratch folder here whose files are copied there.

Checkpoints go to gs:// directly; an object there cannot be appended to, so metrics.jsonl and its like are copied whole.
"""

import contextlib
import fcntl
import importlib.util
import os
import pathlib
import re
import shutil
import sys
import tempfile
import time
import uuid

# Both are read once. One client for gs://, whatever else is installed: etils would take TensorFlow where it finds it,
# and gcsfs would ask a gRPC service what kind of bucket it is.
os.environ.setdefault("EPATH_USE_TF", "false")
os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")

import fsspec  # noqa: E402
from etils import epath  # noqa: E402

import gpt2_jax.hosts as hosts  # noqa: E402


def is_remote(path: str) -> bool:
  return "://" in path


def at(path: str) -> epath.Path:
  """The path, local or gs://. Raises ValueError for another scheme, ImportError where gcsfs is missing."""
  if is_remote(path):
    if not re.match("gs://[^/]", path):
      raise ValueError(f"{path} is neither a local path nor gs://BUCKET/PATH; take one of these")
    if importlib.util.find_spec("gcsfs") is None:
      raise ImportError("gs:// needs gcsfs: pip install '.[gcs]'")
    fsspec.config.conf.setdefault("gcs", {})["use_listings_cache"] = False  # other hosts and TensorStore write, too
  return epath.Path(path)


@contextlib.contextmanager
def reached(place: str):
  """Makes one OSError of what the clients of gs:// raise, which share no class; local errors stay what they are."""
  try:
    yield
  except Exception as error:
    if not is_remote(place):
      raise
    reason = (str(error).strip().splitlines() or [""])[0][:200] or type(error).__name__
    raise OSError(f"{place} cannot be reached: {reason}; look at the bucket, its rights and this host's") from error


def is_there(place: str) -> bool:
  """Whether there is such a file or folder; `exists` on gs:// says no where it could not ask."""
  path = at(place)
  with reached(place):
    try:
      path.stat()
    except FileNotFoundError:
      return False
  return True


class Workdir:
  """Where a run writes its files: `path`, a folder here. Nothing is done for a local workdir, which is that folder.

  For one on gs:// it is a scratch folder. It begins with the metrics.jsonl that is there (TensorBoard's new file needs
  no older one), `copy_up` brings the files that changed there, and so does the end of the context, however it comes.
  """

  def __init__(self, place: str):
    self.place, self.path, self.remote = place, place, is_remote(place)
    self.copied: dict[pathlib.Path, tuple] = {}

  def __enter__(self):
    if self.remote:
      self.scratch = pathlib.Path(tempfile.mkdtemp(prefix="gpt2_jax_"))
      self.path = str(self.scratch / pathlib.PurePosixPath(self.place).name)
      os.mkdir(self.path)
      if hosts.is_first():
        self._fetch("metrics.jsonl")
    return self

  def _fetch(self, name: str):
    if is_there(f"{self.place}/{name}"):
      with reached(self.place):
        (pathlib.Path(self.path) / name).write_bytes((at(self.place) / name).read_bytes())

  def copy_up(self):
    """Copies the files that changed since the last time. Raises OSError with the first that cannot be written."""
    if not self.remote:
      return
    here = pathlib.Path(self.path)
    for file in sorted(file for file in here.rglob("*") if file.is_file()):
      stamp = file.stat().st_mtime_ns, file.stat().st_size
      if self.copied.get(file) != stamp:
        there = at(self.place) / file.relative_to(here).as_posix()
        with reached(str(there)):
          there.write_bytes(file.read_bytes())
        self.copied[file] = stamp

  def __exit__(self, kind, error, traceback):
    if not self.remote:
      return
    try:
      self.copy_up()
    except OSError as late:
      line = f"{late}; the files of this run are in {self.path}"
      if error is None:
        raise OSError(line) from late
      print(line, file=sys.stderr)
    else:
      shutil.rmtree(self.scratch)


@contextlib.contextmanager
def alone_in(workdir: str):
  """Holds the workdir's lock, on process 0, while the run lasts. Raises OSError if another run holds it.

  On gs:// there is no lock: two runs on one workdir are not kept apart. Raises ValueError where another process does
  not see the same workdir.
  """
  path = at(workdir) / "lock"
  with contextlib.ExitStack() as held:
    mine = _mark(path, held) if hosts.is_first() else None
    mark = hosts.from_first("the lock of the workdir", mine)
    if mark is None:
      raise OSError(f"{workdir} is in use by another run; wait for it, or take another --workdir")
    with reached(workdir):
      seen = mine == mark or appears(path, mark)
    blind = [i for i, sees in enumerate(hosts.gather("the workdir", seen)) if not sees]
    if blind:
      raise ValueError(
        f"process {', '.join(map(str, blind))} does not see in {workdir} what process 0 wrote there; "
        f"give a --workdir on a filesystem that all hosts share, or on gs://"
      )
    yield


def _mark(path: epath.Path, held: contextlib.ExitStack) -> str | None:
  """What this run wrote into the lock; None if another run holds it."""
  mark = uuid.uuid4().hex
  if is_remote(str(path)):
    with reached(str(path)):
      path.write_text(mark)
    return mark
  path.parent.mkdir(parents=True, exist_ok=True)
  lock = held.enter_context(path.open("a"))
  try:
    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
  except BlockingIOError:
    return None
  lock.truncate(0)
  lock.write(mark)
  lock.flush()
  return mark


def appears(path: epath.Path, text: str, seconds: float = 20) -> bool:
  """Whether the file comes to hold `text`: a shared filesystem may show it late."""
  end = time.monotonic() + seconds
  while not (path.exists() and path.read_text() == text):
    if time.monotonic() > end:
      return False
    time.sleep(0.1)
  return True
