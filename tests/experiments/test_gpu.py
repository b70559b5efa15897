# SPDX-License-Identifier: Apache-2.0
"""The comparison on a GPU: without one it says so at once."""

import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[2]


def test_without_a_gpu_it_is_one_line():
  pytest.importorskip("torch")
  pytest.importorskip("transformers")
  command = [sys.executable, str(ROOT / "experiments" / "gpu.py")]
  environment = os.environ | {"JAX_PLATFORMS": "cpu"}
  job = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)

  assert job.returncode == 2
  *_, last = job.stderr.strip().split("\n")
  assert last.startswith("error: ") and "GPU" in last
