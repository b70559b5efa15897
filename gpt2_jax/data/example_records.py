# SPDX-License-Identifier: Apache-2.0
"""Records of fine-tuning data as examples, in the conventions that people have.

  {"text": ...}                                       scored whole
  {"prompt": ..., "completion": ...}                  texts, or lists of messages (as TRL has them)
  {"messages": [{"role": ..., "content": ...}, ...]}  a message with "weight": 0 is not scored
  {"title": ..., "article": ...}                      texts by the roles of the template
  any of them with "label": 0, 1, ...                 for classification

A record that has several is read as messages, else as prompt and completion, else as the roles if
that of the response is there, else as text.
"""

import dataclasses
import json

import numpy as np

from gpt2_jax.data.skipped import BadRecord
from gpt2_jax.data.templates import Message, Template
from gpt2_jax.files import parse_json, summarize

# Labels are below it: a store has room for so many.
MAX_LABELS = 4095


@dataclasses.dataclass(frozen=True)
class Example:
  """The turns of an example, its label if it has one, and where it is from, for errors."""

  messages: tuple[Message, ...]
  label: int | None
  place: str


def write_record(record: dict, place: str) -> str:
  """A record and where it is from, as one JSON text. Raises BadRecord where no UTF-8 writes it."""
  text = json.dumps([place, record], ensure_ascii=False)
  try:
    text.encode()
  except UnicodeEncodeError as error:
    raise BadRecord(f"{place} has a lone surrogate in its text: no UTF-8 writes it") from error
  return text


def plain_record(value: object) -> object:
  """A record of TFDS as JSON has it: bytes are texts, arrays are lists."""
  if isinstance(value, dict):
    return {key: plain_record(item) for key, item in value.items()}
  if isinstance(value, bytes):
    return value.decode("utf-8")
  if isinstance(value, np.ndarray | np.generic):
    return plain_record(value.tolist())
  if isinstance(value, list | tuple):
    return [plain_record(item) for item in value]
  return value


def parse_record(text: str, template: Template, loss: str) -> Example:
  """The example that `write_record` wrote.

  Raises ValueError, with its place, if it follows no convention, has a role that the template does
  not know, or nothing in it would be scored.
  """
  place, record = parse_json(text, "a record")
  messages = template.ordered(_messages(record, template, place))

  # Turns without a text are kept: a chat has their markers.
  for message in messages:
    if message.role is not None and message.role not in template.roles:
      raise ValueError(
        f"{place} has a role {message.role[:40]!r}, and template {template.name[:80]} knows "
        f"{summarize(template.roles, each=40)}"
      )

  is_response = {None: True, template.response: True}
  if loss == "responses":
    scored = [m for m in messages if is_response.get(m.role) and m.is_scored]
  else:
    scored = messages
  if not any(message.text for message in scored):
    what = "response with a text" if loss == "responses" else "text"
    raise ValueError(f"{place} has no scored token: there is no {what} in it")
  return Example(tuple(messages), _label(record, place), place)


def _messages(record: dict, template: Template, place: str) -> list[Message]:
  """The turns of a record, by the first convention that it follows."""
  if "messages" in record:
    return _turns(record["messages"], place, "messages")

  if "prompt" in record and "completion" in record:
    prompt, completion = record["prompt"], record["completion"]
    if isinstance(prompt, str) and isinstance(completion, str):
      # A reversed template predicts the prompt from the completion.
      roles = [template.prompt, template.response]
      first, second = reversed(roles) if template.reverse else roles
      turns = [Message(first, prompt), Message(second, completion)]
      # A completion of nothing is a text that ends as a response does.
      return turns if prompt else turns[1:]

    # Lists of messages: what the prompt has is context, an assistant's turn of it, too.
    context = _turns(prompt, place, "prompt")
    context = [dataclasses.replace(message, is_scored=False) for message in context]
    return context + _turns(completion, place, "completion")

  # Fields by the names of the template's roles, in its order; one may be left out.
  if isinstance(record.get(template.response), str):
    turns = [(role, record.get(role)) for role in template.roles]
    return [Message(role, text) for role, text in turns if isinstance(text, str)]

  if isinstance(record.get("text"), str):
    return [Message(None, record["text"])]
  keys = summarize(record, limit=5, each=30) or "no field"
  raise ValueError(
    f"{place} has no text, no prompt with completion, no messages, and no "
    f"{template.response[:40]!r} of template {template.name[:80]} (of {keys})"
  )


def _turns(value: object, place: str, field: str) -> list[Message]:
  """A list of messages. Raises ValueError for another shape."""
  # A sequence of records is a record of sequences in TFDS.
  if isinstance(value, dict) and all(isinstance(column, list) for column in value.values()):
    columns = value.values()
    value = [dict(zip(value, row, strict=False)) for row in zip(*columns, strict=False)]
  if not isinstance(value, list) or not value:
    kind = "an empty list" if value == [] else f"a {type(value).__name__}"
    raise ValueError(f"{place} has {kind} under {field!r}, not a list of messages")

  messages = []
  for number, turn in enumerate(value, 1):
    match turn:
      case {"role": str(role), "content": str(content)}:
        messages.append(Message(role, content, turn.get("weight", 1) != 0))
      case _:
        raise ValueError(
          f"{place} has no message as item {number} of {field!r}; one has role and content, texts"
        )
  return messages


def _label(record: dict, place: str) -> int | None:
  label = record.get("label")
  # The type itself, since True is an int to isinstance. TFDS has -1 where a label is not known.
  if label is None or label == -1 and type(label) is int:
    return None
  if type(label) is not int or not 0 <= label < MAX_LABELS:
    raise ValueError(
      f"{place} has the label {str(label)[:40]!r}; labels are numbers from 0 to {MAX_LABELS - 1}"
    )
  return label
