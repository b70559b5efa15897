# SPDX-License-Identifier: Apache-2.0
"""One output, whatever the runner, the order, the shards, and after a kill; reasons add up."""

import importlib.util
import json
import os
import pathlib
import random
import re
import signal
import subprocess
import sys
import time

import pytest

from gpt2_jax.configs import webtext
from gpt2_jax.data import corpus
from gpt2_jax.data.webtext import plain_runner
from gpt2_jax.data.webtext.inputs import list_shards
from gpt2_jax.data.webtext.job import run_job
from gpt2_jax.data.webtext.pipeline import Pipeline
from gpt2_jax.data.webtext.tally import Tally

pytest.importorskip("trafilatura")
ROOT = pathlib.Path(__file__).parents[3]


@pytest.fixture(scope="module")
def records() -> list[dict]:
  """Texts of all kinds: fine, repeated, nearly repeated, foreign, of Wikipedia, and two pages."""
  rng = random.Random(0)
  vocabulary = re.findall("[A-Za-z]{2,}", (ROOT / "README.md").read_text())
  vocabulary += "the of and to in that it was".split() * 20
  records = []
  for i in range(40):
    words = rng.choices(vocabulary, k=rng.randint(60, 200))
    for copy in range(rng.choice([1, 1, 2, 4])):
      edited = list(words)
      if copy > 1:
        edited[rng.randrange(len(words))] = "EDITED"
      text = " ".join(edited)
      records.append({"url": f"https://site{i % 7}.example.org/{i}/{copy}", "text": text})
  german = "Der Ausschuss sagte am Montag, dass das neue Gesetz vor dem Sommer verabschiedet wird. "
  records.append({"url": "https://a.example.org/de", "text": german * 5})
  records.append({"url": "https://en.wikipedia.org/wiki/X", "text": records[0]["text"]})
  records.append({"url": "https://a.example.org/none", "text": ""})
  records.append({"url": "https://a.example.org/html", "html": "<p>" + "A page. " * 40})
  return records


def write(folder: pathlib.Path, records: list[dict], shards: int) -> str:
  folder.mkdir()
  for i in range(shards):
    lines = [json.dumps(record) for record in records[i::shards]]
    (folder / f"{i:02}.jsonl").write_text("\n".join([*lines, "{broken"][: len(lines) + (i == 0)]))
  return f"{folder}/*.jsonl"


def config():
  config = webtext.get_config()
  config.quality.gopher_quality = True
  return config


@pytest.fixture(scope="module")
def expected(records, tmp_path_factory) -> tuple[pathlib.Path, dict]:
  folder = tmp_path_factory.mktemp("expected")
  shards = list_shards(write(folder / "in", records, 3))
  return folder, run_job(config(), shards, folder / "out")


def content(folder: pathlib.Path) -> dict[str, bytes]:
  """The dataset's files."""
  return {path.name: path.read_bytes() for path in (folder / "webtext/1.0.0").glob("*record*")}


def same(report: dict, other: dict) -> bool:
  """Whether all but the job and the places of unreadable lines is equal."""
  kept = []
  for whole in (report, other):
    copy = json.loads(json.dumps(whole)) | {"job": 0}
    for dropped in copy["stages"]["read"]["reasons"].values():
      dropped["examples"] = []
    kept.append(copy)
  return kept[0] == kept[1]


def test_reasons_add_up_at_every_stage(expected, records):
  folder, report = expected
  tally = Tally.from_json(report["stages"])
  tally.check()
  assert tally.stages["read"].documents_in == len(records) + 1
  reasons = {reason for stage in tally.stages.values() for reason in stage.reasons}
  assert reasons >= {"malformed", "no_text", "wikipedia", "exact_duplicate", "near_duplicate"}
  last = list(tally.stages.values())[-1]
  assert last.documents_out == report["documents"] > 20
  assert list(report["near_duplicate_clusters"])
  assert (folder / "out/report.md").read_text().count("![") == 4
  assert not (folder / "out/work").exists()
  tally.stages["domains"].documents_out += 1
  with pytest.raises(ValueError, match="stage domains"):
    tally.check()


def test_the_dataset_is_read_by_the_corpus(expected):
  folder, report = expected
  documents = corpus.tfds_documents("webtext", "train", "text", str(folder / "out"))
  assert len(documents) == report["documents"]
  assert sum(len(text.encode()) for text in documents) == report["bytes"]
  assert len(set(documents)) == len(documents)


def test_order_shards_and_processes_do_not_matter(expected, records, tmp_path):
  shuffled = random.Random(1).sample(records, len(records))
  shards = list_shards(write(tmp_path / "in", shuffled, 5))[::-1]
  report = run_job(config(), shards, tmp_path / "out", processes=2)
  assert same(report, expected[1]) and content(tmp_path / "out") == content(expected[0] / "out")


def test_a_finished_job_is_left_alone_and_another_one_is_refused(expected):
  folder, report = expected
  shards = list_shards(f"{folder}/in/*.jsonl")
  before = (folder / "out/report.json").stat().st_mtime_ns
  assert same(run_job(config(), shards, folder / "out"), report)
  assert (folder / "out/report.json").stat().st_mtime_ns == before
  other = config()
  other.seed = 5
  with pytest.raises(ValueError, match="another job: its config"):
    run_job(other, shards, folder / "out")


@pytest.mark.parametrize("name", ["work/thesis.txt", "webtext/2.0.0/mine"])
def test_what_is_no_jobs_is_not_removed(expected, tmp_path, name):
  shards = list_shards(f"{expected[0]}/in/*.jsonl")
  (tmp_path / name).parent.mkdir(parents=True)
  (tmp_path / name).write_text("mine")
  with pytest.raises(ValueError, match="not a job's; take another --out"):
    run_job(config(), shards, tmp_path)
  assert (tmp_path / name).read_text() == "mine"


def test_a_file_of_the_config_that_changed_is_another_job(records, tmp_path):
  shards = list_shards(write(tmp_path / "in", records, 2))
  (tmp_path / "blocked.txt").write_text("a.example.org\n")
  named = config()
  named.domains.blocked = str(tmp_path / "blocked.txt")
  run_job(named, shards, tmp_path / "out")
  (tmp_path / "blocked.txt").write_text("example.org\n")
  with pytest.raises(ValueError, match="another job: its files of the config"):
    run_job(named, shards, tmp_path / "out")


def test_more_shards_than_a_process_may_open_files(records, tmp_path):
  shards = list_shards(write(tmp_path / "in", records, 40))
  opened = len(os.listdir("/proc/self/fd"))
  for shard in shards:
    plain_runner.map_shard(Pipeline(before=()), tmp_path, shard)
  documents = plain_runner.MappedDocuments(tmp_path, shards * 30)
  assert len(documents) > 30 * 40 and documents[len(documents) - 1].text
  assert len(os.listdir("/proc/self/fd")) <= opened + plain_runner.OPEN_SHARDS


KILLED = """
import os, pathlib, signal, sys
from gpt2_jax.data.webtext import plain_runner
from tests.data.webtext.test_runners import config
from gpt2_jax.data.webtext.inputs import list_shards
from gpt2_jax.data.webtext.job import run_job
place, calls = sys.argv[3], []
original = getattr(plain_runner, place)
def dies(*args):
  calls.append(1)
  if len(calls) == int(sys.argv[4]):
    os.kill(os.getpid(), signal.SIGKILL)
  return original(*args)
setattr(plain_runner, place, dies)
run_job(config(), list_shards(sys.argv[1]), pathlib.Path(sys.argv[2]))
"""


@pytest.mark.parametrize("place, call", [("map_shard", 3), ("_finish", 20)])
def test_a_job_that_was_killed_resumes_to_the_same(expected, tmp_path, place, call):
  folder, report = expected
  arguments = [f"{folder}/in/*.jsonl", str(tmp_path / "out"), place, str(call)]
  environment = os.environ | {"PYTHONPATH": str(ROOT)}
  result = subprocess.run([sys.executable, "-c", KILLED, *arguments], env=environment, timeout=200)
  assert result.returncode == -signal.SIGKILL
  done = sorted((tmp_path / "out/work/mapped").glob("*.npy"))
  assert len(done) == {"map_shard": 2, "_finish": 3}[place]
  times = [path.stat().st_mtime_ns for path in done]
  assert same(run_job(config(), list_shards(arguments[0]), tmp_path / "out"), report)
  assert content(tmp_path / "out") == content(folder / "out") and times


# Its pins are older than the lock: no environment of the gate has it.
needs_beam = pytest.mark.skipif(
  importlib.util.find_spec("apache_beam") is None, reason="Apache Beam is not installed"
)


def beam_options(workers: int) -> list[str]:
  mode = ["--direct_running_mode=multi_processing"] * (workers > 1)
  return [f"--direct_num_workers={workers}", *mode]


@needs_beam
@pytest.mark.parametrize("workers", [1, 2])
def test_beam_gives_the_same(expected, tmp_path, workers):
  folder, report = expected
  options = beam_options(workers)
  shards = list_shards(f"{folder}/in/*.jsonl")
  beam_report = run_job(config(), shards, tmp_path / "out", "beam", 1, options)
  assert same(beam_report, report) and content(tmp_path / "out") == content(folder / "out")


@needs_beam
@pytest.mark.parametrize("workers", [1, 2])
def test_beam_that_was_killed_starts_over_to_the_same(expected, tmp_path, workers):
  folder, report = expected
  script = (
    "import sys, pathlib\n"
    "from tests.data.webtext.test_runners import beam_options, config\n"
    "from gpt2_jax.data.webtext.inputs import list_shards\n"
    "from gpt2_jax.data.webtext.job import run_job\n"
    "shards, out, options = list_shards(sys.argv[1]), sys.argv[2], beam_options(int(sys.argv[3]))\n"
    "run_job(config(), shards, pathlib.Path(out), 'beam', 1, options)\n"
  )
  command = [sys.executable, "-c", script, f"{folder}/in/*.jsonl", str(tmp_path / "out")]
  command.append(str(workers))
  environment = os.environ | {"PYTHONPATH": str(ROOT)}
  process = subprocess.Popen(command, env=environment, start_new_session=True)
  while not (tmp_path / "out/work/beam").exists() and process.poll() is None:
    time.sleep(0.05)
  if workers > 1:
    time.sleep(2)  # so that its workers run, too
  os.killpg(process.pid, signal.SIGKILL)
  assert process.wait() == -signal.SIGKILL
  shards = list_shards(f"{folder}/in/*.jsonl")
  beam_report = run_job(config(), shards, tmp_path / "out", "beam", 1, beam_options(workers))
  assert same(beam_report, report) and content(tmp_path / "out") == content(folder / "out")
