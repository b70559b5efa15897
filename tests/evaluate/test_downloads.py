# SPDX-License-Identifier: Apache-2.0
"""Datasets over HTTP, from a server on this machine: what is kept, refused, and said."""

import functools
import hashlib
import http.server
import io
import os
import socket
import tarfile
import threading
import zipfile

import pytest

from gpt2_jax.evaluate import downloads, tasks
from gpt2_jax.evaluate.sources import Download, Source, find_files, load
from gpt2_jax.evaluate.tasks.perplexity import whole_file

TEXT = b"It was a dark and stormy night.\n" * 999


class Server(http.server.ThreadingHTTPServer):
  """Serves `files` by path; of those in `cut` only the first half comes."""

  def __init__(self):
    self.files: dict[str, bytes] = {}
    self.cut: set[str] = set()
    self.asked: list[str] = []
    super().__init__(("127.0.0.1", 0), Handler)

  def url(self, path: str) -> str:
    return f"http://127.0.0.1:{self.server_address[1]}/{path}"


class Handler(http.server.BaseHTTPRequestHandler):
  def do_GET(self):
    path = self.path[1:]
    self.server.asked.append(path)
    if path == "moved":
      self.send_response(302)
      self.send_header("Location", "/text.txt")
      return self.end_headers()
    content = self.server.files.get(path)
    if content is None:
      return self.send_error(404)

    self.send_response(200)
    self.send_header("Content-Length", str(len(content)))
    self.end_headers()
    if path in self.server.cut:
      content = content[: len(content) // 2]
    self.wfile.write(content)

  def log_message(self, *_):
    pass


@pytest.fixture
def server():
  with Server() as server:
    server.files["text.txt"] = TEXT
    thread = threading.Thread(target=functools.partial(server.serve_forever, 0.01))
    thread.start()
    yield server
    server.shutdown()
    thread.join()


def toy(*given: Download, files: tuple[str, ...] = ("text.txt",)) -> Source:
  return Source("toy", files, whole_file, "https://toy.example", downloads=given)


def sha256(content: bytes) -> str:
  return hashlib.sha256(content).hexdigest()


def contents(folder) -> dict[str, bytes]:
  """All that is under a folder but the lock."""
  files = [path for path in folder.rglob("*") if path.is_file() and path.name[0] != "."]
  assert not list(folder.rglob("*.partial"))
  return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def tar(members: dict[str, bytes]) -> bytes:
  packed = io.BytesIO()
  with tarfile.open(fileobj=packed, mode="w:gz") as archive:
    for name, content in members.items():
      info = tarfile.TarInfo(name)
      info.size = len(content)
      archive.addfile(info, io.BytesIO(content))
  return packed.getvalue()


def zipped(members: dict[str, bytes]) -> bytes:
  packed = io.BytesIO()
  with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
    for name, content in members.items():
      archive.writestr(name, content)
  return packed.getvalue()


def refused(error, source: Source, data) -> str:
  """The one line that is said, after which nothing is in the folder."""
  with pytest.raises(error) as raised:
    downloads.download_missing([source], str(data))
  line = str(raised.value)
  assert "\n" not in line and len(line) < 600 and contents(data) == {}
  return line


def test_a_file_comes_once_is_what_was_published_and_can_be_loaded(server, tmp_path, capfd):
  source = toy(Download(server.url("text.txt"), sha256(TEXT)))
  assert downloads.download_missing([source, source], str(tmp_path)) == [
    tmp_path / "toy" / "text.txt"
  ]
  assert contents(tmp_path) == {"toy/text.txt": TEXT}
  assert load(source, str(tmp_path)).rows == [{"text": TEXT.decode()}]
  assert "SHA-256 " + sha256(TEXT) + " (as published)" in capfd.readouterr().err

  # What is there is not fetched again, and is never overwritten.
  (tmp_path / "toy" / "text.txt").write_bytes(b"mine")
  assert downloads.download_missing([source], str(tmp_path)) == []
  assert contents(tmp_path) == {"toy/text.txt": b"mine"} and server.asked == ["text.txt"]


def test_a_hash_that_nobody_knows_is_said_and_not_invented(server, tmp_path, capfd):
  downloads.download_missing([toy(Download(server.url("text.txt")))], str(tmp_path))
  said = capfd.readouterr().err
  assert sha256(TEXT) in said and "not pinned" in said
  assert downloads.download_missing(
    [toy(Download(server.url("moved")), files=("moved",))], str(tmp_path)
  )


def test_other_bytes_than_were_published_are_not_kept(server, tmp_path):
  line = refused(ValueError, toy(Download(server.url("text.txt"), "0" * 64)), tmp_path)
  assert sha256(TEXT) in line and "0" * 64 in line and "nothing of it was kept" in line


@pytest.mark.parametrize("path, reason", [("text.txt", "connection ended"), ("no.txt", "HTTP 404")])
def test_what_does_not_come_whole_is_not_kept(server, tmp_path, path, reason):
  server.cut.add("text.txt")
  source = toy(Download(server.url(path)), files=(path,))
  line = refused(OSError, source, tmp_path)
  assert reason in line and f"put {path} into {tmp_path}/toy/" in line


def test_without_a_network_it_is_one_line_with_the_way_out(tmp_path):
  with socket.socket() as unused:
    unused.bind(("127.0.0.1", 0))
    port = unused.getsockname()[1]
  for address in (f"127.0.0.1:{port}", "host.invalid"):
    line = refused(OSError, toy(Download(f"http://{address}/text.txt")), tmp_path)
    assert "cannot be fetched (" in line and "leave --download out" in line


@pytest.mark.parametrize("pack", [tar, zipped])
def test_of_an_archive_only_what_is_named_is_kept(server, tmp_path, pack):
  other = {f"../../{tmp_path.name}-evil": b"evil", "/etc/evil": b"evil", "set/big": b"1" * 9999}
  other |= {"set/text.txt.bak": b"2", "subset/text.txt": b"3"}
  members = {"./set/text.txt": TEXT, "set/labels": b"4"}
  server.files["set"] = pack(other | members)
  download = Download(
    server.url("set"), sha256(server.files["set"]), ("set/text.txt", "set/labels")
  )
  assert len(downloads.download_missing([toy(download)], str(tmp_path))) == 2
  assert contents(tmp_path) == {"toy/text.txt": TEXT, "toy/labels": b"4"}
  assert not list(tmp_path.parent.glob("*-evil")) and not os.path.exists("/etc/evil")


def test_what_an_archive_has_and_the_folder_too_is_left_as_it_is(server, tmp_path):
  server.files["set.zip"] = zipped({"text.txt": TEXT, "labels": b"theirs"})
  (tmp_path / "toy").mkdir()
  (tmp_path / "toy" / "labels").write_bytes(b"mine")
  download = Download(server.url("set.zip"), None, ("text.txt", "labels"))
  assert downloads.download_missing([toy(download)], str(tmp_path)) == [
    tmp_path / "toy" / "text.txt"
  ]
  assert contents(tmp_path) == {"toy/text.txt": TEXT, "toy/labels": b"mine"}


def test_one_archive_serves_two_sources_in_one_request(server, tmp_path):
  server.files["set.zip"] = zipped({"set/text.txt": TEXT, "set/train.txt": b"train"})
  both = [
    toy(Download(server.url("set.zip"), None, (f"set/{name}",)), files=(name,))
    for name in ("text.txt", "train.txt")
  ]
  downloads.download_missing(both, str(tmp_path))
  assert contents(tmp_path) == {"toy/text.txt": TEXT, "toy/train.txt": b"train"}
  assert server.asked == ["set.zip"]


@pytest.mark.parametrize(
  "packed",
  [
    tar({"set/other": TEXT}),
    zipped({"set/other": TEXT}),
    tar({"set/text.txt": os.urandom(9999)})[:5000],
    zipped({"set/text.txt": TEXT})[:150],
    b"<html>Sign in</html>",
    b"",
  ],
)
def test_an_archive_that_is_damaged_or_lacks_the_file_leaves_nothing(server, tmp_path, packed):
  server.files["set"] = packed
  members = ("set/text.txt", "set/labels")
  line = refused(ValueError, toy(Download(server.url("set"), None, members)), tmp_path)
  assert "cannot be unpacked" in line or "holds no " in line


def test_a_link_in_an_archive_is_not_followed(server, tmp_path):
  packed = io.BytesIO()
  with tarfile.open(fileobj=packed, mode="w") as archive:
    link = tarfile.TarInfo("set/text.txt")
    link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
    archive.addfile(link)
  server.files["set"] = packed.getvalue()
  line = refused(ValueError, toy(Download(server.url("set"), None, ("set/text.txt",))), tmp_path)
  assert "holds no set/text.txt" in line


def test_what_has_no_address_is_left_out_and_other_schemes_are_refused(tmp_path):
  assert downloads.download_missing([toy()], str(tmp_path)) == [] and contents(tmp_path) == {}
  (tmp_path / "text.txt").write_bytes(b"local")
  line = str(tmp_path / "text.txt")
  with pytest.raises(ValueError, match="is no http or https address"):
    downloads.download_missing([toy(Download(f"file://{line}"))], str(tmp_path / "data"))
  with pytest.raises(ValueError, match="is a file; give another --data"):
    downloads.download_missing([toy(Download("http://host.invalid/text.txt"))], line)


def all_sources() -> list[Source]:
  found = {}
  for protocols in tasks.TASKS.values():
    for task in protocols.values():
      found |= dict.fromkeys([task.source, task.source.examples])
  return [source for source in found if source is not None]


def test_what_the_tasks_name_is_what_they_then_find(tmp_path):
  for source in all_sources():
    for download in source.downloads:
      for name in download.names:
        (tmp_path / source.name).mkdir(exist_ok=True)
        (tmp_path / source.name / name).touch()
  for source in all_sources():
    assert bool(find_files(source, str(tmp_path))) == bool(source.downloads), source
  without = {source.name for source in all_sources() if not source.downloads}
  assert without == {"text", "storycloze", "cnn_dailymail", "memorization"}


def test_the_recorded_hashes_are_those_of_the_files_at_hand():
  data = os.environ.get("GPT2_JAX_TEST_DATA")
  if not data:
    pytest.skip("GPT2_JAX_TEST_DATA has the published files")
  checked = 0
  for source in all_sources():
    for download in source.downloads:
      path = os.path.join(data, source.name, download.names[0])
      if download.members or not os.path.exists(path):
        continue
      with open(path, "rb") as file:
        assert sha256(file.read()) == download.sha256, path
      checked += 1
  # LAMBADA, PTB, and twelve of BLiMP's sets
  assert checked >= 14
