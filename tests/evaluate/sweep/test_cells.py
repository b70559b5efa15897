# SPDX-License-Identifier: Apache-2.0
"""The files of a sweep: a damaged cell is never taken for a score, and a folder has one writer."""

import dataclasses
import json
import os
import pathlib
import random
import subprocess
import sys

import numpy as np
import pytest

from configs import zero_shot
from gpt2_jax.evaluate import tasks
from gpt2_jax.evaluate.metric import percent, perplexity
from gpt2_jax.evaluate.sources import DatasetRows, Source
from gpt2_jax.evaluate.sweep import bootstrap, cells
from gpt2_jax.evaluate.sweep.models import SweptModel
from gpt2_jax.evaluate.task import Task

METRICS = {"accuracy": percent("correct"), "perplexity": perplexity("items")}
IDENTITY = {"scores": 1, "model": "a", "weights": "0f", "task": "toy", "protocol": "plain"}
IDENTITY |= {"shots": 0, "rows": "abc", "examples": [], "limit": 0, "seed": 0, "stride": 0}
MUTANTS = int(os.environ.get("GPT2_JAX_MUTANTS", "300"))


SOURCE = Source("toy", ("*",), None, "https://example.org")
TOY = {"plain": Task("toy", "plain", "", SOURCE, None, None, METRICS)}


@pytest.fixture(autouse=True)
def toy(monkeypatch):
  monkeypatch.setitem(tasks.TASKS, "toy", TOY)


def content(n: int = 5) -> dict:
  sums = {"items": [1.0] * n, "truncated": [0.0] * (n - 1) + [1.0]}
  sums |= {"correct": [1.0, 0.0] * n, "nats": [0.1 + i for i in range(n)]}
  sums = {key: values[:n] for key, values in sums.items()}
  arrays = {key: np.array(values) for key, values in sums.items()}
  metrics = {}
  for name, interval in bootstrap.intervals(METRICS, arrays, 20).items():
    metric = METRICS[name]
    metrics[name] = interval._asdict() | {"unit": metric.unit, "higher": metric.higher}
  fields = {"origin": "rows.jsonl", "step": None, "run": None, "parameters": 10, "size": None}
  fields |= {"items": n, "of": n, "truncated": 1, "resamples": 20}
  return {"identity": IDENTITY, "metrics": metrics, "sums": sums} | fields


def plain(read: dict) -> dict:
  return read | {"sums": {key: values.tolist() for key, values in read["sums"].items()}}


def test_a_cell_is_read_as_it_was_written_and_so_is_one_without_a_checksum(tmp_path):
  cells.write(tmp_path / "new.json", content())
  (tmp_path / "old.json").write_text(json.dumps(content()))
  assert "sha256" in json.loads((tmp_path / "new.json").read_text())
  for name in ("new.json", "old.json"):
    assert plain(cells.read(tmp_path / name, IDENTITY)) == content()


def test_a_mutant_of_a_cell_is_refused_or_says_the_same(tmp_path):
  path = tmp_path / "cell.json"
  cells.write(path, content())
  whole = path.read_bytes()
  rng = random.Random(0)
  refused = 0
  for _ in range(MUTANTS):
    mutant = bytearray(whole)
    match rng.randrange(4):
      case 0:
        mutant[rng.randrange(len(mutant))] ^= 1 << rng.randrange(8)
      case 1:
        del mutant[rng.randrange(len(mutant)) :]
      case 2:
        # a digit, which leaves JSON as it is
        digits = [i for i, byte in enumerate(mutant) if chr(byte).isdigit()]
        mutant[rng.choice(digits)] = ord(rng.choice("0123456789"))
      case 3:
        i = rng.randrange(len(mutant))
        mutant[i : i + rng.randrange(9)] = rng.randbytes(rng.randrange(9))
    path.write_bytes(mutant)
    try:
      again = plain(cells.read(path, IDENTITY))
      # Where the checksum lost its name, it is one more field of an older cell.
      assert {name: again[name] for name in content()} == content()
    except ValueError as error:
      refused += 1
      assert "\n" not in str(error) and str(path) in str(error) and len(str(error)) < 600
  assert refused > MUTANTS / 2


DEEP = "[" * 100_000 + "]" * 100_000


@pytest.mark.parametrize("text", ["", "[]", "3", "null", '"x"', DEEP, '{"identity": ' + DEEP + "}"])
def test_json_of_another_shape_is_one_line(tmp_path, text):
  path = tmp_path / "cell.json"
  path.write_text(text)
  with pytest.raises(ValueError, match="is no finished cell .*; remove it") as error:
    cells.read(path, IDENTITY)
  assert len(str(error.value)) < 600


CHANGES = [
  {"items": 4},
  {"items": True},
  {"of": 3},
  {"truncated": 0},
  {"parameters": "many"},
  {"identity": IDENTITY | {"weights": "1f"}},
  {"identity": []},
  {"metrics": {}},
  {"metrics": []},
  {"sums": {}},
  {"sums": content()["sums"] | {"nats": [1.0]}},
  {"sums": content()["sums"] | {"nats": [[1.0]] * 5}},
  {"sums": content()["sums"] | {"nats": ["x"] * 5}},
  {"sums": content()["sums"] | {"nats": [9.0] * 5}},
  {"metrics": content()["metrics"] | {"accuracy": None}},
  {"metrics": content()["metrics"] | {"accuracy": {"value": 60.0}}},
  {"metrics": content()["metrics"] | {"perplexity": content()["metrics"]["accuracy"]}},
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: str(change)[:40])
def test_a_cell_that_contradicts_itself_is_refused(tmp_path, change):
  """Without a checksum: cells of before it are held against themselves."""
  path = tmp_path / "cell.json"
  path.write_text(json.dumps(content() | change))
  with pytest.raises(ValueError, match="is no finished cell"):
    cells.read(path, IDENTITY)


def test_a_folder_has_one_writer_and_a_killed_one_leaves_no_lock(tmp_path):
  program = (
    "import pathlib, sys, time; from gpt2_jax.evaluate.sweep import cells\n"
    "with cells.lock_folder(pathlib.Path(sys.argv[1])): print('held', flush=True); time.sleep(60)"
  )
  root = pathlib.Path(__file__).parents[3]
  job = subprocess.Popen(
    [sys.executable, "-c", program, str(tmp_path)], cwd=root, stdout=subprocess.PIPE, text=True
  )
  assert job.stdout.readline() == "held\n"
  with pytest.raises(OSError, match=f"another sweep is writing into {tmp_path}; wait"):
    cells.lock_folder(tmp_path).__enter__()
  job.kill()
  job.communicate()
  with cells.lock_folder(tmp_path):
    pass


@pytest.mark.parametrize(
  "place", ["file", "file/deeper", "out/table.md/", "out/cells", "out/plots", "out/results.jsonl/"]
)
def test_a_folder_that_cannot_be_written_is_refused_and_nothing_is_made(tmp_path, place):
  (tmp_path / "out").mkdir()
  path = tmp_path / place
  if place.endswith("/"):
    path.mkdir()
  elif "deeper" not in place:
    path.write_text("a file")
  else:
    path.parent.write_text("a file")
  before = sorted(tmp_path.rglob("*"))
  with pytest.raises(OSError, match="move it away"):
    cells.check_out(tmp_path / ("out" if place.startswith("out") else place))
  assert sorted(tmp_path.rglob("*")) == before


def test_a_task_of_another_version_of_its_file_has_another_cell_and_ours_keep_theirs():

  model = SweptModel("a", "a", "latest", "0f")
  rows = {SOURCE: DatasetRows([{"text": "a"}], "rows.jsonl")}
  made = {}
  for program in ("", "0a", "0b"):
    task = cells.SweptTask(dataclasses.replace(TOY["plain"], program=program), 0)
    made[program] = cells.make_cell(model, task, rows, zero_shot.get_config())
  assert len({cell.file for cell in made.values()}) == 3
  # As before there were tasks of users: these cells have been computed.
  assert made[""].identity.keys() == IDENTITY.keys() | {"protocol", "dtype"}
