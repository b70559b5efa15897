# SPDX-License-Identifier: Apache-2.0
"""Whatever ends a command is one line: errors, flags, config files, closed outputs, Ctrl-C."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import pytest
from absl import flags
from ml_collections import config_flags

from gpt2_jax.cli import config_file, shell

ROOT = pathlib.Path(__file__).parents[2]
SCRIPTS = ("train", "tokenize", "convert", "evaluate", "contamination", "detect", "memorization")
SCRIPTS += ("sample", "plan", "webtext", "card")


def command(tmp_path, body: str) -> list:
  """A script whose main has this body."""
  lines = "\n".join(f"  {line}" for line in body.splitlines())
  path = tmp_path / "command.py"
  path.write_text(f"import os, sys, time\nfrom gpt2_jax.cli import shell\ndef main():\n{lines}\n")
  with open(path, "a") as file:
    file.write("shell.run(main, 'A test.')\n")
  return [sys.executable, path]


def start(words: list, **options) -> subprocess.Popen:
  environment = os.environ | {"PYTHONPATH": str(ROOT)}
  return subprocess.Popen(
    words, stderr=subprocess.PIPE, text=True, cwd=ROOT, env=environment, **options
  )


def end(process: subprocess.Popen) -> tuple[int, str]:
  """Its status, and what it wrote to stderr."""
  try:
    _, err = process.communicate(timeout=60)
  finally:
    process.kill()  # one that did not end would hold a core until it is done
  return process.returncode, err


# ---- errors


def deep_json():
  json.loads("[" * 100_000)


def no_host_memory():
  bytearray(1 << 62)


def no_device_memory():
  jnp.zeros((1 << 44,)).block_until_ready()


@pytest.mark.parametrize(
  "cause, expected",
  [
    (deep_json, "nested too deep"),
    (no_host_memory, "out of memory; give less at a time"),
    (no_device_memory, "out of device memory: RESOURCE_EXHAUSTED"),
  ],
)
def test_what_the_machine_cannot_do_is_one_line(cause, expected):
  with pytest.raises((MemoryError, RecursionError, jax.errors.JaxRuntimeError)) as caught:
    cause()
  line = shell.message(caught.value)
  assert line.startswith(expected) or expected in line
  assert "\n" not in line and len(line) < shell.LINE_LIMIT


def test_a_line_has_a_length_and_keeps_both_ends():
  line = shell.message(ValueError("the rule, " + "many items, " * 5000 + "the way out"))
  assert len(line) == shell.LINE_LIMIT
  assert line.startswith("the rule, ") and line.endswith("the way out")


def test_a_terminal_obeys_nothing_in_an_error():
  line = shell.message(ValueError("a file's name: \x1b[2J\x07\udcff é"))
  assert line == "a file's name: \\x1b[2J\\x07\\udcff é"


def test_an_error_without_a_text_has_a_name():
  assert shell.message(ValueError()) == "ValueError"
  assert shell.message(KeyError("x")) == "KeyError: 'x'"


def test_errors_end_with_status_2_and_defects_with_a_traceback(tmp_path):
  status, err = end(start(command(tmp_path, "raise MemoryError('1 TB')")))
  assert (status, err) == (2, "error: out of memory; give less at a time 1 TB\n")
  status, err = end(start(command(tmp_path, "{}['a defect']")))
  assert status == 1 and "KeyError: 'a defect'" in err and "command.py" in err


# ---- flags


def test_an_unknown_flag_names_the_nearest(tmp_path):
  for flag, near in (("--tracebak", "--traceback"), ("--trace.knob=3", "--traceback.knob")):
    status, err = end(start([*command(tmp_path, "pass"), flag]))
    assert status == 2 and err.startswith("error: ") and len(err.splitlines()) == 1
    assert f"did you mean {near}?" in err


def parse(tmp_path, *arguments: str, text: str | None = None):
  """The config of `--config=config.py` with this text and the arguments after it."""
  path = tmp_path / "config.py"
  if text is not None:
    path.write_bytes(text.encode("latin-1"))
  argv = ["command", f"--config={path}", *arguments]
  values = flags.FlagValues()
  config_flags.DEFINE_config_file("config", None, flag_values=values, sys_argv=argv)
  config_file.check_errors(argv, flag_values=values)
  values(argv)
  return values.config


GOOD = """from ml_collections import ConfigDict
def get_config(size="small"):
  if size not in ("small", "large"):
    raise ValueError(f"no size {size}")
  return ConfigDict({"steps": 3, "path": "a", "model": {"n_head": 2}})
"""


@pytest.mark.parametrize(
  "text, message",
  [
    ("x = [1,\n", r"'\[' was never closed \(line 1 of .*config.py\)"),
    ("x = 1\n  y = 2\n", r"unexpected indent \(line 2 of"),
    ('x = "\xff"\n', r"can't decode byte 0xff .*\(line 1 of"),
    ("\n\nx = {}['a']\n", r"KeyError: 'a' \(line 3 of"),
    ("import no_such_module\n", r"ModuleNotFoundError: .*no_such_module.*\(line 1 of"),
    ("def get_config():\n  import sys\n  sys.exit(0)\n", r"SystemExit: 0 \(line 3 of"),
    ("def get_config():\n  return get_config()\n", r"RecursionError: .*\(line 2 of"),
    ("def get_config():\n  return int('x')\n", r"invalid literal .*\(line 2 of"),
    ("def get_config():\n  return open('/no/such')\n", r"No such file or directory: '/no/such'"),
    ("def get_config(a, b):\n  pass\n", r"TypeError: .*missing 2 required"),
    ("x = 1\n", r"config.py defines no get_config\(\)"),
    ("def get_config():\n  return 3\n", r"returns int; it is a ConfigDict"),
    ("def get_config():\n  pass\n", r"returns NoneType; it is a ConfigDict"),
  ],
)
def test_a_config_file_with_an_error_says_where(text, message, tmp_path):
  with pytest.raises(flags.IllegalFlagValueError, match=message) as caught:
    parse(tmp_path, text=text)
  line = shell.message(caught.value)
  assert "Traceback" not in line and len(line) < 400


def test_an_unknown_knob_names_the_nearest(tmp_path):
  config = parse(tmp_path, "--config.steps=4", "--config.model.n_head=1", text=GOOD)
  assert (config.steps, config.model.n_head) == (4, 1)
  for knob, near in (
    ("nothing", "path"),
    ("step", "steps"),
    ("model.n_heads", "model.n_head"),
    ("n_head", "model.n_head"),
    ("steps.x", "steps"),
    ("path.x.y", "path"),
    ("modle.n_head", "model.n_head"),
  ):
    with pytest.raises(flags.IllegalFlagValueError, match=f"did you mean --config.{near}?"):
      parse(tmp_path, f"--config.{knob}=4", text=GOOD)


def test_an_unknown_knob_of_a_default_config_is_one_line():
  """The file is not on the command line; its knobs are."""
  status, err = end(start([sys.executable, "launch/evaluate.py", "--config.batchsize=3"]))
  assert status == 2 and len(err.splitlines()) == 1
  assert "there is no knob 'batchsize'; did you mean --config.batch_size?" in err


def test_a_config_file_that_is_not_there(tmp_path):
  for path in (tmp_path / "none.py", tmp_path):
    argv = ["command", f"--config={path}"]
    values = flags.FlagValues()
    config_flags.DEFINE_config_file("config", None, flag_values=values, sys_argv=argv)
    config_file.check_errors(argv, flag_values=values)
    with pytest.raises(flags.IllegalFlagValueError, match=f"there is no file {path}; configs/"):
      values(argv)


# ---- the output


@pytest.mark.parametrize("size", [1, 1_000_000])
def test_an_output_that_nobody_reads_is_one_line(size, tmp_path):
  """Few bytes are written only at the end, many on the way."""
  process = start(command(tmp_path, f"time.sleep(1); print('x' * {size})"), stdout=subprocess.PIPE)
  process.stdout.close()
  process.stdout = None
  expected = "error: nobody reads the output any more (broken pipe)\n"
  assert end(process) == (2, expected)


def test_a_full_disk_behind_the_output_is_one_line(tmp_path):
  with open("/dev/full", "w") as full:
    status, err = end(start(command(tmp_path, "print('x')"), stdout=full))
  assert status == 2 and "No space left" in err and len(err.splitlines()) == 1


def test_a_closed_output_is_refused_before_anything_is_done(tmp_path):
  words = command(tmp_path, "open('written', 'w')")
  process = start(["sh", "-c", '"$0" "$@" >&-', *words])
  status, err = end(process)
  assert status == 2 and err.startswith("error: the standard output is closed")
  assert not (ROOT / "written").exists()


# ---- Ctrl-C


# Flags with which each script comes to its imports.
TO_IMPORTS = {
  "train": ["--config=configs/demo.py", "--workdir=runs/x"],
  "contamination": ["--task=lambada"],
  "detect": ["--files=x", "--watermark=7"],
  "webtext": ["--input=x.html", "--out=runs/x"],
  "sample": ["--model=gpt2"],
  "plan": ["--config=configs/demo.py", "--topology=v5e:2x2"],
}


@pytest.mark.parametrize("script", SCRIPTS)
def test_ctrl_c_during_the_imports_ends_without_a_traceback(script):
  words = [sys.executable, "-X", "importtime", f"launch/{script}.py", *TO_IMPORTS.get(script, [])]
  process = start(words)
  for line in process.stderr:
    if "jax._src" in line:
      break
  process.send_signal(signal.SIGINT)
  status, err = end(process)
  assert status == -signal.SIGINT
  assert "Traceback" not in err and "KeyboardInterrupt" not in err


def interrupt(process: subprocess.Popen, *seconds: float) -> tuple[int, str, float]:
  """Its status and stderr after a SIGINT at each of these times, and how long it took from then."""
  assert process.stdout.readline() == "started\n"
  for wait in seconds:
    time.sleep(wait)
    process.send_signal(signal.SIGINT)
  begin = time.monotonic()
  return *end(process), time.monotonic() - begin


def test_ctrl_c_is_one_line(tmp_path):
  process = start(
    command(tmp_path, "print('started', flush=True); time.sleep(60)"), stdout=subprocess.PIPE
  )
  assert interrupt(process, 0.1)[:2] == (130, "interrupted\n")


# A call that returns to Python only at its end, as the compilation of XLA.
LONG = "import hashlib; print('started', flush=True); hashlib.pbkdf2_hmac('md5', b'', b'', 10**9)"


def test_a_second_ctrl_c_ends_what_python_cannot_interrupt(tmp_path):
  process = start(command(tmp_path, LONG), stdout=subprocess.PIPE)
  status, err, seconds = interrupt(process, 0.1, 1)
  first, last = err.splitlines()
  assert status == 130 and "Ctrl-C again ends at once" in first and last == "interrupted"
  assert seconds < 10


def test_ctrl_c_stays_ignored_where_it_was(tmp_path):
  """In the background of a shell's script."""
  words = command(tmp_path, "print('started', flush=True); time.sleep(1)")
  process = start(["sh", "-c", 'trap \'\' INT; exec "$0" "$@"', *words], stdout=subprocess.PIPE)
  assert interrupt(process, 0.1)[:2] == (0, "")
