# SPDX-License-Identifier: Apache-2.0
"""Text generation and streaming: `complete` gives texts, `stream` gives one as it is generated."""

import dataclasses
import numbers
from collections.abc import Iterable, Iterator, Sequence

from gpt2_jax.decoding.generate import advance, check_generation, completions, snapshot, start
from gpt2_jax.decoding.generation_config import Generation, make_generation
from gpt2_jax.decoding.kv_cache import InferenceModel, for_inference
from gpt2_jax.decoding.moderation import Policy, moderate
from gpt2_jax.decoding.samplers import Greedy, Sample
from gpt2_jax.files import announce
from gpt2_jax.model import GPT2
from gpt2_jax.tokenizer import Tokenizer, check_unicode

# A text, or its token ids, as a template writes them.
Prompt = str | Sequence[int]

# Special tokens that are parsed in a prompt, by how they are written; True stands for all.
Special = bool | Sequence[str]

# Tokens before the new ones that are decoded with them, at least. They are 8 bytes or more: more
# than a character's 4 and the 3 that may be held back.
CONTEXT = 8

# Tokens between two looks at the text, and the last number from then on: the first text comes at
# once, and long ones are not held up by many calls.
STEPS = (1, 2, 4, 8, 16, 32)


def complete(
  model: GPT2 | InferenceModel,
  tokenizer: Tokenizer,
  prompt: Prompt | Sequence[Prompt],
  n_new: int | None = None,
  sampler: Greedy | Sample | None = None,
  *,
  generation: Generation | None = None,
  adapters: int | Sequence[int] | None = None,
  special: Special = (),
  moderation: Policy | None = None,
  **options,
) -> str | list[str]:
  """Generates the text after a prompt: `complete(model, tokenizer, "Dear", temperature=0.8)`.

  A text, or for several prompts or samples a list, all samples of the first prompt first. Tokens
  are drawn at temperature 1 unless options say otherwise: `greedy=True`, `temperature`, `top_k`,
  `top_p` and the other keywords of `make_sampler`, or a `sampler`. More options are the fields of
  `Generation` (seed, samples, stop, window); or give a `generation` as a whole. Of a model with a
  bank of adapters (`stack_adapters`), `adapters` are the number of one for each prompt, or one for
  all.

  A special token in a prompt is plain text, unless `special` names it: `special=("<|user|>",)`
  parses that one and `special=True` all of the tokenizer's, as transformers does. A prompt may also
  be token ids.

  A text has at most `n_new` tokens (128, or as many as the context has room for). It ends before
  `<|endoftext|>` and before the first `stop` string. An empty prompt stands for `<|endoftext|>`.
  Raises ValueError as `generate` does, where the tokenizer has no `<|endoftext|>`, and for a
  `special` token that it lacks.
  """
  generation = make_generation(generation, n_new, sampler, options, default=Sample())
  is_one_prompt = _is_prompt(prompt)
  prompts = [prompt] if is_one_prompt else prompt

  # Without stop strings nothing has to be looked at on the way: one call of the device.
  texts = [""] * (len(prompts) * generation.samples)
  with announce("generating; a new size is compiled first, about a minute for a large model"):
    in_one_call = not generation.stop
    chunks = _text_chunks(
      model, tokenizer, prompts, generation, in_one_call, adapters, special, moderation
    )
    for row, chunk, _ in chunks:
      texts[row] += chunk

  return texts[0] if is_one_prompt and generation.samples == 1 else texts


def stream(
  model: GPT2 | InferenceModel,
  tokenizer: Tokenizer,
  prompt: Prompt,
  n_new: int | None = None,
  sampler: Greedy | Sample | None = None,
  *,
  generation: Generation | None = None,
  adapters: int | None = None,
  special: Special = (),
  moderation: Policy | None = None,
  **options,
) -> Iterator[str]:
  """Streams the text of `complete`, with the same options, in chunks as soon as they are certain.

  No character is split, and no chunk holds the beginning of a stop string.
  """
  generation = make_generation(generation, n_new, sampler, options, default=Sample())
  chunks = stream_counted(model, tokenizer, prompt, generation, adapters, special, moderation)
  return (chunk for chunk, _ in chunks if chunk)


def stream_counted(
  model: GPT2 | InferenceModel,
  tokenizer: Tokenizer,
  prompt: Prompt,
  generation: Generation,
  adapters: int | None = None,
  special: Special = (),
  moderation: Policy | None = None,
) -> Iterator[tuple[str, int]]:
  """Streams one text for those who measure tokens/s: pairs of a chunk and the tokens it took.

  There is a pair for every call of the device; its chunk is empty while nothing is certain.
  """
  if generation.samples != 1:
    raise ValueError(f"stream gives one text, not {generation.samples} samples; call stream_rows")
  chunks = _text_chunks(
    model, tokenizer, [prompt], generation, False, adapters, special, moderation
  )
  return ((chunk, n_tokens) for _, chunk, n_tokens in chunks)


def stream_rows(
  model: GPT2 | InferenceModel,
  tokenizer: Tokenizer,
  prompts: Sequence[Prompt],
  n_new: int | None = None,
  sampler: Greedy | Sample | None = None,
  *,
  generation: Generation | None = None,
  adapters: int | Sequence[int] | None = None,
  special: Special = (),
  moderation: Policy | None = None,
  **options,
) -> Iterator[tuple[int, str]]:
  """Streams a batch of texts: pairs of a row, in the order of `complete`, and its next chunk."""
  generation = make_generation(generation, n_new, sampler, options, default=Sample())
  chunks = _text_chunks(model, tokenizer, prompts, generation, False, adapters, special, moderation)
  return ((row, chunk) for row, chunk, _ in chunks if chunk)


def _text_chunks(
  model,
  tokenizer,
  prompts,
  generation: Generation,
  in_one_call: bool,
  adapters,
  special: Special,
  moderation: Policy | None,
) -> Iterator[tuple[int, str, int]]:
  """Reads the prompts now, and computes rows' chunks and their tokens when they are asked for."""
  # 1. Whatever is wrong is an error here, and not at the first chunk.
  if tokenizer is None:
    raise ValueError(
      "there is no tokenizer: put tokenizer.json, vocab.json and merges.txt, or encoder.json and "
      "vocab.bpe beside the checkpoint, or give one, as of load_tokenizer"
    )
  if not isinstance(prompts, Sequence) or not all(map(_is_prompt, prompts)):
    raise ValueError(
      "a prompt is a text, or a list of token ids; complete and stream_rows take several"
    )
  if generation.logprobs:
    raise ValueError("texts have no logprobs; call generate, which works on tokens")

  # 2. Prefill.
  ids = [encode_prompt(tokenizer, prompt, special) for prompt in prompts]
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
  chunks = _advance_chunks(decoder, state, generation, live, in_one_call)
  if moderation is None:
    return chunks

  # 4. What the policy lets out; a word may have begun in the prompt.
  texts = [tokenizer.decode(prompt) for prompt in ids for _ in range(generation.samples)]
  return moderate(chunks, moderation, texts)


def _advance_chunks(decoder, state, generation: Generation, live: dict, in_one_call: bool):
  """Adds tokens in portions, until no row is live.

  Yields, for each portion of a row, the text that it makes certain and its number of tokens. The
  next portion is dispatched before one is read, unless a stop string may end the texts before it.
  """
  portions = _portions(generation.n_new, in_one_call)
  is_ahead = not generation.stop
  made, n = 0, next(portions)
  state = advance(decoder, state, n, generation)

  while live:
    # 1. `advance` takes the state with it, so what is to be read is copied before.
    current, following = snapshot(state), next(portions, 0)
    if is_ahead and following:
      state = advance(decoder, state, following, generation)
    rows = completions(current, made)
    made, n = made + n, following

    # 2. Text of the new tokens.
    for row, (decoder_of_row, stopper) in list(live.items()):
      last = rows[row].finished or made == generation.n_new
      chunk = stopper.push(decoder_of_row.push(rows[row].tokens, last), last)
      yield row, chunk, len(rows[row].tokens)
      if last or stopper.stopped:
        del live[row]

    if live and not is_ahead:
      state = advance(decoder, state, n, generation)


def _portions(n_new: int, in_one_call: bool) -> Iterator[int]:
  """How many tokens each call adds: STEPS, or all at once."""
  steps = iter(STEPS)
  left = n_new
  while left:
    n = n_new if in_one_call else min(next(steps, STEPS[-1]), left)
    yield n
    left -= n


def _is_prompt(prompt) -> bool:
  """Whether this is one prompt: a text, or token ids. An empty list is no prompt."""
  if isinstance(prompt, str):
    return True
  is_list = isinstance(prompt, Sequence) and bool(prompt)
  return is_list and all(isinstance(token, numbers.Integral) for token in prompt)


def encode_prompt(tokenizer: Tokenizer, prompt: Prompt, special: Special = ()) -> list[int]:
  """The tokens of a prompt; `<|endoftext|>` for an empty one. Raises ValueError if it has none.

  `special` are the special tokens that are parsed in it.
  """
  if not isinstance(prompt, str):
    return list(prompt)

  check_unicode(prompt, "the prompt")
  ids = tokenizer.encode(prompt, special=special) or [tokenizer.eot]
  if ids == [None]:
    raise ValueError(
      "this tokenizer has no <|endoftext|> for an empty prompt to begin with; give some text"
    )
  return ids


class StreamDecoder:
  """Streaming detokenizer: the text of tokens that come bit by bit, after a prompt.

  The text is what decoding all tokens at once adds to the text of the prompt. Characters that are
  incomplete are held back. Such a character decodes to U+FFFD, one or, with SentencePiece, one a
  byte: so at most the last three of a text may still change. A run of Hugging Face's byte fallback
  is held back as a whole, for a bad byte at its end makes U+FFFD of all of it. The last tokens are
  decoded again with the next ones, for a token's text may depend on those before it: SentencePiece
  drops a space at the very beginning, WordPiece adds one before a word.
  """

  def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int] = ()):
    self.tokenizer = tokenizer
    self.tail = decoding_tail(tokenizer, prompt)
    self.held_back = 0  # characters of the tail's text

  def push(self, tokens: Iterable[int], last: bool = False) -> str:
    """What has become certain; all that is left if these are the `last` tokens."""
    ids = [*self.tail, *tokens]
    text = self.tokenizer.decode(ids)
    begin = len(self.tokenizer.decode(self.tail)) - self.held_back
    self.tail = decoding_tail(self.tokenizer, ids)

    # Text that was certain once, the prompt's too, stays so.
    unsure = 0 if last else min(_n_uncertain(self.tokenizer, ids, text), len(text) - begin)
    self.held_back = unsure
    return text[begin : len(text) - unsure]


def decoding_tail(tokenizer: Tokenizer, ids: Sequence[int]) -> list[int]:
  """The last of the ids, as many as it takes to give what follows its text: eight or more.

  What is cut off must not change the text of the rest, which a cut within a character or within
  spaces at the beginning does. So the rest has to end the text of all, and to hold a character that
  is certain and no space.
  """
  ids = list(ids)
  text = tokenizer.decode(ids)
  n_uncertain = _n_uncertain(tokenizer, ids, text)

  size = CONTEXT
  while size < len(ids):
    rest = tokenizer.decode(ids[-size:])
    certain = rest[: max(0, len(rest) - n_uncertain)]
    if certain.strip() and text.endswith(rest):
      return ids[-size:]
    size *= 2
  return ids


def _n_uncertain(tokenizer: Tokenizer, ids: list[int], text: str) -> int:
  """How many characters at the end of the ids' text may change when more tokens come."""
  end = len(ids)
  while end and ids[end - 1] in tokenizer.byte_run_ids:
    end -= 1
  if end < len(ids):
    return len(text) - len(tokenizer.decode(ids[:end]))

  # More tokens may make a character of U+FFFD.
  return len(text[-3:]) - len(text[-3:].rstrip("\ufffd"))


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
