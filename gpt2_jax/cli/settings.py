# SPDX-License-Identifier: Apache-2.0
"""Settings of text generation: flags of `gpt2-jax sample`, and what `/set` changes in a session."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Collection
from typing import TYPE_CHECKING

if TYPE_CHECKING:
  from gpt2_jax.decoding import Generation, Greedy, Sample
  from gpt2_jax.recipe import Recipe
  from gpt2_jax.tokenizer import Tokenizer


def setting(default, what: str, value_type: type, examples: str = ""):
  """A field of `Settings`, with the help and the type of its flag, and values worth a try."""
  metadata = {"help": what, "type": value_type, "examples": examples.split()}
  return dataclasses.field(default=default, metadata=metadata)


def newlines(text: str) -> str:
  """Replaces backslash and n, or t, by the characters they stand for."""
  return text.replace("\\n", "\n").replace("\\t", "\t")


@dataclasses.dataclass(frozen=True)
class Settings:
  """Settings of text generation. None leaves a filter out."""

  n_new: int = setting(100, "Tokens to add, at most.", int, "50 200 500")
  greedy: bool = setting(False, "Take the likeliest token each time.", bool, "true false")
  temperature: float = setting(1.0, "Below 1 is surer, above 1 is wilder.", float, "0.7 0.9 1.2")
  top_k: int | None = setting(None, "Draw from the k likeliest tokens.", int, "20 40 none")
  top_p: float | None = setting(
    None, "Draw from the likeliest tokens that hold this probability.", float, "0.9 0.95 none"
  )
  min_p: float | None = setting(
    None,
    "Draw from the tokens at least so likely, as a part of the likeliest.",
    float,
    "0.05 0.1 none",
  )
  typical: float | None = setting(
    None, "Draw from the most typical tokens that hold this probability.", float, "0.9 0.95 none"
  )
  repetition: float | None = setting(
    None,
    "Penalty on tokens of the text so far, prompt included (1.2, say).",
    float,
    "1.1 1.3 none",
  )
  frequency: float = setting(
    0.0, "Penalty for each time that a token was added.", float, "0.3 0.6 none"
  )
  presence: float = setting(0.0, "Penalty on tokens that were added at all.", float, "0.3 0.6 none")
  no_repeat: int | None = setting(None, "Never repeat a run of so many tokens.", int, "3 4 none")
  stop: tuple[str, ...] = setting(
    (), "End before this text; may be repeated.", str, "\\n \\n\\n none"
  )
  special: tuple[str, ...] = setting(
    (), "Special tokens to parse in a prompt: all, or TOKEN,...; may be repeated.", str, "all none"
  )
  window: int | None = setting(
    None, "Past the context, forget so many of the oldest tokens at a time.", int, "none"
  )
  watermark: tuple[str, ...] = setting(
    (), "KIND:KEY; KIND is green, selfhash, gumbel or synthid.", str, "gumbel:1234 none"
  )
  seed: int = setting(0, "The same seed gives the same text.", int, "0 1 2")

  def __post_init__(self):
    # A flag gives a list.
    object.__setattr__(self, "watermark", tuple(self.watermark))

  def sampler(self) -> Greedy | Sample:
    """Penalties first, then the temperature, then what is kept.

    Raises ValueError for numbers that cannot be.
    """
    from gpt2_jax.decoding import make_sampler
    from gpt2_jax.decoding.watermark import parse_watermark

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
      watermark=tuple(map(parse_watermark, self.watermark)),
    )

  def generation(self) -> Generation:
    """The options of `stream` and `complete`."""
    from gpt2_jax.decoding import Generation, SlidingWindow

    window = None if self.window is None else SlidingWindow(self.window)
    return Generation(self.n_new, self.sampler(), self.seed, stop=self.stop, window=window)

  def special_tokens(self, tokenizer: Tokenizer) -> tuple[str, ...]:
    """The special tokens that are parsed in a prompt. Raises ValueError for one that is none."""
    from gpt2_jax.tokenizer.interface import parsed_tokens

    tokens = []
    for value in self.special:
      if value == "all":
        tokens += tokenizer.special_tokens
      elif value in tokenizer.special_tokens:
        # It may have a comma in it.
        tokens.append(value)
      else:
        tokens += value.split(",")
    return parsed_tokens(tokens, tokenizer.special_tokens)

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

  def differences(self) -> str:
    """What is not as by default, as one line: `temperature 0.8 · top_k 40`."""
    words = []
    for field in dataclasses.fields(self):
      value = getattr(self, field.name)
      if value == field.default:
        continue
      if field.metadata["type"] is str:
        value = ", ".join(map(repr, value))
      words.append(f"{field.name} {value}")
    return " · ".join(words)


def recipe_settings(recipe: Recipe, settings: Settings, given: Collection[str]) -> Settings:
  """The settings with those of a recipe in place of all but the `given` ones.

  Raises ValueError for a setting of the recipe that there is not.
  """
  values = dict(recipe.sampling) | {"stop": recipe.stop}
  names = [field.name for field in dataclasses.fields(settings)]
  for name in values:
    if name not in names:
      raise ValueError(
        f"recipe {recipe.name[:40]} sets {name[:40]!r} of sampling, and there are "
        f"{', '.join(names)}"
      )

  # A temperature asks for draws where a recipe is greedy.
  given = {*given, *(["greedy"] if "temperature" in given else [])}
  values = {name: value for name, value in values.items() if name not in given}
  return dataclasses.replace(settings, **values)


def setting_examples(name: str) -> list[str]:
  """Values that are worth a try; none for a name that is no setting."""
  for field in dataclasses.fields(Settings):
    if field.name == name:
      return field.metadata["examples"]
  return []


def slide_past_context(generation: Generation, n_prompt: int, n_ctx: int) -> tuple[Generation, str]:
  """Adds a sliding window where the context is too short, and says so; else the text is empty."""
  from gpt2_jax.decoding import SlidingWindow

  # The last new token is not read. A context of one token has nothing to forget.
  is_short = n_prompt + generation.n_new - 1 > n_ctx
  if generation.window is not None or not is_short or n_ctx == 1:
    return generation, ""

  stride = n_ctx // 2
  note = (
    f"note: {n_prompt:,} + {generation.n_new:,} tokens exceed the context of {n_ctx:,}; "
    f"the oldest {stride:,} are forgotten at a time (/window)"
  )
  return dataclasses.replace(generation, window=SlidingWindow(stride)), note


def shorten_to_context(generation: Generation, n_prompt: int, n_ctx: int) -> tuple[Generation, str]:
  """Lowers n_new to the room behind the prompt, and says so; else the text is empty.

  A prompt that leaves no room is left to be refused.
  """
  # A full context predicts one token more.
  room = n_ctx + 1 - n_prompt
  if generation.window is not None or not 1 <= room < generation.n_new:
    return generation, ""

  note = (
    f"note: {room:,} new tokens, since the context of {n_ctx:,} has no room for "
    f"{generation.n_new:,}; --window={max(1, n_ctx // 2)} goes on past it"
  )
  return dataclasses.replace(generation, n_new=room), note


def _number(name: str, text: str, number_type: type):
  """The number that a text says. Raises ValueError with the setting's name, of bounded length."""
  try:
    return number_type(text)
  except ValueError as error:
    kind = "a whole number" if number_type is int else "a number"
    raise ValueError(f"{name} is {kind}, not {text[:80]!r}") from error
