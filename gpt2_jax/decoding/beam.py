# SPDX-License-Identifier: Apache-2.0
"""Beam search: the likeliest continuations, found by keeping the best few of every length.

  W beams of a prompt, the branches of a row  C candidates, 2 W  N new tokens

The beams of a row share one cache. What they have in common is stored and read once, each reads its own slots of the
rest, and a beam that takes another's place is a change of that mask, never a copy of keys and values.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from gpt2_jax.decoding.cache import Decoder, at_end, decode, in_slots, logits, place_prompts, prefill, ready
from gpt2_jax.model import GPT2
from gpt2_jax.sharding import ROWS


@dataclasses.dataclass(frozen=True)
class Hypothesis:
  """New tokens, without the `eot` that may have ended them, and the score that ranks them."""

  tokens: list[int]
  score: float  # log-probability, nats, of the tokens and of `eot` where it came, over (their number)**length_penalty


def beam_search(
  model: GPT2 | Decoder,
  prompts: Sequence[Sequence[int]],
  n_new: int,
  beams: int = 4,
  length_penalty: float = 1.0,
  eot: int | None = None,
  early_stopping: bool | str = False,
  returned: int = 1,
) -> list[list[Hypothesis]]:
  """The `returned` best continuations of each prompt by at most `n_new` tokens, best first, as transformers finds them.

  A beam that says `eot` is a hypothesis; so are those that run when `n_new` is reached. A prompt's search ends when it
  has `beams` hypotheses and the best running beam, scored at its present length, is no better than the worst of them;
  `early_stopping=True` ends it as soon as there are as many, "never" hopes for the best length yet to come
  (`n_new`, if `length_penalty` is above 0). One beam is greedy decoding.

  Raises ValueError on an empty prompt, one that leaves no room in the context for `n_new`, more beams than half the
  vocabulary, more returned than beams, an unknown `early_stopping` and a `length_penalty` that is not finite.
  """
  decoder = ready(model)
  if not 1 <= returned <= beams <= decoder.model.config.n_vocab // 2:
    raise ValueError(
      f"{returned} returned of {beams} beams over {decoder.model.config.n_vocab} tokens: give 1 or more, "
      f"no more returned than beams, and no more beams than half the vocabulary"
    )
  if early_stopping not in (True, False, "never"):
    raise ValueError(f"early_stopping is {early_stopping!r}; it is one of True, False, 'never'")
  if not math.isfinite(length_penalty):
    raise ValueError(f"a length_penalty of {length_penalty} is not a finite number; 0 ranks by log-probability alone")
  rule = Rule(
    eot=np.int32(-1 if eot is None else eot),
    length_penalty=np.float32(length_penalty),
    full_ends=np.bool_(beams == 1 or early_stopping not in (False, "never")),
    hoped=np.int32(n_new if early_stopping == "never" and length_penalty > 0 else 0),
  )
  with jax.set_mesh(decoder.mesh):
    found = jax.device_get(_search(decoder, *place_prompts(decoder, prompts, n_new), n_new, beams, rule))
  return [
    [Hypothesis(found.new[b, w, : found.count[b, w]].tolist(), float(found.score[b, w])) for w in range(returned)]
    for b in range(len(prompts))
  ]


class Rule(NamedTuple):
  """What ends a hypothesis, ranks it, and ends the search."""

  eot: jax.Array  # -1: none
  length_penalty: jax.Array
  full_ends: jax.Array  # whether having W hypotheses ends the search
  hoped: jax.Array  # the length at which a running beam is compared with them, if it is not longer already


class Beams(NamedTuple):
  """The running beams of a row, best first; those not yet there have a score of minus infinity."""

  score: jax.Array  # [W] nats
  new: jax.Array  # [W, N] tokens
  sees: jax.Array  # [W, S] slots of the cache


class Found(NamedTuple):
  """The best hypotheses of a row, best first; those not yet there have a score of minus infinity."""

  score: jax.Array  # [W]
  new: jax.Array  # [W, N] tokens
  count: jax.Array  # [W] how many of them are the hypothesis


def _advance(rule: Rule, n, log_p_WV, beams: Beams, found: Found, searching):
  """A row's token n: its beams, its hypotheses, and whether its search goes on.

  At least W of the 2 W best candidates run on, for a beam has one `eot`; only the W best may end as hypotheses.
  """
  (W, V), N = log_p_WV.shape, beams.new.shape[1]
  score_C, flat_C = jax.lax.top_k((beams.score[:, None] + log_p_WV).reshape(-1), 2 * W)
  parent_C, token_C = flat_C // V, flat_C % V
  new_CN = jax.lax.dynamic_update_slice_in_dim(beams.new[parent_C], token_C[:, None], n, 1)
  eot_C = token_C == rule.eot
  ends_C = searching & (eot_C | (n + 1 == N)) & (jnp.arange(2 * W) < W)
  ended = Found(jnp.where(ends_C, score_C / (n + 1.0) ** rule.length_penalty, -jnp.inf), new_CN, n + 1 - eot_C)
  found = _best(W, jax.tree.map(lambda *either: jnp.concatenate(either), found, ended))
  beams = _best(W, Beams(jnp.where(eot_C, -jnp.inf, score_C), new_CN, beams.sees[parent_C]))
  worst = found.score[-1]
  hope = beams.score[0] / jnp.maximum(n + 1.0, rule.hoped) ** rule.length_penalty
  return beams, found, searching & (hope > worst) & ~(rule.full_ends & (worst > -jnp.inf))


def _best(k: int, tree):
  """The `k` entries of the greatest `score`, best first."""
  order = jax.lax.top_k(tree.score, k)[1]
  return jax.tree.map(lambda x: x[order], tree)


@functools.partial(jax.jit, static_argnames=("n_new", "W"))
def _search(decoder: Decoder, tokens_BT, lengths_B, n_new: int, W: int, rule: Rule) -> Found:
  """The hypotheses of every row, leaves [B, W, ...]."""
  B, T = tokens_BT.shape
  S = T + (n_new - 1) * W  # the last token is never read
  x_BTD, caches = prefill(decoder, tokens_BT, S)
  last_B1D = at_end(x_BTD, lengths_B)

  def choose(n, x_BWD, state):
    return jax.vmap(functools.partial(_advance, rule, n))(jax.nn.log_softmax(logits(decoder, x_BWD)), *state)

  def step(carry):
    n, (beams, found, searching), caches = carry
    slot = T + (n - 1) * W
    own_WS = jnp.arange(S) == slot + jnp.arange(W)[:, None]
    beams = beams._replace(sees=beams.sees | own_WS)
    tokens_BW = jax.lax.dynamic_index_in_dim(beams.new, n - 1, 2, keepdims=False)
    positions_BW = jnp.broadcast_to((lengths_B + n - 1)[:, None], (B, W))
    x_BWD, caches = decode(decoder, tokens_BW, positions_BW, beams.sees, caches, in_slots(slot))
    return n + 1, choose(n, x_BWD, (beams, found, searching)), caches

  def everywhere(x):  # the same for every row
    return jax.sharding.reshard(jnp.broadcast_to(x, (B, *x.shape)), P(ROWS))

  nothing_WN = jnp.zeros((W, n_new), jnp.int32)
  never_W = jnp.full(W, -jnp.inf)
  sees_BWS = jnp.broadcast_to((jnp.arange(S) < lengths_B[:, None])[:, None], (B, W, S))
  beams = Beams(everywhere(never_W.at[0].set(0.0)), everywhere(nothing_WN), sees_BWS)  # all start from the first
  found = Found(everywhere(never_W), everywhere(nothing_WN), everywhere(jnp.zeros(W, jnp.int32)))
  state = choose(0, jnp.broadcast_to(last_B1D, (B, W, last_B1D.shape[2])), (beams, found, lengths_B > 0))
  carry = jax.lax.while_loop(lambda c: (c[0] < n_new) & jnp.any(c[1][2]), step, (1, state, caches))
  return carry[1][1]
