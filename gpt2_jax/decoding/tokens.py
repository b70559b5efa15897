# SPDX-License-Identifier: Apache-2.0
"""The loop that samples: `start` reads the prompts into a key-value cache, `advance` adds tokens one at a time.

Prompts of a batch may have any lengths: each row has its own positions, its own part of the cache and its own random
numbers, so a row's tokens do not depend on its company, on the mesh, or on how many steps are asked for at once. (In
bfloat16, near-ties may be rounded one way or the other.)
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from gpt2_jax.decoding.cache import (
  BUCKET,
  Decoder,
  check_prompts,
  check_room,
  decode,
  in_slots,
  logits,
  prefill,
  random_key,
  ready,
)
from gpt2_jax.decoding.samplers import Greedy, History
from gpt2_jax.model import GPT2
from gpt2_jax.sharding import ROWS, axis_size, padded


@dataclasses.dataclass(frozen=True)
class Continuation:
  """What was added to a prompt.

  `tokens` leave `eot` out; `ended` says that it came. `logprobs` are of the model's own distribution, which no filter
  has touched, in nats; None unless they were asked for.
  """

  tokens: list[int]
  logprobs: list[float] | None
  ended: bool


@dataclasses.dataclass(frozen=True)
class SlidingWindow:
  """Lets a row outgrow the context: when it is full, the oldest `stride` tokens but for the first `keep` are forgotten.

  GPT-2's positions are learned and absolute, so what is left is read anew from position 0: one prefill every `stride`
  tokens. What a row remembers depends on its length alone: `keep` tokens, and the last ones.
  """

  stride: int
  keep: int = 0

  def __post_init__(self):
    if self.stride < 1 or self.keep < 0:
      raise ValueError(f"a window with stride {self.stride} and keep {self.keep}: they are 1 and 0 or more")

  def check(self, n_ctx: int) -> None:
    """Raises ValueError if nothing of a context would be left."""
    if self.stride + self.keep >= n_ctx:
      raise ValueError(
        f"stride {self.stride} and keep {self.keep} leave nothing of a context of {n_ctx}; make them smaller"
      )

  def forgotten(self, length, n_ctx: int):
    """How many tokens a row of this length has forgotten; the rest is at most `n_ctx`."""
    return -(-jnp.maximum(length - n_ctx, 0) // self.stride) * self.stride


class State(NamedTuple):
  """Rows under way. In `tokens_BW` all prompts end at one column, `prompt_end`, and the new tokens follow."""

  tokens_BW: jax.Array
  logprobs_BW: jax.Array | None
  first_B: jax.Array  # the column at which a row begins
  count_B: jax.Array  # new tokens
  done_B: jax.Array
  broken: jax.Array  # whether a row's logits were not numbers
  keys_B: jax.Array
  prompt_end: jax.Array
  n: jax.Array  # steps taken
  slot: jax.Array  # of the caches, for the next token
  seen_BS: jax.Array  # slots that hold tokens of the row
  caches: list


def generate(
  model: GPT2 | Decoder,
  prompts: Sequence[Sequence[int]],
  n_new: int,
  sampler=None,
  seed: int = 0,
  eot: int | None = None,
  samples: int = 1,
  window: SlidingWindow | None = None,
  logprobs: bool = False,
) -> list[Continuation]:
  """Continues each prompt `samples` times by at most `n_new` tokens; all samples of the first prompt come first.

  The sampler is `Greedy()` unless another is given. Draws depend on the seed, and on which prompt and which sample a
  row is: to go on from a continuation, take another seed. Raises ValueError on an empty prompt, on tokens outside the
  vocabulary, and on prompts that leave no room in the context for `n_new`, unless there is a `window`.
  """
  decoder, state = start(model, prompts, n_new, seed, samples, window, logprobs)
  state = advance(decoder, state, n_new, sampler or Greedy(), eot, window)
  return continuations(state)[: len(prompts) * samples]


def start(
  model: GPT2 | Decoder,
  prompts,
  n_new: int,
  seed: int = 0,
  samples: int = 1,
  window=None,
  logprobs: bool = False,
  numbers: Sequence[int] | None = None,
  shape: tuple[int, int] = (0, 0),
) -> tuple[Decoder, State]:
  """The Decoder and the State before the first of `n_new` tokens. Arguments and errors as for `generate`.

  `numbers` are those by which the rows draw, in place of 0, 1 and so on; `shape` makes room for that many rows and
  tokens of a prompt at least, so that batches of any prompts share what is compiled.
  """
  decoder = ready(model)
  check_prompts(decoder, prompts, n_new, samples)
  if window is None:
    stride = max(1, decoder.model.config.n_ctx // 2)
    way_out = f"ask for fewer, or slide a window: SlidingWindow({stride}), or {stride} as the setting `window`"
    check_room(decoder, prompts, n_new, way_out)
  else:
    window.check(decoder.model.config.n_ctx)
  with jax.set_mesh(decoder.mesh):
    longest = max(shape[1], *map(len, prompts))
    prompt_end = padded(max(longest - 1, 1), BUCKET) + 1
    prompts = [prompt for prompt in prompts for _ in range(samples)]
    rows = padded(max(shape[0], len(prompts)), axis_size(*ROWS))
    tokens_BW = np.zeros((rows, prompt_end + padded(n_new, BUCKET)), np.int32)
    first_B = np.full(rows, prompt_end - 1, np.int32)
    for row, prompt in enumerate(prompts):
      first_B[row] = prompt_end - len(prompt)
      tokens_BW[row, first_B[row] : prompt_end] = prompt
    row_B = np.arange(rows, dtype=np.int32)
    done_B = row_B >= len(prompts)
    row_B[: len(prompts)] = row_B[: len(prompts)] if numbers is None else numbers
    arrays = jax.device_put((tokens_BW, first_B, row_B, done_B), NamedSharding(decoder.mesh, P(ROWS)))
    return decoder, _start(decoder, *arrays, random_key(seed), prompt_end, samples, window, logprobs)


def advance(decoder: Decoder, state: State, n: int, sampler, eot: int | None = None, window=None) -> State:
  """`n` more tokens for each row that `eot` has not ended, in one call of the device; `state` is given away."""
  with jax.set_mesh(decoder.mesh):
    return _advance(decoder, state, np.int32(n), np.int32(-1 if eot is None else eot), sampler, window)


def continuations(state: State, begin: int = 0) -> list[Continuation]:
  """What the rows hold beyond their first `begin` new tokens. Raises FloatingPointError where logits were NaN."""
  tokens_BW, logprobs_BW, counts, done, broken, prompt_end = jax.device_get(
    (state.tokens_BW, state.logprobs_BW, state.count_B, state.done_B, state.broken, state.prompt_end)
  )
  if broken:
    raise FloatingPointError("the model's logits are not numbers (NaN); are its weights?")

  def new(row, values_BW):
    return values_BW[row, prompt_end + begin : prompt_end + counts[row]].tolist()

  return [
    Continuation(new(row, tokens_BW), None if logprobs_BW is None else new(row, logprobs_BW), bool(done[row]))
    for row in range(len(counts))
  ]


@functools.partial(jax.jit, static_argnames=("prompt_end", "samples", "window", "logprobs"))
def _start(decoder, tokens_BW, first_B, row_B, done_B, key, prompt_end: int, samples: int, window, logprobs: bool):
  W, T = tokens_BW.shape[1], min(prompt_end - 1, decoder.model.config.n_ctx)
  S = T + W - prompt_end
  if window is not None:
    S = min(S, decoder.model.config.n_ctx)
  keys_B = jax.vmap(jax.random.fold_in, (None, 0))(key, row_B // samples)
  slot = jnp.int32(T if window is None else 0)
  seen_BS, caches = _read(decoder, tokens_BW, first_B, prompt_end - first_B, slot, (T, S), window)
  return State(
    tokens_BW,
    jnp.zeros_like(tokens_BW, jnp.float32) if logprobs else None,
    first_B,
    jnp.zeros_like(first_B),
    done_B,  # rows that only fill the mesh are done
    jnp.bool_(False),
    jax.vmap(jax.random.fold_in)(keys_B, row_B % samples),
    jnp.int32(prompt_end),
    jnp.int32(0),
    slot,
    seen_BS,
    caches,
  )


def _read(decoder, tokens_BW, first_B, length_B, slot, sizes: tuple[int, int], window):
  """The caches of all that a row remembers at its length but its newest token, at most T, and where in S slots it is.

  Without a window from slot 0 on; with one the rows' last slots come just before `slot`, in a ring.
  """
  T, S = sizes
  forgotten_B, keep = jnp.zeros_like(length_B), 0
  if window is not None:
    forgotten_B, keep = window.forgotten(length_B, decoder.model.config.n_ctx), window.keep
  held_B1 = (length_B - 1 - forgotten_B)[:, None]
  column_BT = first_B[:, None] + jnp.arange(T) + jnp.where(jnp.arange(T) < keep, 0, forgotten_B[:, None])
  context_BT = jnp.take_along_axis(tokens_BW, jnp.minimum(column_BT, tokens_BW.shape[1] - 1), axis=1)
  caches = prefill(decoder, context_BT, S)[1]
  position_BS = jnp.arange(S) + jnp.zeros_like(held_B1)
  if window is not None:
    position_BS = (position_BS - slot + held_B1) % S
    caches = jax.tree.map(lambda x_BHSK: jnp.take_along_axis(x_BHSK, position_BS[:, None, :, None], axis=2), caches)
  return position_BS < held_B1, caches


@functools.partial(jax.jit, static_argnames=("sampler", "window"), donate_argnames="state")
def _advance(decoder: Decoder, state: State, n, eot, sampler, window) -> State:
  S, n_ctx = state.seen_BS.shape[1], decoder.model.config.n_ctx
  end, slides = state.n + n, window is not None and n_ctx == S  # fewer slots are never full

  def forget(state):
    """Reads full rows anew; the others are left as they are."""
    length_B = state.prompt_end - state.first_B + state.n
    full_B = (window.forgotten(length_B, n_ctx) > window.forgotten(length_B - 1, n_ctx)) & ~state.done_B

    def read(state):
      sizes = (n_ctx - window.stride, S)
      fresh = _read(decoder, state.tokens_BW, state.first_B, length_B, state.slot, sizes, window)
      seen_BS, caches = jax.tree.map(
        lambda new, old: jnp.where(jnp.expand_dims(full_B, range(1, new.ndim)), new, old),
        fresh,
        (state.seen_BS, state.caches),
      )
      return state._replace(seen_BS=seen_BS, caches=caches)

    return jax.lax.cond(jnp.any(full_B), read, lambda state: state, state)

  def step(state):
    return _step(decoder, forget(state) if slides else state, eot, sampler, window)

  return jax.lax.while_loop(lambda state: (state.n < end) & ~jnp.all(state.done_B), step, state)


def _step(decoder: Decoder, state: State, eot, sampler, window) -> State:
  """One more token a row."""
  column = state.prompt_end + state.n
  position_B = column - state.first_B - 1
  if window is not None:
    position_B -= window.forgotten(position_B + 1, decoder.model.config.n_ctx)
  newest_B1 = jax.lax.dynamic_slice_in_dim(state.tokens_BW, column - 1, 1, 1)
  S = state.seen_BS.shape[1]
  seen_BS = state.seen_BS | (jnp.arange(S) == state.slot)
  write = in_slots(state.slot)
  x_B1D, caches = decode(decoder, newest_B1, position_B[:, None], seen_BS[:, None], state.caches, write)
  logits_BV = logits(decoder, x_B1D)[:, 0]
  keys_B = jax.vmap(jax.random.fold_in, (0, None))(state.keys_B, state.n)
  history = History(state.tokens_BW, state.first_B, state.prompt_end, column)
  token_B = jax.vmap(sampler, (0, 0, History(0, 0, None, None)))(keys_B, logits_BV, history).astype(jnp.int32)

  def put(values_BW, new_B):
    return jax.lax.dynamic_update_slice_in_dim(values_BW, new_B[:, None], column, 1)

  logprobs_BW = state.logprobs_BW
  if logprobs_BW is not None:
    chosen_B = jnp.sum(jnp.where(jnp.arange(logits_BV.shape[1]) == token_B[:, None], logits_BV, 0.0), axis=1)
    logprobs_BW = put(logprobs_BW, chosen_B - jax.nn.logsumexp(logits_BV, axis=1))
  done_B = state.done_B | (token_B == eot)
  return state._replace(
    tokens_BW=put(state.tokens_BW, token_B),
    logprobs_BW=logprobs_BW,
    count_B=state.count_B + ~done_B,
    done_B=done_B,
    broken=state.broken | jnp.any(jnp.isnan(logits_BV[:, 0]) & ~state.done_B),  # one NaN before the head is in all
    n=state.n + 1,
    slot=(state.slot + 1) % S,
    seen_BS=seen_BS,
    caches=caches,
  )
