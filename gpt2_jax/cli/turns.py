# SPDX-License-Identifier: Apache-2.0
"""Prompts of `gpt2-jax sample`: a text with its special tokens, or the turns of a chat."""

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING

from gpt2_jax.cli.settings import Settings

if TYPE_CHECKING:
  from gpt2_jax.data.templates import Template
  from gpt2_jax.decoding import Generation
  from gpt2_jax.tokenizer import Tokenizer


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


def prompt_ids(
  tokenizer: "Tokenizer",
  settings: Settings,
  template: "Template | None",
  turns: Sequence[tuple[str, str]],
  text: str,
) -> list[int]:
  """The token ids of a prompt; with a template, those of the turns so far and of a message.

  `turns` are messages and their answers.
  """
  from gpt2_jax.decoding.stream import encode_prompt

  if template is None:
    return encode_prompt(tokenizer, text, settings.special_tokens(tokenizer))

  from gpt2_jax.data.templates import Message, write_prompt
  from gpt2_jax.tokenizer import check_unicode

  check_unicode(text, "the prompt")
  messages = []
  for message, answer in turns:
    messages += [Message(template.prompt, message), Message(template.response, answer)]
  return write_prompt(template, tokenizer, [*messages, Message(template.prompt, text)])


def add_stops(
  generation: "Generation", template: "Template | None", tokenizer: "Tokenizer"
) -> "Generation":
  """Ends a text also where the template's turn ends."""
  if template is None:
    return generation

  from gpt2_jax.data.templates import stop_strings

  stops = stop_strings(template, tokenizer)
  return dataclasses.replace(generation, stop=(*generation.stop, *stops))
