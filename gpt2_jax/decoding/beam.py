# SPDX-License-Identifier: Apache-2.0
"""Beam search: the likeliest completions, by keeping the best few partial ones of every length.

  W beams, of one prompt  C candidates, 2 W  N new tokens  S slots of a cache

The beams of a row share one cache. What they have in common is stored and read once, and each reads
its own slots of the rest. When a beam takes another's place, that mask changes: keys and values are
never copied.
"""

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from gpt2_jax.decoding.generation_config import Completion
from gpt2_jax.decoding.kv_cache import (
  InferenceModel,
  cache_write,
  check_finite,
  decode,
  for_inference,
  last_token,
  logits,
  not_finite,
  prefill,
)
from gpt2_jax.decoding.prompts import batch_prompts
from gpt2_jax.model import GPT2
from gpt2_jax.sharding import ROWS


def beam_search(
  model: GPT2 | InferenceModel,
  prompts: Sequence[Sequence[int]],
  n_new: int,
  beams: int = 4,
  length_penalty: float = 1.0,
  eot: int | None = None,
  early_stopping: bool | str = False,
  returned: int = 1,
) -> list[list[Completion]]:
  """Beam search as transformers does it: the `returned` best completions of each prompt.

  The best comes first, and has at most `n_new` tokens. A completion's `score` is the
  log-probability, in nats, of its tokens and of the `eot` that ended it. It is normalized by
  length: divided by (their number)**length_penalty. One beam is greedy decoding.

  A beam that says `eot` is a hypothesis; so are those that run when `n_new` is reached. A prompt's
  search ends when it has `beams` hypotheses and the best running beam, scored at its present
  length, is no better than the worst of them. `early_stopping=True` ends it as soon as there are as
  many. "never" scores the beam at the best length yet to come: `n_new`, if `length_penalty` is
  above 0.

  Raises ValueError on an empty prompt, one that leaves no room in the context for `n_new`, more
  beams than half the vocabulary, more returned than beams, an unknown `early_stopping` and a
  `length_penalty` that is not finite.
  """
  decoder = for_inference(model)
  rule = _rule(decoder, n_new, beams, length_penalty, eot, early_stopping, returned)
  with jax.set_mesh(decoder.mesh):
    tokens_BT, lengths_B = batch_prompts(decoder, prompts, n_new)
    best, has_nonfinite = jax.device_get(_search(decoder, tokens_BT, lengths_B, n_new, beams, rule))
  check_finite(has_nonfinite)

  rows = []
  for row in range(len(prompts)):
    hypotheses = []
    for beam in range(returned):
      # Without `eot` a hypothesis has all `n_new` tokens, with it fewer: it does not count as one.
      count = int(best.count[row, beam])
      tokens = best.new[row, beam, :count].tolist()
      score = float(best.score[row, beam])
      hypotheses.append(Completion(tokens, score=score, finished=count < n_new))
    rows.append(hypotheses)
  return rows


class BeamRule(NamedTuple):
  """What ends a hypothesis, ranks it, and ends the search."""

  eot: jax.Array  # -1: none
  length_penalty: jax.Array
  full_ends: jax.Array  # whether having W hypotheses ends the search
  least_length: jax.Array  # shorter running beams are compared with hypotheses at this length


def _rule(
  decoder, n_new: int, beams: int, length_penalty: float, eot, early_stopping, returned: int
) -> BeamRule:
  """Checks the arguments of `beam_search`, and makes arrays of them: no value compiles anew."""
  n_vocab = decoder.model.config.n_vocab
  if not 1 <= returned <= beams <= n_vocab // 2:
    raise ValueError(
      f"{returned} returned of {beams} beams over {n_vocab} tokens: give 1 or more, "
      f"no more returned than beams, and no more beams than half the vocabulary"
    )
  if early_stopping not in (True, False, "never"):
    raise ValueError(f"early_stopping is {early_stopping!r}; it is one of True, False, 'never'")
  if not math.isfinite(length_penalty):
    raise ValueError(
      f"a length_penalty of {length_penalty} is not a finite number; "
      f"0 ranks by log-probability alone"
    )

  # Log-probabilities are negative: only a penalty above 0 lets a longer beam score better.
  hopes = early_stopping == "never" and length_penalty > 0
  return BeamRule(
    eot=np.int32(-1 if eot is None else eot),
    length_penalty=np.float32(length_penalty),
    full_ends=np.bool_(beams == 1 or early_stopping not in (False, "never")),
    least_length=np.int32(n_new if hopes else 0),
  )


class Beams(NamedTuple):
  """The running beams of a row, best first; those not yet there have a score of minus infinity."""

  score: jax.Array  # [W] nats
  new: jax.Array  # [W, N] tokens
  mask: jax.Array  # [W, S] slots of the cache that a beam reads


class Hypotheses(NamedTuple):
  """The best hypotheses of a row, best first; those not yet there score minus infinity."""

  score: jax.Array  # [W]
  new: jax.Array  # [W, N] tokens
  count: jax.Array  # [W] how many of them are the hypothesis


def _advance(rule: BeamRule, n, log_p_WV, beams: Beams, hypotheses: Hypotheses, searching):
  """A row's token n: its beams, its hypotheses, and whether its search goes on."""
  # 1. The best 2 W of all beams with one token more. Each beam has one `eot`, so W run on at least.
  W, V = log_p_WV.shape
  N = beams.new.shape[1]
  score_C, flat_C = jax.lax.top_k((beams.score[:, None] + log_p_WV).reshape(-1), 2 * W)
  parent_C, token_C = flat_C // V, flat_C % V
  new_CN = jax.lax.dynamic_update_slice_in_dim(beams.new[parent_C], token_C[:, None], n, 1)

  # 2. Candidates end by `eot` or by their length. Only the W best may end: transformers' rule.
  eot_C = token_C == rule.eot
  ends_C = searching & (eot_C | (n + 1 == N)) & (jnp.arange(2 * W) < W)
  final_C = jnp.where(ends_C, score_C / (n + 1.0) ** rule.length_penalty, -jnp.inf)
  ended = Hypotheses(final_C, new_CN, n + 1 - eot_C)

  # 3. Keep the W best of each kind.
  both = jax.tree.map(lambda old, new: jnp.concatenate((old, new)), hypotheses, ended)
  hypotheses = _best(W, both)
  running_C = jnp.where(eot_C, -jnp.inf, score_C)
  beams = _best(W, Beams(running_C, new_CN, beams.mask[parent_C]))

  # 4. Search on while the best beam may still beat the worst hypothesis.
  worst = hypotheses.score[-1]
  length = jnp.maximum(n + 1.0, rule.least_length)
  hope = beams.score[0] / length**rule.length_penalty
  is_full = worst > -jnp.inf
  return beams, hypotheses, searching & (hope > worst) & ~(rule.full_ends & is_full)


def _best(k: int, tree):
  """The `k` entries of the greatest `score`, best first."""
  order = jax.lax.top_k(tree.score, k)[1]
  return jax.tree.map(lambda x: x[order], tree)


def _no_tokens(lengths_B, sizes: tuple[int, int, int]) -> tuple[Beams, Hypotheses]:
  """The beams of each row before the first token, and no hypotheses; sizes are W, N and S."""
  W, N, S = sizes
  B = lengths_B.shape[0]

  def for_all_rows(x):
    return jax.sharding.reshard(jnp.broadcast_to(x, (B, *x.shape)), P(ROWS))

  # All beams but the first are not there yet: they start from the same prompt, and would say the
  # same.
  nothing_WN = jnp.zeros((W, N), jnp.int32)
  never_W = jnp.full(W, -jnp.inf)
  mask_BWS = jnp.broadcast_to((jnp.arange(S) < lengths_B[:, None])[:, None], (B, W, S))
  beams = Beams(for_all_rows(never_W.at[0].set(0.0)), for_all_rows(nothing_WN), mask_BWS)
  hypotheses = Hypotheses(
    for_all_rows(never_W), for_all_rows(nothing_WN), for_all_rows(jnp.zeros(W, jnp.int32))
  )
  return beams, hypotheses


@functools.partial(jax.jit, static_argnames=("n_new", "W"))
def _search(
  decoder: InferenceModel, tokens_BT, lengths_B, n_new: int, W: int, rule: BeamRule
) -> tuple[Hypotheses, jax.Array]:
  """The hypotheses of every row, leaves [B, W, ...]; whether a logit was NaN or infinite."""
  # 1. Prefill. Behind the prompt each step takes W slots, a beam one; the last token is never read.
  B, T = tokens_BT.shape
  S = T + (n_new - 1) * W
  x_BTD, caches = prefill(decoder, tokens_BT, S)
  last_B1D = last_token(x_BTD, lengths_B)

  def choose(n, x_BWD, state, has_nonfinite):
    logits_BWV = logits(decoder, x_BWD)
    searching_B = state[2]
    has_nonfinite |= jnp.any(not_finite(logits_BWV) & searching_B[:, None])
    log_p_BWV = jax.nn.log_softmax(logits_BWV)
    return jax.vmap(functools.partial(_advance, rule, n))(log_p_BWV, *state), has_nonfinite

  def step(carry):
    n, (beams, hypotheses, searching), has_nonfinite, caches = carry

    # A beam reads what it has read before, and the slot into which its newest token goes.
    slot = T + (n - 1) * W
    own_WS = jnp.arange(S) == slot + jnp.arange(W)[:, None]
    beams = beams._replace(mask=beams.mask | own_WS)

    tokens_BW = jax.lax.dynamic_index_in_dim(beams.new, n - 1, 2, keepdims=False)
    positions_BW = jnp.broadcast_to((lengths_B + n - 1)[:, None], (B, W))
    x_BWD, caches = decode(decoder, tokens_BW, positions_BW, beams.mask, caches, cache_write(slot))
    state, has_nonfinite = choose(n, x_BWD, (beams, hypotheses, searching), has_nonfinite)
    return n + 1, state, has_nonfinite, caches

  # 2. The first token is that of the prefill, the others are a pass each. Rows that only fill the
  #    mesh have length 0, and search for nothing.
  beams, hypotheses = _no_tokens(lengths_B, (W, n_new, S))
  x_BWD = jnp.broadcast_to(last_B1D, (B, W, last_B1D.shape[2]))
  state, has_nonfinite = choose(0, x_BWD, (beams, hypotheses, lengths_B > 0), jnp.bool_(False))

  def goes_on(carry):
    n, (_, _, searching), _, _ = carry
    return (n < n_new) & jnp.any(searching)

  carry = (1, state, has_nonfinite, caches)
  _, (_, hypotheses, _), has_nonfinite, _ = jax.lax.while_loop(goes_on, step, carry)
  return hypotheses, has_nonfinite
