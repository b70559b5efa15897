# SPDX-License-Identifier: Apache-2.0
"""Sessions at the terminal, with the lines that a person would type."""

import io
import string

import pytest

from gpt2_jax.cli.console import Console, complete_line
from gpt2_jax.cli.settings import Settings, shorten_to_context, slide_past_context
from gpt2_jax.cli.terminal import Terminal
from gpt2_jax.decoding import Greedy, Sample, SlidingWindow, Temperature, TopK, complete
from gpt2_jax.model import ModelConfig
from gpt2_jax.tokenizer import Characters

ALPHABET = "".join(sorted(string.ascii_lowercase + " .\n/"))
FEW = Settings(n_new=10)
CONFIG = ModelConfig(
  n_vocab=len(ALPHABET), n_ctx=64, n_embd=16, n_head=4, n_layer=2, dtype="float32"
)


@pytest.fixture(scope="module")
def model(mesh, parameters, place):
  with mesh(1, 1, 1):
    return place(CONFIG, parameters(CONFIG, scale=0.5))


class Typed(Terminal):
  """Lines that a person types; an exception stands for its key. The output is no terminal."""

  def __init__(self, lines):
    super().__init__(io.StringIO())
    self.lines = iter(lines)

  def read(self, prompt, status=""):
    line = next(self.lines, EOFError())
    if isinstance(line, BaseException):
      raise line
    return line


@pytest.fixture
def say(model):
  """say(*lines): what a session with these lines writes, and the Console after it."""

  def run(*lines, settings=FEW, tokenizer=None):
    terminal = Typed(lines)
    console = Console(model, tokenizer or Characters(ALPHABET), settings, terminal)
    console.run()
    return terminal.output.getvalue(), console

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
    ("/temprature 0.5", "did you mean /temperature?"),
    ("/top_k many", "top_k is a whole number, not 'many'"),
    ("/top_k=0", "top-k of 0"),
    ("/set topk 3", "no setting 'topk'; there are n_new"),
    ("/set seeed 3", "did you mean seed?"),
    ("/set top_k 0", "top-k of 0"),
    ("/set top_k many", "top_k is a whole number, not 'many'"),
    ("/set top_k " + "9" * 5000, "top_k is a whole number, not '999"),
    ("/set n_new 0", "n_new is 0; it is from 1 to"),
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
  ],
)
def test_an_error_is_one_line_and_the_session_goes_on(say, line, answer):
  text, console = say(line, "abc")
  errors = [row for row in text.splitlines() if row.startswith("error: ")]
  assert len(errors) == 1 and answer in errors[0] and len(errors[0]) < 400
  assert [prompt for prompt, _ in console.texts] == ["abc"]


class Faulty(Characters):
  """A tokenizer with a defect."""

  def encode(self, text, allow_eot=False, special=()):
    return {}[text] if text == "abc" else super().encode(text)


def test_a_defect_is_one_line_and_the_texts_stay(say):
  """Whatever a library raises: the texts are nowhere else."""
  text, console = say("once upon", "abc", "/quit", tokenizer=Faulty(ALPHABET))
  assert "error: KeyError: 'abc'\n" in text
  assert [prompt for prompt, _ in console.texts] == ["once upon"]


def test_a_window_that_leaves_nothing_of_the_context_is_said_at_once(say):
  text, _ = say("/quit", settings=Settings(window=64))
  assert "error: stride 64 and keep 0 leave nothing of a context of 64" in text


def test_past_the_context_the_text_slides_and_says_so(say, model):
  """The default number of tokens is for any model, and a prompt may be of any length."""
  text, console = say("once upon", "a" * 70, settings=Settings(n_new=62))
  for prompt, added in console.texts:
    expected = complete(model, Characters(ALPHABET), prompt, 62, window=SlidingWindow(32))
    assert added == expected

  notes = [row for row in text.splitlines() if row.startswith("note: ")]
  assert [note.split(" tokens")[0] for note in notes] == ["note: 9 + 62", "note: 70 + 62"]
  assert all("context of 64; the oldest 32 are forgotten at a time" in note for note in notes)


@pytest.mark.parametrize("window", [None, 16])
def test_a_text_that_fits_just_so_does_not_slide_nor_does_a_chosen_window_change(window):
  generation = Settings(n_new=62, window=window).generation()
  assert slide_past_context(generation, 3, 64) == (generation, "")
  assert (slide_past_context(generation, 4, 64) == (generation, "")) == (window is not None)


@pytest.mark.parametrize("n_prompt, n_new, room", [(3, 62, None), (4, 62, 61), (64, 9, 1)])
def test_a_default_is_shortened_to_the_room_behind_the_prompt(n_prompt, n_new, room):
  generation, note = shorten_to_context(Settings(n_new=n_new).generation(), n_prompt, 64)
  assert generation.n_new == (room or n_new)
  assert note.startswith(f"note: {room} new tokens, since the context of 64") == bool(room)


def test_a_default_is_not_shortened_where_there_is_no_room_or_a_window():
  for settings, n_prompt in ((Settings(), 65), (Settings(window=8), 60)):
    generation = settings.generation()
    assert shorten_to_context(generation, n_prompt, 64) == (generation, "")


def test_a_setting_is_a_command_of_its_own(say):
  lines = ["/temperature 0.5", "/top_k=3", "/set seed=7", "/stop =\\n", "/n_new", "/min_p  none"]
  text, console = say(*lines)
  expected = Settings(n_new=10, temperature=0.5, top_k=3, seed=7, stop=("=\n",))
  assert console.settings == expected
  assert "  n_new        10         Tokens to add, at most.\n" in text
  assert expected.differences() == "n_new 10 · temperature 0.5 · top_k 3 · stop '=\\n' · seed 7"


@pytest.mark.parametrize(
  "line, words",
  [
    ("/te", {"/temperature"}),
    ("/s", {"/set", "/settings", "/save", "/special", "/stop", "/seed"}),
    ("/set t", {"temperature", "top_k", "top_p", "typical"}),
    ("/greedy ", {"true", "false"}),
    ("/set greedy t", {"true"}),
    ("/top_k=4", {"40"}),
    ("once /te", set()),
    ("/no_such ", set()),
    ("/save {folder}/t", {"texts/", "two.txt"}),
    ("/save {folder}/gone/t", set()),
    ("/save ~nobody-has-this-name/", set()),
    ("/save a\0b/", set()),
  ],
)
def test_completion_of_commands_settings_values_and_files(tmp_path, line, words):
  (tmp_path / "texts").mkdir()
  (tmp_path / "two.txt").touch()
  (tmp_path / "other").touch()
  line = line.format(folder=tmp_path)
  completed = list(complete_line(line))
  assert {word for word, _, _ in completed} == words

  # What is completed begins with what it replaces.
  assert all(word.startswith(line[len(line) - n :]) for word, n, _ in completed)


def test_ctrl_c_leaves_the_line_and_not_the_session(say):
  _, console = say(KeyboardInterrupt(), "abc", "/quit", "never read")
  assert [prompt for prompt, _ in console.texts] == ["abc"]
