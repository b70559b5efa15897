# SPDX-License-Identifier: Apache-2.0
"""What a model writes: texts up to a stop string, and the likeliest next words."""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from gpt2_jax.decoding.cache import Decoder, at_end, decode, in_slots, logits, prefill
from gpt2_jax.decoding.text import CONTEXT, STEPS, Detokenizer, Stopper
from gpt2_jax.decoding.tokens import Continuation, advance, continuations, start
from gpt2_jax.sharding import ROWS
from gpt2_jax.tokenizer import Tokenizer

PIECES = 8  # tokens of a word at most

Ids = Sequence[int]


def write(
  decoder: Decoder,
  tokenizer: Tokenizer,
  prompts: Sequence[Ids],
  n_new: int,
  stops: Sequence[Sequence[str]],
  sampler,
  draws: tuple[int, Sequence[int]],
  shape: tuple[int, int],
) -> list[tuple[str, float, int]]:
  """What follows each prompt up to its stop strings; -log p of its tokens, in nats; and how many they are.

  `draws` are the seed and each row's number; `shape` is that of the batch.
  """
  seed, numbers = draws
  decoder, state = start(decoder, prompts, n_new, seed, logprobs=True, numbers=numbers, shape=shape)
  rows = [_Text(tokenizer, prompt, stop) for prompt, stop in zip(prompts, stops, strict=True)]
  steps, made = iter(STEPS), 0
  while not all(row.done for row in rows):
    n = min(next(steps, STEPS[-1]), n_new - made)
    state = advance(decoder, state, n, sampler, tokenizer.eot)
    new, made = continuations(state, made), made + n
    for row, found in zip(rows, new, strict=False):  # those beyond the rows only fill the mesh
      if not row.done:
        row.push(found, found.ended or made == n_new)
  return [(row.text, *row.sums()) for row in rows]


class _Text:
  """A text under way."""

  def __init__(self, tokenizer: Tokenizer, prompt: Ids, stop: Sequence[str]):
    self.detokenizer, self.stopper = Detokenizer(tokenizer, prompt), Stopper(stop)
    self.text, self.done = "", False
    self.ids, self.nats = [], []
    self.decoded = functools.partial(_decoded, tokenizer, prompt)

  def push(self, new: Continuation, last: bool) -> None:
    for token, logprob in zip(new.tokens, new.logprobs, strict=True):
      self.ids.append(token)
      self.nats.append(-logprob)
      self._take(self.detokenizer.push([token]), False)
      if self.done:
        return
    if last:
      self._take(self.detokenizer.push([], last=True), True)

  def _take(self, piece: str, last: bool) -> None:
    self.text += self.stopper.push(piece, last)
    self.done = last or self.stopper.stopped

  def sums(self) -> tuple[float, int]:
    """Nats and count of the tokens that it takes to spell the text."""
    n = len(self.ids)
    if self.stopper.stopped:
      n = next(n for n in range(n + 1) if self.decoded(self.ids[:n]).startswith(self.text))
    return sum(self.nats[:n]), n


def _decoded(tokenizer: Tokenizer, before: Ids, ids: Ids) -> str:
  """The text of tokens after others: SentencePiece drops a space at the very beginning."""
  tail = list(before[-CONTEXT:])
  return tokenizer.decode([*tail, *ids])[len(tokenizer.decode(tail)) :]


def next_words(
  decoder: Decoder, tokenizer: Tokenizer, contexts: Sequence[Ids], n: int, shape: tuple[int, int]
) -> list[tuple[tuple[str, ...], tuple[float, ...]]]:
  """For each context words and their nats, least first: the `n` likeliest first pieces, each continued greedily.

  A word ends before white space, before what is no letter or digit after one that is, before `<|endoftext|>`, or after
  8 tokens. The same word from several first pieces counts once, as the likeliest.
  """
  tokens_BT, length_B = np.zeros(shape, np.int32), np.zeros(shape[0], np.int32)
  for row, context in enumerate(contexts):
    tokens_BT[row, : len(context)], length_B[row] = context, len(context)
  words = [[_Word(tokenizer, context) for _ in range(n)] for context in contexts]
  with jax.set_mesh(decoder.mesh):
    tokens_BT, length_B = jax.device_put((tokens_BT, length_B), NamedSharding(decoder.mesh, P(ROWS)))
    token_BN, nats_BN, caches = _first_pieces(decoder, tokens_BT, length_B, n)
    for step in range(PIECES):
      for row, tokens, nats in zip(words, *jax.device_get((token_BN, nats_BN)), strict=False):
        for word, token, cost in zip(row, tokens.tolist(), nats.tolist(), strict=True):
          word.push(token, cost)
      if step + 1 == PIECES or all(word.done for row in words for word in row):
        break
      token_BN, nats_BN, caches = _next_pieces(decoder, token_BN, length_B, np.int32(step), caches)
  return [_merged(row) for row in words]


class _Word:
  """A word under way; its text has the space before it, too."""

  def __init__(self, tokenizer: Tokenizer, context: Ids):
    self.eot, self.decoded, self.ids = tokenizer.eot, functools.partial(_decoded, tokenizer, context), []
    self.text, self.nats, self.done = "", 0.0, False

  def push(self, token: int, nats: float) -> None:
    """One more token, unless the word ends before it."""
    if self.done:
      return
    text = self.decoded([*self.ids, token])
    self.done = token == self.eot or bool(self.ids and _ends(self.text, text[len(self.text) :][:1]))
    if not self.done:
      self.ids.append(token)
      self.text, self.nats = text, self.nats + nats


def _ends(text: str, character: str) -> bool:
  """Whether a word ends before a character. U+FFFD is a part of one, of which nothing is known."""
  in_word = character.isalnum() or character in ("", "\ufffd")
  return character.isspace() or (not in_word and any(map(str.isalnum, text)))


def _merged(words: list[_Word]) -> tuple[tuple[str, ...], tuple[float, ...]]:
  least = {}
  for word in sorted(words, key=lambda word: word.nats):
    least.setdefault(word.text.strip(), word.nats)
  return tuple(least), tuple(least.values())


@functools.partial(jax.jit, static_argnames="n")
def _first_pieces(decoder: Decoder, tokens_BT, length_B, n: int):
  """The `n` likeliest tokens after each context, their -log p, and caches with room for words."""
  x_BTD, caches = prefill(decoder, tokens_BT, tokens_BT.shape[1] + n * (PIECES - 1))
  logits_BV = logits(decoder, at_end(x_BTD, length_B))[:, 0]
  top_BN, token_BN = jax.vmap(lambda logits_V: jax.lax.top_k(logits_V, n))(logits_BV)
  return token_BN, jax.nn.logsumexp(logits_BV, axis=-1, keepdims=True) - top_BN, caches


@functools.partial(jax.jit, donate_argnames="caches")
def _next_pieces(decoder: Decoder, token_BN, length_B, step, caches):
  """The likeliest token after each word so far, as `_first_pieces`; the caches' last slots fill, n a step."""
  n, S = token_BN.shape[1], caches[0][0].shape[2]
  word_S = jnp.arange(S) - (S - n * (PIECES - 1))  # negative in the context
  of_word_NS = (word_S % n == jnp.arange(n)[:, None]) & (word_S >= 0) & (word_S < n * (step + 1))
  seen_BNS = (jnp.arange(S) < length_B[:, None])[:, None] | of_word_NS
  position_BN = length_B[:, None] + step + jnp.zeros_like(token_BN)
  slot = S - n * (PIECES - 1) + n * step
  x_BND, caches = decode(decoder, token_BN, position_BN, seen_BNS, caches, in_slots(slot))
  logits_BNV = logits(decoder, x_BND)
  likeliest_BN = jnp.argmax(logits_BNV, axis=-1).astype(jnp.int32)
  return likeliest_BN, jax.nn.logsumexp(logits_BNV, axis=-1) - logits_BNV.max(-1), caches
