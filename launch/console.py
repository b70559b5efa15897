# SPDX-License-Identifier: Apache-2.0
"""Continuing texts at a terminal: settings that change on the fly, streaming, and what was said so far."""

import contextlib
import dataclasses
import pathlib
from collections.abc import Callable

from gpt2_jax.decoding import (
  Greedy,
  MinP,
  NoRepeatNgram,
  OccurrencePenalty,
  RepetitionPenalty,
  Sample,
  SlidingWindow,
  Temperature,
  TopK,
  TopP,
  Typical,
  ready,
  stream,
)

with contextlib.suppress(ImportError):  # arrow keys and line history in input(); not on every platform
  import readline  # noqa: F401


def setting(default, what: str, kind: type):
  return dataclasses.field(default=default, metadata={"help": what, "kind": kind})


def newlines(text: str) -> str:
  """A text with its \\n and \\t read as the characters they stand for."""
  return text.replace("\\n", "\n").replace("\\t", "\t")


@dataclasses.dataclass(frozen=True)
class Settings:
  """How a text is continued: flags of launch/sample.py, and names for `/set`. None leaves a filter out."""

  n_new: int = setting(100, "Tokens to add, at most.", int)
  greedy: bool = setting(False, "Take the likeliest token each time.", bool)
  temperature: float = setting(1.0, "Below 1 is surer, above 1 is wilder.", float)
  top_k: int | None = setting(None, "Draw from the k likeliest tokens.", int)
  top_p: float | None = setting(None, "Draw from the likeliest tokens that hold this probability.", float)
  min_p: float | None = setting(None, "Draw from the tokens at least so likely, as a part of the likeliest.", float)
  typical: float | None = setting(None, "Draw from the most typical tokens that hold this probability.", float)
  repetition: float | None = setting(None, "Penalty on tokens of the text so far, prompt included (1.2, say).", float)
  frequency: float = setting(0.0, "Penalty for each time that a token was added.", float)
  presence: float = setting(0.0, "Penalty on tokens that were added at all.", float)
  no_repeat: int | None = setting(None, "Never repeat a run of so many tokens.", int)
  stop: tuple[str, ...] = setting((), "End before this text; may be repeated.", str)
  window: int | None = setting(None, "Past the context, forget so many of the oldest tokens at a time.", int)
  seed: int = setting(0, "The same seed gives the same text.", int)

  def sampler(self) -> Greedy | Sample:
    """Penalties first, then the temperature, then what is kept. Raises ValueError for numbers that cannot be."""
    occurrence = OccurrencePenalty(self.frequency, self.presence) if self.frequency or self.presence else None
    optional = (
      (RepetitionPenalty, self.repetition),
      (NoRepeatNgram, self.no_repeat),
      (Temperature, self.temperature),
      (TopK, self.top_k),
      (TopP, self.top_p),
      (MinP, self.min_p),
      (Typical, self.typical),
    )
    filters = [kind(value) for kind, value in optional if value is not None]
    filters = tuple([occurrence, *filters] if occurrence else filters)
    return Greedy(filters) if self.greedy else Sample(filters)

  def how(self) -> dict:
    """The arguments of `stream` and `complete`."""
    window = None if self.window is None else SlidingWindow(self.window)
    return {"n_new": self.n_new, "sampler": self.sampler(), "seed": self.seed, "stop": self.stop, "window": window}

  def changed(self, name: str, text: str) -> "Settings":
    """These with one set to what the text says. Raises ValueError for names and values that there are not."""
    fields = {field.name: field for field in dataclasses.fields(self)}
    if name not in fields:
      raise ValueError(f"no setting {name!r}; there are {', '.join(fields)}")
    kind = fields[name].metadata["kind"]
    if not text:
      raise ValueError(f"/set {name} wants a value; none is its default")
    if text.lower() == "none":
      value = fields[name].default
    elif kind is bool:
      value = {"true": True, "false": False}.get(text.lower())
    else:
      value = (newlines(text),) if kind is str else kind(text)
    if value is None and kind is bool:
      raise ValueError(f"{name} is true or false, not {text!r}")
    new = dataclasses.replace(self, **{name: value})
    new.how()  # a filter refuses what cannot be
    return new


class Console:
  """A session: every line is a prompt, or a command that begins with a slash."""

  HELP = """  a line          a prompt to continue; a \\ at its end goes on to the next line
  /more           go on from the end of the last text, with the next seed
  /again          the last prompt once more, with the next seed
  /set NAME VALUE change a setting (none: its default); /settings shows them all
  /history        the texts so far
  /save FILE      write them to a file
  /quit           or Ctrl-D; Ctrl-C ends a text that is being written"""

  def __init__(self, model, tokenizer, settings: Settings, read: Callable[[str], str] = input, write=print):
    self.decoder, self.tokenizer, self.settings = ready(model), tokenizer, settings
    self.read, self.write = read, write
    self.texts: list[tuple[str, str]] = []  # prompts, and what was added to each

  def run(self) -> None:
    """Reads lines until the end. An error is one line, and the session goes on."""
    self.write("Type a text to continue, or /help.")
    while True:
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
    while line.endswith("\\"):
      line = line[:-1] + "\n" + self.read("  ... ")
    return line

  def _answer(self, line: str) -> None:
    command, _, rest = line.strip().partition(" ") if line.startswith("/") else ("", "", "")
    name, _, value = rest.strip().partition(" ")
    match command:
      case "":
        if line.strip():
          self._continue(line)
      case "/help":
        self.write(self.HELP)
      case "/settings":
        for field in dataclasses.fields(self.settings):
          text = str(getattr(self.settings, field.name))
          self.write(f"  {field.name:<12} {text:<10} {field.metadata['help']}")
      case "/set":
        self.settings = self.settings.changed(name, value.strip())
      case "/history":
        for prompt, added in self.texts:
          self.write(f"{'-' * 40}\n{prompt}{added}")
      case "/save" if rest:
        with open(pathlib.Path(rest.strip()).expanduser(), "x", encoding="utf-8") as file:
          file.write("\n".join(prompt + added for prompt, added in self.texts) + "\n")
      case "/more" | "/again":
        prompt, added = self._last()
        self.settings = dataclasses.replace(self.settings, seed=self.settings.seed + 1)
        self._continue(prompt + added if command == "/more" else prompt)
      case _:
        raise ValueError(
          f"no command {line.strip()}; /help shows those there are, and a space before it makes it a text"
        )

  def _last(self) -> tuple[str, str]:
    if not self.texts:
      raise ValueError("there is no text yet; type one to continue")
    return self.texts[-1]

  def _continue(self, prompt: str) -> None:
    """Writes the text as it is made, and remembers it, whole or interrupted."""
    added = []
    self.write(prompt, end="", flush=True)
    try:
      for piece in stream(self.decoder, self.tokenizer, prompt, **self.settings.how()):
        added.append(piece)
        self.write(piece, end="", flush=True)
    finally:
      self.write("")
      if added:
        self.texts.append((prompt, "".join(added)))
