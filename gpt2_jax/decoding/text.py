# SPDX-License-Identifier: Apache-2.0
"""Texts in, texts out: whole, or piece by piece as they are made."""

import itertools
from collections.abc import Iterable, Iterator, Sequence

from gpt2_jax.decoding.cache import Decoder
from gpt2_jax.decoding.samplers import Greedy
from gpt2_jax.decoding.tokens import SlidingWindow, advance, continuations, start
from gpt2_jax.model import GPT2
from gpt2_jax.tokenizer import Tokenizer

CONTEXT = 8  # tokens, so 8 bytes at least: more than a character's 4 and the 3 that may be held back
STEPS = (1, 2, 4, 8, 16, 32)  # tokens between two looks at the text; the last number goes on


def complete(
  model: GPT2 | Decoder,
  tokenizer: Tokenizer,
  prompt: str | Sequence[str],
  n_new: int,
  sampler=None,
  seed: int = 0,
  stop: Sequence[str] = (),
  samples: int = 1,
  window: SlidingWindow | None = None,
) -> str | list[str]:
  """What follows the prompt: a text, or for several prompts or samples a list, all samples of the first prompt first.

  At most `n_new` tokens, up to `<|endoftext|>`, and up to the first place where a `stop` string begins. An empty prompt
  stands for `<|endoftext|>`. Raises ValueError as `generate` does, and where the tokenizer has no `<|endoftext|>`.
  """
  prompts = [prompt] if isinstance(prompt, str) else prompt
  texts = [""] * (len(prompts) * samples)
  for row, piece in _pieces(model, tokenizer, prompts, n_new, sampler, seed, stop, samples, window, not stop):
    texts[row] += piece
  return texts[0] if isinstance(prompt, str) and samples == 1 else texts


def stream(
  model: GPT2 | Decoder,
  tokenizer: Tokenizer,
  prompt: str,
  n_new: int,
  sampler=None,
  seed: int = 0,
  stop: Sequence[str] = (),
  window: SlidingWindow | None = None,
) -> Iterator[str]:
  """The text of `complete` in pieces, as soon as they are certain: no character is split, no stop string begun."""
  pieces = stream_rows(model, tokenizer, [prompt], n_new, sampler, seed, stop, window=window)
  return (piece for _, piece in pieces)


def stream_rows(
  model: GPT2 | Decoder,
  tokenizer: Tokenizer,
  prompts: Sequence[str],
  n_new: int,
  sampler=None,
  seed: int = 0,
  stop: Sequence[str] = (),
  samples: int = 1,
  window: SlidingWindow | None = None,
) -> Iterator[tuple[int, str]]:
  """`stream` for a batch: pairs of a row, in the order of `complete`, and its next piece."""
  return _pieces(model, tokenizer, prompts, n_new, sampler, seed, stop, samples, window, False)


def _pieces(model, tokenizer, prompts, n_new, sampler, seed, stop, samples, window, at_once: bool):
  """Reads the prompts now, and computes the pieces when they are asked for."""
  if tokenizer is None:
    raise ValueError(
      "there is no tokenizer: put tokenizer.json, vocab.json and merges.txt, or encoder.json and vocab.bpe beside the "
      "checkpoint, or give one, as of load_tokenizer"
    )
  if not isinstance(prompts, Sequence) or not all(isinstance(prompt, str) for prompt in prompts):
    raise ValueError("a prompt is a text; complete and stream_rows take several")
  if isinstance(stop, str) or not all(stop):
    raise ValueError(f"stop strings {stop!r}: give a sequence of texts, none of them empty")
  ids = [_encode(tokenizer, prompt) for prompt in prompts]
  decoder, state = start(model, ids, n_new, seed, samples, window)
  rows = [(Detokenizer(tokenizer, prompt), Stopper(stop)) for prompt in ids for _ in range(samples)]

  def pieces(state):
    steps, made, live = iter(STEPS), 0, dict(enumerate(rows))
    while live:
      n = n_new if at_once else min(next(steps, STEPS[-1]), n_new - made)
      state = advance(decoder, state, n, sampler or Greedy(), tokenizer.eot, window)
      found = continuations(state, made)
      made += n
      for row, (detokenizer, stopper) in list(live.items()):
        last = found[row].ended or made == n_new
        piece = stopper.push(detokenizer.push(found[row].tokens, last), last)
        if piece:
          yield row, piece
        if last or stopper.stopped:
          del live[row]

  return pieces(state)


def _encode(tokenizer, prompt: str) -> list[int]:
  ids = tokenizer.encode(prompt) or [tokenizer.eot]
  if ids == [None]:
    raise ValueError("this tokenizer has no <|endoftext|> for an empty prompt to begin with; give some text")
  return ids


class Detokenizer:
  """Text of tokens that come bit by bit, after a prompt; characters that are not whole yet are held back.

  A character that is not whole decodes to U+FFFD, one or, with SentencePiece, one a byte: so at most the last three of
  a text may still change. The last tokens are decoded again with the next, for a token's text may depend on the one
  before it: SentencePiece drops a space at the very beginning.
  """

  def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int] = ()):
    self.decode = tokenizer.decode
    self.tail, self.held = list(prompt[-CONTEXT:]), 0

  def push(self, tokens: Iterable[int], last: bool = False) -> str:
    """What has become certain; all that is left if these are the `last` tokens."""
    ids = [*self.tail, *tokens]
    text = self.decode(ids)
    begin = len(self.decode(self.tail)) - self.held
    unsure = 0 if last else sum(1 for _ in itertools.takewhile("\ufffd".__eq__, reversed(text[begin:][-3:])))
    self.tail, self.held = ids[-CONTEXT:], unsure
    return text[begin : len(text) - unsure]


class Stopper:
  """Text up to the first place where a stop string begins; what may be the beginning of one is held back."""

  def __init__(self, stop: Sequence[str]):
    self.stop, self.text, self.stopped = tuple(stop), "", False

  def push(self, text: str, last: bool = False) -> str:
    """What has become certain; all that is left of it if this is the `last` text."""
    text = self.text + text
    found = min((at for at in map(text.find, self.stop) if at >= 0), default=len(text))
    begun = len(text) if last else self._begun(text)
    self.stopped = found < len(text) and found <= begun
    sure = min(found, begun)
    self.text = text[sure:]
    return text[:sure]

  def _begun(self, text: str) -> int:
    """Where the longest beginning of a stop string at the end of the text begins."""
    sizes = (n for stop in self.stop for n in range(1, len(stop)) if text.endswith(stop[:n]))
    return len(text) - max(sizes, default=0)
