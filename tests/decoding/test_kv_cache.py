# SPDX-License-Identifier: Apache-2.0
"""The inference model shares what it does not change, and each form of the cache is the other."""

import dataclasses
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from gpt2_jax.attention import cached_attention
from gpt2_jax.decoding import SlidingWindow, for_inference, generate
from gpt2_jax.decoding.generate import prefilled_rows
from gpt2_jax.kernels.tpu_decoding import attention_side_by_side
from gpt2_jax.model import ModelConfig
from gpt2_jax.quantization import quantize
from gpt2_jax.sharding import HEADS, RESIDUAL, ROWS

TINY = ModelConfig(n_vocab=97, n_ctx=96, n_embd=16, n_head=4, n_layer=2, dtype="float32")


@pytest.fixture(scope="module")
def weights(loud_parameters):
  return loud_parameters(TINY)


def buffers(tree) -> list[int]:
  return [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(tree)]


# ---- the inference model


@pytest.mark.parametrize("is_int8", [False, True], ids=["float32", "int8"])
def test_what_is_not_changed_is_no_second_copy(is_int8, mesh, weights, place):
  with mesh(1, 1, 1):
    model = place(TINY, weights)
  model = quantize(model) if is_int8 else model
  decoder = for_inference(model)
  for name in ("wte", "wpe", "ln_f"):
    assert buffers(getattr(decoder.model, name)) == buffers(getattr(model, name))
  assert buffers(decoder.head) == buffers(model.wte)
  assert model.h is not None, "the model is as it was"


def test_a_donated_model_is_freed_and_prepared_alike(mesh, weights, place):
  with mesh(1, 1, 1):
    model, donated = place(TINY, weights), place(TINY, weights)
  expected, decoder = for_inference(model), for_inference(donated, donate=True)
  assert all(leaf.is_deleted() for leaf in jax.tree.leaves(donated.h))
  assert jax.tree.structure(decoder) == jax.tree.structure(expected)
  for ours, theirs in zip(jax.tree.leaves(decoder), jax.tree.leaves(expected), strict=True):
    np.testing.assert_array_equal(ours, theirs)


def test_no_call_casts_a_matrix(mesh, weights, place):
  """All that a step multiplies with is in the compute dtype; what is added is float32."""
  with mesh(1, 1, 1):
    decoder = for_inference(place(dataclasses.replace(TINY, dtype="bfloat16"), weights))
  assert decoder.head.array.dtype == jnp.bfloat16
  assert decoder.model.wte[...].array.dtype == jnp.float32, "embeddings add in float32"
  for leaf in jax.tree.leaves(decoder.blocks):
    assert leaf.dtype == (jnp.bfloat16 if leaf.ndim == 2 else jnp.float32)


# ---- heads side by side, as on a TPU


@pytest.mark.parametrize("sizes", [(1, 1, 1), (2, 1, 2)], ids=str)
@pytest.mark.parametrize("has_prefix", [False, True], ids=["plain", "prefix"])
def test_heads_side_by_side_are_heads_apart(has_prefix, sizes, mesh):
  """For several queries a row, each with a mask of its own."""
  B, T, S, H, K, n_prefix = 2, 3, 20, 4, 8, 5
  rng = np.random.default_rng(0)

  def put(spec, *shape):
    return jax.device_put(rng.standard_normal(shape).astype(np.float32), spec)

  with mesh(*sizes):
    q_BTHK = put(HEADS, B, T, H, K)
    k_BSHK, v_BSHK = put(HEADS, B, S, H, K), put(HEADS, B, S, H, K)
    prefix = tuple(put(P(None, "model", None), n_prefix, H, K) for _ in range(2))
    prefix = prefix if has_prefix else None
    mask_BTS = jax.device_put(rng.random((B, T, S)) < 0.7, RESIDUAL).at[..., 0].set(True)

    def side_by_side(x_BSHK):
      return jnp.reshape(x_BSHK, (B, S, H * K), out_sharding=P(ROWS, None, "model"))

    expected = cached_attention(
      q_BTHK, k_BSHK.swapaxes(1, 2), v_BSHK.swapaxes(1, 2), mask_BTS, prefix
    )
    attention = jax.jit(attention_side_by_side)
    y_BTHK = attention(q_BTHK, side_by_side(k_BSHK), side_by_side(v_BSHK), mask_BTS, prefix)
  np.testing.assert_allclose(y_BTHK, expected, atol=1e-6)
  assert y_BTHK.sharding == expected.sharding


def test_a_cache_of_heads_side_by_side_gives_the_same_text(mesh, weights, place, monkeypatch):
  """Also where a window turns and refills it."""
  prompts = [[1, 2, 3], [7] * 90]
  options = {"n_new": 20, "temperature": 2.0, "window": SlidingWindow(8)}
  with mesh(1, 1, 2):
    decoder = for_inference(place(TINY, weights))
  expected = generate(decoder, prompts, **options)

  # The forms of TPUs, on CPUs: which one it is, is asked while the functions are traced.
  jax.clear_caches()
  for module in ("kv_cache", "generate"):
    monkeypatch.setattr(sys.modules[f"gpt2_jax.decoding.{module}"], "slots_axis", lambda: 1)
  try:
    assert generate(decoder, prompts, **options) == expected
  finally:
    jax.clear_caches()


# ---- samples share a prefill


@pytest.mark.parametrize("parts", [1, 4])
@pytest.mark.parametrize("n_prompts, samples", [(1, 8), (3, 5), (7, 2), (2, 3)])
def test_each_prompt_is_prefilled_once_in_each_part(n_prompts, samples, parts, mesh):
  n_rows = n_prompts * samples
  B = -(-n_rows // parts) * parts
  with mesh(1, parts, 1):
    prompt_P, place_B = prefilled_rows(n_rows, B, samples)
  places = len(prompt_P) // parts
  assert places <= -(-(B // parts - 1) // samples) + 1

  for row in range(n_rows):
    part = row // (B // parts)
    prefilled = prompt_P[part * places + place_B[row]]
    assert prefilled // samples == row // samples
    assert prefilled // (B // parts) == part


def test_samples_of_a_shared_prefill_are_those_of_one_each(mesh, weights, place):
  """Over two parts of rows, one of which has rows of both prompts."""
  prompts = [[1, 2, 3], [5] * 30]
  with mesh(2, 1, 1):
    decoder = for_inference(place(TINY, weights))
  shared = generate(decoder, prompts, 12, samples=3)
  assert shared == [row for row in generate(decoder, prompts, 12) for _ in range(3)]
