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
  *flags: str,
  cwd: pathlib.Path = ROOT,
  script: tuple[str, ...] = (SCRIPT,),
  home: pathlib.Path | None = None,
) -> subprocess.Popen:
  environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
  if home:
    environment["HOME"] = str(home)
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


def test_records_that_are_no_text_are_counted_in_the_last_line(tmp_path):
  """And ~ is the home in every flag; the folders of the store and the tokenizer are made."""
  lines = [b'{"text": "one"}', b'{"text": null}', b'{"text": "caf\xe9"}', b'{"text": "two"}']
  (tmp_path / "a.JSONL").write_bytes(b"\n".join(lines))
  flags = ["--files=~/*.jsonl,~/*.JSONL", "--data_dir=~/prepared", "--tokenizer=~/t/new/t.json"]
  flags += ["--train_tokenizer=characters", "--processes=1"]
  (tmp_path / "b.jsonl").write_text('{"text": "one"}')
  code, out, err = run(*flags, "--out=~/new/store", home=tmp_path)
  assert code == 0, err
  assert "tokens of 3 documents" in out
  skipped = "skipped 2 records, the first: a.JSONL:2 has NoneType under 'text'"
  assert skipped in out and out.count("\n") == 1
  assert manifest(tmp_path / "new" / "store")["skipped"]["count"] == 2

  before = sorted(tmp_path.rglob("*"))
  code, out, err = run(*flags, "--out=~/strict", "--strict", home=tmp_path)
  assert (code, out) == (2, "") and err.splitlines()[-1].startswith("error: a.JSONL:2 has NoneType")
  assert sorted(tmp_path.rglob("*")) == before


def test_two_jobs_side_by_side_are_both_whole_or_one_is_refused(corpus, tmp_path):
  """The two commands of the README on one corpus; and twice the same one."""
  tokenizer = f"--tokenizer={tmp_path}/t.json"
  learn = [*corpus, tokenizer, "--train_tokenizer=characters", "--processes=1"]
  learn += ["--split=train[:90%]"]
  outs = ("train", "train", "other")
  jobs = [start(*learn, f"--out={tmp_path}/{name}") for name in outs]
  codes = []
  for job in jobs:
    _, err = job.communicate(timeout=60)
    codes.append(job.returncode)
    if job.returncode:
      assert job.returncode == 2 and "another process is writing" in err.splitlines()[-1]
  assert codes[2] == 0 and 0 in codes[:2]
  for name in outs[1:]:
    TokenStore.open(str(tmp_path / name)).verify()
  assert manifest(tmp_path / "train") == manifest(tmp_path / "other")


def test_another_tokenizers_file_is_not_overwritten(corpus, tmp_path):
  (tmp_path / "t.json").write_text("mine")
  code, _, err = run(
    *corpus, f"--tokenizer={tmp_path}/t.json", "--train_tokenizer=characters", f"--out={tmp_path}/x"
  )
  assert code == 2 and "t.json is another tokenizer already" in err.splitlines()[-1]
  assert (tmp_path / "t.json").read_text() == "mine" and not (tmp_path / "x").exists()


# GPT-2's tokenizer is the default, and is opened before the files are looked for.
needs_gpt2 = pytest.mark.skipif(
  "TIKTOKEN_CACHE_DIR" not in os.environ, reason="TIKTOKEN_CACHE_DIR is not set"
)


@pytest.mark.parametrize(
  ("flags", "message"),
  [
    (["--out=x"], "give --out and one of --files and --tfds_name"),
    pytest.param(
      ["--files=nothing/*.txt", "--out=x"], "no file matches 'nothing/*.txt'", marks=needs_gpt2
    ),
    pytest.param(["--tfds_name=lm1", "--out=x"], "the nearest names are lm1b", marks=needs_gpt2),
    (["--files=a.txt", "b.txt", "--out=x"], "'b.txt' is no flag; see --help, and quote patterns"),
    (["--verify=nowhere"], "no token store at nowhere"),
  ],
)
def test_what_the_user_got_wrong_is_one_line_and_status_2(tmp_path, flags, message):
  code, out, err = run(*flags, cwd=tmp_path)
  assert (code, out, err.count("\n")) == (2, "", 1)
  assert err.startswith("error: ") and message in err and len(err) < 600
  assert not list(tmp_path.iterdir())


# Calls the command with each row of flags; one process is enough for all of them.
MANY = """
import json, sys
from absl import flags
from gpt2_jax.cli import tokenize
for row in json.loads(sys.argv[1]):
  flags.FLAGS.unparse_flags()
  flags.FLAGS(["tokenize.py", *row])
  try:
    tokenize.main()
    print(json.dumps("no error"))
  except (ValueError, OSError) as error:
    print(json.dumps(str(error)))
  for name in flags.FLAGS.flags_by_module_dict()["gpt2_jax.cli.tokenize"]:
    name.unparse()
"""
BAD_FLAGS = [
  (["--verify="], "a path is empty"),
  (["--verify=~nobody-here/x"], "no such user"),
  (["--files=~nobody-here/x", "--out=x"], "no such user"),
  (["--files=a.txt", "--out=~nobody-here/x"], "no such user"),
  (["--files=a.txt", "--out=x", "--data_dir="], "a path is empty"),
  (["--files=a.txt", "--out=x", "--tokenizer=none.json"], "none.json"),
  (["--files=a.txt", "--out=x", "--characters=1"], "characters '1' is not FROM:TO"),
  (["--files=a.txt", "--out=/dev/null/x"], "/dev/null is no folder"),
  (
    ["--files=a.txt", "--out=x", "--train_tokenizer=characters", "--tokenizer=/dev/null/t.json"],
    "/dev/null is no folder",
  ),
  (
    ["--files=a.txt", "--out=x", "--train_tokenizer=characters", "--tokenizer=gs://b/t.json"],
    "only a local path",
  ),
]


@needs_gpt2
def test_what_is_known_at_the_start_is_said_at_the_start(tmp_path):
  rows = json.dumps([row for row, _ in BAD_FLAGS])
  done = subprocess.run(
    [sys.executable, "-c", MANY, rows],
    cwd=tmp_path,
    env=os.environ | {"PYTHONPATH": str(ROOT)},
    check=True,
    capture_output=True,
    text=True,
  )
  answers = list(map(json.loads, done.stdout.splitlines()))
  for (row, message), answer in zip(BAD_FLAGS, answers, strict=True):
    assert message in answer and len(answer) < 600, row
  assert not list(tmp_path.iterdir())


def test_examples_are_packed_by_a_process_and_the_line_says_what_became_of_them(tmp_path):
  """And a template of one's own; the same command once more finds it complete."""
  (tmp_path / "t.json").write_text(json.dumps({"kind": "characters", "alphabet": "\nQabc"}))
  (tmp_path / "own.json").write_text('{"turns": {"user": ["Q", "\\n"], "assistant": ["", "\\n"]}}')
  pairs = [{"prompt": "a" * (i % 7 + 1), "completion": "b", "label": i % 3} for i in range(20)]
  (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, pairs)))
  flags = ["--examples=a.jsonl", "--template=own.json", "--tokenizer=t.json", "--n_ctx=10"]
  flags += ["--data_dir=prepared", "--out=store", "--processes=1"]
  code, out, err = run(*flags, cwd=tmp_path)
  assert code == 0, err

  # Each has Q, 1 to 7 letters, a line end, b, a line end: 5 to 11 tokens, the longest lose one.
  tokens = sum(min(10, i % 7 + 5) for i in range(20))
  counts = manifest(tmp_path / "store")
  assert (counts["example_tokens"], counts["cut"], counts["scored"]) == (tokens, 2, 40)
  padding = f"padding {1 - tokens / counts['tokens']:.1%}"
  rows = f"20 examples in {counts['rows']} rows of 10, {tokens} tokens of which 40 are scored"
  lost = "2 examples were longer than a row and lost 2 tokens, labels 0 to 2"
  for part in (rows, padding, lost):
    assert part in out and out.count("\n") == 1
  again = run(*flags, cwd=tmp_path)
  assert again[:2] == (0, out) and "is complete already" in again[2]
