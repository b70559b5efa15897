# SPDX-License-Identifier: Apache-2.0
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from gpt2_jax.data import TokenStore

ROOT = pathlib.Path(__file__).parents[2]
SCRIPT = str(ROOT / "launch" / "tokenize.py")


def start(
  *flags: str, cwd: pathlib.Path = ROOT, script: tuple[str, ...] = (SCRIPT,)
) -> subprocess.Popen:
  environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
  pipe = subprocess.PIPE
  return subprocess.Popen(
    [sys.executable, *script, *flags], cwd=cwd, env=environment, stdout=pipe, stderr=pipe, text=True
  )


def run(*flags: str, **kwargs) -> tuple[int, str, str]:
  job = start(*flags, **kwargs)
  out, err = job.communicate(timeout=60)
  return job.returncode, out, err


@pytest.fixture
def corpus(tmp_path) -> list[str]:
  """Flags that name 40 small files."""
  (tmp_path / "files").mkdir()
  for i in range(40):
    (tmp_path / "files" / f"{i}.txt").write_text(f"def f{i}():\n  return {'x' * i}\n")
  return [f"--files={tmp_path}/files/*.txt", f"--data_dir={tmp_path}/prepared"]


def manifest(path: pathlib.Path) -> dict:
  return json.loads((path / "manifest.json").read_text())


@pytest.mark.parametrize(
  ("cwd", "script"),
  [(ROOT, (SCRIPT,)), (ROOT / "launch", ("tokenize.py",)), (ROOT, ("-m", "launch.tokenize"))],
)
def test_it_starts_from_anywhere_with_workers(corpus, tmp_path, cwd, script):
  learn = [f"--tokenizer={tmp_path}/t.json", "--train_tokenizer=characters"]
  code, out, err = run(
    *corpus, *learn, f"--out={tmp_path}/store", "--processes=2", cwd=cwd, script=script
  )
  assert code == 0, err
  store = TokenStore.open(str(tmp_path / "store"))
  assert f"{len(store):,} tokens of 40 documents" in out and "Traceback" not in err
  assert store.tokenizer.decode(store.read([0], len(store))[0]).count("def f") == 40


def test_one_command_learns_a_tokenizer_and_the_next_one_uses_it(corpus, tmp_path):
  tokenizer = f"--tokenizer={tmp_path}/t.model"
  learn = [tokenizer, "--train_tokenizer=sentencepiece", "--vocab_size=300"]
  assert (
    run(*corpus, *learn, "--split=train[:90%]", f"--out={tmp_path}/train", "--processes=1")[0] == 0
  )
  assert (
    run(*corpus, tokenizer, "--split=train[90%:]", f"--out={tmp_path}/valid", "--processes=1")[0]
    == 0
  )
  train, valid = (TokenStore.open(str(tmp_path / name)) for name in ("train", "valid"))
  assert (train.manifest["documents"], valid.manifest["documents"]) == (36, 4)
  assert train.fingerprint == valid.fingerprint and train.tokenizer.vocab_size == 300
  code, out, _ = run(f"--verify={tmp_path}/train")
  assert code == 0 and "every checksum is right" in out


def test_a_killed_job_started_again_gives_the_same_store(corpus, tmp_path):
  learn = [f"--tokenizer={tmp_path}/t.json", "--train_tokenizer=characters"]
  assert run(*corpus, *learn, f"--out={tmp_path}/whole", "--processes=1")[0] == 0
  job = start(*corpus, *learn, f"--out={tmp_path}/killed", "--processes=2")
  while not (tmp_path / "killed" / "job.json").exists():
    assert job.poll() is None
    time.sleep(0.005)
  job.send_signal(signal.SIGKILL)
  job.communicate()
  code, _, err = run(f"--verify={tmp_path}/killed")
  assert code == 2 and err.startswith("error: ") and "half-written" in err
  assert run(*corpus, *learn, f"--out={tmp_path}/killed", "--processes=1")[0] == 0
  assert manifest(tmp_path / "killed") == manifest(tmp_path / "whole")


def test_another_tokenizers_file_is_not_overwritten(corpus, tmp_path):
  (tmp_path / "t.json").write_text("mine")
  code, _, err = run(
    *corpus, f"--tokenizer={tmp_path}/t.json", "--train_tokenizer=characters", f"--out={tmp_path}/x"
  )
  assert code == 2 and "t.json is another tokenizer already" in err.splitlines()[-1]
  assert (tmp_path / "t.json").read_text() == "mine" and not (tmp_path / "x").exists()


@pytest.mark.parametrize(
  ("flags", "message"),
  [
    (["--out=x"], "give --out and one of --files and --tfds_name"),
    (["--files=nothing/*.txt", "--out=x"], "no file matches 'nothing/*.txt'"),
    (["--tfds_name=lm1", "--out=x"], "the nearest names are lm1b"),
    (["--files=a.txt", "b.txt", "--out=x"], "'b.txt' is no flag; see --help, and quote patterns"),
    (["--verify=nowhere"], "no token store at nowhere"),
  ],
)
def test_what_the_user_got_wrong_is_one_line_and_status_2(tmp_path, flags, message):
  code, out, err = run(*flags, cwd=tmp_path)
  assert (code, out, err.count("\n")) == (2, "", 1)
  assert err.startswith("error: ") and message in err
  assert not list(tmp_path.iterdir())
