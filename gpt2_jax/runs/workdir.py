# SPDX-License-Identifier: Apache-2.0
"""The workdir of a run: a local folder, or a gs:// path with a local scratch folder.

Checkpoints go to gs:// directly. An object there cannot be appended to, so metrics.jsonl and its
like are written to the scratch folder and uploaded whole.
"""

import contextlib
import fcntl
import functools
import importlib.util
import logging
import os
import pathlib
import re
import shutil
import sys
import tempfile
import time
import traceback
import typing
import uuid

import gpt2_jax.distributed as distributed
from gpt2_jax.files import first_line, summarize

if typing.TYPE_CHECKING:
  from etils import epath


def is_remote(path: str) -> bool:
  return "://" in path


def as_path(path: str) -> "epath.Path":
  """The path, local or gs://, with pathlib's methods.

  Raises ValueError for another scheme, ImportError if gcsfs is missing.
  """
  if not str(path).strip():
    raise ValueError("the path is empty; give a folder, or gs://BUCKET/PATH")
  if is_remote(path):
    if not re.match("gs://[^/]", path):
      raise ValueError(
        f"{path[:200]} is neither a local path nor gs://BUCKET/PATH; take one of these"
      )
    if importlib.util.find_spec("gcsfs") is None:
      raise ImportError("gs:// needs gcsfs: pip install 'gpt2_jax[gcs]'")
    _choose_gcs_client()

  from etils import epath

  return epath.Path(path)


@functools.cache
def _choose_gcs_client() -> None:
  """Makes gcsfs the one client for gs://, whatever else is installed.

  Only a process that uses gs:// gets these environment variables, at its first such path.
  """
  # etils would take TensorFlow's client wherever TensorFlow is installed. It reads the variable at
  # the first use of any path, a local one too, and keeps the answer: that is dropped here.
  os.environ.setdefault("EPATH_USE_TF", "false")
  from etils.epath import gpath

  with contextlib.suppress(AttributeError):  # a private name, which another version may not have
    gpath._is_tf_installed.cache_clear()

  # gcsfs would ask a gRPC service what kind of bucket it is. It reads the variable when it is
  # imported, which fsspec does at the first gs:// path.
  os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
  import fsspec

  # What it logs as an error, it raises, too: it would be told twice, with a traceback.
  logging.getLogger("gcsfs").setLevel(logging.CRITICAL)

  # No cache of listings: other hosts and TensorStore write, too.
  fsspec.config.conf.setdefault("gcs", {})["use_listings_cache"] = False


@contextlib.contextmanager
def cloud_errors(place: str):
  """Makes one OSError of what the clients of gs:// raise, which share no class.

  Errors of a local place stay what they are.
  """
  try:
    yield
  except Exception as error:
    if not is_remote(place):
      raise
    _release_buffers(error)
    raise OSError(
      f"{place} cannot be reached: {first_line(error, limit=200)}; "
      f"look at the bucket, its rights and this host's"
    ) from error


def _release_buffers(error: BaseException | None):
  """Drops the local variables of the frames that raised an error, and the errors before it.

  gcsfs holds views of its upload buffer there, in a loop with the error. Python 3.13.0 and most of
  3.12 crash where the garbage collector takes such a loop apart (CPython's gh-77894).
  """
  # A chain may lead back to its beginning, where an old error was raised again.
  seen = set()
  while error is not None and id(error) not in seen:
    seen.add(id(error))
    traceback.clear_frames(error.__traceback__)
    error = error.__cause__ or error.__context__


def exists(place: str) -> bool:
  """Whether there is such a file or folder; raises OSError if gs:// cannot be asked."""
  # `stat` and not etils' own `exists`, which says no where it could not ask
  path = as_path(place)
  with cloud_errors(place):
    try:
      path.stat()
    except FileNotFoundError:
      return False
  return True


class Workdir:
  """Where a run writes its files: `path`, a local folder. A local workdir is that folder itself.

  For a workdir on gs:// it is a scratch folder, which begins with the metrics.jsonl that is there,
  and with the run's name at Weights & Biases.
  (TensorBoard's new file needs no older one.) `upload` brings the files that changed to gs://, and
  so does the end of the context, however it comes.
  """

  def __init__(self, place: str):
    self.place = place
    self.path = place
    self.remote = is_remote(place)
    self.uploaded: dict[pathlib.Path, tuple] = {}  # the time and size of each file at its upload

  def __enter__(self):
    if self.remote:
      # The folder has the run's name, for the title of the plot.
      self.scratch = pathlib.Path(tempfile.mkdtemp(prefix="gpt2_jax_"))
      self.path = str(self.scratch / pathlib.PurePosixPath(self.place).name)
      os.mkdir(self.path)
      if distributed.is_primary():
        self._download("metrics.jsonl")
        self._download("wandb_id")
    return self

  def _download(self, name: str):
    if exists(f"{self.place}/{name}"):
      with cloud_errors(self.place):
        (pathlib.Path(self.path) / name).write_bytes((as_path(self.place) / name).read_bytes())

  def upload(self):
    """Uploads the files that changed since the last time; does nothing for a local workdir.

    Raises OSError with the first that cannot be written.
    """
    if not self.remote:
      return

    folder = pathlib.Path(self.path)
    for file in sorted(folder.rglob("*")):
      if not file.is_file():
        continue
      # The state is read before the content: what is written meanwhile goes up next time.
      state = file.stat().st_mtime_ns, file.stat().st_size
      if self.uploaded.get(file) != state:
        target = as_path(self.place) / file.relative_to(folder).as_posix()
        with cloud_errors(str(target)):
          target.write_bytes(file.read_bytes())
        self.uploaded[file] = state

  def __exit__(self, kind, error, traceback):
    if not self.remote:
      return

    # A failed upload keeps the scratch folder, and must not hide the run's own error.
    try:
      self.upload()
    except OSError as upload_error:
      line = f"{upload_error}; the files of this run are in {self.path}"
      if error is None:
        raise OSError(line) from upload_error
      print(line, file=sys.stderr)
    else:
      shutil.rmtree(self.scratch)


@contextlib.contextmanager
def lock(workdir: str):
  """Locks the workdir, on process 0, while the run lasts. Raises OSError if another run holds it.

  On gs:// there is no lock: two runs on one workdir are not kept apart. Raises ValueError if
  another process does not see the same workdir.
  """
  path = as_path(workdir) / "lock"
  with contextlib.ExitStack() as held:
    # 1. Process 0 takes the lock and writes a mark of this run into it.
    own_mark = _acquire(path, held) if distributed.is_primary() else None
    mark = distributed.broadcast("the lock of the workdir", own_mark)
    if mark is None:
      raise OSError(f"{workdir} is in use by another run; wait for it, or take another --workdir")

    # 2. The others look for the mark: a path may be another disk on another host.
    check_shared(path, mark, own_mark == mark, "--workdir")
    yield


def check_shared(path: "epath.Path", mark: str, is_writer: bool, flag: str):
  """Checks that every process sees the mark that process 0 wrote into a file.

  Raises ValueError, on every process alike, with the flag that needs another place.
  """
  with cloud_errors(str(path)):
    is_seen = is_writer or wait_for_text(path, mark)
  all_see = distributed.all_gather_json("the shared folder", is_seen)
  blind = [str(process) for process, sees in enumerate(all_see) if not sees]
  if blind:
    raise ValueError(
      f"process {summarize(blind)} does not see in {path.parent} what process 0 wrote there; "
      f"give a {flag} on a filesystem that all hosts share, or on gs://"
    )


def _acquire(path: "epath.Path", held: contextlib.ExitStack) -> str | None:
  """The mark that this run wrote into the lock; None if another run holds it."""
  mark = uuid.uuid4().hex
  if is_remote(str(path)):
    with cloud_errors(str(path)):
      path.write_text(mark)
    return mark

  # flock is dropped by the kernel when the process ends, however it does: no lock is left behind.
  path.parent.mkdir(parents=True, exist_ok=True)
  file = held.enter_context(path.open("a"))
  try:
    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
  except BlockingIOError:
    return None

  # Opened to append and not to write: the holder's mark must survive a failed attempt.
  file.truncate(0)
  file.write(mark)
  file.flush()
  return mark


def wait_for_text(path: "epath.Path", text: str, seconds: float = 20) -> bool:
  """Waits until the file holds `text`, which a shared filesystem may show late; False if never."""
  deadline = time.monotonic() + seconds
  while not (path.exists() and path.read_text() == text):
    if time.monotonic() > deadline:
      return False
    time.sleep(0.1)
  return True
