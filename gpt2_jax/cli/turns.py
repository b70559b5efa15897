# SPDX-License-Identifier: Apache-2.0
"""Prompts of `gpt2-jax sample`: a text with its special tokens, or the turns of a chat."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING

from gpt2_jax.cli.settings import Settings
from gpt2_jax.files import summarize

if TYPE_CHECKING:
  from gpt2_jax.data.templates import Message, Template
  from gpt2_jax.decoding import Generation, InferenceModel
  from gpt2_jax.decoding.moderation import Policy
  from gpt2_jax.tokenizer import Tokenizer

NO_FIELDS = MappingProxyType({})


@dataclasses.dataclass(frozen=True)
class Ranking:
  """MMI reranking: a backward model, how many answers are drawn, and its weight."""

  reverse: "InferenceModel"
  candidates: int = 16
  weight: float = 1.0


@dataclasses.dataclass(frozen=True)
class Answering:
  """How a prompt is answered: by a template, after fields, with the turns before it or alone."""

  template: "Template | None" = None
  fields: Mapping[str, str] = dataclasses.field(default_factory=dict)
  remembers: bool = True
  ranking: Ranking | None = None
  moderation: "Policy | None" = None

  def chunks(
    self, decoder, tokenizer, turns, text: str, ids: Sequence[int], generation: "Generation"
  ) -> Iterator[tuple[str, int]]:
    """The answer to a message whose prompt has these ids: chunks, and their numbers of tokens."""
    from gpt2_jax.decoding.stream import stream_counted

    if self.ranking is None:
      return stream_counted(decoder, tokenizer, ids, generation, moderation=self.moderation)

    # The best of several is known when all are there.
    from gpt2_jax.decoding.mmi import rerank

    ranked = rerank(
      decoder,
      self.ranking.reverse,
      tokenizer,
      self.template,
      chat_messages(self.template, turns, text, self.fields),
      dataclasses.replace(generation, samples=self.ranking.candidates),
      self.ranking.weight,
    )
    best = ranked[0].text
    chunks = iter([(0, best, len(tokenizer.encode(best)))])
    if self.moderation is not None:
      from gpt2_jax.decoding.moderation import moderate

      chunks = moderate(chunks, self.moderation, [tokenizer.decode(ids)])
    return ((chunk, n_tokens) for _, chunk, n_tokens in chunks)


# A prompt is a text to continue.
PLAIN_TEXT = Answering()


def check_special_tokens(
  tokenizer: "Tokenizer", settings: Settings, template: "Template | None"
) -> None:
  """Raises ValueError for special tokens that the tokenizer lacks."""
  settings.special_tokens(tokenizer)
  if template is None:
    return
  if settings.special:
    raise ValueError(
      f"the template {template.name[:80]} writes special tokens, and in a message they are plain "
      "text: leave out special"
    )

  # It has to be able to write the marker of an answer.
  from gpt2_jax.data.templates import write_prompt

  write_prompt(template, tokenizer, ())


def parse_fields(texts: Sequence[str], template: "Template | None") -> dict[str, str]:
  """Fields of a template from texts NAME=TEXT. Raises ValueError for a name that it lacks."""
  fields = {}
  for text in texts:
    name, equals, value = text.partition("=")
    roles = template.roles if template else []
    if not equals or name not in roles:
      raise ValueError(
        f"field {text[:80]!r} is no NAME=TEXT; the names are the roles of a --recipe or a "
        f"--template: {summarize(roles, each=40) or 'there is none'}"
      )
    fields[name] = value
  return fields


def chat_messages(
  template: "Template",
  turns: Sequence[tuple[str, str]],
  text: str,
  fields: Mapping[str, str] = NO_FIELDS,
) -> list["Message"]:
  """The fields in the template's order, the turns so far, and a message.

  `turns` are messages and their answers. Without any, the message is in its place among the fields;
  but a response among them is an opening, and goes before it. An empty text beside fields is no
  message.
  """
  from gpt2_jax.data.templates import Message
  from gpt2_jax.tokenizer import check_unicode

  check_unicode(text, "the prompt")
  is_message = bool(text or turns or not fields)
  has_place = is_message and not turns and template.response not in fields
  head = dict(fields) | ({template.prompt: text} if has_place else {})
  messages = [Message(role, head[role]) for role in template.roles if role in head]
  if has_place or not is_message:
    return messages

  for message, answer in turns:
    messages += [Message(template.prompt, message), Message(template.response, answer)]
  return [*messages, Message(template.prompt, text)]


def next_role(template: "Template", messages: Sequence["Message"]) -> str:
  """The role that is written next: a response after a prompt, else the turn after the last field.

  Raises ValueError where no turn is left.
  """
  last = messages[-1].role
  if last == template.prompt:
    return template.response
  following = template.roles[template.roles.index(last) + 1 :]
  if not following:
    raise ValueError(
      f"{last[:40]!r} is the last field of template {template.name[:80]}, and nothing is left to "
      "write; leave it out"
    )
  return following[0]


def prompt_ids(
  tokenizer: "Tokenizer",
  settings: Settings,
  template: "Template | None",
  turns: Sequence[tuple[str, str]],
  text: str,
  fields: Mapping[str, str] = NO_FIELDS,
) -> list[int]:
  """The token ids of a prompt; with a template, those of fields, the turns so far, a message."""
  from gpt2_jax.decoding.stream import encode_prompt

  if template is None:
    return encode_prompt(tokenizer, text, settings.special_tokens(tokenizer))

  from gpt2_jax.data.templates import write_prompt

  messages = chat_messages(template, turns, text, fields)
  return write_prompt(template, tokenizer, messages, next_role(template, messages))


def recent_turns(
  turns: Sequence[tuple[str, str]], write: Callable[[Sequence], Sequence[int]], room: int
) -> list[tuple[str, str]]:
  """The newest of the turns with which a prompt has at most `room` tokens: a sliding window.

  `write(turns)` gives the tokens. Fields, as a memory is one, are not among the turns, and stay.
  """
  recent = list(turns)
  while recent and len(write(recent)) > room:
    recent = recent[1:]
  return recent


def add_stops(
  generation: "Generation", template: "Template | None", tokenizer: "Tokenizer"
) -> "Generation":
  """Ends a text also where the template's turn ends."""
  if template is None:
    return generation

  from gpt2_jax.data.templates import stop_strings

  stops = stop_strings(template, tokenizer)
  return dataclasses.replace(generation, stop=(*generation.stop, *stops))
