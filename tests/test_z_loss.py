# SPDX-License-Identifier: Apache-2.0
"""z-loss: the formula and its gradients, by the plain and by the fused cross-entropy."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from configs import gpt2
from gpt2_jax.batch import Batch
from gpt2_jax.finetune.objective import make_objective
from gpt2_jax.kernels.tpu_cross_entropy import Blocks, fused_cross_entropy_and_lse
from gpt2_jax.linear import matmul
from gpt2_jax.loss import NextToken, mean_loss
from gpt2_jax.model import ModelConfig
from gpt2_jax.sharding import BATCH, HIDDEN, RESIDUAL, axis_size
from gpt2_jax.z_loss import NextTokenZ, cross_entropy_and_lse, next_token_objective

V, PADDED, D, T = 97, 128, 24, 6
SMALL = Blocks(rows=32, vocabulary=128, columns=32)


def plain_sum(logits, labels, d_nats, d_lse):
  """The formula, by JAX's own derivatives, over the real vocabulary."""
  logits = logits[..., :V]
  lse = jax.nn.logsumexp(logits, -1)
  nats = lse - jnp.take_along_axis(logits, labels[..., None], -1)[..., 0]
  return (nats * d_nats).sum() + (lse * d_lse).sum(), (nats, lse)


def data():
  rng = np.random.default_rng(0)
  cotangents = rng.normal(size=(2, 4, T)).astype(np.float32)
  return rng.integers(0, V, (4, T)), *cotangents


@pytest.mark.parametrize("sizes", [(1, 1, 1), (1, 2, 4)], ids=str)
def test_nats_logsumexp_and_their_gradients_are_the_formula(sizes, mesh, put):
  logits = (np.random.default_rng(1).normal(size=(4, T, PADDED)) * 3).astype(np.float32)
  labels, d_nats, d_lse = data()

  def weighted(logits, labels, d_nats, d_lse):
    nats, lse = cross_entropy_and_lse(logits, labels, V)
    return (nats * d_nats).sum() + (lse * d_lse).sum(), (nats, lse)

  with mesh(*sizes):
    arguments = put(logits, HIDDEN), *(put(x, BATCH) for x in (labels, d_nats, d_lse))
    gradient, (nats, lse) = jax.jit(jax.grad(weighted, has_aux=True))(*arguments)
    assert gradient.sharding.spec == HIDDEN
  expected, pair = jax.grad(plain_sum, has_aux=True)(jnp.array(logits), labels, d_nats, d_lse)
  np.testing.assert_allclose((nats, lse), pair, atol=2e-6)
  np.testing.assert_allclose(gradient, expected, atol=2e-6)
  assert not np.array(gradient)[..., V:].any()


@pytest.mark.parametrize(
  "sizes, dtype", [((1, 1, 1), "bfloat16"), ((1, 1, 1), "float32"), ((2, 2, 2), "float32")], ids=str
)
def test_the_fused_kernel_gives_the_same(sizes, dtype, mesh, put):
  """Interpreted, against the plain form; 2^-8 is bfloat16's last bit."""
  rng = np.random.default_rng(2)
  wte = rng.normal(size=(PADDED, D)) * 0.5
  x = rng.normal(size=(4, T, D))
  labels, d_nats, d_lse = data()

  def fused(x_BTD, wte_VD, labels_BT):
    blocks = dataclasses.replace(SMALL, vocabulary=SMALL.vocabulary // axis_size("model"))
    return fused_cross_entropy_and_lse(x_BTD, wte_VD, labels_BT, V, blocks)

  def plain(x_BTD, wte_VD, labels_BT):
    logits_BTV = matmul(x_BTD, wte_VD, None, P("model", None), 1, jnp.float32)
    return cross_entropy_and_lse(logits_BTV, labels_BT, V)

  @functools.partial(jax.jit, static_argnums=0)
  def values_and_gradients(form, x, wte, labels, *cotangents):
    pair, pull = jax.vjp(lambda x, wte: form(x, wte, labels), x, wte)
    return *pair, *pull(cotangents)

  with mesh(*sizes):
    arguments = put(x, RESIDUAL).astype(dtype), put(np.float32(wte), P(("model", "data"), None))
    arguments += tuple(put(array, BATCH) for array in (labels, d_nats, d_lse))
    ours, theirs = (values_and_gradients(form, *arguments) for form in (fused, plain))
  for found, expected in zip(ours, theirs, strict=True):
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    atol = {"float32": 1e-5, "bfloat16": 1e-2}[dtype] * np.abs(expected).max()
    np.testing.assert_allclose(found, expected, atol=atol, rtol=0)


def test_the_objective_is_next_token_and_the_square_beside_it(mesh, parameters, place):
  """Its gradient is that of the formula on the model's logits, with weights on the tokens. On a
  TPU it takes the kernel."""
  config = ModelConfig(
    n_vocab=V, n_ctx=T, n_embd=D, n_head=2, n_layer=1, use_bias=False, dtype="float32"
  )
  rng = np.random.default_rng(3)
  tokens_BT = rng.integers(0, V, (4, T + 1)).astype(np.int32)
  weights_BT = rng.integers(0, 2, (4, T)).astype(np.float32)
  batch = Batch(tokens_BT, weights_BT)

  def formula(model):
    weights = weights_BT / weights_BT.sum()
    labels = tokens_BT[:, 1:]
    logits = model.head(model.hidden(model.embed(tokens_BT[:, :-1]))[0])[..., :V]
    lse = jax.nn.logsumexp(logits, -1)
    nats = lse - jnp.where(np.arange(V) == labels[..., None], logits, 0.0).sum(-1)
    return (nats * weights).sum() + 0.25 * (jnp.square(lse) * weights).sum()

  with mesh(1, 1, 1):
    model = place(config, parameters(config))
    total = jax.jit(jax.value_and_grad(formula))
    ours = jax.jit(jax.value_and_grad(lambda m: mean_loss(NextTokenZ(0.25), m, batch)[0]))
    (expected, d_expected), (found, d_found) = total(model), ours(model)
    sums, plain = jax.jit(lambda m: (NextTokenZ(0.25)(m, batch), NextToken()(m, batch)))(model)
    fused = place(dataclasses.replace(config, cross_entropy="fused"), parameters(config))
    for one, has_kernel in ((model, False), (fused, True)):
      text = str(jax.make_jaxpr(NextTokenZ(0.25))(one, batch))
      assert ("pallas_call" in text) == has_kernel

  assert float(found) == pytest.approx(float(expected), rel=1e-6)
  for x, y in zip(jax.tree.leaves(d_found), jax.tree.leaves(d_expected), strict=True):
    np.testing.assert_allclose(x, y, atol=1e-5 * np.abs(y).max(), rtol=0)
  assert sums["nats"] - sums["z_loss"] == pytest.approx(float(plain["nats"]), rel=1e-6)
  assert sums["z_loss"] > 1 and sums["tokens"] == plain["tokens"]


def test_a_weight_of_0_is_the_plain_objective():
  """The same value, so the same program."""
  assert next_token_objective(0.0) == NextToken()
  assert next_token_objective(1e-4) == NextTokenZ(1e-4)


def test_a_classifier_has_no_z_loss():
  config = gpt2.get_config()
  config.z_loss, config.classify.classes = 1e-4, 3
  with pytest.raises(ValueError, match="z_loss is 0.0001, which is of a language model's loss"):
    make_objective(config)
