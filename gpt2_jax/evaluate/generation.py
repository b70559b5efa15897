# SPDX-License-Identifier: Apache-2.0
"""Generation for tasks: texts up to a stop string with their log-likelihood, and next words."""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from gpt2_jax.decoding.generate import advance, check_generation, completions, start
from gpt2_jax.decoding.generation_config import Completion, Generation
from gpt2_jax.decoding.kv_cache import (
  InferenceModel,
  cache_write,
  check_finite,
  count_slots,
  decode,
  last_token,
  logits,
  not_finite,
  prefill,
)
from gpt2_jax.decoding.prompts import pad_prompts, shard_rows
from gpt2_jax.decoding.stream import STEPS, Stopper, StreamDecoder, decoding_tail
from gpt2_jax.tokenizer import Tokenizer

# Tokens of a word at most: each takes a slot of the cache.
MAX_WORD_TOKENS = 8

Ids = Sequence[int]


def write(
  decoder: InferenceModel,
  tokenizer: Tokenizer,
  prompts: Sequence[Ids],
  n_new: int,
  stops: Sequence[Sequence[str]],
  sampler,
  draws: tuple[int, Sequence[int]],
  shape: tuple[int, int],
) -> list[tuple[str, float, int]]:
  """Generates a text for each prompt, up to its stop strings; with its nats and token count.

  Nats are -log p of its tokens. `draws` are the seed and each row's number; `shape` is that of the
  batch.
  """
  # 1. Prefill. Rows end by stop strings of their own, so those are looked for here.
  seed, numbers = draws
  generation = Generation(n_new, sampler, seed, eot=tokenizer.eot, logprobs=True)
  generation = check_generation(decoder, prompts, generation)
  state = start(decoder, prompts, generation, numbers, shape)
  rows = [_Text(tokenizer, prompt, stop) for prompt, stop in zip(prompts, stops, strict=True)]

  # 2. Add tokens in portions, until all texts have ended.
  steps, made = iter(STEPS), 0
  while not all(row.done for row in rows):
    n = min(next(steps, STEPS[-1]), n_new - made)
    state = advance(decoder, state, n, generation)
    new = completions(state, made)
    made += n

    # Rows beyond the prompts only fill the mesh.
    for row, completion in zip(rows, new, strict=False):
      if not row.done:
        row.push(completion, completion.finished or made == n_new)
  return [(row.text, *row.sums()) for row in rows]


class _Text:
  """A text while it is generated."""

  def __init__(self, tokenizer: Tokenizer, prompt: Ids, stop: Sequence[str]):
    self.stream_decoder, self.stopper = StreamDecoder(tokenizer, prompt), Stopper(stop)
    self.text, self.done = "", False
    self.ids, self.nats = [], []
    self.decoded = functools.partial(_decoded, tokenizer, decoding_tail(tokenizer, prompt))

  def push(self, new: Completion, last: bool) -> None:
    # One token at a time: those after the stop string must not count.
    for token, logprob in zip(new.tokens, new.logprobs, strict=True):
      self.ids.append(token)
      self.nats.append(-logprob)
      self._append(self.stream_decoder.push([token]), False)
      if self.done:
        return

    if last:
      self._append(self.stream_decoder.push([], last=True), True)

  def _append(self, chunk: str, last: bool) -> None:
    self.text += self.stopper.push(chunk, last)
    self.done = last or self.stopper.stopped

  def sums(self) -> tuple[float, int]:
    """Nats and count of the tokens that it takes to spell the text."""
    if not self.stopper.stopped:
      return sum(self.nats), len(self.ids)

    n = 0
    while n < len(self.ids) and not self.decoded(self.ids[:n]).startswith(self.text):
      n += 1
    return sum(self.nats[:n]), n


def _decoded(tokenizer: Tokenizer, tail: list[int], ids: Ids) -> str:
  """The text of tokens after others: SentencePiece drops a space at the very beginning."""
  return tokenizer.decode([*tail, *ids])[len(tokenizer.decode(tail)) :]


def next_words(
  decoder: InferenceModel,
  tokenizer: Tokenizer,
  contexts: Sequence[Ids],
  n: int,
  shape: tuple[int, int],
) -> list[tuple[tuple[str, ...], tuple[float, ...]]]:
  """The likeliest next words after each context, and their nats, least first.

  The `n` likeliest first tokens are each continued greedily. A word ends before white space, before
  what is no letter or digit after one that is, before `<|endoftext|>`, or after 8 tokens. The same
  word from several first tokens counts once, as the likeliest.
  """
  words = []
  for context in contexts:
    words.append([_Word(tokenizer, context) for _ in range(n)])

  # All words in one batch: those of a context share its row of the cache.
  tokens_BT, length_B = pad_prompts(contexts, shape)
  with jax.set_mesh(decoder.mesh):
    tokens_BT, length_B = shard_rows(decoder, tokens_BT, length_B)
    token_BN, nats_BN, has_nonfinite, caches = _first_tokens(decoder, tokens_BT, length_B, n)

    for step in range(MAX_WORD_TOKENS):
      # 1. Hand each word its token. Rows beyond the contexts only fill the mesh.
      tokens, nats, is_broken = jax.device_get((token_BN, nats_BN, has_nonfinite))
      check_finite(is_broken)
      for row, row_words in enumerate(words):
        for word, token, cost in zip(
          row_words, tokens[row].tolist(), nats[row].tolist(), strict=True
        ):
          word.push(token, cost)

      # 2. The next token of all words, in one pass.
      if step + 1 == MAX_WORD_TOKENS or all(word.done for row in words for word in row):
        break
      token_BN, nats_BN, has_nonfinite, caches = _next_tokens(
        decoder, token_BN, length_B, np.int32(step), caches
      )
  return [_merged(row) for row in words]


class _Word:
  """A word while it is generated; its text has the space before it, too."""

  def __init__(self, tokenizer: Tokenizer, context: Ids):
    self.eot = tokenizer.eot
    self.decoded = functools.partial(_decoded, tokenizer, decoding_tail(tokenizer, context))
    self.ids = []
    self.text, self.nats, self.done = "", 0.0, False

  def push(self, token: int, nats: float) -> None:
    """One more token, unless the word ends before it."""
    if self.done:
      return

    # The token's first character decides: a token is added as a whole, or not at all.
    text = self.decoded([*self.ids, token])
    next_character = text[len(self.text) :][:1]
    is_end = bool(self.ids) and _ends(self.text, next_character)
    self.done = token == self.eot or is_end
    if not self.done:
      self.ids.append(token)
      self.text = text
      self.nats += nats


def _ends(text: str, character: str) -> bool:
  """Whether a word ends before a character. U+FFFD is a part of one, of which nothing is known."""
  in_word = character.isalnum() or character in ("", "\ufffd")
  return character.isspace() or (not in_word and any(map(str.isalnum, text)))


def _merged(words: list[_Word]) -> tuple[tuple[str, ...], tuple[float, ...]]:
  """Different words and their nats, least first; equal ones count as the likeliest of them."""
  # In order of their nats, so that the first of equal words is the likeliest.
  least = {}
  for word in sorted(words, key=lambda word: word.nats):
    least.setdefault(word.text.strip(), word.nats)
  return tuple(least), tuple(least.values())


@functools.partial(jax.jit, static_argnames="n")
def _first_tokens(decoder: InferenceModel, tokens_BT, length_B, n: int):
  """The `n` likeliest tokens after each context, their -log p, and caches with room for words.

  Before the caches comes whether a context's logit was NaN or infinite.
  """
  x_BTD, caches = prefill(decoder, tokens_BT, tokens_BT.shape[1] + n * (MAX_WORD_TOKENS - 1))
  logits_BV = logits(decoder, last_token(x_BTD, length_B))[:, 0]
  top_BN, token_BN = jax.vmap(lambda logits_V: jax.lax.top_k(logits_V, n))(logits_BV)
  nats_BN = jax.nn.logsumexp(logits_BV, axis=-1, keepdims=True) - top_BN
  has_nonfinite = jnp.any(not_finite(logits_BV) & (length_B > 0))
  return token_BN, nats_BN, has_nonfinite, caches


@functools.partial(jax.jit, donate_argnames="caches")
def _next_tokens(decoder: InferenceModel, token_BN, length_B, step, caches):
  """The likeliest token after each word so far, its -log p, and the caches with the words' tokens.

  Before the caches comes whether a logit was NaN or infinite, in rows that have a context.

  The words of a row share one cache: behind the context each step fills n slots, a word one.
  """
  n, S = token_BN.shape[1], count_slots(caches)
  begin = S - n * (MAX_WORD_TOKENS - 1)

  # 1. A word reads its context and its own slots, the one of this step among them.
  word_S = jnp.arange(S) - begin  # negative in the context
  of_word_NS = (word_S % n == jnp.arange(n)[:, None]) & (word_S >= 0) & (word_S < n * (step + 1))
  mask_BNS = (jnp.arange(S) < length_B[:, None])[:, None] | of_word_NS

  # 2. One pass over the newest tokens of all words.
  position_BN = length_B[:, None] + step + jnp.zeros_like(token_BN)
  write_cache = cache_write(begin + n * step)
  x_BND, caches = decode(decoder, token_BN, position_BN, mask_BNS, caches, write_cache)

  logits_BNV = logits(decoder, x_BND)
  likeliest_BN = jnp.argmax(logits_BNV, axis=-1).astype(jnp.int32)
  nats_BN = jax.nn.logsumexp(logits_BNV, axis=-1) - logits_BNV.max(-1)
  has_nonfinite = jnp.any(not_finite(logits_BNV) & (length_B > 0)[:, None])
  return likeliest_BN, nats_BN, has_nonfinite, caches
