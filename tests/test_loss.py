# SPDX-License-Identifier: Apache-2.0
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gpt2_jax.loss import cross_entropy
from gpt2_jax.sharding import BATCH, HIDDEN

V, PADDED = 97, 128


def data():
  rng = np.random.default_rng(0)
  logits = rng.normal(size=(4, 6, PADDED)) * 3
  labels = rng.integers(0, V, (4, 6))
  labels[0, :4] = [0, 31, 32, V - 1]  # the edges of four shards
  return jnp.float32(logits), jnp.int32(labels)


@pytest.fixture(autouse=True)
def one_device(mesh):
  with mesh(1, 1, 1):
    yield


def plain(logits, labels):
  """logsumexp minus the label's logit, over the real vocabulary, in float64."""
  logits, labels = np.asarray(logits[..., :V], np.float64), np.asarray(labels)
  top = logits.max(-1)
  lse = top + np.log(np.exp(logits - top[..., None]).sum(-1))
  return lse - np.take_along_axis(logits, labels[..., None], -1)[..., 0]


@pytest.mark.parametrize("sizes", [(1, 1, 1), (1, 2, 4)], ids=str)
def test_cross_entropy_and_its_gradient_are_the_formula(sizes, mesh, put):
  logits, labels = data()
  weight = np.random.default_rng(1).normal(size=labels.shape).astype(np.float32)

  def weighted(logits, labels, weight):
    nats = cross_entropy(logits, labels, V)
    return (nats * weight).sum(), nats

  def weighted_plain(logits):
    logits = logits[..., :V]
    nats = jax.nn.logsumexp(logits, -1) - jnp.take_along_axis(logits, labels[..., None], -1)[..., 0]
    return (nats * weight).sum()

  with mesh(*sizes):
    arguments = put(logits, HIDDEN), put(labels, BATCH), put(weight, BATCH)
    gradient, nats = jax.jit(jax.grad(weighted, has_aux=True))(*arguments)
    assert gradient.sharding.spec == HIDDEN
  np.testing.assert_allclose(nats, plain(logits, labels), atol=2e-6)
  np.testing.assert_allclose(gradient, jax.grad(weighted_plain)(logits), atol=1e-6)
  assert not np.array(gradient)[..., V:].any()


def test_uniform_logits_cost_ln_of_the_real_vocabulary():
  labels = np.arange(V)[None]
  nats = cross_entropy(jnp.full((1, V, PADDED), 7.0), labels, V)
  np.testing.assert_allclose(nats, np.log(V), rtol=3e-7)  # one bit of float32


def test_padding_is_never_counted():
  logits, labels = data()
  loud = logits.copy()
  loud = loud.at[..., V:].set(1e4)
  np.testing.assert_array_equal(cross_entropy(loud, labels, V), cross_entropy(logits, labels, V))


def test_large_logits_do_not_overflow():
  logits, labels = data()
  np.testing.assert_allclose(
    cross_entropy(logits * 1e4, labels, V), plain(logits * 1e4, labels), rtol=1e-5, atol=1e-2
  )


def test_perplexity_of_certainty_is_one():
  logits = jnp.full((1, 1, PADDED), -100.0).at[0, 0, 5].set(100.0)
  assert cross_entropy(logits, jnp.array([[5]]), V)[0, 0] == 0.0
  assert cross_entropy(logits, jnp.array([[6]]), V)[0, 0] == 200.0
