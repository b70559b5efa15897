# SPDX-License-Identifier: Apache-2.0
"""Recipe: what a model is fine-tuned for, in one value that tokenizing, training and sampling read.

The table of recipes is configs/recipes/forkme.py. A copy of that file has a table of one's own, and
its recipes are named with it: mine.py:story. Nothing here imports JAX: --help reads it, too.
"""

import dataclasses
import difflib
import json
import pathlib
import runpy
import shlex
from collections.abc import Mapping
from typing import TYPE_CHECKING

from gpt2_jax.configs import shipped_configs
from gpt2_jax.files import first_line, summarize, user_path

if TYPE_CHECKING:
  from gpt2_jax.data.templates import Template

# Plain text, prompts with completions (or named fields), conversations, texts with labels.
FORMS = ("text", "prompt", "chat", "labels")

SHIPPED = "recipes/forkme"


@dataclasses.dataclass(frozen=True)
class Recipe:
  """One application: the form of its data, its template, and how its answers are drawn.

  `turns` are the markers before and after the text of each role, or the name of a template; plain
  text has none. In a form of fields a prompt is the last but one and the response the last, unless
  they are named; in a chat they are the user and the assistant.
  """

  name: str
  form: str
  example: Mapping  # a record of the data: a line of its .jsonl
  about: str = ""  # what it is for, and the source of its format
  turns: str | Mapping[str, tuple[str, str]] = "plain"
  prompt: str = ""  # the role of what is typed
  response: str = ""  # the role that is written then
  stop: tuple[str, ...] = ()  # what ends a text besides <|endoftext|>
  loss: str = "responses"  # what is learned: "responses", or "all"
  n_ctx: int = 512  # length of the rows that examples are packed into
  sampling: Mapping = dataclasses.field(default_factory=dict)  # settings of gpt2-jax sample
  knobs: Mapping = dataclasses.field(default_factory=dict)  # of training, by their dotted names
  backward_of: str = (
    ""  # of a backward model: the chat whose answers it ranks, and whose data it has
  )

  def __post_init__(self):
    if self.form not in FORMS:
      raise ValueError(
        f"recipe {self.name[:40]} has the form {str(self.form)[:40]!r}; it is one of "
        f"{', '.join(FORMS)}"
      )

  def template(self) -> "Template | None":
    """The template of the turns; None for plain text. Raises ValueError where there can be none."""
    from gpt2_jax.data.templates import load_template, template_from_json

    if self.form == "text":
      return None
    if isinstance(self.turns, str):
      return load_template(self.turns)

    prompt, response = "user", "assistant"
    if self.form != "chat":
      prompt, response = [*self.turns, *self.turns][-2:]
    payload = {
      "name": self.name,
      "turns": {role: list(markers) for role, markers in self.turns.items()},
      "prompt": self.prompt or prompt,
      "response": self.response or response,
    }
    return template_from_json(payload, f"recipe {self.name[:40]}")

  def commands(self) -> list[str]:
    """What an owner of GPT-2's weights types: tokenize twice, train, sample."""
    lines = []
    for split, part in (("train", ":90%"), ("validation", "90%:")):
      out = f"--out=data/{self.name}/{split}"
      if self.form == "text":
        lines.append(f"gpt2-jax tokenize --files={self.name}.txt --characters={part} {out}")
        continue
      data = f"--examples={self.backward_of or self.name}.jsonl --split='train[{part}]'"
      lines.append(f"gpt2-jax tokenize --recipe={self.name} {data} {out}")
    start = f"--workdir=runs/{self.name} --config.init_from=gpt2"
    lines.append(f"gpt2-jax train --config={SHIPPED}:{self.name} {start}")

    # A head for labels writes nothing, and a backward model ranks what another one writes.
    if self.form == "labels":
      return lines
    name = self.backward_of or self.name
    sample = f"gpt2-jax sample --recipe={name} --model=runs/{name}"
    if self.backward_of:
      sample += f" --reverse=runs/{self.name}"
    typed = f"--prompt={shlex.quote(self._typed())}" if self.form != "chat" else "--interactive"
    return [*lines, f"{sample} {typed}"]

  def _typed(self) -> str:
    """What the example has as its prompt; of a plain text the first line."""
    if self.form == "text":
      return self.example["text"].split("\n")[0]
    return self.example.get(self.template().prompt, self.example.get("prompt", ""))

  def data_hint(self) -> str:
    """Which files the recipe wants, and what stands in a line of them."""
    if self.form == "text":
      return "--files=FILE.txt"
    line = json.dumps(dict(self.example), ensure_ascii=False)
    return f"--examples=FILE.jsonl, with lines like {line[:200]}"


def load_recipe(name: str) -> Recipe:
  """A shipped recipe by its name, or FILE.py:NAME of a file with a table RECIPES.

  Raises ValueError, with the names that there are, or OSError where there is no file.
  """
  file, colon, key = name.rpartition(":")
  if file.removesuffix(".py") in (SHIPPED, f"configs/{SHIPPED}") or not file:
    file = shipped_configs()[SHIPPED]
  elif not pathlib.Path(user_path(file)).is_file():
    raise FileNotFoundError(
      f"there is no file {file[:200]}; a recipe is a name ({_names(shipped_recipes())}), or "
      "FILE.py:NAME with a copy of configs/recipes/forkme.py"
    )
  recipes = recipes_of(user_path(file))

  for recipe in recipes:
    if recipe.name == key:
      return recipe
  near = difflib.get_close_matches(key, [recipe.name for recipe in recipes], 1, cutoff=0)
  raise ValueError(
    f"there is no recipe {key[:80]!r}; there are {_names(recipes)}"
    + (f"; did you mean {near[0][:40]}?" if near else "")
  )


def shipped_recipes() -> tuple[Recipe, ...]:
  """The table of configs/recipes/forkme.py."""
  return recipes_of(shipped_configs()[SHIPPED])


def recipes_of(file: str) -> tuple[Recipe, ...]:
  """The table RECIPES of a file, which is run. Raises ValueError where it fails or has none."""
  try:
    names = runpy.run_path(file)
  except (Exception, SystemExit) as error:
    raise ValueError(f"{file[:200]}: {type(error).__name__}: {first_line(error)}") from error
  recipes = names.get("RECIPES")
  if not isinstance(recipes, tuple) or not all(isinstance(item, Recipe) for item in recipes):
    raise ValueError(
      f"{file[:200]} has no RECIPES, a tuple of Recipe; begin with configs/recipes/forkme.py"
    )
  return recipes


def _names(recipes: tuple[Recipe, ...]) -> str:
  return summarize([recipe.name for recipe in recipes], limit=30, each=40)
