# SPDX-License-Identifier: Apache-2.0
"""The fused head and cross-entropy, interpreted, against the plain form and against float64."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from gpt2_jax.batch import Batch
from gpt2_jax.kernels.choose import choose_cross_entropy
from gpt2_jax.kernels.tpu_cross_entropy import VMEM, Blocks, fused_cross_entropy
from gpt2_jax.linear import matmul
from gpt2_jax.loss import NextToken, cross_entropy, next_token_nats
from gpt2_jax.model import ModelConfig
from gpt2_jax.quantization import quantize
from gpt2_jax.sharding import BATCH, RESIDUAL, axis_size
from gpt2_jax.unreduced import all_reduce_gradients, defer_reduction

# A padded vocabulary, several blocks each way, and a last one of each that is not full.
V, PADDED, D, T = 301, 384, 48, 21
SMALL = Blocks(rows=32, vocabulary=256, columns=32)
WTE = P(("model", "data"), None)


def data(rows: int, dtype, put):
  """Hidden states, a table whose padding is loud, labels, and a gradient of the nats."""
  rng = np.random.default_rng(0)
  wte = rng.normal(size=(PADDED, D)) * 0.5
  wte[V:] = 30
  labels = rng.integers(0, V, (rows, T))
  labels[0, :5] = [0, 191, 192, 256, V - 1]  # the edges of blocks and of parts
  return (
    put(rng.normal(size=(rows, T, D)), RESIDUAL).astype(dtype),
    put(wte.astype(np.float32), WTE),
    put(labels, BATCH),
    put(rng.normal(size=(rows, T)).astype(np.float32), BATCH),
  )


def plain(x_BTD, wte_VD, labels_BT):
  logits_BTV = matmul(x_BTD, wte_VD, None, P("model", None), 1, jnp.float32)
  return cross_entropy(logits_BTV, labels_BT, V)


def fused(x_BTD, wte_VD, labels_BT):
  # Of each device's part of the vocabulary, the last block is not full.
  blocks = dataclasses.replace(SMALL, vocabulary=SMALL.vocabulary // axis_size("model"))
  return fused_cross_entropy(x_BTD, wte_VD, labels_BT, V, blocks)


@functools.partial(jax.jit, static_argnums=0)
def nats_and_gradients(nats, x_BTD, wte_VD, labels_BT, d_BT):
  """As a training step has them: that of the table is reduced over replica at the end."""
  wte_VD = defer_reduction(wte_VD)
  nats_BT, pull = jax.vjp(lambda x, w: nats(x, w, labels_BT), x_BTD, wte_VD)
  dx_BTD, dw_VD = pull(d_BT)
  return nats_BT, dx_BTD, all_reduce_gradients(dw_VD)


# One device, every axis, a part of the vocabulary that is padding alone.
@pytest.mark.parametrize(
  "sizes, dtype",
  [
    ((1, 1, 1), "bfloat16"),
    ((1, 1, 1), "float32"),
    ((2, 2, 2), "float32"),
    ((1, 1, 8), "float32"),
  ],
  ids=str,
)
def test_fused_nats_and_gradients_are_the_plain_ones(sizes, dtype, mesh, put):
  with mesh(*sizes):
    arguments = data(4, dtype, put)
    ours, theirs = (nats_and_gradients(form, *arguments) for form in (fused, plain))
    alone = jax.jit(fused)(*arguments[:3])

  np.testing.assert_allclose(alone, ours[0], rtol=1e-6)  # without a backward pass, e is not stored
  for found, expected in zip(ours, theirs, strict=True):
    assert (found.dtype, found.sharding) == (expected.dtype, expected.sharding)
    found, expected = (np.asarray(x, np.float64) for x in (found, expected))
    # 1e-2 of the largest value in bfloat16, whose last bit is 2^-8 of a value; 1e-5 in float32.
    atol = {"float32": 1e-5, "bfloat16": 1e-2}[dtype] * np.abs(expected).max()
    np.testing.assert_allclose(found, expected, atol=atol, rtol=0)
  assert not np.asarray(ours[2])[V:].any(), "padding has no gradient"


def test_what_a_confident_row_still_learns_is_not_rounded_away(mesh, put):
  """Where p of the label is 0.999, p - 1 is as precise as any operand, not as p."""
  scale = np.log(999.0)
  x = np.array([[[1.0, 0.0]]], np.float32)
  wte = np.zeros((128, 2), np.float32)
  wte[5, 0] = scale + np.log(99)  # of 100 tokens
  with mesh(1, 1, 1):
    x_BTD = put(x, RESIDUAL).astype(jnp.bfloat16)
    wte_VD, labels_BT = put(wte, WTE), put(np.array([[5]]), BATCH)
    gradient = jax.jit(
      jax.grad(lambda w: fused_cross_entropy(x_BTD, w, labels_BT, 100, SMALL).sum())
    )(wte_VD)
  logits = np.asarray(jnp.asarray(wte, jnp.bfloat16), np.float64)[:100] @ x[0, 0]
  p = np.exp(logits) / np.exp(logits).sum()
  np.testing.assert_allclose(gradient[5, 0], p[5] - 1, rtol=2**-8)
  np.testing.assert_allclose(gradient[:5, 0], p[:5], rtol=2**-7)  # rounded twice: e and p


def test_large_logits_do_not_overflow(mesh, put):
  with mesh(1, 1, 1):
    x, wte, labels, _ = data(1, "float32", put)
    ours, theirs = (jax.jit(form)(x * 1e4, wte, labels) for form in (fused, plain))
  assert np.isfinite(ours).all()
  np.testing.assert_allclose(ours, theirs, rtol=1e-5)


@pytest.mark.parametrize("D", [64, 768, 1024, 1280, 1600, 4096])
def test_blocks_fit_into_vmem_and_fill_tiles(D):
  blocks = Blocks().fitted(D, 2)
  assert 2 * (blocks.rows + blocks.vocabulary) * D * 2 < VMEM
  assert blocks.rows % 128 == 0 and blocks.vocabulary % 128 == 0
  # 50,304 rows of the table, whole and in parts: e in tiles of 16 rows, its maxima in those of 8.
  for parts in (1, 2, 4, 8):
    group = blocks.group(50304 // parts)
    assert group % 16 == 0 and 50304 // parts % group == 0
    assert blocks.vocabulary // group % 8 == 0


def test_the_objective_takes_the_kernel_and_other_weights_their_own_form(
  mesh, parameters, place, tokens
):
  """A model's nats by both forms are the same; int8 has a matmul of its own."""
  config = ModelConfig(n_vocab=97, n_ctx=24, n_embd=16, n_head=2, n_layer=1, dtype="float32")
  fused_config = dataclasses.replace(config, cross_entropy="fused")
  arrays = parameters(config)
  with mesh(1, 1, 2):
    batch = Batch(jnp.asarray(tokens(2, 25, 97)))
    x_BTD = jnp.ones((2, 24, 16), out_sharding=RESIDUAL)
    with_kernel, without = place(fused_config, arrays), place(config, arrays)

    def nats(model):
      return jax.jit(next_token_nats)(model, x_BTD, batch.tokens_BT[:, 1:])

    def has_kernel(model, function, *rest):
      return "pallas_call" in str(jax.make_jaxpr(function)(model, *rest))

    np.testing.assert_allclose(nats(with_kernel), nats(without), rtol=1e-6)
    objective = NextToken()
    assert has_kernel(with_kernel, objective, batch) and not has_kernel(without, objective, batch)
    assert not has_kernel(quantize(with_kernel), objective, batch)


def test_kernels_are_for_tpus_and_bfloat16(mesh):
  with mesh(1, 1, 1):
    assert choose_cross_entropy("auto", jnp.bfloat16) == "plain"
    assert choose_cross_entropy("fused", jnp.bfloat16) == "fused"
