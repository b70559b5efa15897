# SPDX-License-Identifier: Apache-2.0
"""Text generation and streaming: `complete` gives texts, `stream` gives one as it is generated."""

import dataclasses
from collections.abc import Iterable, Iterator, Sequence

from gpt2_jax.decoding.generate import advance, check_generation, completions, start
from gpt2_jax.decoding.generation_config import Generation, make_generation
from gpt2_jax.decoding.kv_cache import InferenceModel, for_inference
from gpt2_jax.decoding.samplers import Greedy, Sample
from gpt2_jax.files import announce
from gpt2_jax.model import GPT2
from gpt2_jax.tokenizer import Tokenizer, check_unicode

# Tokens before the new ones that are decoded with them. They are 8 bytes at least: more than a
# character's 4 and the 3 that may be held back.
CONTEXT = 8

# Tokens between two looks at the text, and the last number from then on: the first text comes at
# once, and long ones are not held up by many calls.
STEPS = (1, 2, 4, 8, 16, 32)


def complete(
  model: GPT2 | InferenceModel,
  tokenizer: Tokenizer,
  prompt: str | Sequence[str],
  n_new: int | None = None,
  sampler: Greedy | Sample | None = None,
  *,
  generation: Generation | None = None,
  adapters: int | Sequence[int] | None = None,
  **options,
) -> str | list[str]:
  """Generates the text after a prompt: `complete(model, tokenizer, "Dear", temperature=0.8)`.

  A text, or for several prompts or samples a list, all samples of the first prompt first. Tokens
  are drawn at temperature 1 unless options say otherwise: `greedy=True`, `temperature`, `top_k`,
  `top_p` and the other keywords of `make_sampler`, or a `sampler`. More options are the fields of
  `Generation` (seed, samples, stop, window); or give a `generation` as a whole. Of a model with a
  bank of adapters (`stack_adapters`), `adapters` are the number of one for each prompt, or one for
  all.

  A text has at most `n_new` tokens (128, or as many as the context has room for). It ends before
  `<|endoftext|>` and before the first `stop` string. An empty prompt stands for `<|endoftext|>`.
  Raises ValueError as `generate` does, and where the tokenizer has no `<|endoftext|>`.
  """
  generation = make_generation(generation, n_new, sampler, options, default=Sample())
  prompts = [prompt] if isinstance(prompt, str) else prompt

  # Without stop strings nothing has to be looked at on the way: one call of the device.
  texts = [""] * (len(prompts) * generation.samples)
  with announce("generating; a new size is compiled first, about a minute for a large model"):
    in_one_call = not generation.stop
    chunks = _text_chunks(model, tokenizer, prompts, generation, in_one_call, adapters)
    for row, chunk, _ in chunks:
      texts[row] += chunk

  is_one_text = isinstance(prompt, str) and generation.samples == 1
  return texts[0] if is_one_text else texts


def stream(
  model: GPT2 | InferenceModel,
  tokenizer: Tokenizer,
  prompt: str,
  n_new: int | None = None,
  sampler: Greedy | Sample | None = None,
  *,
  generation: Generation | None = None,
  adapters: int | None = None,
  **options,
) -> Iterator[str]:
  """Streams the text of `complete`, with the same options, in chunks as soon as they are certain.

  No character is split, and no chunk holds the beginning of a stop string.
  """
  generation = make_generation(generation, n_new, sampler, options, default=Sample())
  chunks = stream_counted(model, tokenizer, prompt, generation, adapters)
  return (chunk for chunk, _ in chunks if chunk)


def stream_counted(
  model: GPT2 | InferenceModel,
  tokenizer: Tokenizer,
  prompt: str,
  generation: Generation,
  adapters: int | None = None,
) -> Iterator[tuple[str, int]]:
  """Streams one text for those who measure tokens/s: pairs of a chunk and the tokens it took.

  There is a pair for every call of the device; its chunk is empty while nothing is certain.
  """
  if generation.samples != 1:
    raise ValueError(f"stream gives one text, not {generation.samples} samples; call stream_rows")
  chunks = _text_chunks(model, tokenizer, [prompt], generation, False, adapters)
  return ((chunk, n_tokens) for _, chunk, n_tokens in chunks)


def stream_rows(
  model: GPT2 | InferenceModel,
  tokenizer: Tokenizer,
  prompts: Sequence[str],
  n_new: int | None = None,
  sampler: Greedy | Sample | None = None,
  *,
  generation: Generation | None = None,
  adapters: int | Sequence[int] | None = None,
  **options,
) -> Iterator[tuple[int, str]]:
  """Streams a batch of texts: pairs of a row, in the order of `complete`, and its next chunk."""
  generation = make_generation(generation, n_new, sampler, options, default=Sample())
  chunks = _text_chunks(model, tokenizer, prompts, generation, False, adapters)
  return ((row, chunk) for row, chunk, _ in chunks if chunk)


def _text_chunks(
  model, tokenizer, prompts, generation: Generation, in_one_call: bool, adapters
) -> Iterator[tuple[int, str, int]]:
  """Reads the prompts now, and computes rows' chunks and their tokens when they are asked for."""
  # 1. Whatever is wrong is an error here, and not at the first chunk.
  if tokenizer is None:
    raise ValueError(
      "there is no tokenizer: put tokenizer.json, vocab.json and merges.txt, or encoder.json and "
      "vocab.bpe beside the checkpoint, or give one, as of load_tokenizer"
    )
  if not isinstance(prompts, Sequence) or not all(isinstance(prompt, str) for prompt in prompts):
    raise ValueError("a prompt is a text; complete and stream_rows take several")
  if generation.logprobs:
    raise ValueError("texts have no logprobs; call generate, which works on tokens")

  # 2. Prefill.
  ids = [encode_prompt(tokenizer, prompt) for prompt in prompts]
  decoder = for_inference(model)
  generation = check_generation(decoder, ids, generation)
  if generation.eot is None:
    generation = dataclasses.replace(generation, eot=tokenizer.eot)
  state = start(decoder, ids, generation, adapters=adapters)

  # 3. Each row turns its tokens into text, and looks for stop strings in it.
  live = {}
  for prompt in ids:
    for _ in range(generation.samples):
      live[len(live)] = StreamDecoder(tokenizer, prompt), Stopper(generation.stop)
  return _advance_chunks(decoder, state, generation, live, in_one_call)


def _advance_chunks(decoder, state, generation: Generation, live: dict, in_one_call: bool):
  """Adds tokens in portions, until no row is live.

  Yields, for each portion of a row, the text that it makes certain and its number of tokens.
  """
  steps, made = iter(STEPS), 0
  while live:
    n = generation.n_new if in_one_call else min(next(steps, STEPS[-1]), generation.n_new - made)
    state = advance(decoder, state, n, generation)
    rows = completions(state, made)
    made += n

    for row, (decoder_of_row, stopper) in list(live.items()):
      last = rows[row].finished or made == generation.n_new
      chunk = stopper.push(decoder_of_row.push(rows[row].tokens, last), last)
      yield row, chunk, len(rows[row].tokens)
      if last or stopper.stopped:
        del live[row]


def encode_prompt(tokenizer: Tokenizer, prompt: str) -> list[int]:
  """The tokens of a prompt; `<|endoftext|>` for an empty one. Raises ValueError if it has none."""
  check_unicode(prompt, "the prompt")
  ids = tokenizer.encode(prompt) or [tokenizer.eot]
  if ids == [None]:
    raise ValueError(
      "this tokenizer has no <|endoftext|> for an empty prompt to begin with; give some text"
    )
  return ids


class StreamDecoder:
  """Streaming detokenizer: the text of tokens that come bit by bit, after a prompt.

  Characters that are incomplete are held back. Such a character decodes to U+FFFD, one or, with
  SentencePiece, one a byte: so at most the last three of a text may still change. The last tokens
  are decoded again with the next ones, for a token's text may depend on the one before it:
  SentencePiece drops a space at the very beginning.
  """

  def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int] = ()):
    self.decode = tokenizer.decode
    self.tail = list(prompt[-CONTEXT:])
    self.held_back = 0  # characters of the tail's text

  def push(self, tokens: Iterable[int], last: bool = False) -> str:
    """What has become certain; all that is left if these are the `last` tokens."""
    ids = [*self.tail, *tokens]
    text = self.decode(ids)
    begin = len(self.decode(self.tail)) - self.held_back

    # Hold back U+FFFD at the end: more tokens may make a character of it.
    unsure = 0
    if not last:
      end = text[begin:][-3:]
      unsure = len(end) - len(end.rstrip("\ufffd"))

    self.tail, self.held_back = ids[-CONTEXT:], unsure
    return text[begin : len(text) - unsure]


class Stopper:
  """Stop strings: passes text on up to the first place where one begins.

  Text that may be the beginning of a stop string is held back.
  """

  def __init__(self, stop: Sequence[str]):
    self.stop = tuple(stop)
    self.text = ""
    self.stopped = False

  def push(self, text: str, last: bool = False) -> str:
    """What has become certain; all that is left of it if this is the `last` text."""
    text = self.text + text

    # 1. Where the first whole stop string begins, and where one may have begun at the end.
    places = [place for place in map(text.find, self.stop) if place >= 0]
    first = min(places, default=len(text))
    begun = len(text) if last else self._begun(text)

    # 2. A beginning that lies before the whole one may become a stop string, which ends the text
    #    earlier: so nothing is decided yet.
    self.stopped = first < len(text) and first <= begun
    certain = min(first, begun)
    self.text = text[certain:]
    return text[:certain]

  def _begun(self, text: str) -> int:
    """Where the longest beginning of a stop string at the end of the text begins."""
    longest = 0
    for stop in self.stop:
      for size in range(1, len(stop)):
        if text.endswith(stop[:size]):
          longest = max(longest, size)
    return len(text) - longest
