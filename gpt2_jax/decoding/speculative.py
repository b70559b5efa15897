# SPDX-License-Identifier: Apache-2.0
"""Speculative decoding: a small draft model proposes tokens, the target verifies them in one pass.

Sources: Leviathan et al. 2022, "Fast Inference from Transformers via Speculative Decoding", and
Chen et al. 2023, "Accelerating Large Language Model Decoding with Speculative Sampling". The
completions are distributed as if the target had drawn them alone; the draft decides only how fast.

In both caches a token's slot is its position, in every row. A query sees the slots up to its own
position, so what a rejected token left behind is overwritten before anything sees it.

  N proposed tokens  T their number and one  S slots; the other letters as in model.py
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from gpt2_jax.compat import categorical, uniform
from gpt2_jax.decoding.generation_config import Completion
from gpt2_jax.decoding.kv_cache import (
  InferenceModel,
  check_finite,
  count_slots,
  decode,
  for_inference,
  last_token,
  logits,
  not_finite,
  prefill,
  random_key,
  slots_axis,
)
from gpt2_jax.decoding.prompts import batch_prompts
from gpt2_jax.decoding.samplers import Greedy, History, Sample, apply_filters
from gpt2_jax.model import GPT2
from gpt2_jax.sharding import ROWS


class Speculation(NamedTuple):
  """The completions of the prompts, and how many proposals and passes they took.

  Proposals count while their row runs, with those beyond its end in its last pass. `passes` are the
  target's, over all rows at once and with the one over the prompts: generating one by one takes as
  many as the longest row has tokens.
  """

  completions: list[Completion]
  proposed: int
  accepted: int
  passes: int

  @property
  def acceptance(self) -> float:
    """Acceptance rate: the fraction of proposals that the target accepted; 0 without proposals."""
    return self.accepted / max(1, self.proposed)


def speculative(
  target: GPT2 | InferenceModel,
  draft: GPT2 | InferenceModel,
  prompts: Sequence[Sequence[int]],
  n_new: int,
  draft_tokens: int = 4,
  sampler: Greedy | Sample | None = None,
  seed: int = 0,
  eot: int | None = None,
) -> Speculation:
  """Speculative decoding: completes prompts as `generate(target, ...)` would, in fewer passes.

  A pass of the target adds 1 to `draft_tokens` + 1 tokens. `Greedy` (the default) gives the
  target's own greedy tokens, up to ties within rounding. `Sample` draws from exactly what its
  filters leave of the target's distribution. The draft is filtered alike, and may have any context
  that holds the text. `eot` ends a row and is left out. Draws depend on the seed and a row's number
  alone.

  Raises ValueError on models of different vocabularies or meshes, on an empty prompt, and on one
  that leaves no room for `n_new` in the context of either model.
  """
  target, draft = for_inference(target), for_inference(draft)
  _check_pair(target, draft, draft_tokens)

  # The smaller context is the one that has to have room.
  smaller = min(target, draft, key=lambda decoder: decoder.model.config.n_ctx)
  end = np.int32(-1 if eot is None else eot)
  with jax.set_mesh(target.mesh):
    tokens_BT, lengths_B = batch_prompts(smaller, prompts, n_new)
    key = random_key(seed)
    tokens_BS, nonfinite, *counts = jax.device_get(
      _speculate(
        target, draft, tokens_BT, lengths_B, key, end, n_new, draft_tokens, sampler or Greedy()
      )
    )
  check_finite(nonfinite.target, "the target")
  check_finite(nonfinite.draft, "the draft")

  # The last pass over a row may have written beyond its end.
  completions = []
  for row, prompt in enumerate(prompts):
    tokens = tokens_BS[row, len(prompt) :][:n_new].tolist()
    finished = eot in tokens
    if finished:
      tokens = tokens[: tokens.index(eot)]
    completions.append(Completion(tokens, finished=finished))
  return Speculation(completions, *map(int, counts))


def _check_pair(target: InferenceModel, draft: InferenceModel, draft_tokens: int) -> None:
  target_size, draft_size = target.model.config.n_vocab, draft.model.config.n_vocab
  if target_size != draft_size:
    raise ValueError(
      f"the target has {target_size} tokens and the draft {draft_size}; "
      f"give two models of one tokenizer"
    )

  # One jitted loop runs both.
  if target.mesh != draft.mesh:
    raise ValueError(
      f"the target is on {target.mesh} and the draft on {draft.mesh}; put both on one mesh"
    )
  if draft_tokens < 1:
    raise ValueError(f"{draft_tokens} draft tokens: propose 1 or more, or call generate")


def sampling_distribution(logits_V, history: History, sampler: Greedy | Sample):
  """The probabilities [V] that the sampler draws from; greedy decoding is certain of one token."""
  logits_V = apply_filters(sampler.filters, logits_V, history)
  if isinstance(sampler, Greedy):
    return jax.nn.one_hot(jnp.argmax(logits_V), logits_V.size)
  return jax.nn.softmax(logits_V)


def draw_token(key, p_V, sampler: Greedy | Sample):
  """Draws a token in proportion to `p_V`, which need not sum to one."""
  # Greedy: all lies on one token, and random numbers for a vocabulary take their time.
  if isinstance(sampler, Greedy):
    return jnp.argmax(p_V).astype(jnp.int32)
  return categorical(key, jnp.log(p_V)).astype(jnp.int32)


def rejection_sample(key, p_TV, q_NV, draft_N, sampler: Greedy | Sample):
  """Rejection sampling of a row's proposals: how many are accepted, and tokens [T].

  The tokens are those that are accepted, one that the target draws, and some of no meaning. The
  proposals were drawn from `q_NV`; `p_TV` is what the target would have drawn from there, and after
  them (Leviathan et al. 2022, algorithm 1).
  """
  # 1. Proposal x is accepted with probability min(1, p(x) / q(x)); a product, for q may be 0.
  N = draft_N.size
  k_accept, k_draw = jax.random.split(key)
  p_N = jnp.take_along_axis(p_TV[:N], draft_N[:, None], axis=1)[:, 0]
  q_N = jnp.take_along_axis(q_NV, draft_N[:, None], axis=1)[:, 0]
  accepted_N = uniform(k_accept, (N,)) * q_N < p_N
  n = jnp.cumprod(accepted_N.astype(jnp.int32)).sum()

  # 2. In place of the first that is rejected comes a draw from what p has more than q. After all of
  #    them comes a draw from p: the padding is a q of zero. p and q may be equal but for rounding.
  p_V = p_TV[n]
  more_V = jnp.maximum(p_V - jnp.pad(q_NV, ((0, 1), (0, 0)))[n], 0)
  more_V = jnp.where(more_V.any(), more_V, p_V)

  drawn = draw_token(k_draw, more_V, sampler)
  return n, jnp.where(jnp.arange(N + 1) == n, drawn, jnp.pad(draft_N, (0, 1)))


def extend(decoder: InferenceModel, tokens_BT, position_B, caches):
  """Decodes T more tokens a row, the first at `position_B`: normed output [B, T, D], and caches."""
  positions_BT = position_B[:, None] + jnp.arange(tokens_BT.shape[1])
  mask_BTS = jnp.arange(count_slots(caches)) <= positions_BT[:, :, None]

  # The last pass over a row may look beyond its end, and so beyond the context; nothing of that is
  # kept.
  positions_BT = jnp.minimum(positions_BT, decoder.model.config.n_ctx - 1)
  write = functools.partial(_update_rows, start_B=position_B, axis=slots_axis() - 1)
  return decode(decoder, tokens_BT, positions_BT, mask_BTS, caches, write)


def _update_rows(old, new, start_B, axis: int = 0):
  """`old` with `new` in it, in each row at a place of its own."""
  update = functools.partial(jax.lax.dynamic_update_slice_in_dim, axis=axis)
  return jax.vmap(update)(old, new, start_B)


def _slice_rows(x_BS, start_B, size: int):
  """`size` entries of each row, from a place of its own."""
  return jax.vmap(functools.partial(jax.lax.dynamic_slice_in_dim, slice_size=size))(x_BS, start_B)


def _fold(keys_B, n):
  return jax.vmap(jax.random.fold_in, (0, None))(keys_B, n)


class TokenBuffer(NamedTuple):
  """Prompts with new tokens behind them: of slots [0, `end_B`), those from `prompt_end_B` on."""

  tokens_BS: jax.Array
  prompt_end_B: jax.Array
  end_B: jax.Array

  def distributions(self, decoder: InferenceModel, x_BTD, sampler):
    """What the sampler draws from, [B, T, V]; `x_BTD` are outputs from the newest token on.

    Returns with it whether the logits were NaN or infinite, [B, T].
    """
    ends_BT = self.end_B[:, None] + jnp.arange(x_BTD.shape[1])
    of_token = functools.partial(sampling_distribution, sampler=sampler)

    # The T distributions of a row have the same text, and each ends it one token later.
    def of_row(logits_TV, tokens_S, prompt_end, ends_T):
      histories = History(tokens_S, 0, prompt_end, ends_T)
      return jax.vmap(of_token, (0, History(None, None, None, 0)))(logits_TV, histories)

    logits_BTV = logits(decoder, x_BTD)
    p_BTV = jax.vmap(of_row)(logits_BTV, self.tokens_BS, self.prompt_end_B, ends_BT)
    return p_BTV, not_finite(logits_BTV)


def _propose(draft: InferenceModel, buffer: TokenBuffer, keys_B, caches, n: int, sampler):
  """N proposals: the tokens with them at the end [B, S], their distributions [B, N, V], caches.

  The last result says in which rows logits were NaN or infinite, [B].

  Each pass takes the two newest tokens: the draft has not seen the last proposal of a round in
  which all were accepted, and to see a token twice changes nothing.
  """
  draw = functools.partial(draw_token, sampler=sampler)

  def step(carry, i):
    buffer, caches = carry
    newest_B2 = _slice_rows(buffer.tokens_BS, buffer.end_B - 2, 2)
    x_B2D, caches = extend(draft, newest_B2, buffer.end_B - 2, caches)
    q_B1V, nonfinite_B1 = buffer.distributions(draft, x_B2D[:, 1:], sampler)
    q_BV = q_B1V[:, 0]
    token_B = jax.vmap(draw)(_fold(keys_B, i), q_BV)

    tokens_BS = _update_rows(buffer.tokens_BS, token_B[:, None], buffer.end_B)
    buffer = TokenBuffer(tokens_BS, buffer.prompt_end_B, buffer.end_B + 1)
    return (buffer, caches), (q_BV, nonfinite_B1[:, 0])

  (buffer, caches), (q_NBV, nonfinite_NB) = jax.lax.scan(step, (buffer, caches), jnp.arange(n))
  return buffer.tokens_BS, jnp.swapaxes(q_NBV, 0, 1), caches, jnp.any(nonfinite_NB, axis=0)


@functools.partial(jax.jit, static_argnames=("n_new", "n", "sampler"))
def _speculate(
  target: InferenceModel,
  draft: InferenceModel,
  tokens_BT,
  lengths_B,
  key,
  eot,
  n_new: int,
  n: int,
  sampler,
):
  """The prompts with their new tokens behind them [B, S], `_Nonfinite`, a Speculation's counts."""
  # Rows draw by their number; those that only fill the mesh have length 0, and are done.
  rows_B = jax.sharding.reshard(jnp.arange(tokens_BT.shape[0]), P(ROWS))
  keys_B = jax.vmap(functools.partial(jax.random.fold_in, key))(rows_B)
  prompt_end_B = jnp.maximum(lengths_B, 1)

  # 1. Prefill both caches. The last pass over a row may write n + 1 tokens behind its end.
  room = n_new + n + 1
  x_BTD, caches = prefill(target, tokens_BT, tokens_BT.shape[1] + room)
  _, draft_caches = prefill(draft, tokens_BT, tokens_BT.shape[1] + room)
  tokens_BS = jnp.pad(tokens_BT, ((0, 0), (0, room)))
  buffer = TokenBuffer(tokens_BS, prompt_end_B, prompt_end_B)

  # 2. The first token is the target's, from the pass over the prompts.
  p_B1V, nonfinite_B1 = buffer.distributions(target, last_token(x_BTD, prompt_end_B), sampler)
  draw = functools.partial(draw_token, sampler=sampler)
  token_B = jax.vmap(draw)(_fold(keys_B, 0), p_B1V[:, 0])
  nonfinite = _Nonfinite(jnp.any(nonfinite_B1[:, 0] & (lengths_B > 0)), jnp.bool_(False))
  tokens_BS = _update_rows(tokens_BS, token_B[:, None], prompt_end_B)
  buffer = TokenBuffer(tokens_BS, prompt_end_B, prompt_end_B + 1)
  done_B = (lengths_B == 0) | (token_B == eot) | (n_new == 1)

  # 3. Rounds of proposals, until all rows are done.
  def step(state):
    return _round(target, draft, state, keys_B, eot, n_new, n, sampler)

  state = _Rounds(buffer, done_B, nonfinite, caches, draft_caches, 0, 0, passes=1)
  state = jax.lax.while_loop(lambda state: ~jnp.all(state.done_B), step, state)
  counts = (state.proposed, state.accepted, state.passes)
  return state.buffer.tokens_BS, state.nonfinite, *counts


class _Nonfinite(NamedTuple):
  """Whether logits of a row that counts were NaN or infinite."""

  target: jax.Array
  draft: jax.Array


class _Rounds(NamedTuple):
  """What one round of proposals hands to the next."""

  buffer: TokenBuffer
  done_B: jax.Array
  nonfinite: _Nonfinite
  caches: list
  draft_caches: list
  proposed: jax.Array | int
  accepted: jax.Array | int
  passes: jax.Array | int


def _round(target, draft, state: _Rounds, keys_B, eot, n_new: int, n: int, sampler) -> _Rounds:
  """The draft proposes n tokens a row; the target verifies them, and adds one of its own."""
  buffer, prompt_end_B = state.buffer, state.buffer.prompt_end_B
  keys_B = _fold(keys_B, state.passes)
  k_propose, k_accept = _fold(keys_B, 0), _fold(keys_B, 1)

  # 1. The draft proposes, one token a pass.
  tokens_BS, q_BNV, draft_caches, draft_nonfinite_B = _propose(
    draft, buffer, k_propose, state.draft_caches, n, sampler
  )

  # 2. The target reads the newest token and the proposals in one pass, and accepts some.
  newest_BT = _slice_rows(tokens_BS, buffer.end_B - 1, n + 1)
  x_BTD, caches = extend(target, newest_BT, buffer.end_B - 1, state.caches)
  proposed = buffer._replace(tokens_BS=tokens_BS)
  p_BTV, nonfinite_BT = proposed.distributions(target, x_BTD, sampler)
  sample_row = functools.partial(rejection_sample, sampler=sampler)
  accepted_B, new_BT = jax.vmap(sample_row)(k_accept, p_BTV, q_BNV, newest_BT[:, 1:])

  # 3. A row that is not done grows by what was accepted, and by the target's own token.
  end_B = jnp.minimum(buffer.end_B + accepted_B + 1, prompt_end_B + n_new)
  tokens_BS = _update_rows(tokens_BS, new_BT, buffer.end_B)
  grown = TokenBuffer(tokens_BS, prompt_end_B, jnp.where(state.done_B, buffer.end_B, end_B))

  # 4. It is done at `eot`, if that is among the tokens that count, and when it is full.
  counts_BT = jnp.arange(n + 1) <= accepted_B[:, None]
  has_eot_B = jnp.any((new_BT == eot) & counts_BT, axis=1)
  is_full_B = end_B == prompt_end_B + n_new

  # 5. Finite weights give finite logits everywhere, also beyond a row's end: all of them count.
  running_B = ~state.done_B
  nonfinite = _Nonfinite(
    state.nonfinite.target | jnp.any(nonfinite_BT & running_B[:, None]),
    state.nonfinite.draft | jnp.any(draft_nonfinite_B & running_B),
  )

  return _Rounds(
    grown,
    state.done_B | has_eot_B | is_full_B,
    nonfinite,
    caches,
    draft_caches,
    state.proposed + n * jnp.sum(~state.done_B),
    state.accepted + jnp.sum(jnp.where(state.done_B, 0, accepted_B)),
    state.passes + 1,
  )
