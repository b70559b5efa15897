# SPDX-License-Identifier: Apache-2.0
"""Interactive text generation at a terminal: streaming, settings that may change, history."""

import contextlib
import dataclasses
import pathlib
from collections.abc import Callable

from gpt2_jax.decoding import (
  Generation,
  Greedy,
  Sample,
  SlidingWindow,
  for_inference,
  make_sampler,
  stream,
)

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
    window = None if self.window is None else SlidingWindow(self.window)
    return Generation(self.n_new, self.sampler(), self.seed, stop=self.stop, window=window)

  def changed(self, name: str, text: str) -> "Settings":
    """These settings with one set to what the text says.

    Raises ValueError for unknown names and values.
    """
    fields = {field.name: field for field in dataclasses.fields(self)}
    if name not in fields:
      raise ValueError(f"no setting {name!r}; there are {', '.join(fields)}")
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
      value = value_type(text)
    if value is None and value_type is bool:
      raise ValueError(f"{name} is true or false, not {text!r}")

    # 2. Filters refuse numbers that cannot be, before the setting is taken.
    settings = dataclasses.replace(self, **{name: value})
    settings.generation()
    return settings


class Console:
  """An interactive session: every line is a prompt, or a command that begins with a slash."""

  HELP = """  a line          a prompt to continue; a \\ at its end goes on to the next line
  /more           go on from the end of the last text, with the next seed
  /again          the last prompt once more, with the next seed
  /set NAME VALUE change a setting (none: its default); /settings shows them all
  /history        the texts so far
  /save FILE      write them to a file
  /quit           or Ctrl-D; Ctrl-C ends a text that is being written"""

  def __init__(
    self, model, tokenizer, settings: Settings, read: Callable[[str], str] = input, write=print
  ):
    self.decoder = for_inference(model)
    self.tokenizer = tokenizer
    self.settings = settings
    self.read, self.write = read, write
    self.texts: list[tuple[str, str]] = []  # prompts, and what was added to each

  def run(self) -> None:
    """Reads lines until the end. An error is one line, and the session goes on."""
    self.write("Type a text to continue, or /help.")
    while True:
      # Ctrl-D ends the session; Ctrl-C ends a line, or a text that is being written.
      try:
        line = self._line()
        if line.strip() in ("/quit", "/exit"):
          return
        self._answer(line)
      except EOFError:
        self.write("")
        return
      except KeyboardInterrupt:
        self.write("")
      except (ValueError, OSError) as error:
        self.write(f"error: {error}")

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
        self.settings = self.settings.changed(name, value.strip())

      # The texts so far
      case "/history":
        for prompt, added in self.texts:
          self.write(f"{'-' * 40}\n{prompt}{added}")
      case "/save" if rest:
        # "x": nothing is overwritten.
        text = "\n".join(prompt + added for prompt, added in self.texts) + "\n"
        with open(pathlib.Path(rest.strip()).expanduser(), "x", encoding="utf-8") as file:
          file.write(text)
      case "/more" | "/again":
        # With the same seed the same random numbers would come again.
        prompt, added = self._last()
        self.settings = dataclasses.replace(self.settings, seed=self.settings.seed + 1)
        self._continue(prompt + added if command == "/more" else prompt)
      case _:
        raise ValueError(
          f"no command {line.strip()}; "
          f"/help shows those there are, and a space before it makes it a text"
        )

  def _last(self) -> tuple[str, str]:
    if not self.texts:
      raise ValueError("there is no text yet; type one to continue")
    return self.texts[-1]

  def _continue(self, prompt: str) -> None:
    """Writes the text as it is made, and remembers it, whole or interrupted."""
    generation = self.settings.generation()
    added = []
    self.write(prompt, end="", flush=True)
    try:
      for chunk in stream(self.decoder, self.tokenizer, prompt, generation=generation):
        added.append(chunk)
        self.write(chunk, end="", flush=True)
    finally:
      # Also after Ctrl-C, and before the line of an error.
      self.write("")
      if added:
        self.texts.append((prompt, "".join(added)))
