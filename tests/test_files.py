# SPDX-License-Identifier: Apache-2.0
import hashlib
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from gpt2_jax.files import (
  announce,
  announce_if,
  atomic_write,
  file_lock,
  first_line,
  local_path,
  progress,
  read_json_object,
  sha256,
  shows_wait,
  source_commit,
  summarize,
  user_path,
)

ROOT = pathlib.Path(__file__).parents[1]


def test_an_overwrite_leaves_the_old_file_or_the_new_one(tmp_path):
  path = tmp_path / "new folder" / "file"
  with (
    pytest.raises(OSError, match="the disk is gone"),
    atomic_write(path, overwrite=True) as partial,
  ):
    partial.write_text("half")
    raise OSError("the disk is gone")
  assert not list(path.parent.iterdir())
  for text in ("first", "second"):
    with atomic_write(path, overwrite=True) as partial:
      partial.write_text(text)
    assert path.read_text() == text and list(path.parent.iterdir()) == [path]
  with pytest.raises(KeyboardInterrupt), atomic_write(path, overwrite=True) as partial:
    partial.write_text("half")
    raise KeyboardInterrupt
  assert path.read_text() == "second" and list(path.parent.iterdir()) == [path]


def test_sha256_of_a_file_is_that_of_its_bytes(tmp_path):
  content = bytes(range(256)) * 4096
  (tmp_path / "file").write_bytes(content)
  assert sha256(tmp_path / "file") == sha256(content) == hashlib.sha256(content).hexdigest()


@pytest.mark.parametrize(
  ("error", "line"),
  [
    (ValueError("one\ntwo"), "one"),
    (OSError("\n  one  \n\n"), "one"),
    (KeyboardInterrupt(), "KeyboardInterrupt"),
    (RuntimeError(" \n"), "RuntimeError"),
    (ValueError("x" * 999), "x" * 300),
  ],
)
def test_the_first_line_of_an_error_is_bounded_and_never_empty(error, line):
  assert first_line(error) == line
  assert first_line(error, limit=2) == line[:2]


def test_progress_gives_the_items_and_draws_on_a_terminal_alone(capfd):
  assert list(progress(range(3), "counting")) == [0, 1, 2]
  assert capfd.readouterr() == ("", "")


KILLED = """
import os, pathlib, signal, sys
from gpt2_jax.files import atomic_write
with atomic_write(pathlib.Path(sys.argv[1])) as partial:
  partial.write_text("half")
  os.kill(os.getpid(), signal.SIGKILL)
"""


def test_what_a_kill_leaves_is_removed_by_the_next_writer_and_a_living_one_is_not(tmp_path):
  path = tmp_path / "file"
  environment = os.environ | {"PYTHONPATH": str(ROOT)}
  killed = subprocess.run([sys.executable, "-c", KILLED, str(path)], env=environment, timeout=60)
  assert killed.returncode == -signal.SIGKILL
  assert len(list(tmp_path.glob(".file.*.partial"))) == 1

  with atomic_write(path, overwrite=True) as living:
    living.write_text("living")
    with atomic_write(path, overwrite=True) as other:
      other.write_text("other")
    assert path.read_text() == "other" and living.read_text() == "living"
    assert list(tmp_path.glob(".file.*.partial")) == [living.parent]
  assert path.read_text() == "living" and list(tmp_path.iterdir()) == [path]


def test_what_a_kill_leaves_of_a_whole_file_is_removed_by_who_is_refused(tmp_path):
  (tmp_path / "file").write_text("whole")
  (tmp_path / ".file.0123456789abcdef.partial").mkdir()
  with pytest.raises(FileExistsError), atomic_write(tmp_path / "file"):
    pass
  assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_lock_is_held_by_one_and_free_afterwards(tmp_path):
  path = tmp_path / "new folder" / "lock"
  with file_lock(path, "busy"), pytest.raises(OSError, match="^busy$"), file_lock(path, "busy"):
    pass
  with file_lock(path, "busy"):
    pass


def test_paths_as_people_type_them(tmp_path, monkeypatch):
  monkeypatch.setenv("HOME", str(tmp_path))
  monkeypatch.chdir(tmp_path)
  assert user_path("~/runs") == f"{tmp_path}/runs" and user_path("a/~") == "a/~"
  assert user_path("gs://bucket/a") == "gs://bucket/a"
  assert str(local_path("~/runs")) == f"{tmp_path}/runs"
  for path in ("", " ", "~no_such_user/runs", "a\0b"):
    with pytest.raises(ValueError, match="path|user"):
      user_path(path)
  with pytest.raises(ValueError, match="is a URL"):
    local_path("gs://bucket/a")
  (tmp_path / "~here").touch()
  assert user_path("~here") == "~here"


@pytest.mark.parametrize(
  ("content", "fault"),
  [
    (b"[" * 200_000, "nested too deep|no JSON"),
    (b'{"a": ' * 100_000, "nested too deep|no JSON"),
    (b"\xff{}", "is not UTF-8 at byte 0"),
    (b"", "no JSON"),
    (b"[]", "holds a list, not an object"),
    (b"null", "holds a NoneType, not an object"),
    (b"1" * 5000, "no JSON|holds a int"),
  ],
)
def test_json_of_any_kind_is_one_line_with_its_path(content, fault, tmp_path):
  (tmp_path / "file.json").write_bytes(content)
  with pytest.raises(ValueError, match=fault) as error:
    read_json_object(tmp_path / "file.json")
  assert "file.json" in str(error.value) and len(str(error.value)) < 400


def test_a_long_list_is_summed_up():
  assert summarize(["a", 2]) == "a, 2"
  assert summarize(range(1000), limit=3) == "0, 1, 2, and 997 more"
  assert len(summarize(["x" * 1000] * 20)) < 8 * 82 + 20
  assert summarize(["/a" * 100 + "/gone.txt"]).endswith("/gone.txt")


def test_a_long_wait_is_announced_once_and_a_short_one_not(capsys):
  with announce("compiling, about a minute", seconds=0.02):
    time.sleep(0.2)
  assert capsys.readouterr().err == "compiling, about a minute\n"
  with announce("loading", seconds=0.2):
    pass
  with pytest.raises(OSError, match="gone"), announce("loading", seconds=0.2):
    raise OSError("gone")
  time.sleep(0.4)
  assert capsys.readouterr() == ("", "")


def test_of_waits_inside_one_another_the_outermost_speaks(capsys):
  with announce("outer", seconds=0.02), announce("inner", seconds=0.02):
    time.sleep(0.2)
  with shows_wait(), announce("beside a spinner", seconds=0.02):
    time.sleep(0.2)
  with announce("after", seconds=0.02):
    time.sleep(0.2)
  assert capsys.readouterr().err == "outer\nafter\n"


def test_other_processes_and_a_closed_stderr_announce_nothing(capsys, monkeypatch):
  announce_if(False)
  with announce("compiling", seconds=0.01):
    time.sleep(0.1)
  announce_if(True)
  monkeypatch.setattr(sys, "stderr", None)
  with announce("compiling", seconds=0.01):
    time.sleep(0.1)
  assert capsys.readouterr() == ("", "")


def test_the_codes_commit_is_gits():
  if not (ROOT / ".git").exists():
    assert source_commit() == ""
    return
  command = ["git", "-C", str(ROOT), "rev-parse", "HEAD"]
  head = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
  assert source_commit().removesuffix("-dirty") == head
