# SPDX-License-Identifier: Apache-2.0
import dataclasses
import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

from gpt2_jax.batch import Batch
from gpt2_jax.linear import Dense
from gpt2_jax.loss import NextToken, cross_entropy, mean_loss
from gpt2_jax.model import GPT2, ModelConfig, dropout, layer_norm
from gpt2_jax.sharding import BATCH, abstract_mesh
from gpt2_jax.sizes import ALIASES, SIZES, model_config


def nats(model, tokens_BT, key=None):
  """Mean loss of predicting tokens 1.. from the ones before."""
  return mean_loss(NextToken(), model, Batch(tokens_BT), key)[0]


TINY = ModelConfig(n_vocab=97, n_ctx=24, n_embd=24, n_head=3, n_layer=2, dtype="float32")
FIVE = dataclasses.replace(TINY, n_embd=40, n_head=5, pad_heads=True)
COUNTS = {"117M": 124_439_808, "345M": 354_823_168, "762M": 774_030_080, "1542M": 1_557_611_200}


def reference(config, arrays, tokens):
  """GPT-2 from its formula, in float64: logits [B, T, V]."""
  a = arrays
  heads, size = config.n_head, config.n_embd // config.n_head

  def norm(x, name, layer=...):
    y = (
      (x - x.mean(-1, keepdims=True))
      / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
      * a[name + ".g"][layer]
    )
    return y + a[name + ".b"][layer] if config.use_bias else y

  def linear(x, name, layer):
    y = x @ a[name + ".w"][layer]
    return y + a[name + ".b"][layer] if config.use_bias else y

  def gelu(x):
    if config.gelu == "tanh":
      return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))
    return 0.5 * x * (1 + np.vectorize(math.erf)(x / np.sqrt(2)))

  B, T = tokens.shape
  x = a["wte"][tokens] + a["wpe"][:T]
  for layer in range(config.n_layer):
    c = linear(norm(x, "h.ln_1", layer), "h.attn.c_attn", layer).reshape(B, T, heads, 3, size)
    y = np.zeros((B, T, heads, size))
    for head in range(heads):
      q, k, v = c[:, :, head].transpose(2, 0, 1, 3)
      scores = q @ k.transpose(0, 2, 1) / np.sqrt(size)
      scores[:, ~np.tri(T, dtype=bool)] = -np.inf
      p = np.exp(scores - scores.max(-1, keepdims=True))
      y[:, :, head] = p / p.sum(-1, keepdims=True) @ v
    x = x + linear(y.reshape(B, T, -1), "h.attn.c_proj", layer)
    x = x + linear(
      gelu(linear(norm(x, "h.ln_2", layer), "h.mlp.c_fc", layer)), "h.mlp.c_proj", layer
    )
  return norm(x, "ln_f") @ a["wte"].T


@jax.jit
def forward(model, tokens_BT, key=None):
  return model(tokens_BT, key)


@pytest.mark.parametrize("size, count", COUNTS.items())
def test_parameter_counts_are_exact(size, count, parameters):
  """From `jax.eval_shape`; what the padding of the vocabulary adds is not counted."""
  config = SIZES[size]
  with jax.sharding.use_abstract_mesh(abstract_mesh(1, 1, 1)):
    model = jax.eval_shape(lambda: GPT2(config, jax.random.key(0)))
    padding = (config.padded_vocab - config.n_vocab) * config.n_embd
  assert sum(leaf.size for leaf in jax.tree.leaves(model)) - padding == count == config.n_params
  bare = dataclasses.replace(config, use_bias=False, n_vocab=128)  # as nanoGPT trains
  with jax.sharding.use_abstract_mesh(abstract_mesh(1, 1, 1)):
    model = jax.eval_shape(lambda: GPT2(bare, jax.random.key(0)))
  assert sum(leaf.size for leaf in jax.tree.leaves(model)) == bare.n_params
  assert {leaf.dtype for leaf in jax.tree.leaves(model)} == {jnp.dtype("float32")}


def test_every_size_has_its_names():
  today = {"gpt2": "117M", "gpt2-medium": "345M", "gpt2-large": "762M", "gpt2-xl": "1542M"}
  today |= {"124M": "117M", "355M": "345M", "774M": "762M", "1558M": "1542M"}
  for alias, size in today.items():
    assert model_config(alias) == model_config(size) == SIZES[size]
  for size, aliases in ALIASES.items():
    assert all(model_config(alias) is SIZES[size] for alias in aliases)
  assert model_config("distilgpt2") == dataclasses.replace(SIZES["117M"], n_layer=6)


@pytest.mark.parametrize(
  "wrong, near", [("774", "774M"), ("gpt2-mediun", "gpt2-medium"), ("1542", "1542M")]
)
def test_an_unknown_size_names_the_nearest(wrong, near):
  with pytest.raises(
    ValueError, match=f"unknown size '{wrong}'; did you mean '{near}'. Sizes are .*gpt2-xl.*117M"
  ):
    model_config(wrong)


@pytest.mark.parametrize(
  "knobs, rule",
  [
    ({"n_embd": 100, "n_head": 12}, "n_embd of 100 does not divide by n_head of 12"),
    ({"gelu": "relu"}, "gelu is 'relu'; it is one of tanh, erf"),
    ({"remat": "some"}, "remat is 'some'; it is one of none, dots, attention, full"),
    ({"dtype": "float16"}, "dtype is 'float16'; it is one of float32, bfloat16"),
    ({"attn_pdrop": 1.0}, "attn_pdrop is 1.0; a dropout rate is at least 0 and below 1"),
    ({"embd_pdrop": -0.1}, "embd_pdrop is -0.1"),
  ],
)
def test_config_refuses_what_cannot_be(knobs, rule):
  with pytest.raises(ValueError, match=rule):
    ModelConfig(**knobs)


def test_heads_that_do_not_divide_say_the_way_out():
  with jax.sharding.use_abstract_mesh(abstract_mesh(2, 16, 4)):
    rule = "25 heads do not divide the model axis of 4; set --config.model.pad_heads=True"
    with pytest.raises(ValueError, match=re.escape(rule)):
      jax.eval_shape(lambda: GPT2(SIZES["1542M"], jax.random.key(0)))
    assert dataclasses.replace(SIZES["1542M"], pad_heads=True).padded_heads == 28
    assert SIZES["1542M"].padded_vocab == 50_304


@pytest.mark.parametrize("gelu, use_bias", [("tanh", True), ("erf", False)])
def test_logits_are_the_formula(gelu, use_bias, mesh, parameters, place, tokens):
  config = dataclasses.replace(TINY, gelu=gelu, use_bias=use_bias)
  arrays, tokens_BT = parameters(config), tokens(2, 24, 97)
  assert any(name.endswith(".b") for name in arrays) == use_bias
  with mesh(1, 1, 1):
    logits = np.array(forward(place(config, arrays), tokens_BT))
  assert logits.dtype == np.float32
  expected = reference(config, arrays, tokens_BT)
  assert np.abs(expected).max() > 2  # there is something to get wrong
  np.testing.assert_allclose(logits[..., :97], expected, atol=2e-5)
  assert np.all(logits[..., 97:] == -np.inf)


def test_layer_norm_has_float32_statistics(mesh):
  """A large mean over a small spread, in bfloat16: its own sums would lose the spread."""
  rng = np.random.default_rng(0)
  x, g, b = (
    jnp.asarray(64 + rng.normal(size=(2, 3, 256)), jnp.bfloat16),
    rng.normal(size=256),
    rng.normal(size=256),
  )
  with mesh(1, 1, 1):
    y = layer_norm(x, jnp.float32(g), jnp.float32(b))
  exact = np.array(x.astype(jnp.float32), np.float64)
  exact = (exact - exact.mean(-1, keepdims=True)) / np.sqrt(
    exact.var(-1, keepdims=True) + 1e-5
  ) * g + b
  assert y.dtype == jnp.bfloat16
  np.testing.assert_allclose(
    y.astype(jnp.float32), exact, rtol=2**-8, atol=1e-5
  )  # rounded to 8 bits once


def test_bfloat16_is_close_to_float32(mesh, parameters, place, tokens):
  """Each of about 20 roundings on the way is 2^-9 of its value, and they add up like noise:
  sqrt(20) / 512 is 1 %."""
  arrays, tokens_BT = parameters(TINY), tokens(2, 24, 97)
  low = dataclasses.replace(TINY, dtype="bfloat16")
  with mesh(1, 1, 1):
    exact, rough = (np.array(forward(place(c, arrays), tokens_BT))[..., :97] for c in (TINY, low))
  assert rough.dtype == np.float32
  error = np.sqrt(np.square(rough - exact).mean() / np.square(exact).mean())
  assert 1e-4 < error < 2e-2, "above: something else is bfloat16 too; below: nothing was"


def test_future_tokens_never_change_past_logits(mesh, parameters, place, tokens):
  before = tokens(2, 24, 97)
  with mesh(1, 1, 1):
    model = place(TINY, parameters(TINY))
    for since in (1, 13, 23):
      after = before.copy()
      after[:, since:] = (after[:, since:] + 1) % 97
      a, b = forward(model, before), forward(model, after)
      np.testing.assert_array_equal(a[:, :since], b[:, :since])
      assert np.abs(a - b)[:, since:, :97].max(-1).min() > 1e-3


def test_a_sequence_longer_than_the_context_is_refused(mesh, parameters, place, tokens):
  with mesh(1, 1, 1):
    model = place(TINY, parameters(TINY))
    with pytest.raises(ValueError, match="25 tokens exceed the context of 24"):
      jax.eval_shape(model, tokens(1, 25, 97))


def test_hidden_tells_the_scale_of_each_layer(mesh, parameters, place, tokens):
  with mesh(1, 1, 1):
    arrays = parameters(TINY) | {
      "h.attn.c_proj.w": np.zeros((2, 24, 24)),
      "h.attn.c_proj.b": np.zeros((2, 24)),
    }
    arrays |= {
      "h.mlp.c_proj.w": np.zeros((2, 96, 24)),
      "h.mlp.c_proj.b": np.ones((2, 24)) * [[0.0], [1.0]],
    }
    tokens_BT = tokens(2, 24, 97)
    _, rms_L, _ = jax.jit(lambda model, tokens: model.hidden(model.embed(tokens)))(
      place(TINY, arrays), tokens_BT
    )
  x = arrays["wte"][tokens_BT] + arrays["wpe"]  # the first block then adds nothing, the second 1
  np.testing.assert_allclose(rms_L, [np.sqrt(np.square(x + n).mean()) for n in (0, 1)], rtol=1e-5)


def test_dropout_keeps_the_expectation(mesh):
  """Each value is dropped or scaled; over 40,000 the share kept is within 5 standard errors of 1 -
  rate."""
  with mesh(1, 1, 1):
    y = np.array(dropout(jnp.full((200, 200), 3.0), 0.2, jax.random.key(0)))
    assert dropout(y, 0.2, None) is y and dropout(y, 0.0, jax.random.key(0)) is y
  np.testing.assert_allclose(np.unique(y), [0, 3.75])
  assert abs((y > 0).mean() - 0.8) < 5 * math.sqrt(0.2 * 0.8 / y.size)


@pytest.mark.parametrize(
  "where, silent",
  [
    ("embd_pdrop", ""),
    ("attn_pdrop", ""),
    ("resid_pdrop", "h.attn.c_proj"),
    ("resid_pdrop", "h.mlp.c_proj"),
  ],
)
def test_dropout_is_by_key(where, silent, mesh, parameters, place, tokens):
  """`silent` is a branch that adds nothing, so that the dropout of the other one shows."""
  config = dataclasses.replace(TINY, n_layer=1, **{where: 0.3})
  arrays, tokens_BT = parameters(config), tokens(2, 24, 97)
  arrays |= {
    name: array * 0 for name, array in arrays.items() if silent and name.startswith(silent)
  }
  with mesh(1, 1, 1):
    model = place(config, arrays)
    one, same, other = (
      np.array(forward(model, tokens_BT, jax.random.key(n)))[..., :97] for n in (1, 1, 2)
    )
    without = np.array(forward(model, tokens_BT))[..., :97]
  np.testing.assert_array_equal(one, same)
  assert np.abs(one - other).max() > 1e-2 and np.abs(one - without).max() > 1e-2
  np.testing.assert_allclose(without, reference(config, arrays, tokens_BT), atol=2e-5)


def test_remat_and_unroll_change_the_work_not_the_gradients(mesh, parameters, place, tokens):
  """With dropout, so that what is computed again must draw the same numbers again."""
  base = dataclasses.replace(TINY, resid_pdrop=0.1)
  tokens_BT, grads, programs = tokens(2, 24, 97), {}, {}
  with mesh(1, 1, 1):
    for knobs in (("none", 1), ("dots", 1), ("attention", 1), ("full", 1), ("none", 2)):
      model = place(dataclasses.replace(base, remat=knobs[0], unroll=knobs[1]), parameters(base))
      step = jax.jit(jax.grad(nats)).trace(model, tokens_BT, jax.random.key(0))
      programs[knobs] = str(step.jaxpr)
      grads[knobs] = jax.device_get(
        jax.tree.leaves(step.lower().compile()(model, tokens_BT, jax.random.key(0)))
      )
  for knobs, leaves in grads.items():
    for ours, theirs in zip(leaves, grads["none", 1], strict=True):
      np.testing.assert_allclose(
        ours, theirs, rtol=1e-5, atol=1e-6 * np.abs(theirs).max(), err_msg=str(knobs)
      )
  products = {knobs: program.count("dot_general[") for knobs, program in programs.items()}
  assert products["none", 1] == products["dots", 1] < products["attention", 1]
  assert products["attention", 1] < products["full", 1]
  assert [knobs for knobs, program in programs.items() if "unroll=2" in program] == [("none", 2)]


@pytest.fixture(scope="module")
def five_heads(mesh, parameters, place, unpadded, put, tokens):
  """Logits, loss and gradients of 5 heads by the size of the model axis, on real parameters with
  nonzero biases."""
  arrays = parameters(FIVE)

  @jax.jit
  @functools.partial(jax.value_and_grad, has_aux=True)
  def everything(model, tokens_BT):
    logits_BTV = model(tokens_BT)
    return cross_entropy(logits_BTV[:, :-1], tokens_BT[:, 1:], 97).mean(), logits_BTV

  found = {}
  for n in (1, 2, 4, 8):
    with mesh(1, 8 // n if n > 1 else 1, n):
      model = place(FIVE, arrays)
      heads = model.h.attn.c_proj.w[...].array.shape[1] // 8
      (loss, logits), grads = everything(model, put(tokens(4, 24, 97), BATCH))
      found[n] = heads, np.array(logits)[..., :97], float(loss), unpadded(grads, arrays)
  return found


@pytest.mark.parametrize("n", [2, 4, 8])
def test_padded_heads_change_nothing(n, five_heads):
  """`unpadded` also checks that the gradients of all padding are exactly zero, so that it stays
  zero."""
  _, logits, loss, grads = five_heads[1]
  heads, padded_logits, padded_loss, padded_grads = five_heads[n]
  assert (five_heads[1][0], heads) == (5, {2: 6, 4: 8, 8: 8}[n])
  np.testing.assert_allclose(padded_logits, logits, atol=2e-5)
  assert padded_loss == pytest.approx(loss, abs=2e-6)
  for name, grad in grads.items():
    np.testing.assert_allclose(
      padded_grads[name], grad, atol=1e-5 * np.abs(grad).max(), err_msg=name
    )


def test_five_heads_on_one_device_are_the_formula(five_heads, parameters, tokens):
  np.testing.assert_allclose(
    five_heads[1][1], reference(FIVE, parameters(FIVE), tokens(4, 24, 97)), atol=2e-5
  )


def test_padded_vocabulary_is_never_counted(mesh, parameters, place, put, tokens):
  """Uniform logits cost ln V exactly, and loud padding costs nothing."""
  with mesh(1, 1, 1):
    arrays = parameters(TINY)
    model = place(TINY, arrays)
    loss, tokens_BT = jax.jit(nats), tokens(2, 24, 97)
    quiet = loss(model, tokens_BT)
    loud = np.full((128, 24), 100, np.float32)
    loud[:97] = arrays["wte"]
    model.wte = nnx.Param(Dense(put(loud, P(("model", "data"), None)), outputs_are_rows=True))
    assert loss(model, tokens_BT) == quiet
    uniform = loss(place(TINY, arrays | {"wte": np.zeros((97, 24))}), tokens_BT)
  assert float(uniform) == pytest.approx(
    math.log(97), rel=1e-6
  )  # a float32 mean of 46 equal numbers


def test_initialization_is_as_published(mesh):
  """N(0, 0.02), wpe N(0, 0.01), what writes to the residual stream over sqrt(2 L); biases 0, gains
  1."""
  config = ModelConfig(n_vocab=500, n_ctx=256, n_embd=64, n_head=4, n_layer=8)
  with mesh(1, 1, 1):
    model = jax.jit(GPT2, static_argnums=0)(config, jax.random.key(0))
  std = {
    "wte": 0.02,
    "wpe": 0.01,
    "c_attn": 0.02,
    "c_fc": 0.02,
    "attn.c_proj": 0.005,
    "mlp.c_proj": 0.005,
  }
  h = model.h
  found = {
    "wte": model.wte[...].array[:500],
    "wpe": model.wpe[...],
    "c_attn": h.attn.c_attn.w[...].array,
    "c_fc": h.mlp.c_fc.w[...].array,
  }
  found |= {"attn.c_proj": h.attn.c_proj.w[...].array, "mlp.c_proj": h.mlp.c_proj.w[...].array}
  for name, x in found.items():
    assert float(x.std()) == pytest.approx(std[name], rel=5 / math.sqrt(2 * x.size)), (
      name
    )  # five standard errors
  assert not np.array_equal(h.attn.c_proj.w[...].array[0], h.attn.c_proj.w[...].array[1])
  for ln in (h.ln_1, h.ln_2, model.ln_f):
    assert (ln.g[...] == 1).all() and not ln.b[...].any()
  assert not any(x.b[...].any() for x in (h.attn.c_attn, h.attn.c_proj, h.mlp.c_fc, h.mlp.c_proj))
