# SPDX-License-Identifier: Apache-2.0
"""An evaluation over several real processes, with its datasets and results on gs://: a process is
killed in the middle, and the same command ends in the table that one process alone comes to."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time

import jax
import pytest

import gpt2_jax
from gpt2_jax import distributed
from tests.launch import test_evaluate
from tests.launch.test_evaluate import ROOT

TASKS = ("lambada:last_word", "ptb", "text")

folder = test_evaluate.folder  # a fixture


@pytest.fixture(scope="module")
def models(folder, mesh, tmp_path_factory):
  """A folder, and the workdir of a run, which Orbax reads."""
  workdir = tmp_path_factory.mktemp("runs") / "run"
  with mesh(1, 1, 1):
    model, tokenizer = gpt2_jax.load_pretrained(str(folder / "wide"))
    gpt2_jax.save_pretrained(model, tokenizer, str(workdir), "orbax")
  return [folder / "one", f"{workdir}@all"]


def free_port() -> int:
  """A port that is free, as is the next one."""
  while True:
    with socket.socket() as one, socket.socket() as two, contextlib.suppress(OSError):
      one.bind(("", 0))
      two.bind(("", one.getsockname()[1] + 1))
      return one.getsockname()[1]


def start(*flags: str, differing: dict | None = None) -> list[subprocess.Popen]:
  """Two processes of two simulated devices each, on one sweep."""
  environment = os.environ | {"JAX_NUM_CPU_DEVICES": "2", "PYTHONPATH": str(ROOT)}
  environment["JAX_COMPILATION_CACHE_DIR"] = jax.config.jax_compilation_cache_dir or ""
  environment["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
  processes = []
  address = f"localhost:{free_port()}"
  for i in range(2):
    group = [f"--coordinator={address}", "--processes=2", f"--process={i}"]
    own = (differing or {}).get(i, [])
    command = [sys.executable, str(ROOT / "launch" / "evaluate.py"), *flags, *group, *own]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    processes.append(subprocess.Popen(command, env=environment, **pipes))
  return processes


def ends(processes: list[subprocess.Popen]) -> list[tuple[int, str, str]]:
  """Status, stdout and stderr of each; one that hangs is an error."""
  results = []
  try:
    for process in processes:
      out, err = process.communicate(timeout=120)
      results.append((process.returncode, out, err))
  finally:
    for process in processes:
      process.kill()
  return results


def computed(bucket) -> list[str]:
  """The cells that the processes have computed, by the lists of all."""
  names = []
  for name in ("sweep/computed.jsonl", "sweep/computed.1.jsonl"):
    lines = bucket.objects.get(name, b"").decode().splitlines()
    names += [json.loads(line)["cell"] for line in lines]
  return names


def finished(bucket) -> dict[str, bytes]:
  return {name: body for name, body in bucket.objects.items() if name.startswith("sweep/cells/")}


def test_two_processes_divide_the_cells_and_a_killed_one_is_resumed_from_the_bucket(
  folder,
  models,
  bucket,
  tmp_path,
  monkeypatch,
):
  # As many devices as each of the two has: their sums are the same to the last bit.
  monkeypatch.setenv("JAX_NUM_CPU_DEVICES", "2")
  alone = test_evaluate.start(*test_evaluate.sweep(folder, tmp_path, TASKS, models))
  flags = test_evaluate.sweep(folder, "gs://bucket/sweep", TASKS, models)
  for path in (folder / "data").rglob("*.*"):
    bucket.put(path.relative_to(folder).as_posix(), path.read_bytes())
  flags.append("--data=gs://bucket/data")

  # 1. Process 1 dies after its first cell: process 0 says so, and that the same command resumes.
  processes = start(*flags)
  while b"\n" not in bucket.objects.get("sweep/computed.1.jsonl", b""):
    assert not any(process.poll() for process in processes), ends(processes)
    time.sleep(0.01)
  processes[1].send_signal(signal.SIGKILL)
  (status, out, err), _ = ends(processes)
  assert status == distributed.EXIT_RETRY and "| task |" not in out
  assert f"error: process 1 ({socket.gethostname()}) is gone" in err and "the same command" in err
  before = finished(bucket)
  assert 1 <= len(before) < 6 and "sweep/table.md" not in bucket.objects

  [(_, whole, _)] = ends([alone])

  # 2. The same command again. Nothing that was finished is computed again.
  (status, out, err), (other_status, other_out, other_err) = ends(start(*flags))
  assert (status, other_status) == (0, 0), (err, other_err)
  # JAX's collectives on CPUs greet there, too.
  assert whole in out and "| task |" not in other_out
  assert (err + other_err).count("] kept ") == len(before)
  assert (err + other_err).count("] computed ") == 6 - len(before)
  assert len(finished(bucket)) == 6 and finished(bucket).items() >= before.items()
  assert len(computed(bucket)) == len(set(computed(bucket)))

  # 3. The report is that of one process.
  assert bucket.objects["sweep/table.md"] == (tmp_path / "table.md").read_bytes()
  results = bucket.objects["sweep/results.jsonl"].decode()
  local = (tmp_path / "results.jsonl").read_text()
  assert results.replace("gs://bucket/", f"{folder}/") == local
  plots = {f"sweep/plots/{path.name}" for path in (tmp_path / "plots").iterdir()}
  assert plots <= bucket.objects.keys()


def test_processes_with_other_rows_end_with_one_line(
  folder,
  models,
  bucket,
  tmp_path,
):
  other = tmp_path / "ptb.test.txt"
  other.write_text(" the cat sat \n" * 9)
  flags = test_evaluate.sweep(folder, "gs://bucket/sweep", ["ptb"], models[:1])
  for status, _, err in ends(start(*flags, differing={1: [f"--data={other}"]})):
    assert status == 2 and "was started with another sweep (model, task or rows): ptb" in err
    assert "Traceback" not in err and not bucket.objects


def test_a_bucket_without_rights_is_one_line_before_anything_is_computed(folder, bucket):
  bucket.refuse = "^sweep/"
  _, err = test_evaluate.run(
    *test_evaluate.sweep(folder, "gs://bucket/sweep", ["ptb"], ["one"]), status=2
  )
  assert "error: gs://bucket/sweep cannot be reached" in err and "Traceback" not in err
  assert "computed" not in err and not bucket.objects
