# SPDX-License-Identifier: Apache-2.0
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gpt2_jax.attention import causal_attention, masked_attention, self_attention
from gpt2_jax.kernels.chunked_attention import QUERIES
from gpt2_jax.sharding import HIDDEN

B, H, K = 2, 2, 4


def qkv(length, scale=2.0):
  return np.random.default_rng(0).normal(size=(3, B, length, H, K)) * scale


def reference(q, k, v, xp=np):
  """The formula, over the whole square."""
  scores = xp.einsum("bthk,bshk->bhts", q, k) / K**0.5
  scores = xp.where(xp.tril(xp.ones(scores.shape[-2:], bool)), scores, -xp.inf)
  p = xp.exp(scores - scores.max(-1, keepdims=True))
  return xp.einsum("bhts,bshk->bthk", p / p.sum(-1, keepdims=True), v)


@pytest.mark.parametrize("length", [1, 37, QUERIES, QUERIES + 44])
def test_causal_attention_is_the_formula(length):
  """Below, at and above one chunk of queries; values against float64, gradients against those of
  the formula."""
  q, k, v = qkv(length)
  weight = np.random.default_rng(1).normal(size=(B, length, H, K)).astype(np.float32)
  f32 = [jnp.float32(x) for x in (q, k, v)]
  np.testing.assert_allclose(jax.jit(causal_attention)(*f32), reference(q, k, v), atol=5e-6)

  def gradients(attention):
    return jax.jit(jax.grad(lambda *qkv: (attention(*qkv) * weight).sum(), (0, 1, 2)))(*f32)

  # Up to 300 float32 terms a sum, of size up to about 10.
  for ours, theirs in zip(
    gradients(causal_attention), gradients(lambda *qkv: reference(*qkv, xp=jnp)), strict=True
  ):
    np.testing.assert_allclose(ours, theirs, atol=5e-5)


def test_the_future_is_never_read():
  length, since = QUERIES + 20, QUERIES - 6
  before = jnp.float32(qkv(length))
  after = before.at[:, :, since:].multiply(-100)
  y = jax.jit(causal_attention)
  np.testing.assert_array_equal(y(*before)[:, :since], y(*after)[:, :since])
  assert np.all(y(*before)[:, since:] != y(*after)[:, since:])


def test_masked_attention_hides_what_the_mask_hides():
  q, k, v = (jnp.float32(x) for x in qkv(6))
  lengths = np.array([2, 5])
  mask = np.arange(6) < lengths[:, None, None, None]
  y = masked_attention(q, k, v, mask)
  for row, n in enumerate(lengths):
    alone = masked_attention(q[row : row + 1], k[row : row + 1, :n], v[row : row + 1, :n], True)
    np.testing.assert_allclose(y[row : row + 1], alone, atol=1e-6)


@pytest.mark.parametrize("length", [37, QUERIES + 44])
def test_packed_segments_attend_as_if_each_stood_alone(length):
  """Values and gradients, below and above one chunk of queries."""
  ends = [0, 5, 6, 30, length]
  segments_BT = np.repeat(np.arange(4), np.diff(ends))[None].repeat(B, 0)
  weight = np.random.default_rng(1).normal(size=(B, length, H, K)).astype(np.float32)
  arguments = [jnp.float32(x) for x in qkv(length)]

  def packed(q, k, v):
    return causal_attention(q, k, v, segments_BT=segments_BT)

  def apart(q, k, v):
    spans = [slice(a, b) for a, b in zip(ends, ends[1:], strict=False)]
    return jnp.concatenate([causal_attention(q[:, s], k[:, s], v[:, s]) for s in spans], axis=1)

  np.testing.assert_allclose(jax.jit(packed)(*arguments), jax.jit(apart)(*arguments), atol=5e-6)
  gradients = [
    jax.jit(jax.grad(lambda *x, form=form: (form(*x) * weight).sum(), (0, 1, 2)))(*arguments)
    for form in (packed, apart)
  ]
  for ours, theirs in zip(*gradients, strict=True):
    np.testing.assert_allclose(ours, theirs, atol=5e-5)


def test_scores_and_softmax_are_float32_under_bfloat16():
  """Scores of about 30 would be off by up to 0.1 in bfloat16, and the probabilities by 10 %."""
  low = [jnp.asarray(x, jnp.bfloat16) for x in qkv(37, scale=4.0)]
  y = causal_attention(*low)
  exact = reference(*(np.array(x.astype(jnp.float32), np.float64) for x in low))
  assert y.dtype == jnp.bfloat16
  # What is rounded to 8 bits: the probabilities, 2^-9 of each, and the result.
  np.testing.assert_allclose(
    y.astype(jnp.float32), exact, rtol=2**-8, atol=2**-9 * np.abs(exact).max()
  )


def test_dropout_meets_the_probabilities():
  q, k, v = (jnp.float32(x) for x in qkv(9))
  np.testing.assert_allclose(
    causal_attention(q, k, v, lambda p, start: p * 0.5),
    causal_attention(q, k, v) * 0.5,
    rtol=1e-6,
    atol=1e-7,
  )
  assert not causal_attention(q, k, v, lambda p, start: jnp.zeros_like(p)).any()


@pytest.mark.parametrize("kernel", ["fused", "splash"])
@pytest.mark.parametrize(
  "sizes, heads, length, dtype",
  [
    ((1, 1, 1), 12, 512, "bfloat16"),
    (
      (1, 1, 1),
      25,
      300,
      "float32",
    ),  # heads that do not fill the last group, a length that fills no block
    ((1, 1, 1), 25, 130, "bfloat16"),
    ((2, 2, 2), 12, 130, "float32"),
  ],
)
def test_the_kernels_of_a_tpu_are_plain_attention(kernel, sizes, heads, length, dtype, mesh, put):
  """Interpreted, at the width of GPT-2's heads: values and gradients against the chunked form."""
  with mesh(*sizes):
    rows, width = sizes[0] * sizes[1], heads * 64
    rng = np.random.default_rng(0)
    c_BTC = put(jnp.asarray(rng.normal(size=(rows, length, 3 * width)), dtype), HIDDEN)
    weight = put(jnp.asarray(rng.normal(size=(rows, length, width)), jnp.float32), HIDDEN)

    def both(kernel):
      weighted = jax.jit(jax.grad(lambda c: (self_attention(c, 64, kernel) * weight).sum()))
      return jax.jit(lambda c: self_attention(c, 64, kernel))(c_BTC), weighted(c_BTC)

    for ours, plain in zip(both(kernel), both("chunked"), strict=True):
      assert ours.dtype == dtype and ours.sharding == plain.sharding
      ours, plain = (np.asarray(x, np.float32) for x in (ours, plain))
      # 1e-2 of the largest value in bfloat16, whose last bit is 2^-8 of a value; 1e-5 in float32.
      np.testing.assert_allclose(
        ours, plain, atol=1e-2 * np.abs(plain).max() if dtype == "bfloat16" else 1e-5
      )


@pytest.mark.parametrize("kernel", ["fused", "splash"])
def test_the_kernels_of_a_tpu_attend_by_segments(kernel, mesh, put):
  """Values and gradients against the chunked form. Segments cross chunks of queries, one has one
  token, and a number comes again."""
  length, width = 300, 3 * 64
  with mesh(1, 1, 1):
    rng = np.random.default_rng(0)
    c_BTC = put(rng.normal(size=(2, length, 3 * width)).astype(np.float32), HIDDEN)
    weight = put(rng.normal(size=(2, length, width)).astype(np.float32), HIDDEN)
    segments_BT = np.sort(rng.integers(0, 4, (2, length)))
    segments_BT[:, 10], segments_BT[:, -2:] = 9, 0

    def both(kernel):
      def attention(c):
        return self_attention(c, 64, kernel, segments_BT=segments_BT)

      gradient = jax.jit(jax.grad(lambda c: (attention(c) * weight).sum()))
      return jax.jit(attention)(c_BTC), gradient(c_BTC)

    for ours, theirs in zip(both(kernel), both("chunked"), strict=True):
      np.testing.assert_allclose(ours, theirs, atol=1e-5)


@pytest.mark.parametrize("kernel", ["fused", "splash"])
def test_the_kernels_of_a_tpu_never_read_the_future(kernel, mesh, put):
  with mesh(1, 1, 1):
    before = put(np.random.default_rng(0).normal(size=(1, 280, 3 * 128)).astype(np.float32), HIDDEN)
    after = before.at[:, 260:].multiply(-100)
    y = jax.jit(lambda c: self_attention(c, 64, kernel))
    np.testing.assert_array_equal(y(before)[:, :260], y(after)[:, :260])
    assert np.all(y(before)[:, 260:] != y(after)[:, 260:])


@pytest.mark.parametrize("kernel", ["auto", "fused", "splash", "cudnn"])
def test_dropout_is_never_lost_to_a_kernel(kernel, mesh):
  with mesh(1, 1, 1):
    c_BTC = jnp.ones((1, 9, 3 * 64), out_sharding=HIDDEN)
    assert not self_attention(c_BTC, 64, kernel, lambda p, start: jnp.zeros_like(p)).any()


def test_a_kernel_of_other_devices_is_refused(mesh):
  with (
    mesh(1, 1, 1),
    pytest.raises(ValueError, match="attention is cudnn and the devices are cpus; set"),
  ):
    self_attention(jnp.ones((1, 8, 3 * 64), out_sharding=HIDDEN), 64, "cudnn")
