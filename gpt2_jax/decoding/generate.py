# SPDX-License-Identifier: Apache-2.0
"""Text generation on tokens: greedy decoding and sampling of a batch, one token a step.

`generate` is the whole of it. Its parts serve those who look at the tokens on the way, as streaming
does: `start` prefills the KV cache, `advance` adds tokens, `completions` reads them.

Prompts of a batch may have any lengths. Each row has its own positions, its own part of the cache
and its own random numbers. So its tokens do not depend on the other rows, on the mesh, or on how
many steps a call makes. (In bfloat16, near-ties may be rounded one way or the other.)

  P rows that are prefilled: samples of a prompt share one
  W columns of the tokens: prompts end at one column, and the new tokens follow  S slots of a cache
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from gpt2_jax.decoding.adapters import adapter_numbers
from gpt2_jax.decoding.generation_config import Completion, Generation, make_generation
from gpt2_jax.decoding.kv_cache import (
  InferenceModel,
  cache_write,
  check_finite,
  check_memory,
  decode,
  for_inference,
  logits,
  not_finite,
  prefill,
  random_key,
  slots_axis,
)
from gpt2_jax.decoding.prompts import BUCKET, check_prompts, check_room, pad_prompts, shard_rows
from gpt2_jax.decoding.samplers import Greedy, History, Sample
from gpt2_jax.files import announce
from gpt2_jax.linear import NO_CONTEXT, Context
from gpt2_jax.model import GPT2
from gpt2_jax.sharding import ROWS, axis_size, padded


class State(NamedTuple):
  """The rows of a batch while they are generated.

  In `tokens_BW` all prompts end at one column, `prompt_end`, and the new tokens follow: so a step
  writes one column of all rows.
  """

  tokens_BW: jax.Array
  logprobs_BW: jax.Array | None
  prompt_start_B: jax.Array  # the column at which a row begins
  count_B: jax.Array  # new tokens
  done_B: jax.Array
  has_nonfinite: jax.Array  # whether a logit of any row was NaN or infinite
  keys_B: jax.Array
  prompt_end: jax.Array
  n: jax.Array  # steps taken
  slot: jax.Array  # of the caches, for the next token
  mask_BS: jax.Array  # slots that hold tokens of the row
  caches: list
  context: Context = NO_CONTEXT  # the adapter of each row


def generate(
  model: GPT2 | InferenceModel,
  prompts: Sequence[Sequence[int]],
  n_new: int | None = None,
  sampler: Greedy | Sample | None = None,
  *,
  generation: Generation | None = None,
  adapters: int | Sequence[int] | None = None,
  **options,
) -> list[Completion]:
  """Generates completions of prompts of tokens; all samples of the first prompt come first.

  It is greedy decoding, as with transformers' `generate`, unless a sampler or one of its options is
  given: `generate(model, ids, 50, temperature=0.8, top_k=40)` draws. Options are the fields of
  `Generation` (seed, samples, eot, window, logprobs) and the keywords of `make_sampler`; or give a
  `generation` as a whole, whose own sampler counts. Of a model with a bank of adapters
  (`stack_adapters`), `adapters` are the number of one for each prompt, or one for all.

  Draws depend on the seed, and on which prompt and which sample a row is: to go on from a
  completion, take another seed. Raises ValueError on an empty prompt, on tokens outside the
  vocabulary, and on prompts that leave no room in the context for `n_new`, unless there is a
  `window`.
  """
  generation = make_generation(generation, n_new, sampler, options, default=Greedy())
  if generation.stop:
    raise ValueError("stop strings end texts, and generate works on tokens; call complete")
  decoder = for_inference(model)
  generation = check_generation(decoder, prompts, generation)
  with announce("compiling the decoder, about a minute for a large model"):
    state = start(decoder, prompts, generation, adapters=adapters)
    state = advance(decoder, state, generation.n_new, generation)
  return completions(state)[: len(prompts) * generation.samples]


def check_generation(decoder: InferenceModel, prompts, generation: Generation) -> Generation:
  """Checks prompts and options against the model; returns the options with `n_new` filled in."""
  n_ctx = decoder.model.config.n_ctx

  # The prompts first: without them there is no room to measure.
  n_new = 1 if generation.n_new is None else generation.n_new
  check_prompts(decoder, prompts, n_new, generation.samples)
  generation = generation.with_n_new(max(map(len, prompts)), n_ctx)
  slots = padded(max(map(len, prompts)), BUCKET) + padded(generation.n_new, BUCKET)
  slots = slots if generation.window is None else min(slots, n_ctx)
  check_memory(decoder, len(prompts) * generation.samples, slots)

  if generation.window is not None:
    generation.window.check(n_ctx)
    return generation

  stride = max(1, n_ctx // 2)
  remedy = (
    f"ask for fewer, or slide a window: SlidingWindow({stride}), "
    f"or {stride} as the setting `window`"
  )
  check_room(decoder, prompts, generation.n_new, remedy)
  return generation


def start(
  decoder: InferenceModel,
  prompts: Sequence[Sequence[int]],
  generation: Generation,
  numbers: Sequence[int] | None = None,
  shape: tuple[int, int] = (0, 0),
  adapters: int | Sequence[int] | None = None,
) -> State:
  """Prefills the KV cache: the State before the first new token, of a checked `generation`.

  `numbers` are those by which the rows draw, in place of 0, 1 and so on. `shape` makes room for at
  least that many rows and tokens of a prompt: batches of any prompts then share what is compiled.
  `adapters` are as of `generate`; raises ValueError for those that the model does not have.
  """
  adapters = adapter_numbers(decoder, adapters, len(prompts))
  with jax.set_mesh(decoder.mesh):
    # 1. Round all sizes up, so that few shapes are compiled.
    longest = max(shape[1], *map(len, prompts))
    prompt_end = padded(max(longest - 1, 1), BUCKET) + 1
    columns = prompt_end + padded(generation.n_new, BUCKET)
    rows = [prompt for prompt in prompts for _ in range(generation.samples)]
    B = padded(max(shape[0], len(rows)), axis_size(*ROWS))

    # 2. Pad the prompts on the left. Rows that only fill the mesh are done, and have length 1.
    tokens_BW, lengths_B = pad_prompts(rows, (B, columns), end=prompt_end)
    prompt_start_B = (prompt_end - np.maximum(lengths_B, 1)).astype(np.int32)
    done_B = lengths_B == 0

    # 3. Number the rows: their random keys depend on the number, and on nothing else of the batch.
    row_B = np.arange(B, dtype=np.int32)
    if numbers is not None:
      row_B[: len(rows)] = numbers

    # 4. The adapter of each row.
    adapter_B = None if adapters is None else _of_rows(adapters, generation.samples, B)

    # 5. Samples of a prompt share its prefill.
    arrays = (tokens_BW, prompt_start_B, row_B, done_B, adapter_B)
    shared = None
    if generation.samples > 1:
      prefilled_P, place_B = prefilled_rows(len(rows), B, generation.samples)
      shared = _take_rows((tokens_BW, prompt_start_B, adapter_B), prefilled_P), place_B
    arrays, shared = shard_rows(decoder, arrays, shared)
    options = (prompt_end, generation.samples, generation.window, generation.logprobs)
    return _start(decoder, *arrays, shared, random_key(generation.seed), *options)


def _of_rows(numbers: Sequence[int], samples: int, B: int) -> np.ndarray:
  """The number of each row, [B]: all samples of a prompt have the prompt's, the rest have 0."""
  number_B = np.zeros(B, np.int32)
  number_B[: len(numbers) * samples] = np.repeat(numbers, samples)
  return number_B


def _take_rows(arrays, row_P):
  return jax.tree.map(lambda x_B: x_B[row_P], arrays)


def prefilled_rows(n_rows: int, B: int, samples: int) -> tuple[np.ndarray, np.ndarray]:
  """The rows that are prefilled, [P]: one for each prompt of a part; and each row's place, [B].

  A part are the rows of one device. What it prefills stays there, so no cache is sent: a place is
  a number among the P / parts prefilled rows of the part.
  """
  # 1. Rows beyond `n_rows` only fill the mesh, and take what is in the first place.
  per_part = B // axis_size(*ROWS)
  row_B = np.arange(B, dtype=np.int32)
  first_B = row_B - row_B % per_part  # the first row of each row's part
  place_B = np.where(row_B < n_rows, row_B // samples - first_B // samples, 0).astype(np.int32)

  # 2. The first row of each prompt in its part; parts with fewer prompts repeat their first row.
  places = int(place_B.max()) + 1
  prompt_P = np.repeat(row_B[::per_part], places)
  for row in range(n_rows - 1, -1, -1):
    prompt_P[row // per_part * places + place_B[row]] = row
  return prompt_P, place_B


def advance(decoder: InferenceModel, state: State, n: int, generation: Generation) -> State:
  """Adds `n` tokens to each row that `eot` has not ended, in one call of the device.

  `state` is given away. How many tokens a call adds changes none of them.
  """
  eot = -1 if generation.eot is None else generation.eot
  with jax.set_mesh(decoder.mesh):
    return _advance(
      decoder, state, np.int32(n), np.int32(eot), generation.sampler, generation.window
    )


def snapshot(state: State) -> State:
  """What `completions` reads of a state that the next `advance` is given: dispatched, not read."""
  return _copy(state._replace(caches=[], mask_BS=None, keys_B=None, context=NO_CONTEXT))


@jax.jit
def _copy(tree):
  return jax.tree.map(jnp.copy, tree)


def completions(state: State, begin: int = 0) -> list[Completion]:
  """What the rows hold beyond their first `begin` new tokens.

  Raises FloatingPointError where logits were NaN or infinite.
  """
  # One transfer for all, and not the caches with them.
  state = jax.device_get(state._replace(caches=[], mask_BS=None, keys_B=None))
  check_finite(state.has_nonfinite)

  def new_values(values_BW, row):
    first, last = state.prompt_end + begin, state.prompt_end + state.count_B[row]
    return values_BW[row, first:last].tolist()

  rows = []
  for row, done in enumerate(state.done_B.tolist()):
    logprobs = None if state.logprobs_BW is None else new_values(state.logprobs_BW, row)
    rows.append(Completion(new_values(state.tokens_BW, row), logprobs, finished=done))
  return rows


@functools.partial(jax.jit, static_argnames=("prompt_end", "samples", "window", "logprobs"))
def _start(
  decoder,
  tokens_BW,
  prompt_start_B,
  row_B,
  done_B,
  adapter_B,
  shared,
  key,
  prompt_end: int,
  samples: int,
  window,
  logprobs: bool,
):
  """The State before the first token. `shared` are rows to prefill and places in them, or None."""
  # 1. Sizes: T tokens of a prompt are read here, all but its last; a cache has S slots.
  n_ctx = decoder.model.config.n_ctx
  W, T = tokens_BW.shape[1], min(prompt_end - 1, n_ctx)
  S = T + W - prompt_end
  if window is not None:
    S = min(S, n_ctx)

  # 2. Prefill. With a window the slots are a ring, and the first step writes slot 0.
  slot = jnp.int32(T if window is None else 0)
  rows, place_B = shared or ((tokens_BW, prompt_start_B, adapter_B), None)
  memory = _prefill_remembered(
    decoder, rows[0], rows[1], prompt_end - rows[1], slot, (T, S), window, Context(None, rows[2])
  )
  mask_BS, caches = memory if shared is None else _take_in_parts(memory, place_B)

  # 3. A random key for each sample of each prompt.
  keys_B = jax.vmap(jax.random.fold_in, (None, 0))(key, row_B // samples)
  keys_B = jax.vmap(jax.random.fold_in)(keys_B, row_B % samples)

  return State(
    tokens_BW=tokens_BW,
    logprobs_BW=jnp.zeros_like(tokens_BW, jnp.float32) if logprobs else None,
    prompt_start_B=prompt_start_B,
    count_B=jnp.zeros_like(prompt_start_B),
    done_B=done_B,
    has_nonfinite=jnp.bool_(False),
    keys_B=keys_B,
    prompt_end=jnp.int32(prompt_end),
    n=jnp.int32(0),
    slot=slot,
    mask_BS=mask_BS,
    caches=caches,
    context=Context(adapter_B=adapter_B),
  )


def _take_in_parts(tree, place_B):
  """For each row what is in its place, [B, ...], among the rows of its own part of the mesh."""
  parts = axis_size(*ROWS)
  place_NB = jnp.reshape(place_B, (parts, -1), out_sharding=P(ROWS, None))

  def take(x_P):
    spec = jax.typeof(x_P).sharding.spec
    x_NP = jnp.reshape(x_P, (parts, -1, *x_P.shape[1:]), out_sharding=P(ROWS, None, *spec[1:]))
    x_NB = jax.vmap(lambda x_P, place_B: x_P[place_B])(x_NP, place_NB)
    return jnp.reshape(x_NB, (-1, *x_P.shape[1:]), out_sharding=spec)

  return jax.tree.map(take, tree)


def _prefill_remembered(
  decoder, tokens_BW, prompt_start_B, length_B, slot, sizes: tuple[int, int], window, context
):
  """Prefills caches of S slots with what rows of these lengths remember; their mask, and them.

  All but a row's newest token is read, at most T tokens. Without a window they are in the slots
  from 0 on. With one they are the last slots before `slot`, in a ring.
  """
  T, S = sizes
  n_ctx = decoder.model.config.n_ctx

  # 1. How many tokens were forgotten, and how many of the others are read.
  if window is None:
    forgotten_B, keep = jnp.zeros_like(length_B), 0
  else:
    forgotten_B, keep = window.forgotten(length_B, n_ctx), window.keep
  held_B1 = (length_B - 1 - forgotten_B)[:, None]

  # 2. Gather the tokens: the first `keep`, then those after the gap. Positions beyond a row's end
  #    read any token, and are masked.
  gap_BT = jnp.where(jnp.arange(T) < keep, 0, forgotten_B[:, None])
  column_BT = prompt_start_B[:, None] + jnp.arange(T) + gap_BT
  column_BT = jnp.minimum(column_BT, tokens_BW.shape[1] - 1)
  remembered_BT = jnp.take_along_axis(tokens_BW, column_BT, axis=1)
  caches = prefill(decoder, remembered_BT, S, context)[1]

  # 3. Turn the ring, so that each row's tokens end just before `slot`.
  position_BS = jnp.arange(S) + jnp.zeros_like(held_B1)
  if window is not None:
    position_BS = (position_BS - slot + held_B1) % S
    axis = slots_axis()
    order = jnp.expand_dims(position_BS, [1, 3] if axis == 2 else [2])
    caches = jax.tree.map(lambda x: jnp.take_along_axis(x, order, axis), caches)
  return position_BS < held_B1, caches


@functools.partial(jax.jit, static_argnames=("sampler", "window"), donate_argnames="state")
def _advance(decoder: InferenceModel, state: State, n, eot, sampler, window) -> State:
  end = state.n + n

  # A ring with fewer slots than the context is never full: no row outgrows the context then.
  slides = window is not None and state.mask_BS.shape[1] == decoder.model.config.n_ctx

  def step(state):
    if slides:
      state = _slide(decoder, state, window)
    return _step(decoder, state, eot, sampler, window)

  def goes_on(state):
    return (state.n < end) & ~jnp.all(state.done_B)

  return jax.lax.while_loop(goes_on, step, state)


def _slide(decoder: InferenceModel, state: State, window) -> State:
  """Forgets the oldest tokens of full rows, by a prefill of the rest; others stay as they are."""
  n_ctx = decoder.model.config.n_ctx
  length_B = state.prompt_end - state.prompt_start_B + state.n
  grows_B = window.forgotten(length_B, n_ctx) > window.forgotten(length_B - 1, n_ctx)
  full_B = grows_B & ~state.done_B

  def refill(state):
    # `window.stride` slots are free again, so at most this many tokens are left to read.
    sizes = (n_ctx - window.stride, state.mask_BS.shape[1])
    fresh = _prefill_remembered(
      decoder,
      state.tokens_BW,
      state.prompt_start_B,
      length_B,
      state.slot,
      sizes,
      window,
      state.context,
    )

    def of_full_rows(new, old):
      return jnp.where(jnp.expand_dims(full_B, range(1, new.ndim)), new, old)

    mask_BS, caches = jax.tree.map(of_full_rows, fresh, (state.mask_BS, state.caches))
    return state._replace(mask_BS=mask_BS, caches=caches)

  return jax.lax.cond(jnp.any(full_B), refill, lambda state: state, state)


def _step(decoder: InferenceModel, state: State, eot, sampler, window) -> State:
  """One more token a row."""
  # 1. Decode the newest token at its position among what the row still remembers.
  column = state.prompt_end + state.n
  position_B = column - state.prompt_start_B - 1
  if window is not None:
    position_B -= window.forgotten(position_B + 1, decoder.model.config.n_ctx)
  newest_B1 = jax.lax.dynamic_slice_in_dim(state.tokens_BW, column - 1, 1, 1)
  S = state.mask_BS.shape[1]
  mask_BS = state.mask_BS | (jnp.arange(S) == state.slot)
  queries = newest_B1, position_B[:, None], mask_BS[:, None]
  write = cache_write(state.slot)
  x_B1D, caches = decode(decoder, *queries, state.caches, write, state.context)
  logits_BV = logits(decoder, x_B1D, state.context)[:, 0]

  # 2. Sample. A key is of the row and the step, so portions of any size draw the same.
  keys_B = jax.vmap(jax.random.fold_in, (0, None))(state.keys_B, state.n)
  history = History(state.tokens_BW, state.prompt_start_B, state.prompt_end, column)
  sample_rows = jax.vmap(sampler, (0, 0, History(0, 0, None, None)))
  token_B = sample_rows(keys_B, logits_BV, history).astype(jnp.int32)

  def put(values_BW, new_B):
    return jax.lax.dynamic_update_slice_in_dim(values_BW, new_B[:, None], column, 1)

  # 3. Log-probabilities are the model's own, before any filter.
  logprobs_BW = state.logprobs_BW
  if logprobs_BW is not None:
    is_token_BV = jnp.arange(logits_BV.shape[1]) == token_B[:, None]
    chosen_B = jnp.sum(jnp.where(is_token_BV, logits_BV, 0.0), axis=1)
    logprobs_BW = put(logprobs_BW, chosen_B - jax.nn.logsumexp(logits_BV, axis=1))

  # 4. Keep book. All logits are looked at: a weight of the head or of ln_f may spoil only some.
  done_B = state.done_B | (token_B == eot)
  nonfinite_B = not_finite(logits_BV) & ~state.done_B
  return state._replace(
    tokens_BW=put(state.tokens_BW, token_B),
    logprobs_BW=logprobs_BW,
    count_B=state.count_B + ~done_B,
    done_B=done_B,
    has_nonfinite=state.has_nonfinite | jnp.any(nonfinite_B),
    n=state.n + 1,
    slot=(state.slot + 1) % S,
    mask_BS=mask_BS,
    caches=caches,
  )
