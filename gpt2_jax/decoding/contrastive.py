# SPDX-License-Identifier: Apache-2.0
"""Contrastive search: of the likeliest tokens, the one whose hidden state is least like those before it.

Source: Su et al. 2022, "A Contrastive Framework for Neural Text Generation", arXiv 2202.06417, equation 5.

  C candidates of a row, the k of the paper  N new tokens
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from gpt2_jax.decoding.cache import Decoder, at_end, decode, in_slots, logits, place_prompts, prefill, ready
from gpt2_jax.model import GPT2
from gpt2_jax.sharding import BATCH


def contrastive_search(
  model: GPT2 | Decoder,
  prompts: Sequence[Sequence[int]],
  n_new: int,
  k: int = 4,
  alpha: float = 0.6,
  eot: int | None = None,
) -> list[list[int]]:
  """Continues each prompt by at most `n_new` tokens; lists of the new tokens, `eot` ending a row (and left out).

  Each is, of the `k` likeliest, the one with the greatest (1 - alpha) * probability - alpha * the greatest cosine
  between its own output of `ln_f` and that of any token before it. `k` of 1 and `alpha` of 0 are greedy decoding.

  Raises ValueError on an empty prompt, one that leaves no room in the context for `n_new`, a `k` that is not in
  [1, n_vocab] and an `alpha` that is not in [0, 1].
  """
  decoder = ready(model)
  if not 1 <= k <= decoder.model.config.n_vocab:
    raise ValueError(f"k of {k} is not in [1, {decoder.model.config.n_vocab}], the size of the vocabulary")
  if not 0 <= alpha <= 1:
    raise ValueError(f"alpha of {alpha} is not in [0, 1]; 0 is the likeliest token, 1 the one least like the others")
  ends = -1 if eot is None else eot
  with jax.set_mesh(decoder.mesh):
    rows = place_prompts(decoder, prompts, n_new)
    new_BN, counts_B = jax.device_get(_search(decoder, *rows, n_new, k, jnp.float32(alpha), ends))
  return [row[:count].tolist() for row, count in zip(new_BN, counts_B, strict=True)][: len(prompts)]


def _unit(x_BTD):
  """Each position's direction, float32."""
  x_BTD = x_BTD.astype(jnp.float32)
  return x_BTD / jnp.linalg.norm(x_BTD, axis=-1, keepdims=True)


@functools.partial(jax.jit, static_argnames=("n_new", "C"))
def _search(decoder: Decoder, tokens_BT, lengths_B, n_new: int, C: int, alpha, eot):
  """The new tokens [B, n_new], and how many of them come before `eot`, [B]."""
  B, T = tokens_BT.shape
  S = T + n_new  # tokens that are kept; the candidates for the last of them need C - 1 slots more
  x_BTD, caches = prefill(decoder, tokens_BT, S + C - 1)
  x_B1D = at_end(x_BTD, lengths_B)
  units_BSD = jnp.pad(_unit(x_BTD), ((0, 0), (0, n_new), (0, 0)))
  slots_S = jnp.arange(S + C - 1)

  def step(carry):
    n, x_B1D, units_BSD, new_BN, counts_B, done_B, caches = carry
    p_BC, tokens_BC = jax.lax.top_k(jax.nn.softmax(logits(decoder, x_B1D)[:, 0]), C)
    past_BS = (slots_S < lengths_B[:, None]) | ((slots_S >= T) & (slots_S < T + n))  # all but the prompts' padding
    sees_BCS = past_BS[:, None] | (slots_S == T + n + jnp.arange(C)[:, None])
    positions_BC = jnp.broadcast_to((lengths_B + n)[:, None], (B, C))
    x_BCD, caches = decode(decoder, tokens_BC, positions_BC, sees_BCS, caches, in_slots(T + n))

    # Highest: a TPU would round the unit vectors to bfloat16 first.
    cosines_BCS = jnp.einsum("bcd,bsd->bcs", _unit(x_BCD), units_BSD, precision="highest")
    likeness_BC = jnp.where(past_BS[:, None, :S], cosines_BCS, -1.0).max(-1)
    chosen_B = jnp.argmax((1 - alpha) * p_BC - alpha * likeness_BC, axis=1)
    token_B, x_B1D = jax.vmap(lambda c, tokens_C, x_CD: (tokens_C[c], x_CD[c][None]))(chosen_B, tokens_BC, x_BCD)

    def keep(x_BHSK):  # the chosen one's keys or values, in the first of the candidates' slots
      one_BH1K = jax.vmap(lambda c, x_HSK: x_HSK[:, T + n + c][:, None])(chosen_B, x_BHSK)
      return jax.lax.dynamic_update_slice_in_dim(x_BHSK, one_BH1K, T + n, 2)

    done_B |= token_B == eot
    new_BN = jax.lax.dynamic_update_slice_in_dim(new_BN, token_B[:, None], n, 1)
    units_BSD = jax.lax.dynamic_update_slice_in_dim(units_BSD, _unit(x_B1D), T + n, 1)
    return n + 1, x_B1D, units_BSD, new_BN, counts_B + ~done_B, done_B, jax.tree.map(keep, caches)

  new_BN = jnp.zeros((B, n_new), jnp.int32, out_sharding=BATCH)
  carry = (0, x_B1D, units_BSD, new_BN, jnp.zeros_like(lengths_B), lengths_B == 0, caches)
  carry = jax.lax.while_loop(lambda c: (c[0] < n_new) & ~jnp.all(c[5]), step, carry)
  return carry[3], carry[4]
