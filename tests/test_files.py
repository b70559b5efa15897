# SPDX-License-Identifier: Apache-2.0
import hashlib

import pytest

from gpt2_jax.files import atomic_write, first_line, progress, sha256


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
