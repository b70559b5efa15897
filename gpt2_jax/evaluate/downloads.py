# SPDX-License-Identifier: Apache-2.0
"""Downloads published datasets over HTTP: atomic, checked by SHA-256, of archives what is named.

Nothing that was fetched is executed, and no path of an archive is used to write: a file is kept
under the name that its task declares.
"""

import contextlib
import functools
import hashlib
import http.client
import lzma
import pathlib
import shutil
import sys
import tarfile
import tempfile
import urllib.error
import urllib.parse
import urllib.request
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from typing import BinaryIO

from gpt2_jax.evaluate.sources import Download, Source, find_files
from gpt2_jax.files import (
  atomic_write,
  check_folder,
  check_writable,
  file_lock,
  first_line,
  local_path,
  summarize,
)

CHUNK = 2**20  # bytes read at once
TIMEOUT = 30  # seconds without a byte
# Some of the sites refuse Python's own name.
HEADERS = {"User-Agent": "Mozilla/5.0 (compatible; gpt2-jax)"}

# What reading a damaged archive raises; RuntimeError is of an encrypted one.
BAD_ARCHIVE = (
  tarfile.TarError,
  zipfile.BadZipFile,
  zlib.error,
  lzma.LZMAError,
  EOFError,
  OSError,
  RuntimeError,
)


def download_missing(sources: Iterable[Source], data: str) -> list[pathlib.Path]:
  """Fetches into the data folder what is not there yet; returns the files that came.

  A source without an address, because a form has to be signed or the user's own files are meant,
  is left out. Raises OSError if an address gives nothing, ValueError if it gives something else.
  """
  root = local_path(data)
  if root.is_file():
    raise ValueError(f"--download fetches into a folder, and {data} is a file; give another --data")
  check_folder(root)

  sources = list(sources)
  if not _missing(sources, data):
    return []
  fetched = []
  busy = f"another process fetches into {root}; waiting until it has ended"
  with file_lock(root / ".download.lock", busy, wait=True):
    # Asked again: that process may have fetched all.
    for (name, url), (sha256, members) in _missing(sources, data).items():
      fetched += _fetch(Download(url, sha256, tuple(members)), root / name)
  return fetched


def _missing(
  sources: Iterable[Source], data: str
) -> dict[tuple[str, str], tuple[str | None, list[str]]]:
  """What to fetch: for a dataset's name and an address the SHA-256, and the members of an archive.

  One archive may hold the files of several sources, and is fetched once.
  """
  missing = {}
  for source in sources:
    if find_files(source, data):
      continue
    for download in source.downloads:
      _, members = missing.setdefault((source.name, download.url), (download.sha256, []))
      members += [member for member in download.members if member not in members]
  return missing


def _fetch(download: Download, folder: pathlib.Path) -> list[pathlib.Path]:
  """Fetches one address into a dataset's folder: all of its files, or none."""
  url = download.url
  if urllib.parse.urlsplit(url).scheme not in ("http", "https"):
    raise ValueError(f"{url[:200]} is no http or https address, and is not fetched")

  # The first file has no name: it is gone with this process, however that ends.
  with tempfile.TemporaryFile(dir=folder.parent) as content:
    try:
      size, digest = _read(url, content, folder)
    except (OSError, http.client.HTTPException) as error:
      raise OSError(
        f"{url[:200]} cannot be fetched ({_reason(error)}); try again, or get it elsewhere, put "
        f"{summarize(download.names, 3)} into {folder}/, and leave --download out"
      ) from error

    if download.sha256 not in (None, digest):
      raise ValueError(
        f"{url[:200]} has the SHA-256 {digest}, and what was published has {download.sha256}: it "
        f"is damaged or was changed, and nothing of it was kept"
      )
    paths = _publish(download, content, folder)

  pin = "as published" if download.sha256 else "not pinned: nobody has recorded what it should be"
  print(f"fetched {url} into {folder}: {size:,} bytes, SHA-256 {digest} ({pin})", file=sys.stderr)
  return paths


def _read(url: str, content: BinaryIO, folder: pathlib.Path) -> tuple[int, str]:
  """Reads what is at an address into a file, with a progress bar; returns its size and SHA-256."""
  import tqdm

  request = urllib.request.Request(url, headers=HEADERS)
  digest = hashlib.sha256()
  with urllib.request.urlopen(request, timeout=TIMEOUT) as response:
    # A server may not say how much there is.
    length = response.headers.get("Content-Length", "")
    length = int(length) if length.isdecimal() else None
    check_writable(folder, length or 0)

    name = urllib.parse.urlsplit(url).path.rpartition("/")[2][:40]
    options = {"unit": "B", "unit_scale": True, "disable": None, "leave": False}
    with tqdm.tqdm(desc=name, total=length, **options) as bar:
      while chunk := response.read(CHUNK):
        content.write(chunk)
        digest.update(chunk)
        bar.update(len(chunk))

  # To the library, a connection that ends too early is no error.
  size = content.tell()
  if length not in (None, size):
    raise OSError(f"the connection ended after {size:,} of {length:,} bytes")
  return size, digest.hexdigest()


def _reason(error: Exception) -> str:
  """Why an address gave nothing, in a few words."""
  if isinstance(error, urllib.error.HTTPError):
    return f"HTTP {error.code} {error.reason}"[:100]
  if isinstance(error, urllib.error.URLError):
    return str(error.reason)[:100]
  return first_line(error, 200)


# ---- from what was fetched to files


def _publish(download: Download, content: BinaryIO, folder: pathlib.Path) -> list[pathlib.Path]:
  """Writes the files of an address. Those that are there already are left as they are."""
  content.seek(0)
  paths = [folder / name for name in download.names]
  paths = {path: member for path, member in zip(paths, download.members or [""], strict=True)}
  new = {path: member for path, member in paths.items() if not path.exists()}

  # All of them under hidden names first. The contexts end from the last to the first, so that the
  # file that the others accompany gets its name when they are there.
  with contextlib.ExitStack() as stack:
    partial = {stack.enter_context(atomic_write(path)): member for path, member in new.items()}
    if not download.members:
      for path in partial:
        _copy(content, path)
    else:
      _extract(download.url, content, partial)
  return list(new)


def _extract(url: str, content: BinaryIO, files: dict[pathlib.Path, str]) -> None:
  """Writes members of an archive, in one pass over it, to the paths that `files` has for them."""
  left = {member: path for path, member in files.items()}
  try:
    for name, size, open_member in _archive_files(content):
      # An archive may pack its files in a folder, or with ./ before them.
      members = [member for member in left if f"/{name}".endswith(f"/{member}")]
      for member in members:
        path = left.pop(member)
        check_writable(path, size)
        with open_member() as packed:
          _copy(packed, path)
      if not left:
        return
  except BAD_ARCHIVE as error:
    reason = first_line(error, 150)
    raise ValueError(f"{url[:200]} cannot be unpacked: {reason}") from error
  raise ValueError(f"{url[:200]} holds no {summarize(left, 3)}; nothing of it was kept")


def _archive_files(
  content: BinaryIO,
) -> Iterator[tuple[str, int, Callable[[], BinaryIO]]]:
  """The regular files of a zip or tar archive: path, size, and how to open it."""
  is_zip = zipfile.is_zipfile(content)
  content.seek(0)
  if is_zip:
    with zipfile.ZipFile(content) as archive:
      for info in archive.infolist():
        yield info.filename, info.file_size, functools.partial(archive.open, info)
    return

  with tarfile.open(fileobj=content) as archive:
    for info in archive:
      if info.isreg():
        yield info.name, info.size, functools.partial(archive.extractfile, info)


def _copy(content: BinaryIO, path: pathlib.Path) -> None:
  with open(path, "wb") as file:
    shutil.copyfileobj(content, file, CHUNK)
