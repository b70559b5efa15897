# SPDX-License-Identifier: Apache-2.0
"""Sessions at the terminal, with the lines that a person would type."""

import string

import pytest

from gpt2_jax.cli.console import Console, Settings
from gpt2_jax.decoding import Greedy, Sample, Temperature, TopK, complete
from gpt2_jax.model import ModelConfig
from gpt2_jax.tokenizer import Characters

ALPHABET = "".join(sorted(string.ascii_lowercase + " .\n/"))
CONFIG = ModelConfig(
  n_vocab=len(ALPHABET), n_ctx=64, n_embd=16, n_head=4, n_layer=2, dtype="float32"
)


@pytest.fixture(scope="module")
def model(mesh, parameters, place):
  with mesh(1, 1, 1):
    return place(CONFIG, parameters(CONFIG, scale=0.5))


@pytest.fixture
def say(model):
  """say(*lines): what a session with these lines writes, and the Console after it; an exception
  stands for its key."""

  def run(*lines):
    typed, written = iter(lines), []

    def read(prompt):
      line = next(typed, EOFError())
      if isinstance(line, BaseException):
        raise line
      return line

    console = Console(
      model,
      Characters(ALPHABET),
      Settings(n_new=10),
      read,
      lambda text="", end="\n", flush=False: written.append(text + end),
    )
    console.run()
    return "".join(written), console

  return run


def test_a_line_is_continued_as_complete_does(say, model):
  text, console = say("once upon", "/set seed 3", "once upon")
  for prompt, seed in (("once upon", 0), ("once upon", 3)):
    added = complete(
      model, Characters(ALPHABET), prompt, 10, Sample((Temperature(1.0),)), seed=seed
    )
    assert prompt + added + "\n" in text
    assert (prompt, added) in console.texts


def test_settings_change_and_are_shown(say):
  text, console = say(
    "/set top_k 3",
    "/set greedy true",
    "/set stop a\\nb",
    "/settings",
    "/set top_k none",
    "/set n_new 4",
  )
  assert console.settings == Settings(n_new=4, greedy=True, stop=("a\nb",))
  assert "top_k        3 " in text
  assert console.settings.sampler() == Greedy((Temperature(1.0),))
  assert Settings(top_k=5, temperature=0.5).sampler() == Sample((Temperature(0.5), TopK(5)))


def test_more_goes_on_and_again_starts_anew_with_the_next_seed(say, model):
  """With the same seed the same random numbers would come round again."""
  _, console = say("abc", "/more", "/again")
  (first, added), (second, _), (third, _) = console.texts
  assert (first, second, third) == ("abc", "abc" + added, "abc" + added)
  assert console.settings.seed == 2


def test_a_stop_of_any_characters(say):
  for typed, stop in (("é", "é"), ("—END", "—END"), ("a\\nb", "a\nb")):
    assert say(f"/set stop {typed}")[1].settings.stop == (stop,)


def test_a_space_before_a_slash_makes_it_a_text(say):
  assert say(" /abc")[1].texts[0][0] == " /abc"


def test_history_is_saved_and_nothing_is_overwritten(say, tmp_path):
  path = tmp_path / "texts.txt"
  text, console = say("abc", "line one\\", "line two", f"/save {path}", f"/save {path}", "/history")
  assert path.read_text() == "\n".join(prompt + added for prompt, added in console.texts) + "\n"
  assert console.texts[1][0] == "line one\nline two"
  assert "error: " in text and "is there already" in text
  assert text.count("-" * 40) == 2


@pytest.mark.parametrize(
  "line, answer",
  [
    ("/st top_k 3", "no command /st top_k 3; did you mean /set?"),
    ("/set topk 3", "no setting 'topk'; there are n_new"),
    ("/set seeed 3", "did you mean seed?"),
    ("/set top_k 0", "top-k of 0"),
    ("/set top_k many", "top_k is a whole number, not 'many'"),
    ("/set top_k " + "9" * 5000, "top_k is a whole number, not '999"),
    ("/set n_new 0", "n_new is 0; it is from 1 to"),
    (
      "/set n_new 65",
      "n_new of 65 exceeds the context of 64: set a smaller one, or first a window",
    ),
    ("/set window 64", "leave nothing of a context of 64"),
    ("/set window 0", "stride 0"),
    ("/set seed -1", "a seed of -1 is not from 0 to 4294967295"),
    ("/set seed 4294967296", "a seed of 4294967296 is not"),
    ("/set temperature nan", "a temperature of nan"),
    ("/set top_p inf", "top-p of inf"),
    ("/set stop \udcff", "the stop string is not valid Unicode"),
    ("/save ~nobody-has-this-name/x", "this machine has no such user"),
    ("/save gs://bucket/x", "only a local path will do"),
    ("/save /dev/null/x", "File exists"),
    ("/save a\0b", "it has a NUL in it"),
    ("/save " + "x" * 300, "File name too long"),
    ("ab\udcff", "the prompt is not valid Unicode: character 2"),
    ("/set top_k", "/set top_k wants a value"),
    ("/set", "no setting ''"),
    ("/save", "no command /save"),
    ("/set seed 99999999999999999999", "is not from 0 to 4294967295"),
    ("/set greedy perhaps", "greedy is true or false, not 'perhaps'"),
    ("/more", "there is no text yet"),
    ("Ä", "is none of the alphabet's"),
    ("a" * 60, "exceed the context of 64"),
  ],
)
def test_an_error_is_one_line_and_the_session_goes_on(say, line, answer):
  text, console = say(line, "abc")
  errors = [row for row in text.splitlines() if row.startswith("error: ")]
  assert len(errors) == 1 and answer in errors[0] and len(errors[0]) < 400
  assert [prompt for prompt, _ in console.texts] == ["abc"]


class Faulty(Characters):
  """A tokenizer with a defect."""

  def encode(self, text, allow_eot=False):
    return {}[text] if text == "abc" else super().encode(text)


def test_a_defect_is_one_line_and_the_texts_stay(model):
  """Whatever a library raises: the texts are nowhere else."""
  lines, written = iter(["once upon", "abc", "/quit"]), []
  console = Console(
    model,
    Faulty(ALPHABET),
    Settings(n_new=10),
    lambda prompt: next(lines),
    lambda text="", **_: written.append(text),
  )
  console.run()
  assert "error: KeyError: 'abc'" in written
  assert [prompt for prompt, _ in console.texts] == ["once upon"]


def test_settings_that_no_prompt_can_be_continued_with_are_said_at_once(model):
  written = []
  settings = Settings(n_new=65)
  console = Console(model, Characters(ALPHABET), settings, lambda prompt: "/quit", written.append)
  console.run()
  assert [line for line in written if line.startswith("error: n_new of 65 exceeds")]


def test_ctrl_c_leaves_the_line_and_not_the_session(say):
  _, console = say(KeyboardInterrupt(), "abc", "/quit", "never read")
  assert [prompt for prompt, _ in console.texts] == ["abc"]
