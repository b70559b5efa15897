# SPDX-License-Identifier: Apache-2.0
"""Weights & Biases by its own library, offline: what is written, where, and what is not."""

import importlib.util
import os
import pathlib
import subprocess
import sys

import pytest

from gpt2_jax.runs.weights_and_biases import WeightsAndBiases, check_wandb

ROOT = pathlib.Path(__file__).parents[2]
SECRET = "0123456789abcdef0123456789abcdef01234567"


def contents(folder) -> bytes:
  return b"".join(path.read_bytes() for path in folder.rglob("*") if path.is_file())


def test_a_run_is_written_resumes_under_its_id_and_holds_no_secret(tmp_path, monkeypatch):
  pytest.importorskip("wandb")
  monkeypatch.setenv("WANDB_MODE", "offline")
  monkeypatch.setenv("WANDB_API_KEY", SECRET)
  for step in (0, 4):
    board = WeightsAndBiases("project", str(tmp_path), "run", step, {"seed": step}, print)
    board.write(step + 1, {"loss": 2.5, "val_loss": float("nan"), "batch_hash": 77})
    board.write_text(step + 1, "eval/sample", "<b>text")
    board.close()

  runs = [path.name for path in (tmp_path / "wandb").glob("offline-run-*")]
  run_id = (tmp_path / "wandb_id").read_text().strip()
  # offline-run-TIME-ID, and -1 after it where two began in one second.
  assert len(runs) == 2 and {name.split("-")[3] for name in runs} == {run_id}
  written = contents(tmp_path / "wandb")
  assert b"train/loss" in written and b"eval/loss" in written and b"&lt;b&gt;text" in written
  assert SECRET.encode() not in written and b"batch_hash" not in written


def test_a_run_from_step_0_is_a_new_one(tmp_path, monkeypatch):
  pytest.importorskip("wandb")
  monkeypatch.setenv("WANDB_MODE", "disabled")
  ids = set()
  for _ in range(2):
    WeightsAndBiases("project", str(tmp_path), "run", 0, {}, print).close()
    ids.add((tmp_path / "wandb_id").read_text())
  assert len(ids) == 2


# In a process of its own: the library remembers who has logged in.
NOBODY = """
from gpt2_jax.runs.weights_and_biases import WeightsAndBiases
WeightsAndBiases("project", ".", "run", 0, {}, print)
"""


def test_nobody_logged_in_is_one_line_at_the_start(tmp_path):
  pytest.importorskip("wandb")
  env = {name: value for name, value in os.environ.items() if not name.startswith("WANDB")}
  env |= {"HOME": str(tmp_path), "NETRC": str(tmp_path / "netrc")}
  env["PYTHONPATH"] = os.pathsep.join([str(ROOT), env.get("PYTHONPATH", "")])
  result = subprocess.run(
    [sys.executable, "-c", NOBODY],
    cwd=tmp_path,
    env=env,
    capture_output=True,
    stdin=subprocess.DEVNULL,
  )
  line = result.stderr.decode().strip().splitlines()[-1]
  assert line.startswith("OSError: wandb_project project: ") and len(line) < 600
  assert "wandb login" in line and "WANDB_MODE=offline" in line


def test_without_the_library_a_project_is_refused_with_its_extra(monkeypatch):
  monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
  check_wandb("")
  with pytest.raises(ImportError, match=r"pip install wandb \(extra \[wandb\]\)"):
    check_wandb("project")
