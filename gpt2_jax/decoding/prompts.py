# SPDX-License-Identifier: Apache-2.0
"""Pads prompts: lists of tokens of any lengths become arrays whose rows are split over the mesh."""

from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from gpt2_jax.decoding.kv_cache import InferenceModel
from gpt2_jax.sharding import ROWS, axis_size, padded

BUCKET = 32  # lengths are padded to a multiple, so that few shapes are compiled


def check_prompts(decoder: InferenceModel, prompts, n_new: int, samples: int = 1) -> None:
  """Raises ValueError unless there are prompts, none of them empty, of the model's own tokens."""
  # A text passes for a sequence of prompts, and each of its characters for a prompt.
  is_text = isinstance(prompts, str)
  if is_text or any(isinstance(row, str) or not hasattr(row, "__len__") for row in prompts):
    raise ValueError("prompts are lists of token ids; encode the texts, or call complete")

  shortest = min(map(len, prompts), default=0)
  if shortest < 1 or n_new < 1 or samples < 1:
    raise ValueError(
      f"{len(prompts)} prompts, {samples} samples, {n_new} new tokens: "
      f"give one of each at least, and no empty prompt"
    )

  # JAX clamps indices that are out of bounds, so another tokenizer's tokens would pass unseen.
  n_vocab = decoder.model.config.n_vocab
  low, high = min(map(min, prompts)), max(map(max, prompts))
  if low < 0 or high >= n_vocab:
    raise ValueError(
      f"prompts hold tokens {low} to {high}, the vocabulary {n_vocab}; is it the right tokenizer?"
    )


def check_room(
  decoder: InferenceModel,
  prompts,
  n_new: int,
  remedy: str = "ask for fewer",
  reads_last: bool = False,
) -> None:
  """Raises ValueError unless the context holds every token that is read.

  Those are the longest prompt and `n_new` tokens, but for the last of them unless `reads_last`.
  """
  longest, n_ctx = max(map(len, prompts)), decoder.model.config.n_ctx
  if longest + n_new - (not reads_last) <= n_ctx:
    return

  behind = "" if reads_last else " and the one token behind it"
  raise ValueError(
    f"{longest} prompt and {n_new} new tokens exceed the context of {n_ctx}{behind}; {remedy}"
  )


def pad_prompts(
  prompts: Sequence[Sequence[int]], shape: tuple[int, int], end: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
  """Pads prompts to one array of this shape; tokens [B, W] and lengths [B], int32.

  On the right: prompts begin at column 0, and a token's column is its position. With `end` on the
  left: all prompts end before that column, for a loop that adds a token to every row at a time.
  Rows without a prompt have length 0.
  """
  tokens_BW = np.zeros(shape, np.int32)
  lengths_B = np.zeros(shape[0], np.int32)

  # Token 0 pads: whoever reads the rows masks what is beyond the lengths.
  for row, prompt in enumerate(prompts):
    begin = 0 if end is None else end - len(prompt)
    tokens_BW[row, begin : begin + len(prompt)] = prompt
    lengths_B[row] = len(prompt)
  return tokens_BW, lengths_B


def shard_rows(decoder: InferenceModel, *arrays):
  """Puts arrays onto the model's mesh, their rows split over its replica and data axes."""
  return jax.device_put(arrays, NamedSharding(decoder.mesh, P(ROWS)))


def batch_prompts(
  decoder: InferenceModel,
  prompts: Sequence[Sequence[int]],
  n_new: int,
  reads_last: bool = False,
):
  """Checks and pads the prompts of a search; tokens [B, T] and lengths [B] on the mesh in force.

  B and T are rounded up; rows that only fill the mesh have length 0. Raises ValueError as
  `check_prompts` and `check_room` do.
  """
  check_prompts(decoder, prompts, n_new)
  check_room(decoder, prompts, n_new, reads_last=reads_last)

  # Whole multiples: of the devices that split the rows, and of a bucket, so that few shapes are
  # compiled.
  B = padded(len(prompts), axis_size(*ROWS))
  T = min(decoder.model.config.n_ctx, padded(max(map(len, prompts)), BUCKET))
  return shard_rows(decoder, *pad_prompts(prompts, (B, T)))
