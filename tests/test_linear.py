# SPDX-License-Identifier: Apache-2.0
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from gpt2_jax.linear import Linear, dot, normal, project, turned
from gpt2_jax.sharding import HIDDEN, RESIDUAL, ROWS

B, T, IN, OUT = 8, 6, 16, 24

# What the model does: (stored, gathered, contract, spec of x, spec of y)
KINDS = {
  "column": (P("data", "model"), P(None, "model"), 0, RESIDUAL, P(ROWS, None, "model")),
  "row": (P("model", "data"), P("model", None), 0, P(ROWS, None, "model"), RESIDUAL),
  "head": (P(("model", "data"), None), P("model", None), 1, RESIDUAL, P(ROWS, None, "model")),
}


def rounded(array, dtype):
  """float64 values that `dtype` can hold."""
  return np.asarray(jnp.asarray(array, dtype).astype(jnp.float32), np.float64)


def relative(found, expected):
  """Largest error, as a part of the largest value."""
  return np.abs(np.asarray(found, np.float64) - expected).max() / np.abs(expected).max()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sizes", [(1, 1, 1), (2, 2, 2)], ids=str)
def test_project_and_its_gradients_are_the_plain_product(kind, sizes, mesh, put):
  stored, gathered, contract, x_spec, y_spec = KINDS[kind]
  rng = np.random.default_rng(0)
  x, dy = rng.normal(size=(B, T, IN)), rng.normal(size=(B, T, OUT))
  w = rng.normal(size=(IN, OUT) if contract == 0 else (OUT, IN))

  @functools.partial(jax.jit, static_argnums=3)
  def both(x, w, dy, out_dtype):
    y, pull = jax.vjp(lambda x, w: project(x, w, None, gathered, contract, out_dtype), x, w)
    return y, *pull(dy)

  with mesh(*sizes):
    w_IO = put(w.astype(np.float32), stored)
    for dtype in (jnp.float32, jnp.bfloat16):
      y, dx, dw = both(put(x, x_spec).astype(dtype), w_IO, put(dy, y_spec).astype(dtype), dtype)
      assert (y.dtype, dx.dtype, dw.dtype) == (dtype, dtype, jnp.float32)
      assert y.sharding.spec == y_spec
      assert dx.sharding.spec == x_spec
      assert dw.sharding == w_IO.sharding, "the gradient is scattered as the weight is stored"
      rx, rdy, rw = (rounded(a, dtype) for a in (x, dy, w))
      rw = rw if contract == 0 else rw.T
      flat, dflat = rx.reshape(-1, IN), rdy.reshape(-1, OUT)
      expected_dw = flat.T @ dflat
      # float32: sums of 24 or 48 products. bfloat16: the operands are the rounded ones and the sum is float32,
      # so only what is stored in bfloat16 (8 bits) is rounded again, once; on a mesh, a partial sum is rounded too.
      tight, once = 1e-6, 1e-6 if dtype == jnp.float32 else 2**-8
      assert relative(y, rx @ rw) < once
      assert relative(dx, rdy @ rw.T) < once
      assert relative(dw, expected_dw if contract == 0 else expected_dw.T) < tight


def test_project_keeps_float32_sums_where_asked(mesh, put):
  """The head: bfloat16 operands, logits that were never bfloat16."""
  rng = np.random.default_rng(0)
  x, w = rng.normal(size=(1, 4, IN)), rng.normal(size=(OUT, IN))
  with mesh(1, 1, 1):
    x_BTI = put(x, RESIDUAL).astype(jnp.bfloat16)
    y = project(x_BTI, put(w.astype(np.float32), P(None, None)), None, P("model", None), 1, jnp.float32)
  assert y.dtype == jnp.float32
  assert relative(y, rounded(x, jnp.bfloat16) @ rounded(w, jnp.bfloat16).T) < 1e-6


@pytest.mark.parametrize("rows", [1, 7, 8])
def test_dot_of_a_few_rows_is_those_rows(rows, mesh, put):
  rng = np.random.default_rng(0)
  a, b = rounded(rng.normal(size=(rows, IN)), jnp.bfloat16), rounded(rng.normal(size=(IN, OUT)), jnp.bfloat16)
  with mesh(1, 1, 1):
    spec = P(ROWS, "model")
    y = dot(put(a, spec).astype(jnp.bfloat16), put(b, P(None, None)).astype(jnp.bfloat16), (1, 0), spec)
  assert y.shape == (rows, OUT) and y.dtype == jnp.float32
  assert relative(y, a @ b) < 1e-6


@pytest.mark.parametrize("rows, length", [(8, 1), (8, 6), (8, 128), (8, 192), (1, 6), (1, 8)])
def test_turned_is_the_transpose(rows, length, mesh, put):
  x = np.arange(rows * length * 4, dtype=np.float32).reshape(rows, length, 4)
  for sizes in ((1, 1, 1), (2, 2, 2))[: 1 + (rows == 8)]:
    with mesh(*sizes):
      y = jax.jit(turned)(put(x, P(ROWS, None, "model")))
      assert y.sharding.spec == P("model", ROWS)
    np.testing.assert_array_equal(y, x.reshape(-1, 4).T)


@pytest.mark.parametrize("axis", [0, 1])
def test_normal_pads_with_zeros_and_never_changes_the_rest(axis, mesh):
  with mesh(1, 1, 1):
    key = jax.random.key(3)
    whole = np.array(normal(key, (50, 40), P(None, None), 0.02, (axis, 1000)))
    larger = np.array(normal(key, (50, 48) if axis else (64, 40), P(None, None), 0.02, (axis, (50, 40)[axis])))
  np.testing.assert_array_equal(larger[:50, :40], whole)
  assert not larger[50:].any() and not larger[:, 40:].any()
  assert abs(whole.std() - 0.02) < 5 * 0.02 / np.sqrt(2 * whole.size)  # five standard errors
  assert abs(whole.mean()) < 5 * 0.02 / np.sqrt(whole.size)


def test_linear_adds_its_bias(mesh, put):
  rng = np.random.default_rng(0)
  x, b = rng.normal(size=(1, 3, IN)), rng.normal(size=OUT)
  with mesh(1, 1, 1):
    linear = Linear(jax.random.key(0), (IN, OUT), P("data", "model"), 0.5, True)
    linear.b[...] = put(b.astype(np.float32), P("model"))
    y = linear(put(x.astype(np.float32), RESIDUAL))
    without = Linear(jax.random.key(0), (IN, OUT), P("data", "model"), 0.5, False)
    assert len(jax.tree.leaves(without)) == 1
  assert relative(y, x @ np.array(linear.w[...], np.float64) + b) < 1e-6


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_bias_is_added_once_and_its_gradient_is_the_sum_over_rows(mesh, put, dtype):
  rng = np.random.default_rng(3)
  x, dy = (jnp.asarray(rng.normal(size=(4, 6, n)), dtype) for n in (8, 16))
  w, b = (np.float32(rng.normal(size=shape)) for shape in ((8, 16), (16,)))
  with mesh(2, 2, 2):
    args = put(x, RESIDUAL), put(w, P("data", "model")), put(b, P("model"))
    y, pull = jax.vjp(lambda *args: project(*args, P(None, "model")), *args)
    *_, db = pull(put(dy, HIDDEN))
  tolerance = {"float32": 1e-5, "bfloat16": 2e-2}[dtype]  # bfloat16 rounds y to 8 bits; db is summed in float32
  np.testing.assert_allclose(
    np.float32(y), np.float32(x) @ np.float32(jnp.asarray(w, dtype)) + b, rtol=tolerance, atol=tolerance
  )
  np.testing.assert_allclose(db, np.float32(dy).sum((0, 1)), rtol=1e-5, atol=1e-5)
