# SPDX-License-Identifier: Apache-2.0
"""Interactive text generation at a terminal: streaming, settings that may change, history."""

import dataclasses
import difflib
import itertools
import os
import pathlib
import re
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from gpt2_jax.cli import shell
from gpt2_jax.cli.settings import Settings, setting_examples, slide_past_context
from gpt2_jax.cli.terminal import Completions, Terminal
from gpt2_jax.cli.turns import (
  PLAIN_TEXT,
  Answering,
  add_stops,
  check_special_tokens,
  parse_fields,
  prompt_ids,
  recent_turns,
)
from gpt2_jax.files import atomic_write, local_path

if TYPE_CHECKING:
  from gpt2_jax.decoding import Generation

# Each command, and what completion says of it.
COMMANDS = {
  "/help": "what can be typed",
  "/settings": "all settings and their values",
  "/set": "NAME VALUE: change a setting",
  "/more": "go on from the end of the last text",
  "/again": "the last prompt once more",
  "/new": "begin a new chat",
  "/field": "NAME=TEXT: a turn that stands before every prompt",
  "/history": "the texts so far",
  "/save": "FILE: write them to a file",
  "/quit": "end the session",
  "/exit": "end the session",
}

HELP = """  a line          a prompt to continue; a \\ at its end goes on to the next line
  /more           go on from the end of the last text, with the next seed
  /again          the last prompt once more, with the next seed
  /new            begin a new chat, with --template: no turn so far is remembered
  /field          NAME=TEXT: a turn before all others, with --template or --recipe: the memory of
                  an adventure, the date of an article; it stays when old turns have to go
  /NAME VALUE     change a setting, as in /temperature 0.7 (none: its default);
                  /set NAME VALUE does the same, /settings shows them all
  /history        the texts so far
  /save FILE      write them to a file
  /quit           or Ctrl-D; Ctrl-C ends a text that is being written"""

SETTINGS = {field.name: field.metadata["help"] for field in dataclasses.fields(Settings)}


class Console:
  """An interactive session: every line is a prompt, or a command that begins with a slash."""

  def __init__(
    self,
    model,
    tokenizer,
    settings: Settings,
    terminal: Terminal,
    answering: Answering = PLAIN_TEXT,
  ):
    from gpt2_jax.decoding import for_inference

    with terminal.waiting("preparing the model"):
      self.decoder = for_inference(model)
    self.tokenizer = tokenizer
    self.settings = settings
    self.terminal = terminal
    self.answering = answering
    self.template = answering.template  # a line is a message of a chat that it writes
    self.turns: list[tuple[str, str]] = []  # messages of the chat, and the answer to each
    self.texts: list[tuple[str, str]] = []  # prompts, and what was added to each

  def run(self) -> None:
    """Reads lines until the end. An error is one line, and the session goes on.

    Only a terminal that cannot be read or written ends it early, with an OSError.
    """
    self._greet()
    while True:
      # Ctrl-D ends the session; Ctrl-C ends a line, or a text that is being written.
      try:
        line = self._line()
        if line.strip() in ("/quit", "/exit"):
          return
        self._say_error(self._answer, line)
      except EOFError:
        self.terminal.write()
        return
      except KeyboardInterrupt:
        self.terminal.write()

  def _greet(self) -> None:
    tab = "; Tab completes commands" if self.terminal.editing else ""
    what = "a text to continue" if self.template is None else "a message"
    self.terminal.write(f"Type {what}, or /help{tab}.")
    if self.terminal.is_terminal and not self.terminal.editing:
      self.terminal.write("pip install 'gpt2_jax[console]' adds completion to this line", "dim")
    self._say_error(self._check, self.settings)

  def _say_error(self, do: Callable, argument) -> None:
    """Calls `do(argument)`; an error of it is one line."""
    try:
      do(argument)
    # Whatever it is, a defect too: the session has texts that nobody has saved.
    except Exception as error:
      self.terminal.write(f"error: {shell.message(error)}", "error")

  def _line(self) -> str:
    line = self.terminal.read("gpt2> ", self._status())

    # A backslash at the end goes on to the next line.
    while line.endswith("\\"):
      line = line[:-1] + "\n" + self.terminal.read("  ... ")
    return line

  def _answer(self, line: str) -> None:
    # A space before the slash makes a text of it.
    command = rest = ""
    if line.startswith("/"):
      command, rest = split_command(line)

    match command:
      # A text
      case "":
        if line.strip():
          self._continue(line)

      # Settings
      case "/help":
        self.terminal.write(HELP)
      case "/settings":
        for name in SETTINGS:
          self._show(name)
      case "/set":
        name, value = split_command(rest)
        self._set(name, value)
      case _ if command[1:] in SETTINGS:
        name = command[1:]
        if rest:
          self._set(name, rest)
        else:
          self._show(name)

      # The texts so far
      case "/history":
        for prompt, added in self.texts:
          self.terminal.write("-" * 40, "dim")
          self.terminal.write(prompt, "dim", end="")
          self.terminal.write(added)
      case "/save" if rest:
        self._save(rest)
      case "/more" | "/again" if self.template is None:
        self._continue_last(command)
      case "/more" | "/again":
        self._answer_again(command)
      case "/new":
        self.turns = []
      case "/field":
        self._set_field(rest)
      case _:
        raise _unknown_command(command, line)

  # Settings

  def _show(self, name: str) -> None:
    value = str(getattr(self.settings, name))
    self.terminal.write(f"  {name:<12} {value:<10} ", end="")
    self.terminal.write(SETTINGS[name], "dim")

  def _set(self, name: str, value: str) -> None:
    settings = self.settings.changed(name, value)
    self._check(settings)
    self.settings = settings

  def _set_field(self, text: str) -> None:
    fields = dict(self.answering.fields) | parse_fields([text], self.template)
    self.answering = dataclasses.replace(self.answering, fields=fields)

  def _check(self, settings: Settings) -> None:
    """Raises ValueError for settings with which this model can continue no prompt."""
    check_special_tokens(self.tokenizer, settings, self.template)
    window = settings.generation().window
    if window is not None:
      window.check(self.decoder.model.config.n_ctx)

  def _status(self) -> str:
    """One line: the context, and the settings that are not by default."""
    n_ctx = self.decoder.model.config.n_ctx
    settings = self.settings.differences() or "settings as by default"
    return f"context {n_ctx:,} · {settings}"

  # Texts

  def _continue_last(self, command: str) -> None:
    """Goes on from the end of the last text, or continues its prompt once more."""
    if not self.texts:
      raise ValueError("there is no text yet; type one to continue")
    prompt, added = self.texts[-1]
    self._take_next_seed()
    self._continue(prompt + added if command == "/more" else prompt)

  def _take_next_seed(self) -> None:
    """With the same seed the same random numbers would come again."""
    seed = (self.settings.seed + 1) % 2**32
    self.settings = dataclasses.replace(self.settings, seed=seed)

  def _save(self, file: str) -> None:
    """Nothing is overwritten, and no half of a file is left."""
    text = "\n".join(prompt + added for prompt, added in self.texts) + "\n"
    with atomic_write(local_path(file)) as partial:
      partial.write_text(text, encoding="utf-8")
    if self.terminal.is_terminal:
      self.terminal.write(f"saved, texts: {len(self.texts)}", "dim")

  def _continue(self, prompt: str) -> None:
    """Writes the text as it is made, and remembers it, whole or interrupted."""
    # 1. Read the prompt, which raises here if it cannot be continued, and make the first token:
    #    what has not run before is compiled.
    turns, ids = self._read(prompt)
    generation = self._fit_context(len(ids))
    begin = time.monotonic()
    with self.terminal.waiting("compiling and reading the prompt"):
      chunks = self.answering.chunks(self.decoder, self.tokenizer, turns, prompt, ids, generation)
      first, n_first = next(chunks)
    first_at = time.monotonic()

    # 2. Write what comes. Each chunk is remembered before it is written: Ctrl-C, or a defect, may
    #    come at any moment.
    place, text, n_tokens = len(self.texts), "", 0
    self.turns.append((prompt, ""))
    # The answer of a chat begins a line of its own.
    shown = prompt if self.template is None else f"{prompt}\n"
    try:
      self.terminal.write(shown, "dim", end="")
      for chunk, n_new in itertools.chain([(first, n_first)], chunks):
        n_tokens += n_new
        if chunk:
          text += chunk
          self.texts[place:] = [(shown, text)]
          self.turns[-1] = (prompt, text)
          self.terminal.write(chunk, end="")
    finally:
      # Also after Ctrl-C, and before the line of an error.
      self.terminal.write()

    # 3. Tell the speed without the first call, which may have been compiled.
    if self.terminal.is_terminal:
      seconds = time.monotonic() - first_at
      self.terminal.write(_speed(n_tokens, n_tokens - n_first, seconds, first_at - begin), "dim")

  def _answer_again(self, command: str) -> None:
    """Answers the last message of a chat once more, in place of the answer that it has."""
    if command == "/more":
      raise ValueError("an answer ends its turn; /again draws another, and a message goes on")
    if not self.turns:
      raise ValueError("there is no message yet; type one")

    turns = self.turns
    self.turns = turns[:-1]
    self._take_next_seed()
    try:
      self._continue(turns[-1][0])
    finally:
      # The former answer stays unless another one was begun.
      if len(self.turns) < len(turns):
        self.turns = turns

  def _read(self, prompt: str) -> tuple[list[tuple[str, str]], list[int]]:
    """The turns that there is room for, and the tokens of a prompt with them.

    The oldest turns make room for an answer, of half of the context at most.
    """
    n_ctx = self.decoder.model.config.n_ctx
    room = max(n_ctx + 1 - self.settings.n_new, n_ctx // 2)

    def write(turns) -> list[int]:
      fields = self.answering.fields
      return prompt_ids(self.tokenizer, self.settings, self.template, turns, prompt, fields)

    turns = self.turns if self.answering.remembers and self.template is not None else []
    recent = recent_turns(turns, write, room)
    if len(recent) < len(turns):
      n_left_out = len(turns) - len(recent)
      self.terminal.write(f"note: the oldest {n_left_out:,} turns are left out, for room", "dim")
    return recent, write(recent)

  def _fit_context(self, n_prompt: int) -> "Generation":
    """The options for a prompt of so many tokens, after a line if the context is too short."""
    n_ctx = self.decoder.model.config.n_ctx
    generation, note = slide_past_context(self.settings.generation(), n_prompt, n_ctx)
    if note:
      self.terminal.write(note, "dim")
    return add_stops(generation, self.template, self.tokenizer)


def _unknown_command(command: str, line: str) -> ValueError:
  names = [*COMMANDS, *(f"/{name}" for name in SETTINGS)]
  near = difflib.get_close_matches(command, names, 1, cutoff=0)[0]
  return ValueError(
    f"no command {line.strip()[:80]}; did you mean {near}? "
    f"/help lists them, and a space before it makes it a text"
  )


def split_command(line: str) -> tuple[str, str]:
  """The first word of a line and the rest; between them are spaces, or one equals sign."""
  match = re.match(r"(\S*?)(?:=|\s+|$)(.*)", line.strip(), re.DOTALL)
  return match[1], match[2].strip()


def complete_line(line: str) -> Completions:
  """What may follow in a line that is a command: commands, settings, values, files."""
  if not line.startswith("/"):
    return

  *words, last = re.split(r"[\s=]+", line)
  match words:
    case []:
      yield from _beginning_with(last, COMMANDS)
      yield from _beginning_with(last, {f"/{name}": what for name, what in SETTINGS.items()})
    case ["/set"]:
      yield from _beginning_with(last, SETTINGS)
    case ["/set", name] | [name] if name.removeprefix("/") in SETTINGS:
      yield from _beginning_with(last, dict.fromkeys(setting_examples(name.removeprefix("/")), ""))
    case ["/save"]:
      yield from _paths(last)


def _beginning_with(start: str, words: dict[str, str]) -> Completions:
  for word, what in words.items():
    if word.startswith(start):
      yield word, len(start), what


def _paths(start: str) -> Completions:
  """Files and folders whose path begins so."""
  folder, slash, name = start.rpartition("/")
  try:
    entries = sorted(pathlib.Path(folder + slash or ".").expanduser().iterdir())
  except (OSError, RuntimeError, ValueError):
    return  # no such folder, or no such user: there is nothing to complete
  for entry in entries:
    if entry.name.startswith(name) and (name or not entry.name.startswith(".")):
      yield entry.name + (os.sep if entry.is_dir() else ""), len(name), ""


def _speed(n_tokens: int, n_timed: int, seconds: float, first_seconds: float) -> str:
  """One line: how many tokens, how fast, and how long the first took."""
  line = f"{n_tokens:,} tokens"
  if n_timed > 0 and seconds > 0:
    line += f" · {n_timed / seconds:,.1f} tokens/s"
  return f"[{line} · the first after {first_seconds:.1f} s]"
