# SPDX-License-Identifier: Apache-2.0
"""Speculative decoding: a small model proposes tokens, the large one judges all of them in one pass.

Source: Leviathan et al. 2022, "Fast Inference from Transformers via Speculative Decoding", and Chen et al. 2023,
"Accelerating Large Language Model Decoding with Speculative Sampling". What comes out is distributed as if the large
model had drawn it alone; the small one decides only how fast.

In both caches a token's slot is its position, in every row. A query sees the slots up to its own position, so what a
rejected token left behind is overwritten before anything sees it.

  # N proposed tokens  T their number and one  S slots; the other letters as in model.py
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from gpt2_jax.decoding.cache import Decoder, at_end, decode, logits, place_prompts, prefill, random_key, ready
from gpt2_jax.decoding.samplers import Greedy, History, Sample, filtered
from gpt2_jax.model import GPT2
from gpt2_jax.sharding import ROWS


class Speculation(NamedTuple):
  """The new tokens of each prompt, and what they took.

  Proposals count while their row runs, with those beyond its end in its last pass. `passes` are the target's, over all
  rows at once and with the one over the prompts: generating one by one takes as many as the longest row has tokens.
  """

  tokens: list[list[int]]
  proposed: int
  accepted: int
  passes: int

  @property
  def acceptance(self) -> float:
    """The fraction of proposed tokens that the target accepted; 0 where none was proposed."""
    return self.accepted / max(1, self.proposed)


def speculative(
  target: GPT2 | Decoder,
  draft: GPT2 | Decoder,
  prompts: Sequence[Sequence[int]],
  n_new: int,
  draft_tokens: int = 4,
  sampler: Greedy | Sample | None = None,
  seed: int = 0,
  eot: int | None = None,
) -> Speculation:
  """Continues each prompt as `generate(target, ...)` would, by 1 to `draft_tokens` + 1 tokens a pass of the target.

  `Greedy` (the default) gives the target's own greedy tokens, up to ties within rounding; `Sample` draws from exactly
  what its filters leave of the target's distribution. The draft is filtered alike, and may have any context that holds
  the text. `eot` ends a row and is left out. Draws depend on the seed and a row's number alone.

  Raises ValueError on models of different vocabularies or meshes, on an empty prompt, and on one that leaves no room
  for `n_new` in the context of either model.
  """
  target, draft = ready(target), ready(draft)
  sizes = [decoder.model.config.n_vocab for decoder in (target, draft)]
  if sizes[0] != sizes[1]:
    raise ValueError(f"the target has {sizes[0]} tokens and the draft {sizes[1]}; give two models of one tokenizer")
  if target.mesh != draft.mesh:
    raise ValueError(f"the target is on {target.mesh} and the draft on {draft.mesh}; put both on one mesh")
  if draft_tokens < 1:
    raise ValueError(f"{draft_tokens} draft tokens: propose 1 or more, or call generate")
  short = min(target, draft, key=lambda decoder: decoder.model.config.n_ctx)
  ends = np.int32(-1 if eot is None else eot)
  with jax.set_mesh(target.mesh):
    tokens_BT, lengths_B = place_prompts(short, prompts, n_new)
    text_BS, *counts = jax.device_get(
      _speculate(target, draft, tokens_BT, lengths_B, random_key(seed), ends, n_new, draft_tokens, sampler or Greedy())
    )
  new = [text_S[len(prompt) :][:n_new].tolist() for text_S, prompt in zip(text_BS, prompts, strict=False)]
  return Speculation([row[: row.index(eot)] if eot in row else row for row in new], *map(int, counts))


def distribution(logits_V, history: History, sampler: Greedy | Sample):
  """The probabilities [V] that the sampler draws from; greedy decoding is certain of one token."""
  logits_V = filtered(sampler.filters, logits_V, history)
  if isinstance(sampler, Greedy):
    return jax.nn.one_hot(jnp.argmax(logits_V), logits_V.size)
  return jax.nn.softmax(logits_V)


def draw(key, p_V, sampler: Greedy | Sample):
  """A token in proportion to `p_V`, which need not sum to one."""
  if isinstance(sampler, Greedy):  # all lies on one token, and random numbers for a vocabulary take their time
    return jnp.argmax(p_V).astype(jnp.int32)
  return jax.random.categorical(key, jnp.log(p_V)).astype(jnp.int32)


def judge(key, p_TV, q_NV, draft_N, sampler: Greedy | Sample):
  """How many of the proposals stand, and tokens [T]: those that do, one that the target draws, and some of no meaning.

  The proposals were drawn from `q_NV`; `p_TV` is what the target would have drawn from there, and after them. Proposal
  x stands with probability min(1, p(x) / q(x)); in place of the first that falls comes a draw from what p has more than
  q, and after all of them, if they stand, a draw from p (Leviathan et al. 2022, algorithm 1).
  """
  N = draft_N.size
  k_stand, k_draw = jax.random.split(key)
  p_N, q_N = (jnp.take_along_axis(x_TV, draft_N[:, None], axis=1)[:, 0] for x_TV in (p_TV[:N], q_NV))
  stands_N = jax.random.uniform(k_stand, (N,)) * q_N < p_N
  n = jnp.cumprod(stands_N.astype(jnp.int32)).sum()
  p_V = p_TV[n]
  more_V = jnp.maximum(p_V - jnp.pad(q_NV, ((0, 1), (0, 0)))[n], 0)
  more_V = jnp.where(more_V.any(), more_V, p_V)  # p and q may be equal but for their rounding
  return n, jnp.where(jnp.arange(N + 1) == n, draw(k_draw, more_V, sampler), jnp.pad(draft_N, (0, 1)))


def extend(decoder: Decoder, tokens_BT, position_B, caches):
  """The normed output [B, T, D] for T more tokens a row, the first at `position_B`, and the caches with them."""
  positions_BT = position_B[:, None] + jnp.arange(tokens_BT.shape[1])
  seen_BTS = jnp.arange(caches[0][0].shape[2]) <= positions_BT[:, :, None]
  # The last pass over a row may look beyond its end, and so beyond the context; nothing of that is kept.
  positions_BT = jnp.minimum(positions_BT, decoder.model.config.n_ctx - 1)
  return decode(
    decoder, tokens_BT, positions_BT, seen_BTS, caches, functools.partial(_write, start_B=position_B, axis=1)
  )


def _write(old, new, start_B, axis: int = 0):
  """`old` with `new` in it, in each row at a place of its own."""
  return jax.vmap(functools.partial(jax.lax.dynamic_update_slice_in_dim, axis=axis))(old, new, start_B)


def _read(x_BS, start_B, size: int):
  return jax.vmap(functools.partial(jax.lax.dynamic_slice_in_dim, slice_size=size))(x_BS, start_B)


def _fold(keys_B, n):
  return jax.vmap(jax.random.fold_in, (0, None))(keys_B, n)


class Rows(NamedTuple):
  """Rows under way: of slots [0, `end_B`) of `text_BS`, those from `prompt_B` on are new."""

  text_BS: jax.Array
  prompt_B: jax.Array
  end_B: jax.Array

  def distributions(self, decoder: Decoder, x_BTD, sampler):
    """What the sampler draws from [B, T, V], where `x_BTD` are the outputs at the newest token and those after it."""
    ends_BT = self.end_B[:, None] + jnp.arange(x_BTD.shape[1])

    def of_row(logits_TV, text_S, prompt, ends_T):
      one = functools.partial(distribution, sampler=sampler)
      return jax.vmap(one, (0, History(None, None, None, 0)))(logits_TV, History(text_S, 0, prompt, ends_T))

    return jax.vmap(of_row)(logits(decoder, x_BTD), self.text_BS, self.prompt_B, ends_BT)


def _propose(draft: Decoder, rows: Rows, keys_B, caches, n: int, sampler):
  """The text with N proposals at its end [B, S], the distributions they were drawn from [B, N, V], and the caches.

  Each pass takes the two newest tokens: the draft has not seen the last proposal of a round in which all stood, and to
  see a token twice changes nothing.
  """

  def step(carry, i):
    rows, caches = carry
    x_B2D, caches = extend(draft, _read(rows.text_BS, rows.end_B - 2, 2), rows.end_B - 2, caches)
    q_BV = rows.distributions(draft, x_B2D[:, 1:], sampler)[:, 0]
    token_B = jax.vmap(functools.partial(draw, sampler=sampler))(_fold(keys_B, i), q_BV)
    text_BS = _write(rows.text_BS, token_B[:, None], rows.end_B)
    return (Rows(text_BS, rows.prompt_B, rows.end_B + 1), caches), q_BV

  (rows, caches), q_NBV = jax.lax.scan(step, (rows, caches), jnp.arange(n))
  return rows.text_BS, jnp.swapaxes(q_NBV, 0, 1), caches


@functools.partial(jax.jit, static_argnames=("n_new", "n", "sampler"))
def _speculate(target: Decoder, draft: Decoder, tokens_BT, lengths_B, key, eot, n_new: int, n: int, sampler):
  """The prompts with their new tokens behind them [B, S], and the counts of a Speculation."""
  B, width = tokens_BT.shape
  room = n_new + n + 1  # the last pass over a row may write n + 1 tokens behind its end
  rows_B = jax.sharding.reshard(jnp.arange(B), P(ROWS))
  keys_B = jax.vmap(functools.partial(jax.random.fold_in, key))(rows_B)
  prompt_B = jnp.maximum(lengths_B, 1)  # rows that only fill the mesh have length 0, and are done

  def step(carry):
    rows, done_B, caches, draft_caches, proposed, accepted, passes = carry
    k_propose, k_judge = (_fold(_fold(keys_B, passes), i) for i in range(2))
    text_BS, q_BNV, draft_caches = _propose(draft, rows, k_propose, draft_caches, n, sampler)
    asked_BT = _read(text_BS, rows.end_B - 1, n + 1)
    x_BTD, caches = extend(target, asked_BT, rows.end_B - 1, caches)
    p_BTV = rows._replace(text_BS=text_BS).distributions(target, x_BTD, sampler)
    judge_row = functools.partial(judge, sampler=sampler)
    stand_B, new_BT = jax.vmap(judge_row)(k_judge, p_BTV, q_BNV, asked_BT[:, 1:])
    end_B = jnp.minimum(rows.end_B + stand_B + 1, prompt_B + n_new)
    rows = Rows(_write(text_BS, new_BT, rows.end_B), prompt_B, jnp.where(done_B, rows.end_B, end_B))
    proposed += n * jnp.sum(~done_B)
    accepted += jnp.sum(jnp.where(done_B, 0, stand_B))
    done_B |= jnp.any((new_BT == eot) & (jnp.arange(n + 1) <= stand_B[:, None]), axis=1) | (end_B == prompt_B + n_new)
    return rows, done_B, caches, draft_caches, proposed, accepted, passes + 1

  x_BTD, caches = prefill(target, tokens_BT, width + room)
  _, draft_caches = prefill(draft, tokens_BT, width + room)
  rows = Rows(jnp.pad(tokens_BT, ((0, 0), (0, room))), prompt_B, prompt_B)
  x_B1D = at_end(x_BTD, prompt_B)
  p_BV = rows.distributions(target, x_B1D, sampler)[:, 0]
  token_B = jax.vmap(functools.partial(draw, sampler=sampler))(_fold(keys_B, 0), p_BV)
  rows = Rows(_write(rows.text_BS, token_B[:, None], prompt_B), prompt_B, prompt_B + 1)
  done_B = (lengths_B == 0) | (token_B == eot) | (n_new == 1)
  carry = (rows, done_B, caches, draft_caches, 0, 0, 1)
  rows, *_, proposed, accepted, passes = jax.lax.while_loop(lambda carry: ~jnp.all(carry[1]), step, carry)
  return rows.text_BS, proposed, accepted, passes
