# SPDX-License-Identifier: Apache-2.0
"""Atomic writes: every format is written whole or not at all, and overwrites nothing."""

import contextlib
import json
import os
import pathlib
import signal
import subprocess
import sys

import numpy as np
import pytest

from gpt2_jax.convert import names, pretrained
from gpt2_jax.convert.weights import Weights
from gpt2_jax.files import atomic_write
from gpt2_jax.model import ModelConfig
from gpt2_jax.tokenizer import Characters

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


# Forks writers of one model each, whose numbers are all n and whose tokenizer has n characters
# (none for an even n). A slow tensor gives a kill, or another writer, something to hit.
WRITERS = """
import glob, json, os, random, signal, sys, time
import huggingface_hub, numpy as np, safetensors.numpy
from gpt2_jax.convert import names, pretrained
from gpt2_jax.convert.weights import Weights
from gpt2_jax.model import ModelConfig
from gpt2_jax.tokenizer import Characters

config = ModelConfig(131, 16, 16, 4, 2)

def write(n, form, to):
  def read(name):
    time.sleep(0.001)
    return np.full(names.shapes(config)[name], n, np.float32)
  tokenizer = Characters("abcdefghij"[:n]) if n % 2 else None
  pretrained.write(Weights(config, read, tokenizer, "a test"), to, form)

def fork(ready, n, form, to):
  pid = os.fork()
  if pid:
    return pid
  os.read(ready, 1)
  status = 1
  try:
    write(n, form, to)
    status = 0
  except FileExistsError:
    status = 3
  except BaseException as error:
    print(repr(error), file=sys.stderr)
  finally:
    os._exit(status)

def together(form, to):
  ready, go = os.pipe()
  pids = [fork(ready, n, form, to) for n in range(1, 9)]
  os.write(go, bytes(8))
  return [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]

def hidden(to):
  folder, name = os.path.split(to)
  return f"{folder}/.{name}.*.partial/*"

def killed(form, to, count):
  rng, statuses = random.Random(form), []
  for n in range(count):
    ready, go = os.pipe()
    pid = fork(ready, 5, form, f"{to}{n}")
    os.write(go, b"x")
    # Half of them at any time, and half once they write: a busy machine is slow to begin.
    while n % 2 and not glob.glob(f"{to}{n}") and not glob.glob(hidden(f"{to}{n}")):
      time.sleep(0.001)
    time.sleep(rng.uniform(0, 0.04 if n % 2 else 0.08))
    os.kill(pid, signal.SIGKILL)
    statuses.append(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
  return statuses
"""


def run_writers(call: str) -> list[int]:
  """What a call of one of the functions in WRITERS returns, in a process of its own."""
  job = subprocess.run(
    [sys.executable, "-c", f"{WRITERS}\nprint(json.dumps({call}))"],
    env=os.environ | {"PYTHONPATH": str(ROOT)},
    capture_output=True,
    text=True,
    timeout=60,
  )
  assert job.returncode == 0 and not job.stderr, job.stderr
  return json.loads(job.stdout)


def check_is_whole(path: pathlib.Path) -> int:
  """The number that all weights of a checkpoint are, by which its tokenizer has to be, too."""
  weights = pretrained.open_weights(str(path))
  numbers = {float(x) for name in names.shapes(weights.config) for x in weights.read(name).flat}
  assert len(numbers) == 1
  n = int(numbers.pop())
  assert weights.tokenizer == (Characters("abcdefghij"[:n]) if n % 2 else None)
  return n


@pytest.mark.parametrize("form", ["hf", "llmc"])
def test_of_eight_at_once_one_is_whole_and_the_others_are_refused(form, tmp_path):
  statuses = run_writers(f"together({form!r}, {str(tmp_path / 'to')!r})")
  assert sorted(statuses) == [0] + [3] * 7
  n = check_is_whole(tmp_path / "to")
  assert statuses[n - 1] == 0
  extra = ["to.tokenizer.json"] if form == "llmc" and n % 2 else []
  assert sorted(path.name for path in tmp_path.iterdir()) == ["to", *extra], "nothing is left over"


@pytest.mark.parametrize("form", ["hf", "llmc"])
def test_random_kills_leave_a_checkpoint_whole_or_not_at_all(form, tmp_path):
  """And what they do leave is gone after the next writer of that name."""
  statuses = run_writers(f"killed({form!r}, {str(tmp_path / 'to')!r}, 20)")
  assert set(statuses) <= {0, -signal.SIGKILL} and statuses.count(-signal.SIGKILL) >= 5
  for n, status in enumerate(statuses):
    path = tmp_path / f"to{n}"
    assert path.exists() or status != 0
    if path.exists():
      assert check_is_whole(path) == 5

  assert list(tmp_path.glob(".*.partial")), "some were killed in the middle"
  weights = Weights(ModelConfig(131, 16, 16, 4, 2), zeros, None, "a test")
  for n in range(20):
    # A name that is taken stays as it is.
    with contextlib.suppress(FileExistsError):
      pretrained.write(weights, str(tmp_path / f"to{n}"), form)
  assert not list(tmp_path.glob(".*.partial"))


def test_what_a_killed_writer_left_goes_where_its_tokenizer_is_in_the_way(tmp_path):
  (tmp_path / ".to.0123.partial").mkdir()
  (tmp_path / "to.tokenizer.json").write_text("its tokenizer")
  weights = Weights(ModelConfig(131, 16, 16, 4, 2), zeros, None, "a test")
  with pytest.raises(FileExistsError, match="to.tokenizer.json"):
    pretrained.write(weights, str(tmp_path / "to"), "llmc")
  assert [path.name for path in tmp_path.iterdir()] == ["to.tokenizer.json"]


def zeros(name: str) -> np.ndarray:
  return np.zeros(names.shapes(ModelConfig(131, 16, 16, 4, 2))[name], np.float32)
