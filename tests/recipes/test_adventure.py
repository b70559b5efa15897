# SPDX-License-Identifier: Apache-2.0
"""Chats and adventures of recipes: the memory stays, old turns make room, a game is played."""

import importlib.util
import io

import pytest

from experiments import play_adventure
from gpt2_jax.cli.console import Console
from gpt2_jax.cli.settings import Settings
from gpt2_jax.cli.terminal import Terminal
from gpt2_jax.cli.turns import Answering, parse_fields
from gpt2_jax.data.templates import ExampleEncoder, Message, write_prompt
from gpt2_jax.decoding import Generation, Greedy
from gpt2_jax.recipe import load_recipe
from tests.recipes.tiny import CONFIG, N_CTX

ADVENTURE = load_recipe("adventure").template()
MEMORY = "You are a knight."
FEW = Settings(n_new=8, greedy=True, stop=("\n>",))


class Typed(Terminal):
  """Lines that a person types."""

  def __init__(self, lines):
    super().__init__(io.StringIO())
    self.lines = iter(lines)

  def read(self, prompt, status=""):
    line = next(self.lines, None)
    if line is None:
      raise EOFError
    return line


def session(model, tokenizer, answering, *lines, settings=FEW) -> tuple[str, Console, list[str]]:
  """What a session writes, the Console after it, and the prompt of each of its answers."""
  terminal = Typed(lines)
  console = Console(model, tokenizer, settings, terminal, answering)
  prompts = []
  read = console._read

  def remember(text):
    turns, ids = read(text)
    prompts.append(tokenizer.decode(ids))
    return turns, ids

  console._read = remember
  console.run()
  return terminal.output.getvalue(), console, prompts


@pytest.fixture(scope="module")
def model(mesh, parameters, place):
  with mesh(1, 1, 1):
    return place(CONFIG, parameters(CONFIG, scale=0.3))


def test_the_memory_stays_and_the_oldest_turns_make_room(model, bytes_tokenizer):
  answering = Answering(ADVENTURE, {"memory": MEMORY})
  _, console, _ = session(model, bytes_tokenizer, answering)
  lines = [f"go to room {number} and look around" for number in range(9)]
  for n, line in enumerate(lines):
    turns, ids = console._read(line)
    console.turns.append((line, "Nothing."))

    # The memory, and whole turns: the newest ones, one after the other.
    prompt = bytes_tokenizer.decode(ids)
    assert prompt.startswith(f"{MEMORY}\n\n\n> go to room ") and prompt.endswith(f"> {line}\n")
    numbers = [number for number in range(9) if f"room {number} " in prompt]
    assert numbers == list(range(n + 1))[-len(numbers) :] and len(numbers) == len(turns) + 1
    assert len(ids) <= N_CTX + 1 - FEW.n_new

  # One turn more would not have had room; and the session says so.
  assert "room 0" not in prompt and len(ids) > N_CTX - FEW.n_new - 50
  assert "turns are left out, for room" in console.terminal.output.getvalue()


def test_a_field_is_set_in_a_session_and_one_that_is_none_is_an_error(model, bytes_tokenizer):
  lines = ("/field memory=A dark wood.", "look", "/field mood=dark", "/field", "/new", "wait")
  text, _, prompts = session(model, bytes_tokenizer, Answering(ADVENTURE), *lines)
  assert prompts == ["A dark wood.\n\n\n> look\n", "A dark wood.\n\n\n> wait\n"]
  assert "error: field 'mood=dark' is no NAME=TEXT; the names are the roles of" in text
  assert text.count("error:") == 2
  with pytest.raises(ValueError, match="there is none"):
    parse_fields(["memory=x"], None)


def test_prompts_of_fields_do_not_remember_each_other(model, bytes_tokenizer):
  template = load_recipe("story").template()
  answering = Answering(template, remembers=False)
  _, console, prompts = session(model, bytes_tokenizer, answering, "A cat.", "A dog.", "/again")
  assert prompts == ["A cat.\n\n", "A dog.\n\n", "A dog.\n\n"] and len(console.texts) == 3


def test_an_opening_goes_before_the_first_message(model, bytes_tokenizer):
  fields = {"memory": MEMORY, "assistant": "A gate."}
  _, console, _ = session(model, bytes_tokenizer, Answering(ADVENTURE, fields))
  first = f"{MEMORY}\n\nA gate.\n> open it\n"
  assert bytes_tokenizer.decode(console._read("open it")[1]) == first
  console.turns = [("open it", "It opens.")]
  second = bytes_tokenizer.decode(console._read("go in")[1])
  assert second == f"{first}It opens.\n> go in\n"


def test_either_side_is_written_after_what_training_saw_before_it(bytes_tokenizer):
  messages = [Message("memory", MEMORY), Message("assistant", "A gate."), Message("user", "open")]
  encoder = ExampleEncoder(ADVENTURE, bytes_tokenizer, "all")
  whole = encoder.encode((*messages, Message("assistant", "It opens."))).ids.tolist()
  narrator = write_prompt(ADVENTURE, bytes_tokenizer, messages)
  player = write_prompt(ADVENTURE, bytes_tokenizer, messages[:2], "user")
  assert bytes_tokenizer.decode(player) == f"{MEMORY}\n\nA gate.\n>"
  assert bytes_tokenizer.decode(narrator) == f"{MEMORY}\n\nA gate.\n> open\n"
  assert whole[: len(player)] == player and whole[: len(narrator)] == narrator


class TwoRooms:
  """A game of two rooms: whoever goes north has won."""

  def __init__(self):
    self.is_over = False
    self.lines = []

  def start(self) -> str:
    return "You are in a hall."

  def say(self, line: str) -> str:
    self.lines.append(line)
    self.is_over = line == "north"
    return "You are out." if self.is_over else "Nothing happens."


def test_a_model_plays_until_the_game_is_over(bytes_tokenizer, reciting):
  """It writes the player's line, and the game's answer is before its next one."""
  first = f"{play_adventure.MEMORY}\n\nYou are in a hall.\n>"
  second = f"{first} look at it\nNothing happens.\n>"
  said = bytes_tokenizer.encode(" look at it\nNothing happens.\n> north\nand more")
  game = TwoRooms()
  turns = play_adventure.play(
    reciting(len(first), said),
    bytes_tokenizer,
    ADVENTURE,
    game,
    9,
    Generation(24, Greedy()),
  )
  assert list(turns) == [
    ("", "You are in a hall."),
    ("look at it", "Nothing happens."),
    ("north", "You are out."),
  ]
  assert game.lines == ["look at it", "north"] and len(second) < N_CTX


def test_a_played_game_is_examples_of_the_recipe():
  session = ">>> import adventure\n>>> adventure.play()\nHI\n>>> no\n>>> get(lamp)\nOK\n>>> north\n"
  commands = play_adventure.parse_commands(session)
  assert (
    commands
    == ["no", "get lamp", "north"]
    == play_adventure.parse_commands("no\nget lamp\n\nnorth")
  )
  turns = list(play_adventure.played(TwoRooms(), [*commands, "south"]))
  assert [command for command, _ in turns] == ["", *commands], "nothing after the end"
  records = list(play_adventure.examples(turns, 2))
  texts = [[turn["content"] for turn in record["messages"]] for record in records]
  assert texts[1] == [play_adventure.MEMORY, "Nothing happens.", "north", "You are out."]
  assert {turn["role"] for turn in records[0]["messages"]} == set(ADVENTURE.roles)


@pytest.mark.skipif(
  importlib.util.find_spec("adventure") is None, reason="pip install adventure: Colossal Cave"
)
def test_colossal_cave_answers(bytes_tokenizer, reciting):
  """The real game: its first question, and a line that it does not understand."""
  game = play_adventure.ColossalCave(1)
  turns = list(play_adventure.played(game, ["no", "east", "get lamp", "frobnicate it", ""]))
  answers = [answer for _, answer in turns]
  assert answers[0].startswith("WELCOME TO ADVENTURE!!")
  assert answers[1].startswith("YOU ARE STANDING AT THE END OF A ROAD")
  assert "SHINY BRASS LAMP" in answers[2] and answers[3] == "OK" and answers[4]
  assert game.score()[1] == 350 and not game.is_over
