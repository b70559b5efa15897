# SPDX-License-Identifier: Apache-2.0
"""Prompt and chat templates: how the turns of an example become tokens, and which are scored.

A template puts markers around each turn. Special tokens in a marker are inserted as ids; a text
that spells one is plain text, so no text can pretend to be a turn.
"""

import dataclasses
import functools
import itertools
import pathlib
from collections.abc import Sequence

import numpy as np

from gpt2_jax.files import read_json_object, summarize, user_path
from gpt2_jax.tokenizer import Tokenizer
from gpt2_jax.tokenizer.gpt1_bpe import TASK_TOKENS
from gpt2_jax.tokenizer.interface import EOT, split_at_tokens

# What is scored: the responses with the marker that ends them, or every token but the first.
LOSSES = ("responses", "all")


@dataclasses.dataclass(frozen=True)
class Message:
  """A turn of an example. Without a role it is a plain text, scored as a response is."""

  role: str | None
  text: str
  is_scored: bool = True  # false takes a response out of the loss


@dataclasses.dataclass(frozen=True)
class Turn:
  """The markers around a text of `role`.

  Spaces at the end of `before` are encoded with a response, for GPT-2's tokens begin with them.
  """

  role: str
  before: str = ""
  after: str = ""


@dataclasses.dataclass(frozen=True)
class Template:
  """The markers of each role, and what ends a response when one is generated.

  `prompt` and `response` are the roles of a prompt and its completion; responses are scored.
  `reverse` writes the turns of an example from the last to the first, for a model of p(prompt |
  response). Raises ValueError for a template that has no turn of these roles.
  """

  name: str
  turns: tuple[Turn, ...]
  prompt: str = "user"
  response: str = "assistant"
  special_tokens: tuple[str, ...] = (EOT,)
  stop: tuple[str, ...] = (EOT,)
  reverse: bool = False

  def __post_init__(self):
    for role in (self.response, self.prompt):
      if role not in self.roles:
        raise ValueError(
          f"template {self.name[:80]} has no turn of {role[:40]!r}, only of "
          f"{summarize(self.roles, each=40) or 'none'}; nothing would be scored as a response: "
          "add that turn, or name another role as its prompt and response"
        )

  @property
  def roles(self) -> list[str]:
    return [turn.role for turn in self.turns]

  def turn(self, role: str) -> Turn:
    return self.turns[self.roles.index(role)]

  def to_json(self) -> dict:
    turns = {turn.role: [turn.before, turn.after] for turn in self.turns}
    payload = {
      "name": self.name,
      "turns": turns,
      "prompt": self.prompt,
      "response": self.response,
      "special_tokens": list(self.special_tokens),
      "stop": list(self.stop),
    }
    # Left out where it is false: stores of former versions have none.
    return payload | ({"reverse": True} if self.reverse else {})

  def backward(self) -> "Template":
    """The template of the model that predicts prompts from responses."""
    return dataclasses.replace(
      self,
      name=f"{self.name}_reverse",
      prompt=self.response,
      response=self.prompt,
      reverse=not self.reverse,
    )

  def ordered(self, messages: Sequence[Message]) -> tuple[Message, ...]:
    """The messages of an example in the order in which they are written."""
    return tuple(reversed(messages)) if self.reverse else tuple(messages)


# A prompt and its completion as they are; messages one after another.
PLAIN = Template("plain", (Turn("system"), Turn("user"), Turn("assistant", after=EOT)))

# Summaries as the GPT-2 paper induces them (3.6): the article, and TL;DR: after it.
TLDR = Template("tldr", (Turn("user", after="\nTL;DR:"), Turn("assistant", " ", EOT)))

# Each turn ends with <|endoftext|> (Zhang et al. 2020, "DialoGPT").
DIALOGPT = Template("dialogpt", (Turn("user", "", EOT), Turn("assistant", "", EOT)))

# Its backward model, which predicts what was said from the answer: the last turn comes first.
DIALOGPT_REVERSE = DIALOGPT.backward()

# Roles in words, for a vocabulary that has no special token but <|endoftext|>.
CHAT = Template(
  "chat",
  (
    Turn("system", "", "\n\n"),
    Turn("user", "User: ", "\n"),
    Turn("assistant", "Assistant: ", EOT),
  ),
)

# Roles between special tokens, which the tokenizer must have (OpenAI's chat markup language).
CHATML = Template(
  "chatml",
  tuple(
    Turn(role, f"<|im_start|>{role}\n", "<|im_end|>\n") for role in ("system", "user", "assistant")
  ),
  special_tokens=("<|im_start|>", "<|im_end|>"),
  stop=("<|im_end|>",),
)

# The tasks of GPT-1's paper (Radford et al. 2018, figure 1): a text, or a premise and a hypothesis,
# and last the token whose hidden state is classified.
GPT1_TASKS = Template(
  "gpt1",
  (
    Turn("text", "_start_", "_classify_"),
    Turn("premise", "_start_", "_delimiter_"),
    Turn("hypothesis", "", "_classify_"),
  ),
  prompt="premise",
  response="hypothesis",
  special_tokens=TASK_TOKENS,
  stop=("_classify_",),
)

TEMPLATES = (PLAIN, TLDR, DIALOGPT, CHAT, CHATML, GPT1_TASKS, DIALOGPT_REVERSE)


def load_template(name_or_path: str) -> Template:
  """A template of this module by name, or one's own from a JSON file of `Template.to_json`.

  In a file only "turns" has to be there. Raises ValueError for anything else, OSError for no file.
  """
  for template in TEMPLATES:
    if template.name == name_or_path:
      return template
  if not name_or_path.endswith(".json"):
    names = ", ".join(template.name for template in TEMPLATES)
    raise ValueError(
      f"template {name_or_path[:80]!r} is none of {names}; a .json file has one's own, as "
      '{"turns": {"user": ["Q: ", "\\n"], "assistant": ["A: ", "<|endoftext|>"]}}'
    )
  path = pathlib.Path(user_path(name_or_path))
  if not path.is_file():
    raise FileNotFoundError(f"template {name_or_path[:200]}: no such file")
  return template_from_json(read_json_object(path), str(path))


def template_from_json(payload: object, place: str) -> Template:
  """The inverse of `Template.to_json`. Raises ValueError for another shape, with the place."""
  values = dict(payload) if isinstance(payload, dict) else {}
  turns = values.pop("turns", None)
  is_whole = isinstance(turns, dict) and bool(turns)
  if is_whole:
    is_whole = all(_is_texts(markers) and len(markers) == 2 for markers in turns.values())
  if not is_whole:
    raise ValueError(
      f"{place} has no turns of a template, as "
      '{"turns": {"user": ["Q: ", "\\n"], "assistant": ["A: ", "<|endoftext|>"]}}'
    )

  for name, value in values.items():
    if name in ("name", "prompt", "response") and isinstance(value, str):
      continue
    if name in ("special_tokens", "stop") and _is_texts(value):
      values[name] = tuple(value)
      continue
    if name == "reverse" and isinstance(value, bool):
      continue
    raise ValueError(
      f"{place} has {name[:40]!r} as {str(value)[:40]!r}; a template has turns, texts name, prompt "
      "and response, lists of texts special_tokens and stop, and reverse, true or false"
    )
  values.setdefault("name", pathlib.PurePath(place).stem)
  return Template(turns=tuple(Turn(role, *markers) for role, markers in turns.items()), **values)


def _is_texts(value: object) -> bool:
  return isinstance(value, list) and all(isinstance(text, str) for text in value)


@dataclasses.dataclass(frozen=True)
class Encoded:
  """The tokens of an example; which are scored; where the last response starts."""

  ids: np.ndarray  # int32 [length]
  is_scored: np.ndarray  # bool [length]
  last_response: int


def stop_strings(template: Template, tokenizer: Tokenizer) -> tuple[str, ...]:
  """Stop strings of a template, but for <|endoftext|> where it is a token, which ends a text."""
  return tuple(text for text in template.stop if text != EOT or tokenizer.eot is None)


def write_prompt(
  template: Template, tokenizer: Tokenizer, messages: Sequence[Message], role: str | None = None
) -> list[int]:
  """The token ids after which a model writes the next turn: the turns so far, and its marker.

  The next turn is a response, or of `role`. Special tokens of the template are ids; one that a
  message spells is plain text. Raises ValueError if the tokenizer lacks a special token of the
  template.
  """
  return ExampleEncoder(template, tokenizer).encode_prompt(messages, role or template.response)


@dataclasses.dataclass(frozen=True)
class Piece:
  """A text that is encoded, or a special token; part of a response, or not."""

  text: str
  is_special: bool
  is_response: bool


@dataclasses.dataclass(frozen=True)
class ExampleEncoder:
  """Encodes examples by a template. Raises ValueError if the tokenizer lacks a special token."""

  template: Template
  tokenizer: Tokenizer
  loss: str = "responses"

  @functools.cached_property
  def special_ids(self) -> dict[str, int | None]:
    """The id of each special token. A vocabulary without <|endoftext|> leaves it out (None)."""
    ids = {EOT: self.tokenizer.eot}
    for token in self.template.special_tokens:
      ids.setdefault(token, self.tokenizer.special_id(token))
      if ids[token] is None and token != EOT:
        raise ValueError(
          f"template {self.template.name[:80]} inserts {token[:40]!r}, and the tokenizer has no "
          "such token; take another --template, or a tokenizer that has it"
        )
    return ids

  def encode(self, messages: tuple[Message, ...]) -> Encoded:
    """Tokens and loss mask. A response is encoded by itself: no token spans where it starts.

    The first token is never scored: nothing in the example predicts it.
    """
    ids, is_response = self._tokens(self._pieces(messages))

    # 1. Where the last response starts: after the last token that is none.
    is_response = np.array(is_response, bool)
    starts = np.flatnonzero(is_response & ~np.concatenate([[False], is_response[:-1]]))
    last_response = int(starts[-1]) if len(starts) else len(ids)

    # 2. The loss mask.
    is_scored = np.ones_like(is_response) if self.loss == "all" else is_response.copy()
    is_scored[:1] = False
    return Encoded(np.array(ids, np.int32), is_scored, last_response)

  def encode_prompt(self, messages: Sequence[Message], role: str) -> list[int]:
    """The tokens of the messages, and of the marker before a turn of `role` that is to follow."""
    # A space at the marker's end belongs to the first token of the turn's text.
    before = self.template.turn(role).before.rstrip(" ")
    return self._tokens(self._pieces(tuple(messages)) + self._marker(before, False))[0]

  def _tokens(self, pieces: list[Piece]) -> tuple[list[int], list[bool]]:
    """The tokens of the pieces, and of each whether it is part of a response."""
    # Texts that are neighbours are one text, so that tokens are those of the whole.
    ids = []
    is_response = []
    for (special, response), run in itertools.groupby(
      pieces, lambda piece: (piece.is_special, piece.is_response)
    ):
      if special:
        tokens = [self.special_ids[piece.text] for piece in run]
        tokens = [token for token in tokens if token is not None]
      else:
        tokens = self.tokenizer.encode("".join(piece.text for piece in run))
      ids += tokens
      is_response += [response] * len(tokens)
    return ids, is_response

  def _pieces(self, messages: tuple[Message, ...]) -> list[Piece]:
    pieces = []
    for message in messages:
      # A plain text has no markers, and ends as a document of a corpus does.
      if message.role is None:
        pieces += [Piece(message.text, False, True), Piece(EOT, True, True)]
        continue

      turn = self.template.turn(message.role)
      is_response = message.role == self.template.response
      before, text = turn.before, message.text
      if is_response:
        # The space between a marker and a response belongs to the response's first token.
        before = turn.before.rstrip(" ")
        if not text[:1].isspace():
          text = turn.before[len(before) :] + text
      is_response &= message.is_scored

      pieces += self._marker(before, False)
      pieces.append(Piece(text, False, is_response))
      pieces += self._marker(turn.after, is_response)
    return pieces

  def _marker(self, text: str, is_response: bool) -> list[Piece]:
    """A marker, cut at its special tokens."""
    parts = split_at_tokens(text, self.template.special_tokens)
    return [Piece(part, is_special, is_response) for part, is_special in parts]
