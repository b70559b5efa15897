# SPDX-License-Identifier: Apache-2.0
import os
import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).parents[1]
TESTS = """
import pytest

def test_needs_a_package():
  pytest.importorskip("no_such_package")

@pytest.mark.skipif(True, reason="GPT2_JAX_TEST_DATA is not set")
def test_needs_data():
  pass

def test_needs_a_privilege():
  pytest.skip("this process may not mount a tmpfs")

def test_passes():
  pass
"""
FILE = """
import pytest

pytest.importorskip("no_such_oracle")
"""


def test_with_oracles_nothing_skips_for_want_of_what_should_be_there(tmp_path):
  """A package or named data that is missing: a failure, of one test and of a file. Other skips
  stay skips."""
  (tmp_path / "test_some.py").write_text(TESTS)
  (tmp_path / "test_file.py").write_text(FILE)
  command = [
    sys.executable,
    "-m",
    "pytest",
    "-p",
    "tests.conftest",
    "-p",
    "no:cacheprovider",
    "-ra",
  ]
  command += ["--rootdir", str(tmp_path), "-n", "1", "--continue-on-collection-errors"]
  command += ["--oracles", str(tmp_path)]
  done = subprocess.run(
    command,
    cwd=ROOT,
    env=os.environ | {"GPT2_JAX_TEST_DATA": str(tmp_path)},
    capture_output=True,
    text=True,
  )

  assert done.returncode == 1, done.stdout + done.stderr
  assert "1 failed, 1 passed, 1 skipped, 2 errors" in done.stdout, done.stdout
  assert "could not import 'no_such_package'" in done.stdout
  assert "could not import 'no_such_oracle'" in done.stdout
