# SPDX-License-Identifier: Apache-2.0
"""Interactive text generation at a terminal: streaming, settings that may change, history."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
from collections.abc import Callable
from typing import TYPE_CHECKING

from gpt2_jax.cli import shell
from gpt2_jax.files import atomic_write, local_path

if TYPE_CHECKING:
  from gpt2_jax.decoding import Generation, Greedy, Sample

# Arrow keys and line history in input(); not on every platform.
with contextlib.suppress(ImportError):
  import readline  # noqa: F401


def setting(default, what: str, value_type: type):
  """A field of `Settings`, with the help and the type of its flag."""
  return dataclasses.field(default=default, metadata={"help": what, "type": value_type})


def newlines(text: str) -> str:
  """Replaces backslash and n, or t, by the characters they stand for."""
  return text.replace("\\n", "\n").replace("\\t", "\t")


@dataclasses.dataclass(frozen=True)
class Settings:
  """Settings of text generation: flags of launch/sample.py, and names for `/set`.

  None leaves a filter out.
  """

  n_new: int = setting(100, "Tokens to add, at most.", int)
  greedy: bool = setting(False, "Take the likeliest token each time.", bool)
  temperature: float = setting(1.0, "Below 1 is surer, above 1 is wilder.", float)
  top_k: int | None = setting(None, "Draw from the k likeliest tokens.", int)
  top_p: float | None = setting(
    None, "Draw from the likeliest tokens that hold this probability.", float
  )
  min_p: float | None = setting(
    None, "Draw from the tokens at least so likely, as a part of the likeliest.", float
  )
  typical: float | None = setting(
    None, "Draw from the most typical tokens that hold this probability.", float
  )
  repetition: float | None = setting(
    None, "Penalty on tokens of the text so far, prompt included (1.2, say).", float
  )
  frequency: float = setting(0.0, "Penalty for each time that a token was added.", float)
  presence: float = setting(0.0, "Penalty on tokens that were added at all.", float)
  no_repeat: int | None = setting(None, "Never repeat a run of so many tokens.", int)
  stop: tuple[str, ...] = setting((), "End before this text; may be repeated.", str)
  window: int | None = setting(
    None, "Past the context, forget so many of the oldest tokens at a time.", int
  )
  seed: int = setting(0, "The same seed gives the same text.", int)

  def sampler(self) -> Greedy | Sample:
    """Penalties first, then the temperature, then what is kept.

    Raises ValueError for numbers that cannot be.
    """
    from gpt2_jax.decoding import make_sampler

    # A penalty of 0 changes nothing, and would count the tokens for it.
    return make_sampler(
      greedy=self.greedy,
      frequency_penalty=self.frequency or None,
      presence_penalty=self.presence or None,
      repetition_penalty=self.repetition,
      no_repeat_ngram=self.no_repeat,
      temperature=self.temperature,
      top_k=self.top_k,
      top_p=self.top_p,
      min_p=self.min_p,
      typical_p=self.typical,
    )

  def generation(self) -> Generation:
    """The options of `stream` and `complete`."""
    from gpt2_jax.decoding import Generation, SlidingWindow

    window = None if self.window is None else SlidingWindow(self.window)
    return Generation(self.n_new, self.sampler(), self.seed, stop=self.stop, window=window)

  def changed(self, name: str, text: str) -> Settings:
    """These settings with one set to what the text says.

    Raises ValueError for unknown names and values.
    """
    fields = {field.name: field for field in dataclasses.fields(self)}
    if name not in fields:
      near = difflib.get_close_matches(name, fields, 1, cutoff=0)[0]
      raise ValueError(
        f"no setting {name[:80]!r}; there are {', '.join(fields)}; did you mean {near}?"
      )
    if not text:
      raise ValueError(f"/set {name} wants a value; none is its default")

    # 1. Read the text as the type of the field.
    value_type = fields[name].metadata["type"]
    if text.lower() == "none":
      value = fields[name].default
    elif value_type is bool:
      value = {"true": True, "false": False}.get(text.lower())
    elif value_type is str:
      value = (newlines(text),)
    else:
      value = _number(name, text, value_type)
    if value is None and value_type is bool:
      raise ValueError(f"{name} is true or false, not {text[:80]!r}")

    # 2. Filters refuse numbers that cannot be, before the setting is taken.
    settings = dataclasses.replace(self, **{name: value})
    settings.generation()
    return settings


def _number(name: str, text: str, number_type: type):
  """The number that a text says. Raises ValueError with the setting's name, of bounded length."""
  try:
    return number_type(text)
  except ValueError as error:
    kind = "a whole number" if number_type is int else "a number"
    raise ValueError(f"{name} is {kind}, not {text[:80]!r}") from error


class Console:
  """An interactive session: every line is a prompt, or a command that begins with a slash."""

  HELP = """  a line          a prompt to continue; a \\ at its end goes on to the next line
  /more           go on from the end of the last text, with the next seed
  /again          the last prompt once more, with the next seed
  /set NAME VALUE change a setting (none: its default); /settings shows them all
  /history        the texts so far
  /save FILE      write them to a file
  /quit           or Ctrl-D; Ctrl-C ends a text that is being written"""

  COMMANDS = "/help /settings /set /history /save /more /again /quit /exit".split()

  def __init__(
    self, model, tokenizer, settings: Settings, read: Callable[[str], str] = input, write=print
  ):
    from gpt2_jax.decoding import for_inference

    self.decoder = for_inference(model)
    self.tokenizer = tokenizer
    self.settings = settings
    self.read, self.write = read, write
    self.texts: list[tuple[str, str]] = []  # prompts, and what was added to each

  def run(self) -> None:
    """Reads lines until the end. An error is one line, and the session goes on.

    Only a terminal that cannot be read or written ends it early, with an OSError.
    """
    self.write("Type a text to continue, or /help.")
    self._say_error(self._check, self.settings)
    while True:
      # Ctrl-D ends the session; Ctrl-C ends a line, or a text that is being written.
      try:
        line = self._line()
        if line.strip() in ("/quit", "/exit"):
          return
        self._say_error(self._answer, line)
      except EOFError:
        self.write("")
        return
      except KeyboardInterrupt:
        self.write("")

  def _say_error(self, do: Callable, argument) -> None:
    """Calls `do(argument)`; an error of it is one line."""
    try:
      do(argument)
    # Whatever it is, a defect too: the session has texts that nobody has saved.
    except Exception as error:
      self.write(f"error: {shell.message(error)}")

  def _line(self) -> str:
    line = self.read("gpt2> ")

    # A backslash at the end goes on to the next line.
    while line.endswith("\\"):
      line = line[:-1] + "\n" + self.read("  ... ")
    return line

  def _answer(self, line: str) -> None:
    # A space before the slash makes a text of it.
    command = rest = ""
    if line.startswith("/"):
      command, _, rest = line.strip().partition(" ")

    match command:
      # A text
      case "":
        if line.strip():
          self._continue(line)

      # Settings
      case "/help":
        self.write(self.HELP)
      case "/settings":
        for field in dataclasses.fields(self.settings):
          text = str(getattr(self.settings, field.name))
          self.write(f"  {field.name:<12} {text:<10} {field.metadata['help']}")
      case "/set":
        name, _, value = rest.strip().partition(" ")
        settings = self.settings.changed(name, value.strip())
        self._check(settings)
        self.settings = settings

      # The texts so far
      case "/history":
        for prompt, added in self.texts:
          self.write(f"{'-' * 40}\n{prompt}{added}")
      case "/save" if rest:
        # Nothing is overwritten, and no half of a file is left.
        text = "\n".join(prompt + added for prompt, added in self.texts) + "\n"
        with atomic_write(local_path(rest.strip())) as partial:
          partial.write_text(text, encoding="utf-8")
      case "/more" | "/again":
        # With the same seed the same random numbers would come again.
        prompt, added = self._last()
        seed = (self.settings.seed + 1) % 2**32
        self.settings = dataclasses.replace(self.settings, seed=seed)
        self._continue(prompt + added if command == "/more" else prompt)
      case _:
        near = difflib.get_close_matches(command, self.COMMANDS, 1, cutoff=0)[0]
        raise ValueError(
          f"no command {line.strip()[:80]}; did you mean {near}? "
          f"/help shows those there are, and a space before it makes it a text"
        )

  def _check(self, settings: Settings) -> None:
    """Raises ValueError for settings with which this model can continue no prompt."""
    n_ctx = self.decoder.model.config.n_ctx
    window = settings.generation().window
    if window is not None:
      window.check(n_ctx)
    elif settings.n_new > n_ctx:
      raise ValueError(
        f"n_new of {settings.n_new:,} exceeds the context of {n_ctx:,}: set a smaller one, "
        f"or first a window, as in /set window {max(1, n_ctx // 2)}"
      )

  def _last(self) -> tuple[str, str]:
    if not self.texts:
      raise ValueError("there is no text yet; type one to continue")
    return self.texts[-1]

  def _continue(self, prompt: str) -> None:
    """Writes the text as it is made, and remembers it, whole or interrupted."""
    from gpt2_jax.decoding import stream

    generation = self.settings.generation()
    added = []
    try:
      # It reads the prompt now, and raises here if that cannot be continued.
      chunks = stream(self.decoder, self.tokenizer, prompt, generation=generation)
      self.write(prompt, end="", flush=True)
      for chunk in chunks:
        added.append(chunk)
        self.write(chunk, end="", flush=True)
    finally:
      # Also after Ctrl-C, and before the line of an error.
      self.write("")
      if added:
        self.texts.append((prompt, "".join(added)))
