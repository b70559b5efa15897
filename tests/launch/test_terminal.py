# SPDX-License-Identifier: Apache-2.0
"""The console in real pseudo-terminals, with and without prompt_toolkit, and what is written."""

import contextlib
import io
import os
import pathlib
import pty
import re
import select
import string
import subprocess
import sys
import termios
import time

import jax
import pytest

from gpt2_jax.cli.terminal import Terminal, printable
from gpt2_jax.convert.pretrained import save_pretrained
from gpt2_jax.model import ModelConfig
from gpt2_jax.tokenizer import Characters

ALPHABET = "".join(sorted(string.ascii_lowercase + " .\n"))
CONFIG = ModelConfig(
  n_vocab=len(ALPHABET), n_ctx=64, n_embd=16, n_head=4, n_layer=2, dtype="float32"
)
SECONDS = 60

# A process of its own session takes its terminal, so that Ctrl-C is a signal to it.
CHILD = """
import fcntl, sys, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
if sys.argv.pop(1) == "plain":
  sys.modules["prompt_toolkit"] = None  # as if it were not installed
from gpt2_jax.cli.main import run
run("sample")
"""


CHILD_ENVIRONMENT = {
  "PYTHONPATH": str(pathlib.Path(__file__).parents[2]),
  "TERM": "xterm-256color",
  "NO_COLOR": "",
  # Nobody answers where the cursor is.
  "PROMPT_TOOLKIT_NO_CPR": "1",
  # What XLA has compiled in another run.
  "JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir or "",
  "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.05",
}


class Screen:
  """A terminal with a session in it, and all that was written to it."""

  def __init__(self, mode: str, *flags: str, **environment: str):
    self.master, slave = pty.openpty()
    termios.tcsetwinsize(slave, (40, 100))
    self.process = subprocess.Popen(
      [sys.executable, "-c", CHILD, mode, *flags],
      stdin=slave,
      stdout=slave,
      stderr=slave,
      start_new_session=True,
      env=os.environ | CHILD_ENVIRONMENT | environment,
    )
    os.close(slave)
    self.raw = ""
    self.seen = 0

  def type(self, text: str) -> None:
    os.write(self.master, text.encode())

  def wait_for(self, text: str) -> str:
    """What is written up to this text, without colours and moves of the cursor."""
    end = time.monotonic() + SECONDS
    while time.monotonic() < end:
      shown = self._shown()[self.seen :]
      if text in shown:
        length = shown.index(text) + len(text)
        self.seen += length
        return shown[:length]
      self._read()
    raise AssertionError(f"{text!r} did not come in {SECONDS} s; the end is {self.raw[-500:]!r}")

  def wait_for_characters(self, count: int) -> None:
    """Waits until so many characters more are written, whatever they are."""
    end = time.monotonic() + SECONDS
    while len(self._shown()) < self.seen + count:
      assert time.monotonic() < end, f"nothing more came; the end is {self.raw[-500:]!r}"
      self._read()
    self.seen += count

  def _shown(self) -> str:
    """All that was written, without colours and moves of the cursor."""
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", self.raw)

  def _read(self) -> None:
    if select.select([self.master], [], [], 0.1)[0]:
      # Linux says EIO when the process has gone.
      with contextlib.suppress(OSError):
        self.raw += os.read(self.master, 65536).decode(errors="replace")

  def end(self) -> int:
    try:
      return self.process.wait(SECONDS)
    finally:
      self.process.kill()
      os.close(self.master)


@pytest.fixture(scope="module")
def checkpoint(mesh, parameters, place, tmp_path_factory):
  path = tmp_path_factory.mktemp("console") / "model"
  with mesh(1, 1, 1):
    save_pretrained(place(CONFIG, parameters(CONFIG, scale=0.5)), Characters(ALPHABET), str(path))
  return path


@pytest.mark.parametrize("mode", ["edited", "plain"])
def test_a_session_at_a_terminal(checkpoint, tmp_path, mode):
  """A text, a setting, Ctrl-C in the middle of a text, and every text in the file at the end."""
  screen = Screen(mode, f"--model={checkpoint}", "--interactive", "--n_new=20")
  greeting = screen.wait_for("gpt2>")
  assert ("Tab completes" in greeting) == (mode == "edited")
  assert ("gpt2_jax[console]" in greeting) == (mode == "plain")

  # 1. A text: the prompt is dim, and the speed stands below it.
  screen.type("once upon\r")
  screen.wait_for("tokens/s")
  assert "\x1b[2monce upon\x1b[0m" in screen.raw
  screen.wait_for("gpt2>")

  # 2. A setting, by completion where there is one; it is asked for again.
  if mode == "edited":
    screen.type("/tempera")
    screen.wait_for("Below 1 is surer")
    screen.type("\t")
    screen.wait_for("ture")
    screen.type(" 0.5\r")
  else:
    screen.type("/temperature 0.5\r")
  screen.wait_for("gpt2>")
  screen.type("/temperature\r")
  screen.wait_for("temperature  0.5")

  # 3. A text past the context, which Ctrl-C ends. Ctrl-C at the prompt ends nothing.
  screen.type("/n_new 1000000\r")
  screen.wait_for("gpt2>")
  screen.type("twice upon\r")
  screen.wait_for("exceed the context of 64")
  screen.wait_for("twice upon")
  screen.wait_for_characters(5)  # of what the model adds: before them there is nothing to keep
  screen.type("\x03")
  screen.wait_for("gpt2>")
  # Python's readline looks at signals before it waits for a key: one in the instant between the
  # prompt and the wait is heard with the next key only. No person is that quick.
  time.sleep(0.3)
  screen.type("\x03")
  screen.wait_for("gpt2>")

  # 4. Both texts are there.
  path = tmp_path / "texts.txt"
  screen.type(f"/save {path}\r")
  screen.wait_for("saved, texts: 2")
  screen.wait_for("gpt2>")
  screen.type("\x04")
  assert screen.end() == 0
  assert "Traceback" not in screen.raw
  text = path.read_text()
  assert text.startswith("once upon") and "\ntwice upon" in text


class FakeTerminal(io.StringIO):
  """A text that says of itself that it is a terminal."""

  def isatty(self):
    return True


@pytest.mark.parametrize(
  "environment, written",
  [
    ({}, "\x1b[2ma\\x1b[31m\\rb\n\tü\x1b[0m\n"),
    ({"NO_COLOR": "1"}, "a\\x1b[31m\\rb\n\tü\n"),
    ({"TERM": "dumb"}, "a\x1b[31m\rb\n\tü\n"),
  ],
)
def test_a_terminal_shows_control_characters_and_obeys_none(monkeypatch, environment, written):
  """What a model writes may be any bytes. A file gets them as they are."""
  for name, value in ({"NO_COLOR": "", "TERM": "xterm"} | environment).items():
    monkeypatch.setenv(name, value)
  screen, file = FakeTerminal(), io.StringIO()
  for output in (screen, file):
    Terminal(output).write("a\x1b[31m\rb\n\tü", "dim")
  assert screen.getvalue() == written
  assert file.getvalue() == "a\x1b[31m\rb\n\tü\n"


def test_letters_of_any_script_are_printable():
  text = "naïve 日本語 한국어 \U0001f9d1\u200d\U0001f680 \xa0\n\t"
  assert printable(text) == text
  assert printable("\x00\x07\x7f\x9b") == "\\x00\\x07\\x7f\\x9b"


def test_a_spinner_leaves_nothing_behind(monkeypatch):
  monkeypatch.setenv("TERM", "xterm")
  monkeypatch.setattr("gpt2_jax.cli.terminal.SPINNER_DELAY", 0.0)
  screen, file = FakeTerminal(), io.StringIO()
  with pytest.raises(KeyboardInterrupt), Terminal(screen).waiting("compiling"):
    while "compiling, 0 s" not in screen.getvalue():
      time.sleep(0.01)
    raise KeyboardInterrupt
  assert screen.getvalue().endswith("\r\x1b[K")

  # No terminal, no spinner; nor in front of what is quick.
  monkeypatch.undo()
  with Terminal(file).waiting("compiling"), Terminal(screen).waiting("quick"):
    pass
  assert file.getvalue() == "" and "quick" not in screen.getvalue()


def test_a_closed_output_takes_nothing():
  closed = Terminal(None)
  with closed.waiting("compiling"):
    closed.write("text", "dim")
