# SPDX-License-Identifier: Apache-2.0
"""Contrastive search: of the likeliest tokens, the one whose hidden state repeats the text least.

Source: Su et al. 2022, "A Contrastive Framework for Neural Text Generation", arXiv 2202.06417,
equation 5.

  C candidates of a row, the k of the paper  N new tokens  S slots of a cache
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp

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
  slots_axis,
)
from gpt2_jax.decoding.prompts import batch_prompts
from gpt2_jax.model import GPT2
from gpt2_jax.sharding import BATCH


def contrastive_search(
  model: GPT2 | InferenceModel,
  prompts: Sequence[Sequence[int]],
  n_new: int,
  k: int = 4,
  alpha: float = 0.6,
  eot: int | None = None,
) -> list[Completion]:
  """Contrastive search: a completion of each prompt by at most `n_new` tokens.

  Each token is, of the `k` likeliest, the one with the greatest (1 - alpha) * probability - alpha *
  likeness. Its likeness is the greatest cosine between its own output of `ln_f` and that of any
  token before it. `k` of 1 and `alpha` of 0 are greedy decoding. `eot` ends a row, and is left out.

  Raises ValueError on an empty prompt, one that leaves no room in the context for `n_new`, a `k`
  that is not in [1, n_vocab] and an `alpha` that is not in [0, 1].
  """
  decoder = for_inference(model)
  n_vocab = decoder.model.config.n_vocab
  if not 1 <= k <= n_vocab:
    raise ValueError(f"k of {k} is not in [1, {n_vocab}], the size of the vocabulary")
  if not 0 <= alpha <= 1:
    raise ValueError(
      f"alpha of {alpha} is not in [0, 1]; "
      f"0 is the likeliest token, 1 the one least like the others"
    )

  with jax.set_mesh(decoder.mesh):
    # Candidates are compared by what the model makes of them: it reads the last new token, too.
    tokens_BT, lengths_B = batch_prompts(decoder, prompts, n_new, reads_last=True)
    end = -1 if eot is None else eot
    new_BN, count_B, has_nonfinite = jax.device_get(
      _search(decoder, tokens_BT, lengths_B, n_new, k, jnp.float32(alpha), end)
    )
  check_finite(has_nonfinite)

  # Without `eot` a row has all `n_new` tokens, with it fewer: it does not count as one.
  rows = []
  for row in range(len(prompts)):
    count = int(count_B[row])
    rows.append(Completion(new_BN[row, :count].tolist(), finished=count < n_new))
  return rows


def _unit(x_BTD):
  """Each position's direction, float32."""
  x_BTD = x_BTD.astype(jnp.float32)
  return x_BTD / jnp.linalg.norm(x_BTD, axis=-1, keepdims=True)


def _likeness(x_BCD, units_BSD, past_BS):
  """Each candidate's greatest cosine with any token before it, [B, C]."""
  # Highest precision: a TPU would round the unit vectors to bfloat16 first.
  cosines_BCS = jnp.einsum("bcd,bsd->bcs", _unit(x_BCD), units_BSD, precision="highest")
  return jnp.where(past_BS[:, None], cosines_BCS, -1.0).max(-1)


def _move_to_first(cache, chosen_B, slot):
  """Moves the chosen candidate's keys or values to the first of the candidates' slots.

  The next step's candidates overwrite the others.
  """
  axis = slots_axis()

  def choose(c, row):
    return jax.lax.dynamic_slice_in_dim(row, slot + c, 1, axis - 1)

  chosen = jax.vmap(choose)(chosen_B, cache)
  return jax.lax.dynamic_update_slice_in_dim(cache, chosen, slot, axis)


@functools.partial(jax.jit, static_argnames=("n_new", "C"))
def _search(decoder: InferenceModel, tokens_BT, lengths_B, n_new: int, C: int, alpha, eot):
  """The new tokens [B, N], how many of them come before `eot` [B], and `has_nonfinite`."""
  # 1. Prefill. S tokens are kept; the candidates for the last of them need C - 1 slots more.
  B, T = tokens_BT.shape
  S = T + n_new
  x_BTD, caches = prefill(decoder, tokens_BT, S + C - 1)
  x_B1D = last_token(x_BTD, lengths_B)
  units_BSD = jnp.pad(_unit(x_BTD), ((0, 0), (0, n_new), (0, 0)))
  slots_S = jnp.arange(S + C - 1)

  def step(carry):
    n, x_B1D, units_BSD, new_BN, count_B, done_B, has_nonfinite, caches = carry

    # 2. One pass over all candidates: each reads the text before it, and its own slot.
    logits_BV = logits(decoder, x_B1D)[:, 0]
    has_nonfinite |= jnp.any(not_finite(logits_BV) & ~done_B)
    p_BC, tokens_BC = jax.lax.top_k(jax.nn.softmax(logits_BV), C)
    of_prompt_BS = slots_S < lengths_B[:, None]
    of_new_S = (slots_S >= T) & (slots_S < T + n)
    past_BS = of_prompt_BS | of_new_S
    mask_BCS = past_BS[:, None] | (slots_S == T + n + jnp.arange(C)[:, None])
    positions_BC = jnp.broadcast_to((lengths_B + n)[:, None], (B, C))
    x_BCD, caches = decode(decoder, tokens_BC, positions_BC, mask_BCS, caches, cache_write(T + n))

    # 3. Choose by the formula.
    likeness_BC = _likeness(x_BCD, units_BSD, past_BS[:, :S])
    chosen_B = jnp.argmax((1 - alpha) * p_BC - alpha * likeness_BC, axis=1)
    token_B, x_B1D = jax.vmap(lambda c, tokens_C, x_CD: (tokens_C[c], x_CD[c][None]))(
      chosen_B, tokens_BC, x_BCD
    )

    # 4. Keep the chosen one, and forget the others.
    caches = jax.tree.map(lambda cache: _move_to_first(cache, chosen_B, T + n), caches)
    done_B |= token_B == eot
    new_BN = jax.lax.dynamic_update_slice_in_dim(new_BN, token_B[:, None], n, 1)
    units_BSD = jax.lax.dynamic_update_slice_in_dim(units_BSD, _unit(x_B1D), T + n, 1)
    count_B += ~done_B
    return n + 1, x_B1D, units_BSD, new_BN, count_B, done_B, has_nonfinite, caches

  def goes_on(carry):
    n, *_, done_B, _, _ = carry
    return (n < n_new) & ~jnp.all(done_B)

  # Rows that only fill the mesh have length 0, and are done.
  new_BN = jnp.zeros((B, n_new), jnp.int32, out_sharding=BATCH)
  count_B, done_B = jnp.zeros_like(lengths_B), lengths_B == 0
  carry = (0, x_B1D, units_BSD, new_BN, count_B, done_B, jnp.bool_(False), caches)
  *_, new_BN, count_B, _, has_nonfinite, _ = jax.lax.while_loop(goes_on, step, carry)
  return new_BN, count_B, has_nonfinite
