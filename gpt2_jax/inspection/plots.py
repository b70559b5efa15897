# SPDX-License-Identifier: Apache-2.0
"""Plots of what a model makes of a text: one call from a text to a matplotlib figure.

A notebook shows a figure that is a cell's last value; `figure.savefig("surprise.png")` writes it.
"""

from gpt2_jax.inspection.figures import Picture, draw_attention, draw_next_tokens, draw_surprise
from gpt2_jax.inspection.heads import attention_weights
from gpt2_jax.inspection.predictions import next_tokens, score
from gpt2_jax.model import GPT2
from gpt2_jax.tokenizer import Tokenizer


def plot_surprise(
  model: GPT2,
  tokenizer: Tokenizer,
  text: str,
  width: int = 80,
  max_nats: float | None = None,
) -> Picture:
  """Plots a text, each token on a colour for its loss under the model.

  `width` is the number of characters in a line. Colours go from 0 to `max_nats`, by default the
  greatest loss of the text: give it to compare texts or models. Raises as `score` does.
  """
  return draw_surprise(score(model, tokenizer, text), width, max_nats)


def plot_next_tokens(model: GPT2, tokenizer: Tokenizer, text: str, n: int = 10) -> Picture:
  """Plots the `n` most likely next tokens after a text. Raises as `next_tokens` does."""
  return draw_next_tokens(next_tokens(model, tokenizer, text, n))


def plot_attention(
  model: GPT2,
  tokenizer: Tokenizer,
  text: str,
  layer: int | None = None,
  head: int | None = None,
) -> Picture:
  """Plots the attention of all heads of a layer (default: the middle one), or of one head.

  Rows are queries, columns are keys. Negative numbers count from the end. Raises as
  `attention_weights` does, and ValueError for a layer or head that is not there.
  """
  return draw_attention(attention_weights(model, tokenizer, text), layer, head)
