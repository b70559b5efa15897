# SPDX-License-Identifier: Apache-2.0
"""Comparing two checkouts: what is no checkout is refused."""

import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).parents[2]


def compare(*flags: str) -> subprocess.CompletedProcess:
  command = [sys.executable, str(ROOT / "experiments" / "regression.py"), *flags]
  return subprocess.run(command, capture_output=True, text=True, timeout=300)


def test_what_is_no_checkout_is_one_line(tmp_path):
  job = compare(f"--before={tmp_path}")
  assert job.returncode == 2
  assert job.stderr.startswith("error: ") and job.stderr.count("\n") == 1
  assert "no checkout" in job.stderr
