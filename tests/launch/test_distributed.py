# SPDX-License-Identifier: Apache-2.0
"""A run on many processes: stopped, killed and resumed on other numbers, it sees the same batches.

GPT2_JAX_KILLS=10 kills more often than the one time that fits a suite.
"""

import contextlib
import json
import os
import pathlib
import random
import signal
import socket
import subprocess
import sys
import time

import jax
import pytest

from gpt2_jax import distributed

ROOT = pathlib.Path(__file__).parents[2]
KILLS = int(os.environ.get("GPT2_JAX_KILLS", "1"))
STEPS, SAVE_EVERY = 20 + 10 * KILLS, 5
HOST = socket.gethostname()


@pytest.fixture(scope="module")
def data(tmp_path_factory):
  folder = tmp_path_factory.mktemp("data")
  (folder / "text.txt").write_text("".join(chr(97 + (i * i + i // 7) % 23) for i in range(9000)))
  shared = (f"--files={folder}/text.txt", f"--tokenizer={folder}/characters.json", "--processes=1")
  for name, more in (("train", ["--train_tokenizer=characters"]), ("validation", [])):
    command = [
      sys.executable,
      ROOT / "launch/tokenize.py",
      *shared,
      f"--data_dir={folder}/tfds",
      *more,
    ]
    subprocess.run(
      [*command, f"--out={folder}/{name}"], check=True, capture_output=True, timeout=120
    )
  return folder


class Run:
  """`processes` processes of `devices` simulated devices each, started on one run."""

  def __init__(
    self, data, workdir, processes: int, devices: int, *more: str, differing: dict | None = None
  ):
    self.workdir = workdir
    environment = os.environ | {"JAX_NUM_CPU_DEVICES": str(devices), "PYTHONPATH": str(ROOT)}
    environment["JAX_COMPILATION_CACHE_DIR"] = jax.config.jax_compilation_cache_dir or ""
    environment["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.2"
    address, self.processes = f"localhost:{free_port()}", []
    for i in range(processes):
      command = [sys.executable, ROOT / "launch/train.py", *flags_for(data, workdir), *more]
      if processes > 1:
        command += [f"--coordinator={address}", f"--processes={processes}", f"--process={i}"]
      command += (differing or {}).get(i, [])
      process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
      self.processes.append(process)

  def wait_for_step(self, step: int):
    end = time.monotonic() + 240
    while not any(reached == step for reached, *_ in losses(self.workdir)):
      assert time.monotonic() < end and all(process.poll() is None for process in self.processes), (
        self.end()
      )
      time.sleep(0.05)

  def end(self, seconds: float = 240) -> list[tuple[int, str]]:
    """Status and stderr of each; one that hangs is an error."""
    end, ends = time.monotonic() + seconds, []
    try:
      for process in self.processes:
        _, err = process.communicate(timeout=max(0.1, end - time.monotonic()))
        ends.append((process.returncode, err))
    finally:
      for process in self.processes:
        process.kill()
    return ends


def free_port() -> int:
  """A port that is free, as is the next one."""
  while True:
    with socket.socket() as one, socket.socket() as two, contextlib.suppress(OSError):
      one.bind(("", 0))
      two.bind(("", one.getsockname()[1] + 1))
      return one.getsockname()[1]


def flags_for(data, workdir) -> list[str]:
  return [
    f"--config={ROOT}/configs/shakespeare.py",
    f"--workdir={workdir}",
    f"--config.data.train={data}/train",
    f"--config.data.validation={data}/validation",
    f"--config.data.tokenizer={data}/characters.json",
    "--config.model.n_vocab=23",
    "--config.model.n_ctx=8",
    "--config.model.n_embd=32",
    "--config.model.n_head=2",
    "--config.model.n_layer=1",
    f"--config.steps={STEPS}",
    "--config.steps_per_call=1",
    "--config.batch_size=8",
    "--config.warmup_steps=2",
    f"--config.save_every={SAVE_EVERY}",
    "--config.eval_every=20",
    "--config.keep=3",
    "--config.log_every=1",
  ]


def losses(workdir) -> list[tuple]:
  """Step, loss and batch of the whole lines."""
  path, lines = pathlib.Path(workdir) / "metrics.jsonl", []
  for line in path.read_text().splitlines() if path.exists() else []:
    with contextlib.suppress(ValueError):
      lines.append(json.loads(line))
  return [(line["step"], line["loss"], line["batch_hash"]) for line in lines if "loss" in line]


def newest(workdir) -> int:
  return max(int(path.name) for path in (workdir / "checkpoints").iterdir() if path.name.isdigit())


def cut_what_process_1_wrote(workdir) -> int:
  """Of the newest checkpoint: process 0 can read its own part."""
  step = newest(workdir)
  parts = [
    path
    for path in (workdir / f"checkpoints/{step}/state/ocdbt.process_1/d").iterdir()
    if path.stat().st_size
  ]
  for path in parts:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
  assert parts
  return step


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
  """An uninterrupted run: one process of eight devices."""
  workdir = tmp_path_factory.mktemp("whole")
  ((status, err),) = Run(data, workdir, 1, 8).end()
  assert status == 0 and "1 process x 8 devices (cpu), mesh (1, 8, 1)" in err, err
  return workdir


def test_resumed_on_other_numbers_of_processes_it_is_the_same_run(data, whole, tmp_path):
  four = Run(data, tmp_path, 4, 2)
  four.wait_for_step(SAVE_EVERY + 2)
  four.processes[2].send_signal(signal.SIGTERM)
  ends = four.end()
  stopped = losses(tmp_path)[-1][0]
  assert [status for status, _ in ends] == [0] * 4, ends
  assert "4 processes x 2 devices (cpu), mesh (1, 8, 1)" in ends[0][1]
  assert (
    f"SIGTERM: stopped and saved at step {stopped}; the same command resumes from there"
    in ends[0][1]
  )
  assert newest(tmp_path) == stopped < STEPS

  rng, damaged = random.Random(0), None
  for kill in range(KILLS):
    victim = kill % 2
    two = Run(data, tmp_path, 2, 4)
    two.wait_for_step(losses(tmp_path)[-1][0] + rng.randrange(1, 2 * SAVE_EVERY))
    two.processes[victim].kill()
    ends = two.end(60)
    assert ends[victim][0] == -signal.SIGKILL
    status, err = ends[1 - victim]
    assert (
      status == distributed.EXIT_RETRY
      and f"error: process {victim} ({HOST}) is gone" in err
      and "Check failure" not in err
    )
    if damaged and kill == 1:
      assert f"checkpoint {damaged} cannot be read" in "".join(err for _, err in ends)
    lost = losses(tmp_path)[-1][0] - newest(tmp_path)
    assert lost <= SAVE_EVERY + 1  # the step under way while a checkpoint is written
    if kill == 0:
      damaged = cut_what_process_1_wrote(tmp_path)

  ((status, err),) = Run(data, tmp_path, 1, 8).end()
  assert status == 0
  assert KILLS > 1 or f"checkpoint {damaged} cannot be read" in err
  steps, resumed, batches = zip(*losses(tmp_path), strict=True)
  _, uninterrupted, whole_batches = zip(*losses(whole), strict=True)
  assert steps == tuple(range(1, STEPS + 1)) and batches == whole_batches
  assert max(abs(a - b) for a, b in zip(resumed, uninterrupted, strict=True)) < 1e-5


def test_a_process_with_another_config_ends_both_with_the_difference(data, tmp_path):
  ends = Run(data, tmp_path, 2, 4, differing={1: ["--config.learning_rate=1.0"]}).end()
  for status, err in ends:
    assert (
      status == 2
      and f"process 1 ({HOST}) was started with another config: learning_rate is 0.001 on" in err
    )
  assert not list(tmp_path.iterdir())
