# SPDX-License-Identifier: Apache-2.0
"""Real processes: a sweep that is killed, one that lacks a dataset, and what the command says."""

import functools
import http.server
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import threading
import time

import jax
import numpy as np
import pytest
import safetensors.numpy
import tokenizers

import gpt2_jax
from gpt2_jax.evaluate.sweep.cells import COMPUTED

ROOT = pathlib.Path(__file__).parents[2]
WORDS = (
  "the cat sat on a mat while many birds sang over old green hills and no one heard them".split()
)
TASKS = (
  "lambada:last_word",
  "lambada:last_piece",
  "ptb",
  "text",
  "blimp_wh_island",
  "blimp_passive_1::1",
)
# one batch, one shape to compile
KNOBS = ("--config.resamples=100", "--config.batch_size=128", "--config.limit=60")


def tokenizer() -> gpt2_jax.HuggingFace:
  made = tokenizers.Tokenizer(tokenizers.models.BPE())
  made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
  made.decoder = tokenizers.decoders.ByteLevel()
  alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
  options = {
    "special_tokens": ["<|endoftext|>"],
    "initial_alphabet": alphabet,
    "show_progress": False,
  }
  made.train_from_iterator(
    [" ".join(WORDS)] * 9, tokenizers.trainers.BpeTrainer(vocab_size=290, **options)
  )
  return gpt2_jax.HuggingFace(made.to_str())


@pytest.fixture(scope="module")
def folder(tmp_path_factory, mesh, parameters, place):
  """Three models of two sizes, and five datasets in the form in which they are published."""
  folder, ours = tmp_path_factory.mktemp("zero_shot"), tokenizer()
  with mesh(1, 1, 1):
    for seed, (name, width) in enumerate({"one": 16, "two": 16, "wide": 32}.items()):
      config = gpt2_jax.ModelConfig(
        ours.vocab_size, n_ctx=64, n_embd=width, n_head=2, n_layer=1, dtype="float32"
      )
      model = place(config, parameters(config, seed=seed))
      gpt2_jax.save_pretrained(model, ours, str(folder / name))
  sentences = [" ".join(WORDS[i * i % 7 : i * i % 7 + 4 + i % 9]) for i in range(60)]
  pairs = [{"sentence_good": s, "sentence_bad": s[::-1]} for s in sentences]
  write(folder, "lambada/lambada_test.jsonl", [json.dumps({"text": s}) for s in sentences])
  write(folder, "ptb/ptb.test.txt", [f" {s} " for s in sentences])
  write(folder, "text/story.txt", [" ".join(sentences)])
  for name in ("wh_island", "passive_1"):
    write(folder, f"blimp/{name}.jsonl", map(json.dumps, pairs))
  return folder


def write(folder, name: str, lines) -> None:
  path = folder / "data" / name
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text("".join(line + "\n" for line in lines))


def start(*flags: str) -> subprocess.Popen:
  cache = {"JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir or ""}
  cache |= {
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "0",
  }
  command = [sys.executable, str(ROOT / "launch" / "evaluate.py"), *flags]
  return subprocess.Popen(
    command,
    stderr=subprocess.PIPE,
    stdout=subprocess.PIPE,
    text=True,
    env=os.environ | cache,
    # a suite in the background hands on SIG_IGN
    preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
  )


def run(*flags: str, status: int = 0) -> tuple[str, str]:
  process = start(*flags)
  out, err = process.communicate(timeout=300)
  assert process.returncode == status, err
  return out, err


def sweep(folder, out, tasks=TASKS, models=("one", "two", "wide")) -> list[str]:
  flags = [f"--model={folder / name}" for name in models] + [f"--task={task}" for task in tasks]
  return [*flags, f"--data={folder / 'data'}", f"--out={out}", *KNOBS]


def computed(out) -> list[str]:
  path = pathlib.Path(out) / COMPUTED
  return (
    [json.loads(line)["cell"] for line in path.read_text().splitlines()] if path.exists() else []
  )


def times(out) -> dict[str, int]:
  return {path.name: path.stat().st_mtime_ns for path in (out / "cells").glob("*.json")}


def test_a_sweep_killed_and_interrupted_ends_in_the_same_table_and_computes_no_cell_twice(
  folder, tmp_path
):
  out, err = run(*sweep(folder, tmp_path / "whole"))
  assert err.count("] computed ") == 18 and out == (tmp_path / "whole" / "table.md").read_text()
  killed = tmp_path / "killed"
  for cells, number, status in (
    (4, signal.SIGKILL, -9),
    (9, signal.SIGKILL, -9),
    (13, signal.SIGINT, 130),
  ):
    process = start(*sweep(folder, killed))
    while len(computed(killed)) < cells:
      assert process.poll() is None, process.communicate()[1]
      time.sleep(0.02)
    process.send_signal(number)
    _, err = process.communicate(timeout=300)
    assert process.returncode == status and len(computed(killed)) < 18
  assert err.splitlines()[-1] == "interrupted"
  before = times(killed)
  _, err = run(*sweep(folder, killed))
  assert err.count("] kept ") == len(before) >= 13 and err.count("] computed ") == 18 - len(before)
  assert (
    len(computed(killed)) == len(set(computed(killed))) and times(killed).items() >= before.items()
  )
  for name in ("table.md", "results.jsonl"):
    assert (killed / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
  assert len(list((killed / "plots").glob("*.parameters.png"))) == 6


def test_a_cell_that_fails_and_a_dataset_that_is_left_out_are_said(folder, tmp_path):
  write(folder, "blimp/passive_2.jsonl", ['{"sentence_good": "a cat"}'])
  flags = sweep(folder, tmp_path, ["blimp_passive_2", "copa", "text"], ["one"])
  out, err = run(*flags, "--skip_missing", status=1)
  assert (
    "failed blimp_passive_2" in err and "passive_2.jsonl:1" in err and len(computed(tmp_path)) == 1
  )
  assert (
    "- copa:lm_eval:0: not run: copa: " in out and "- blimp_passive_2:lm_eval:0: failed: " in out
  )
  # Of one model there is no curve, and none is announced.
  assert "written to" in err and "plots" not in err


def test_missing_datasets_are_one_line(folder, tmp_path):
  out, err = run(*sweep(folder, tmp_path, ["ptb", "copa", "piqa"]), status=2)
  assert (
    not out
    and "error: 2 datasets are not there: copa (val.jsonl), piqa (" in err.splitlines()[-1]
    and len(err.splitlines()[-1]) < 600
  )
  assert "Traceback" not in err and not computed(tmp_path)


def test_two_sweeps_of_one_folder_compute_no_cell_twice_and_one_is_refused(folder, tmp_path):
  flags = sweep(folder, tmp_path, TASKS[:3], ["one", "two"])
  jobs = [start(*flags), start(*flags)]
  ends = [(job.communicate(timeout=300), job.returncode) for job in jobs]

  # Where one is done before the other begins, both are whole.
  assert sorted(status for _, status in ends) in ([0, 2], [0, 0])
  for (out, err), status in ends:
    last = err.splitlines()[-1]
    assert "Traceback" not in err and (status == 0 or not out)
    assert status == 0 or last == (
      f"error: another sweep is writing into {tmp_path}; wait until it ends, or take another --out"
    )
  assert len(computed(tmp_path)) == len(set(computed(tmp_path))) == 6
  assert len((tmp_path / "results.jsonl").read_text().splitlines()) == 6
  assert not list(tmp_path.rglob("*.partial"))


def test_a_model_of_nan_is_one_line_and_what_fits_nothing_is_said_at_the_start(folder, tmp_path):
  shutil.copytree(folder / "one", tmp_path / "broken")
  weights = safetensors.numpy.load_file(tmp_path / "broken" / "model.safetensors")
  name = next(name for name in weights if "ln_f" in name)
  weights[name] = np.full_like(weights[name], np.nan)
  safetensors.numpy.save_file(weights, tmp_path / "broken" / "model.safetensors", {"format": "pt"})
  flags = sweep(folder, tmp_path / "out", ["text"], [tmp_path / "broken"])
  out, err = run(*flags, status=2)
  assert not out and err.splitlines()[-1].startswith("error: none of the 1 cells could be computed")
  assert "not finite numbers" in err and "Traceback" not in err

  overlap = {"task": "text", "fingerprint": "0", "n": 8, "rate": 0.1, "ngrams": [1], "found": [0]}
  (tmp_path / "overlap.json").write_text(json.dumps(overlap))
  flags = sweep(folder, tmp_path / "none", ["text"], ["one"])
  out, err = run(*flags, f"--overlap={tmp_path}/overlap.json", status=2)
  assert not out and "error: an overlap of text with 1 items fits no task here" in err
  assert not (tmp_path / "none").exists()


def test_a_task_of_ones_own_is_fetched_listed_scored_and_drawn_beside_ours(folder, tmp_path):
  # 1. The template, with an address on this machine.
  text = run("--template")[0]
  rows = [{"country": w, "capital": w, "other": w[::-1]} for w in sorted(set(WORDS))[:9]]
  server = tmp_path / "server"
  write(server, "capitals.jsonl", map(json.dumps, rows))
  handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=server / "data")
  with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as http_server:
    threading.Thread(target=http_server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{http_server.server_address[1]}/capitals.jsonl"
    text = text.replace("import Source", "import Download, Source").replace(
      'url="this template"', f'url="this template", downloads=(Download("{address}"),)'
    )
    assert "Download(" in text
    own = tmp_path / "own.py"
    own.write_text(text)

    # 2. Fetched, and scored beside one of ours, the first four items of each.
    flags = [f"--include={own}", "--tasks=capitals::1,blimp_wh_is*", f"--data={folder / 'data'}"]
    flags += [f"--models={folder / 'one'},{folder / 'wide'}", "--limit=4", *KNOBS[:2]]
    out, err = run(*flags, "--download", f"--out={tmp_path / 'out'}")
    http_server.shutdown()
  assert f"fetched {address}" in err and "not pinned" in err
  assert "capitals:pair:1" in out and "blimp_wh_island:lm_eval:0" in out
  assert "| 4 of 9 |" in out and "| 4 of 60 |" in out
  assert "The first 4 items of each task, and no others." in out
  assert err.endswith("table.md, results.jsonl, cells, plots\n")
  assert len(list((tmp_path / "out" / "plots").iterdir())) == 2


def test_flags_that_people_try_name_the_right_ones(tmp_path):
  expected = {
    "--batch-size=8": "it is a knob of the config: --config.batch_size=VALUE",
    "--num_fewshot=5": "--task=NAME::5 puts 5 solved examples before each item",
    "--tsks=lambada": "did you mean --tasks?",
    "--download": "cannot be fetched (",
    "--model=gpt2,gpt2-xl": "several models are --models=gpt2,gpt2-xl",
  }
  flags = [f"--data={tmp_path}", "--include=" + str(tmp_path / "own.py"), "--task=own"]
  (tmp_path / "own.py").write_text(OFFLINE)
  jobs = {flag: start(*flags, flag, f"--out={tmp_path}/out") for flag in expected}
  for flag, text in expected.items():
    out, err = jobs[flag].communicate(timeout=300)
    assert jobs[flag].returncode == 2 and not out and text in err and len(err.splitlines()) == 1


OFFLINE = """import dataclasses
from gpt2_jax.evaluate.sources import Download
from gpt2_jax.evaluate.template import TASKS
source = dataclasses.replace(TASKS[0].source, downloads=(Download("http://host.invalid/a"),))
TASKS = [dataclasses.replace(TASKS[0], name="own", source=source)]
"""
