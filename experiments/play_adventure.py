# SPDX-License-Identifier: Apache-2.0
"""A model plays a real text adventure: it writes the player's lines, and the game answers them.

  pip install -e '.[adventure]'
  python experiments/play_adventure.py --commands=walkthrough.txt --out=adventure.jsonl
  python experiments/play_adventure.py --model=runs/adventure --turns=20

The game is Colossal Cave (Crowther and Woods 1977) as Brandon Rhodes ported it: the package
`adventure` of PyPI. The first command plays a file's commands, one a line, or the walkthroughs that
the package has in adventure/tests, and writes the game as examples of the recipe `adventure`, which
learns both sides. The second lets the model play, and says the score. The game's text is the
narrator's turn, and a line of the model that the game does not understand costs a turn as any
player's does.
"""

import json
import pathlib
import re
from collections.abc import Iterator, Sequence
from typing import Protocol

from absl import flags

from gpt2_jax.cli import shell
from gpt2_jax.cli.settings import Settings
from gpt2_jax.cli.turns import recent_turns
from gpt2_jax.data.templates import Message, Template, write_prompt
from gpt2_jax.decoding import Generation, complete, for_inference
from gpt2_jax.files import atomic_write, local_path, read_text
from gpt2_jax.recipe import load_recipe

MEMORY = "You explore a cave. Commands are one or two words."
# Words of a line: more is no command of any adventure of that age.
MAX_WORDS = 4


class Game(Protocol):
  """A text adventure."""

  @property
  def is_over(self) -> bool:
    """Whether no line is read any more."""
    ...

  def start(self) -> str:
    """What it says at first."""
    ...

  def say(self, line: str) -> str:
    """Its answer to a line of the player."""
    ...


class ColossalCave:
  """Colossal Cave of the package `adventure`."""

  def __init__(self, seed: int):
    try:
      import adventure
      from adventure.game import Game as CaveGame
    except ImportError as error:
      raise ImportError(
        "Colossal Cave needs the package adventure: pip install 'gpt2_jax[adventure]'"
      ) from error

    self.game = CaveGame(seed=seed)
    adventure.load_advent_dat(self.game)

  @property
  def is_over(self) -> bool:
    return self.game.is_finished

  def start(self) -> str:
    self.game.start()
    return self.game.output.strip()

  def say(self, line: str) -> str:
    return self.game.do_command(line.lower().split() or ["look"]).strip()

  def score(self) -> tuple[int, int]:
    """The points so far, and all that there are."""
    return self.game.compute_score()


def parse_commands(text: str) -> list[str]:
  """The commands of a file: its lines, or those of a Python session, as get(lamp)."""
  lines = text.splitlines()
  if any(line.startswith(">>> ") for line in lines):
    lines = [line[4:] for line in lines if line.startswith(">>> ")]
    lines = [line for line in lines if not re.match(r"(import |adventure\.)", line)]
  commands = [" ".join(re.sub(r"[(),]", " ", line).split()) for line in lines]
  return [command for command in commands if command]


def played(game: Game, commands: Sequence[str]) -> Iterator[tuple[str, str]]:
  """The game's first text after an empty command; then each command and its answer."""
  yield "", game.start()
  for command in commands:
    if game.is_over:
      return
    yield command, game.say(command)


def examples(turns: Sequence[tuple[str, str]], length: int) -> Iterator[dict]:
  """Records of the recipe `adventure`, `length` turns each; one begins where another ended."""
  for first in range(0, len(turns) - 1, length):
    messages = [("memory", MEMORY), ("assistant", turns[first][1])]
    for command, answer in turns[first + 1 : first + 1 + length]:
      messages += [("user", command), ("assistant", answer)]
    yield {"messages": [{"role": role, "content": text} for role, text in messages]}


def play(
  model, tokenizer, template: Template, game: Game, n_turns: int, generation: Generation
) -> Iterator[tuple[str, str]]:
  """Lets the model play: yields each of its lines, and the game's answer to it.

  The memory and the newest turns stand before a line, as many as the context has room for.
  """
  decoder = for_inference(model)
  turns = [("", game.start())]
  yield turns[0]

  def write(recent) -> list[int]:
    messages = [Message("memory", MEMORY)]
    for line, answer in recent:
      # The first text of the game answers nobody.
      if line:
        messages.append(Message(template.prompt, line))
      messages.append(Message(template.response, answer))
    return write_prompt(template, tokenizer, messages, template.prompt)

  for seed in range(generation.seed, generation.seed + n_turns):
    if game.is_over:
      return
    recent = recent_turns(turns, write, decoder.model.config.n_ctx + 1 - generation.n_new)
    text = complete(
      decoder,
      tokenizer,
      write(recent),
      generation.n_new,
      generation.sampler,
      seed=seed,
      stop=("\n",),
    )
    # A model may write nothing, or too much: the game reads a few words.
    line = " ".join(text.split()[:MAX_WORDS]) or "look"
    turns.append((line, game.say(line)))
    yield turns[-1]


def add_flags() -> None:
  """Not where the module is imported: its functions are tested beside commands with such flags."""
  flags.DEFINE_multi_string("commands", [], "Files with commands to play, one a line.")
  flags.DEFINE_string("out", None, "Where the played games go, as examples (.jsonl).")
  flags.DEFINE_string("model", None, "The model that plays, as of gpt2-jax sample.")
  flags.DEFINE_integer("turns", 20, "Turns that are played, or are in an example.", 1)
  flags.DEFINE_float("temperature", 0.7, "Of the model's lines.")
  flags.DEFINE_integer("seed", 1, "Of the game and of the model's lines.", 0)


def main() -> None:
  given = flags.FLAGS
  if bool(given.model) == bool(given.commands and given.out):
    raise ValueError("give --model to play, or --commands and --out to write examples; see --help")

  if given.model:
    play_with(given.model, given.turns, given.temperature, given.seed)
  else:
    write_examples(given.commands, given.out, given.turns, given.seed)


def write_examples(files: Sequence[str], out: str, n_turns: int, seed: int) -> None:
  """Plays the commands of each file, and writes the games as examples."""
  records = []
  for file in files:
    game = ColossalCave(seed)
    turns = list(played(game, parse_commands(read_text(pathlib.Path(file)))))
    records += examples(turns, n_turns)
    print(f"{file}: {len(turns) - 1:,} commands, {game.score()[0]} of {game.score()[1]} points")
  with atomic_write(local_path(out)) as partial:
    partial.write_text("".join(f"{json.dumps(record)}\n" for record in records))
  print(f"{out}: {len(records):,} examples")


def play_with(name: str, n_turns: int, temperature: float, seed: int) -> None:
  """Lets a model play, and prints the game as it goes."""
  from gpt2_jax.convert.pretrained import load_pretrained

  model, tokenizer = load_pretrained(name)
  template = load_recipe("adventure").template()
  generation = Settings(n_new=12, temperature=temperature, seed=seed).generation()
  game = ColossalCave(seed)
  for line, answer in play(model, tokenizer, template, game, n_turns, generation):
    print(f"> {line}\n{answer}" if line else answer, flush=True)
  points, all_points = game.score()
  print(f"{points} of {all_points} points")


if __name__ == "__main__":
  add_flags()
  shell.run(main, __doc__)
