# SPDX-License-Identifier: Apache-2.0
"""The command: a small run is planned, searched and saved; bad input is one line and a status."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[2]
SMALL = "--config.model.n_embd=256 --config.model.n_layer=1 --config.model.n_head=4"
SMALL += " --config.model.n_vocab=500 --config.model.n_ctx=128 --config.batch_size=16"


def plan(*flags: str) -> subprocess.CompletedProcess:
  command = [
    sys.executable,
    str(ROOT / "launch" / "plan.py"),
    f"--config={ROOT}/configs/gpt2.py:117M",
    *flags,
  ]
  return subprocess.run(command, capture_output=True, text=True, timeout=300, env=os.environ)


def test_a_search_reports_each_candidate_and_prints_the_best_as_flags(tmp_path):
  done = plan(
    "--topology=v5e:2x2",
    "--search",
    "--compiled=1",
    "--usd_per_chip_hour=1.2",
    f"--out={tmp_path}",
    *SMALL.split(),
  )
  assert done.returncode == 0, done.stderr
  assert "compiling 1" in done.stderr and done.stdout.count(" ms, ") == 1
  last = done.stdout.strip().splitlines()[-1]
  facts = json.loads((tmp_path / "plan.json").read_text())
  assert f"--config.mesh.data={facts['mesh']['data']}" in last
  assert "USD at 1.2 a chip-hour" in done.stdout
  assert (tmp_path / "plan.png").exists() and "libtpu" not in done.stderr


@pytest.mark.parametrize(
  "flags, message",
  [
    (["--topology=v5e:3"], "--topology=v5e:3 is not a topology: give a generation"),
    (["--topology=v5e:2x2", "--slices=2"], "only replica may cross slices"),
    (
      ["--topology=v5e:2x2", "--config.batch_size=6"],
      "does not divide by the replica x data axes of 4",
    ),
    ([], "--topology"),
    (["--topology=v5e:2x2", "--tokens=nan"], "--tokens=nan is not a finite number above 0"),
    (["--topology=v5e:2x2", "--usd_per_chip_hour=-1"], "is not a finite number above 0"),
    (["--topology=v5e:2x2", "--out="], "a path is empty"),
    (["--topology=v5e:2x2", "--out=gs://bucket/plan"], "is a URL, and only a local path will do"),
    (["--topology=v5e:2x2", "--out=/dev/null/plan"], "--out=/dev/null/plan cannot be written"),
    (
      ["--topology=v5e:2x2", "--search", "--config.batch_size=0"],
      "batch_size of 0 is not at least 1",
    ),
  ],
)
def test_bad_input_is_one_line_and_a_status(flags, message):
  done = plan(*flags, *SMALL.split()[:3])
  assert done.returncode in (1, 2) and message in done.stderr and "Traceback" not in done.stderr
