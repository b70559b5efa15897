# SPDX-License-Identifier: Apache-2.0
"""Runs what a page tells the reader to type.

A shell block runs in bash, where `gpt2-jax`, `python`, `make` and the cloud's programs are
recorders: each writes down how it was called. Then every recorded call of this project is run
truly, in order, with published names replaced by a small local checkpoint and small sizes.
"""

import contextlib
import dataclasses
import importlib.util
import os
import pathlib
import re
import socket
import subprocess
import sys

from tests.launch.bad_inputs.runner import Worker
from tests.pages.markdown import ROOT

# What a block before may have set.
VARIABLES = {"BUCKET": "bucket", "PROJECT": "my-project", "DATA": "gs://bucket", "IMAGE": "image"}

# Programs of others: a page may call them; nothing is rented in a test.
FOREIGN = ("gcloud", "git", "docker", "kubectl", "sky", "xpk", "tensorboard", "jupyter")
RECORDED = ("gpt2-jax", "python", "make", "pip", *FOREIGN)
RECORDER = """#!/bin/sh
printf '%s\\0' "${0##*/}" "$#" "$@" >>"$CALLS"
case "$*" in
  *--template*) cat "$TEMPLATE" ;;
  *--watermark*) echo 'Once upon a time there was a cat that sat on a mat by the sea.' ;;
esac
"""
# Of the commands whose output a page writes to a file, one is this.
TEMPLATE = ROOT / "gpt2_jax" / "evaluate" / "template.py"

# A published name is a local folder here.
PUBLISHED = re.compile(
  r"(--(?:models?|from|against|verify|config\.init_from|config\.distill\.teacher)=)(?:gpt2(?:-\w+)?|distilgpt2)(?:,gpt2-\w+)?$"
)
# The coordinator of a run of one process is not asked for; the text of a test has few words.
SMALL_FLAGS = {"--processes=4": "--processes=1", "--vocab_size=4096": "--vocab_size=500"}
SMALL_FLAGS |= {"--false_positives=0.01": "--false_positives=0.2"}
SMALL_FLAGS |= {
  "--workdir=/shared/run": "--workdir=runs/shared",
  "runs/trunk@100000": "runs/trunk@2",
}
# Few examples in short rows.
SMALL_FLAGS |= {
  f"--prepare=data/e2e/{name}.txt": "--prepare=e2e.txt" for name in ("train", "valid")
}
SMALL_FLAGS |= {f"--n_ctx={length}": "--n_ctx=64" for length in (128, 256, 512)}
TINY = "n_layer=1 n_embd=16 n_head=2 n_ctx=128 dtype=float32".split()
STEPS = "steps=2 batch_size=8 warmup_steps=1 log_every=1 eval_every=2 eval_windows=8 save_every=2"


@dataclasses.dataclass(frozen=True)
class Call:
  """A program and its arguments, as bash gave them to it."""

  program: str
  arguments: tuple[str, ...]


def free_port() -> int:
  """A port such that it and the next one are free, for now."""
  while True:
    with socket.socket() as first, socket.socket() as second:
      first.bind(("localhost", 0))
      port = first.getsockname()[1]
      with contextlib.suppress(OSError, OverflowError):
        second.bind(("localhost", port + 1))
        return port


def record(script: str, folder: pathlib.Path, shims: pathlib.Path) -> list[Call]:
  """The calls that a shell block makes. Fails if bash does."""
  calls = shims / "calls"
  calls.write_bytes(b"")
  environment = {"PATH": f"{shims}:/usr/bin:/bin", "HOME": str(folder), "CALLS": str(calls)}
  environment["TEMPLATE"] = str(TEMPLATE)
  for name, value in {
    "HOST:PORT": f"localhost:{free_port()}",
    "BUCKET=my-bucket": "BUCKET=bucket",
  }.items():
    script = script.replace(name, value)
  job = subprocess.run(
    ["bash", "-euo", "pipefail", "-c", script],
    cwd=folder,
    env=environment | VARIABLES,
    capture_output=True,
    text=True,
    timeout=60,
  )
  assert job.returncode == 0, f"bash: {job.stderr[-500:]}"

  words = calls.read_bytes().decode().split("\0")[:-1]
  result = []
  while words:
    program, count, *words = words
    result.append(Call(program, tuple(words[: int(count)])))
    words = words[int(count) :]
  return result


def make_shims(folder: pathlib.Path, sandbox: pathlib.Path) -> None:
  """The recorders: on the path, and launch/tpu_vm.sh of the sandbox."""
  (sandbox / "launch").mkdir(exist_ok=True)
  for path in [folder / name for name in RECORDED] + [sandbox / "launch" / "tpu_vm.sh"]:
    path.write_text(RECORDER)
    path.chmod(0o755)


def run(call: Call, worker: Worker, sandbox: pathlib.Path) -> None:
  """Runs a recorded call truly. Fails with what it said unless it ends with status 0."""
  program, arguments = call.program, list(call.arguments)
  if program == "python" and arguments[0].startswith("launch/"):
    program, arguments = pathlib.Path(arguments[0]).stem, arguments[1:]
  elif program == "gpt2-jax":
    program, arguments = arguments[0], arguments[1:]

  match program:
    case "gke":
      _process([sys.executable, ROOT / "launch" / "gke.py", "--dry-run", *arguments], sandbox)
    case "tpu_vm.sh":
      end = arguments.index("--") if "--" in arguments else len(arguments)
      arguments.insert(end, "--dry-run")
      _process(["bash", ROOT / "launch" / "tpu_vm.sh", *arguments], sandbox)
    case "make":
      _process(["make", "--dry-run", "--directory", ROOT, *arguments], sandbox)
    case "pip":
      _check_install(arguments)
    case "python":
      _run_python(arguments, sandbox)
    case _ if program in FOREIGN:
      pass
    case _:
      # GPT-1's words are cut by a library that need not be there.
      if "gpt1_tasks" in str(arguments) and importlib.util.find_spec("spacy") is None:
        return
      if program == "webtext" and importlib.util.find_spec("trafilatura") is None:
        return
      # Beam's environment is another one.
      if "--runner=beam" in arguments and importlib.util.find_spec("apache_beam") is None:
        return
      flags = [small_flag(flag) for flag in arguments] + small_knobs(program, arguments)
      if "--processes=1" in flags:  # the processes meet before JAX is used: not in the worker
        return _process([sys.executable, ROOT / "launch" / f"{program}.py", *flags], sandbox)
      result = worker.run(program, flags, seconds=180)
      shown = (
        f"{program} {' '.join(flags)}: {result.status}\n{result.out[-400:]}{result.err[-1200:]}"
      )
      # A test fetches nothing; what is fetched is tests/evaluate/test_downloads.py's subject.
      is_offline = "--download" in flags and "error: " in result.err
      assert result.status == 0 or is_offline and "Traceback" not in result.err, shown


def small_flag(flag: str) -> str:
  """A flag with a local checkpoint in place of a published name, and one process, not four."""
  for written, small in SMALL_FLAGS.items():
    flag = flag.replace(written, small)
  # The TPU's compiler takes minutes for the large sizes.
  flag = flag.replace("--config=gpt2:1542M", "--config=gpt2:117M")
  return PUBLISHED.sub(r"\1./gpt2", flag)


def small_knobs(command: str, arguments: list[str]) -> list[str]:
  """Knobs that make a command's model and work small."""
  if any(flag in ("--help", "--list", "--version", "--template") for flag in arguments):
    return []
  if command == "train":
    steps = [f"--config.{knob}" for knob in STEPS.split()]
    # A branch goes on from the last of these steps.
    if any(flag.startswith("--config.branch_from=") for flag in arguments):
      steps += ["--config.steps=4", "--config.decay_steps=2"]
    if "--config=distill" in arguments:
      return [*steps, "--config.model.dtype=float32", "--config.distill.layers=0"]
    # The sizes of what starts from a checkpoint are the checkpoint's, but for the context.
    if any(flag.startswith(("--config=finetune", "--config=recipes/")) for flag in arguments):
      return [*steps, "--config.model.dtype=float32", "--config.model.n_ctx=64"]
    return steps + [f"--config.model.{x}" for x in TINY]
  if command == "plan" and "--config=distill" in arguments:
    sizes = ["--config.distill.layers=0", "--config.batch_size=8", "--config.microbatches=1"]
    return ["--config.distill.teacher=./gpt2", *sizes]
  if command == "plan":
    sizes = ("n_layer=1", "n_embd=128", "n_head=2", "n_ctx=256", "n_vocab=512")
    return ["--config.batch_size=64", "--compiled=1"] + [f"--config.model.{x}" for x in sizes]
  if command == "memorization" and any(flag.startswith("--model=") for flag in arguments):
    return ["--samples=4", "--length=8"]
  if command == "evaluate" and "--config=responsible" in arguments:
    tasks = "--tasks=crows_pairs:valid,machine_text:lrr"
    return [tasks, "--limit=2", "--config.resamples=10", "--config.batch_size=8"]
  if command == "evaluate":
    return ["--skip_missing", "--config.limit=2", "--config.resamples=10", "--config.batch_size=8"]
  return []


def _run_python(arguments: list[str], sandbox: pathlib.Path) -> None:
  """A script of experiments/, or a module, in a form that a test has time for."""
  script, *flags = arguments
  if script == "-m":
    # lm_eval's own command would download its tasks.
    if importlib.util.find_spec("lm_eval") is not None:
      _process([sys.executable, "-m", flags[0], "--help"], sandbox)
    return
  if script == "experiments/zero_shot_sweep.py":
    flags += ["--model=./gpt2", "--task=lambada", *small_knobs("evaluate", flags)]
  if script == "experiments/e2e.py":
    flags = [small_flag(flag) for flag in flags]
    if any(flag.startswith("--model=") for flag in flags):
      flags += ["--limit=2", "--beams=2", "--n_new=4"]
  # An hour of benchmarks, and one of compiling for TPUs: the script is there, and Python reads it.
  names = ("bench", "calibrate", "distill", "detection", "finetune", "gpu", "optimizers")
  # These need a game, another checkout, and a model that is trained.
  names += ("watermark", "play_adventure", "regression", "memorization", "webtext_rates")
  names += ("private", "moderation")  # and these minutes
  hours = tuple(f"experiments/{name}.py" for name in names)
  if script in hours or script == "experiments/reproduce.py" and not flags:
    compile((ROOT / script).read_text(), script, "exec")
    return
  _process([sys.executable, ROOT / script, *flags], sandbox)


def _check_install(arguments: list[str]) -> None:
  """`pip install` of this project names extras and files that are there."""
  setup = (ROOT / "setup.py").read_text()
  for word in arguments[1:]:
    for extra in re.findall(r"\[([\w,]+)\]", word):
      for name in extra.split(","):
        assert f'"{name}": [' in setup, f"setup.py has no extra {name}"
    if word.endswith(".txt"):
      assert (ROOT / word).exists(), f"there is no {word}"


def _process(command: list, folder: pathlib.Path) -> None:
  environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
  job = subprocess.run(
    list(map(str, command)),
    cwd=folder,
    env=environment,
    capture_output=True,
    text=True,
    timeout=180,
  )
  shown = f"{job.stdout[-300:]}{job.stderr[-1200:]}"
  assert job.returncode == 0, f"{' '.join(map(str, command))}: {job.returncode}\n{shown}"
