# SPDX-License-Identifier: Apache-2.0
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from gpt2_jax import linear
from gpt2_jax.kernels.cpu import dot, transpose_rows
from gpt2_jax.kernels.int8 import int8_limbs
from gpt2_jax.linear import Dense, Linear, matmul, normal
from gpt2_jax.quantization import Int8, int8
from gpt2_jax.sharding import HIDDEN, RESIDUAL, ROWS

B, T, IN, OUT = 8, 6, 16, 24

# JAX 0.8.0 and older cannot run the TPU's form on a CPU, nor fuse the conversion of int8.
old_cpu = pytest.mark.skipif(jax.__version_info__ < (0, 8, 1), reason="JAX 0.8.0 on a CPU")
OTHER_FORM = pytest.param("tpu", marks=old_cpu)

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


@pytest.mark.parametrize("form", ["cpu", OTHER_FORM])  # how it is written for each, computed here
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sizes", [(1, 1, 1), (2, 2, 2)], ids=str)
def test_matmul_and_its_gradients_are_the_plain_product(form, kind, sizes, mesh, put, monkeypatch):
  monkeypatch.setattr(linear, "platform", lambda: form)
  stored, gathered, contract, x_spec, y_spec = KINDS[kind]
  rng = np.random.default_rng(0)
  x, dy = rng.normal(size=(B, T, IN)), rng.normal(size=(B, T, OUT))
  w = rng.normal(size=(IN, OUT) if contract == 0 else (OUT, IN))

  @functools.partial(jax.jit, static_argnums=3)
  def both(x, w, dy, out_dtype):
    y, pull = jax.vjp(lambda x, w: matmul(x, w, None, gathered, contract, out_dtype), x, w)
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
      # float32: sums of 24 or 48 products. bfloat16: the operands are the rounded ones and the sum
      # is float32, so only what is stored in bfloat16 (8 bits) is rounded again, once; on a mesh, a
      # partial sum is rounded too.
      tight, once = 1e-6, 1e-6 if dtype == jnp.float32 else 2**-8
      assert relative(y, rx @ rw) < once
      assert relative(dx, rdy @ rw.T) < once
      assert relative(dw, expected_dw if contract == 0 else expected_dw.T) < tight


def test_matmul_keeps_float32_sums_where_asked(mesh, put):
  """The head: bfloat16 operands, logits that were never bfloat16."""
  rng = np.random.default_rng(0)
  x, w = rng.normal(size=(1, 4, IN)), rng.normal(size=(OUT, IN))
  with mesh(1, 1, 1):
    x_BTI = put(x, RESIDUAL).astype(jnp.bfloat16)
    y = matmul(
      x_BTI, put(w.astype(np.float32), P(None, None)), None, P("model", None), 1, jnp.float32
    )
  assert y.dtype == jnp.float32
  assert relative(y, rounded(x, jnp.bfloat16) @ rounded(w, jnp.bfloat16).T) < 1e-6


@pytest.mark.parametrize("rows", [1, 2, 8])
def test_the_cpus_dot_of_a_few_rows_is_those_rows(rows, mesh, put):
  rng = np.random.default_rng(0)
  a, b = (
    rounded(rng.normal(size=(rows, IN)), jnp.bfloat16),
    rounded(rng.normal(size=(IN, OUT)), jnp.bfloat16),
  )
  with mesh(1, 1, 1):
    spec = P(ROWS, "model")
    y = dot(
      put(a, spec).astype(jnp.bfloat16), put(b, P(None, None)).astype(jnp.bfloat16), (1, 0), spec
    )
  assert y.shape == (rows, OUT) and y.dtype == jnp.float32
  assert relative(y, a @ b) < 1e-6


@pytest.mark.parametrize("rows, length", [(8, 1), (8, 6), (8, 128), (8, 192), (1, 6), (1, 8)])
def test_transpose_rows_is_the_transpose(rows, length, mesh, put):
  x = np.arange(rows * length * 4, dtype=np.float32).reshape(rows, length, 4)
  for sizes in ((1, 1, 1), (2, 2, 2))[: 1 + (rows == 8)]:
    with mesh(*sizes):
      y = jax.jit(transpose_rows)(put(x, P(ROWS, None, "model")))
      assert y.sharding.spec == P("model", ROWS)
    np.testing.assert_array_equal(y, x.reshape(-1, 4).T)


@pytest.mark.parametrize("axis", [0, 1])
def test_normal_pads_with_zeros_and_never_changes_the_rest(axis, mesh):
  with mesh(1, 1, 1):
    key = jax.random.key(3)
    whole = np.array(normal(key, (50, 40), P(None, None), 0.02, (axis, 1000)))
    larger = np.array(
      normal(key, (50, 48) if axis else (64, 40), P(None, None), 0.02, (axis, (50, 40)[axis]))
    )
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
  assert relative(y, x @ np.array(linear.w[...].array, np.float64) + b) < 1e-6


@pytest.mark.parametrize("form", ["cpu", "tpu"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_bias_is_added_once_and_its_gradient_is_the_sum_over_rows(
  mesh, put, dtype, form, monkeypatch
):
  monkeypatch.setattr(linear, "platform", lambda: form)
  rng = np.random.default_rng(3)
  x, dy = (jnp.asarray(rng.normal(size=(4, 6, n)), dtype) for n in (8, 16))
  w, b = (np.float32(rng.normal(size=shape)) for shape in ((8, 16), (16,)))
  with mesh(2, 2, 2):
    args = put(x, RESIDUAL), put(w, P("data", "model")), put(b, P("model"))
    y, pull = jax.vjp(lambda *args: matmul(*args, P(None, "model")), *args)
    *_, db = pull(put(dy, HIDDEN))
  tolerance = {"float32": 1e-5, "bfloat16": 2e-2}[
    dtype
  ]  # bfloat16 rounds y to 8 bits; db is summed in float32
  np.testing.assert_allclose(
    np.float32(y),
    np.float32(x) @ np.float32(jnp.asarray(w, dtype)) + b,
    rtol=tolerance,
    atol=tolerance,
  )
  np.testing.assert_allclose(db, np.float32(dy).sum((0, 1)), rtol=1e-5, atol=1e-5)


def table(w_OI) -> Dense:
  return Dense(w_OI, outputs_are_rows=True)


def dequantized(w: Int8):
  return np.asarray(w.q_OI, np.float64) * np.asarray(w.scale_O, np.float64)[..., None]


def test_int8_is_the_nearest_step_of_each_row(mesh, put):
  rng = np.random.default_rng(0)
  w = (
    rng.normal(size=(3, 40, 64)) * np.logspace(-35, 30, 40)[:, None]
  )  # rows of very different sizes
  w[:, 7], w[0, 3, 5] = 0, 0
  w = w.astype(np.float32)
  with mesh(1, 1, 1):
    found = jax.jit(int8)(table(put(w, P(None, None, None))))
  q, most = np.asarray(found.q_OI), np.abs(w).max(-1)
  assert q.dtype == np.int8 and found.scale_O.dtype == jnp.float32
  assert np.isfinite(found.scale_O).all() and (np.asarray(found.scale_O) > 0).all()
  assert (np.abs(q.astype(int)).max(-1) == np.where(most > 0, 127, 0)).all(), (
    "all of the range, both ways alike"
  )
  half = np.asarray(found.scale_O, np.float64)[..., None] / 2
  assert (
    np.abs(dequantized(found) - w) <= half * (1 + 127 * 2**-22)
  ).all()  # half a step and float32's rounding of it


@pytest.mark.parametrize("n", [2, 3])
def test_limbs_add_up(n):
  x = (np.random.default_rng(0).normal(size=(5, 300)) * np.logspace(-20, 20, 5)[:, None]).astype(
    np.float32
  )
  x[2] = 0
  found, unit = (np.asarray(a, np.float64) for a in jax.jit(int8_limbs, static_argnums=1)(x, n))
  total = sum(digit / 254.0**i for i, digit in enumerate(np.split(found, n))) * unit
  most = np.abs(x).max(1, keepdims=True).astype(np.float64)
  assert np.abs(found).max() <= 127
  assert (np.abs(total - x) <= most * (0.5 / (127 * 254 ** (n - 1)) + 2**-23)).all()


@pytest.mark.parametrize("form", ["cpu", "tpu"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sizes", [(1, 1, 1), (2, 2, 2), (1, 1, 2)], ids=str)
def test_matmul_takes_int8_for_the_values_it_stands_for(form, kind, sizes, mesh, put, monkeypatch):
  monkeypatch.setattr(linear, "platform", lambda: form)
  """Few rows go another way than many on the CPU; both keep the activations."""
  stored, gathered, contract, x_spec, y_spec = KINDS[kind]
  rng = np.random.default_rng(0)
  w, b = rng.normal(size=(OUT, IN)).astype(np.float32), rng.normal(size=OUT).astype(np.float32)
  w[5] = 0
  with mesh(*sizes):
    w_int8 = jax.jit(int8)(table(put(w, stored if contract else P(*stored[::-1]))))
    b_O = put(b, P(gathered[1 - contract]))
    for rows in ((8, 1), (8, 6)) if sizes == (2, 2, 2) else ((1, 1), (8, 6)):
      x = (
        rng.normal(size=(*rows, IN)) * np.array([1, 100, 1, 1e-4, 1, 0])[: rows[1], None]
      )  # a row alone has its digits
      for dtype in (jnp.float32, jnp.bfloat16):
        here = jax.jit(
          lambda x, w, b: w.matmul(x, b, gathered, out_dtype=jnp.float32)
        )  # traced for this form
        y = here(put(x, x_spec).astype(dtype), w_int8, b_O)
        assert y.sharding.spec == y_spec
        given = rounded(x, dtype)
        expected = given @ dequantized(w_int8).T + b
        # of a row's largest value: two digits of base 254 for bfloat16, three for float32; sums as
        # elsewhere
        left_out = (
          np.abs(given).max(-1) * np.abs(dequantized(w_int8)).sum(1).max() * 0.5 / (127 * 254)
        )
        once = 1e-6 * np.abs(expected).max(-1) + (
          left_out if dtype == jnp.bfloat16 else left_out / 254
        )
        assert (np.abs(np.asarray(y, np.float64) - expected).max(-1) <= once).all()


@old_cpu
def test_few_rows_read_int8_and_no_float_copy_of_it(mesh, put):
  """What makes decoding fast: as temporary memory, not even a bfloat16 weight."""
  with mesh(1, 1, 1):
    w = jax.jit(int8)(table(put(np.ones((512, 256), np.float32), P(None, None))))
    for dtype in (jnp.float32, jnp.bfloat16):
      x = put(np.ones((2, 1, 256)), RESIDUAL).astype(dtype)
      compiled = jax.jit(lambda x, w: w.matmul(x, None, P(None, None))).lower(x, w).compile()
      assert compiled.memory_analysis().temp_size_in_bytes < 512 * 256


@pytest.mark.parametrize("platform", ["tpu", "cuda"])
def test_accelerators_convert_int8_behind_a_barrier(platform, mesh, put):
  with mesh(1, 1, 1):
    w = jax.jit(int8)(table(put(np.ones((OUT, IN), np.float32), P(None, None))))
    x = put(np.ones((1, 1, IN)), RESIDUAL).astype(jnp.bfloat16)
    text = (
      jax.jit(lambda x, w: w.matmul(x, None, P(None, None)))
      .trace(x, w)
      .lower(lowering_platforms=(platform,))
      .as_text()
    )
  assert "optimization_barrier" in text and "xi32" not in text


@pytest.mark.parametrize("sizes", [(1, 1, 1), (1, 4, 2)], ids=str)
@pytest.mark.parametrize("spec", [P("data", "model"), P("model", "data")], ids=str)
def test_gradients_pass_through_int8(sizes, spec, mesh, put):
  """To x and the bias, as through the rounded weight; the int8 weight has none."""
  rng = np.random.default_rng(0)
  x, dy = (rng.normal(size=(4, 3, n)).astype(np.float32) for n in (IN, OUT))
  with mesh(*sizes):
    gathered = P(*(None if name == "data" else name for name in spec))
    rows = P(("replica", "data"), None, gathered[0])
    w = int8(table(put(rng.normal(size=(OUT, IN)), P(spec[1], spec[0]))))
    bias = put(rng.normal(size=OUT).astype(np.float32), P(gathered[1]))
    for dtype, tolerance in ((jnp.float32, 1e-5), (jnp.bfloat16, 2e-2)):

      def total(x, bias):
        return (w.matmul(x, bias, gathered, out_dtype=jnp.float32) * dy).sum()

      dx, db = jax.jit(jax.grad(total, (0, 1)))(put(x, rows).astype(dtype), bias)
      expected = dy.astype(np.float64) @ dequantized(w)
      assert dx.dtype == dtype and db.dtype == jnp.float32
      scale = np.abs(expected).max()
      np.testing.assert_allclose(np.float64(dx), expected, atol=tolerance * scale)
      np.testing.assert_allclose(db, dy.sum((0, 1)), atol=tolerance * 10)
