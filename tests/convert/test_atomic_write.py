# SPDX-License-Identifier: Apache-2.0
"""Atomic writes: every format is written whole or not at all, and overwrites nothing."""

import os
import pathlib
import signal
import subprocess
import sys

import pytest

from gpt2_jax.convert import pretrained
from gpt2_jax.convert.weights import Weights
from gpt2_jax.files import atomic_write
from gpt2_jax.model import ModelConfig

ROOT = pathlib.Path(__file__).parents[2]
FORMS = ["hf", "orbax", "nanogpt", "llmc"]
# Writes every format, and is killed in the middle of each.
KILLED = """
import os, signal, sys
import numpy as np
from gpt2_jax.convert import pretrained
from gpt2_jax.convert import names
from gpt2_jax.convert.weights import Weights
from gpt2_jax.model import ModelConfig
config = ModelConfig(131, 16, 16, 4, 2, gelu="erf")
def read(name):
  if name == "ln_f.g":
    os.kill(os.getpid(), signal.SIGKILL)
  return np.ones(names.shapes(config)[name], np.float32)
form, to = sys.argv[1:]
if form == "llmc":
  config = ModelConfig(131, 16, 16, 4, 2)
pretrained.write(Weights(config, read, None, "a test"), to, form)
"""


@pytest.mark.parametrize("form", FORMS)
def test_an_error_in_the_middle_leaves_nothing(form, made, tmp_path):
  whole = made(ModelConfig(131, 16, 16, 4, 2, gelu="tanh" if form == "llmc" else "erf"))
  seen = []

  def read(name):
    seen.append(name)
    if len(seen) == 20:
      raise OSError("the disk is gone")
    return whole.read(name)

  if form == "nanogpt":
    pytest.importorskip("torch")
  with pytest.raises(OSError, match="the disk is gone"):
    pretrained.write(Weights(whole.config, read, None, "a test"), str(tmp_path / "to"), form)
  assert len(seen) == 20 and not list(tmp_path.iterdir())


def test_a_kill_in_the_middle_leaves_no_checkpoint(tmp_path):
  """None of the name that was asked for."""
  environment = os.environ | {"PYTHONPATH": str(ROOT)}
  jobs = {
    form: subprocess.Popen(
      [sys.executable, "-c", KILLED, form, str(tmp_path / form)], env=environment
    )
    for form in ("hf", "llmc")
  }
  for form, job in jobs.items():
    assert job.wait(timeout=60) == -signal.SIGKILL
    assert not (tmp_path / form).exists()
    assert any(form in path.name for path in tmp_path.iterdir()), "it was in the middle"


def test_nothing_is_overwritten(tmp_path):
  pytest.importorskip("torch")
  (tmp_path / "there").write_text("mine")
  for form in FORMS:
    weights = Weights(ModelConfig(), None, None, "a test")
    with pytest.raises(
      FileExistsError, match="there is there already; take another name, or move it away"
    ):
      pretrained.write(weights, str(tmp_path / "there"), form, other_gelu=True)
  assert (tmp_path / "there").read_text() == "mine"
  assert [path.name for path in tmp_path.iterdir()] == ["there"]


def test_of_two_at_once_the_first_to_end_stays(tmp_path):
  """A file and a folder, by two writers of one process number."""
  for name, make in (("file", lambda path, text: path.write_text(text)), ("folder", folder_with)):
    refusal = pytest.raises(
      FileExistsError, match="written by another process meanwhile, and is left as it is"
    )
    with refusal, atomic_write(tmp_path / name) as late:
      with atomic_write(tmp_path / name) as early:
        make(early, "early")
      make(late, "late")
  assert (tmp_path / "file").read_text() == (tmp_path / "folder" / "x").read_text() == "early"
  assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder"]


def folder_with(path, text):
  path.mkdir()
  (path / "x").write_text(text)
