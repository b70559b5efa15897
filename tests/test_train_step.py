# SPDX-License-Identifier: Apache-2.0
"""What one update computes, and that no mesh changes it. The loop around it is test_train.py's."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

from gpt2_jax import train
from gpt2_jax.batch import Batch
from gpt2_jax.finetune.trainable import partition, trainable_mask
from gpt2_jax.linear import Dense
from gpt2_jax.loss import NextToken, mean_loss
from gpt2_jax.model import ModelConfig
from gpt2_jax.optimizer import adamw
from gpt2_jax.runs.validation import evaluation_sums
from gpt2_jax.schedules import cosine
from gpt2_jax.sharding import BATCH, ROWS, abstract_mesh
from gpt2_jax.sizes import SIZES
from gpt2_jax.train import (
  TrainState,
  init_state,
  scan_steps,
  train_step,
)

TINY = ModelConfig(
  n_vocab=97, n_ctx=8, n_embd=40, n_head=4, n_layer=2, dtype="float32", pad_heads=True
)
FIVE = dataclasses.replace(TINY, n_head=5)
OPTIMIZER = adamw(cosine(1e-3, 6, 2, 0.1), 0.9, 0.95, 0.1, 1.0)
init = jax.jit(functools.partial(init_state, optimizer=OPTIMIZER), static_argnames="model_config")


@functools.partial(jax.jit, static_argnames="microbatches")
def step_once(state, tokens_BT, microbatches=1):
  return train_step(
    state, Batch(tokens_BT), NextToken(), optimizer=OPTIMIZER, microbatches=microbatches
  )


@pytest.mark.parametrize("rate", [1e38, 1e30])
def test_an_update_that_is_not_finite_is_skipped(rate, mesh):
  """Gradient and loss are finite: all of the state but the counts keeps its bits."""
  optimizer = adamw(cosine(rate, 6, 0, 0.1), 0.9, 0.95, 0.1, 1.0)
  with mesh(1, 1, 1):
    state = init(jax.random.key(0), model_config=TINY)
    step = jax.jit(
      lambda state, tokens: train_step(state, Batch(tokens), NextToken(), optimizer=optimizer)
    )
    after, metrics = step(state, batch(0))
  assert np.isfinite(metrics["loss"]) and np.isfinite(metrics["grad_norm"])
  assert int(metrics["skips"]) == int(after.skipped_total) == 1
  assert same((state.model, state.opt_state), (after.model, after.opt_state))


def nats(model, tokens_BT):
  return mean_loss(NextToken(), model, Batch(tokens_BT))[0]


def gradients(model, tokens_BT, microbatches, key=None):
  """Mean loss and its gradient in every parameter."""
  trained, frozen = partition(model, trainable_mask(model, ("*",)))
  sums, grads = train.gradients(NextToken(), trained, frozen, Batch(tokens_BT), microbatches, key)
  return sums["nats"] / sums["tokens"], grads


def batch(step):
  """32 windows, counting up from anywhere: there is something to learn."""
  starts = np.random.default_rng(step).integers(0, 97, (32, 1))
  return ((starts + np.arange(TINY.n_ctx + 1)) % 97).astype(np.int32)


def same(a, b):
  """Whether two trees hold the same bits, NaN included."""
  pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
  return all(np.array(x).tobytes() == np.array(y).tobytes() for x, y in pairs)


@pytest.fixture(scope="module")
def six_steps(mesh, put, parameters, unpadded):
  """six_steps(config, sizes, microbatches): parameters before, six losses, parameters after; all
  without padding."""

  @functools.cache
  def run(config, sizes, microbatches=1):
    shapes, losses = parameters(config), []
    with mesh(*sizes):
      state = init(jax.random.key(0), model_config=config)
      shardings = [x.sharding for x in jax.tree.leaves(state)]
      before = unpadded(state.model, shapes)
      for step in range(6):
        state, metrics = step_once(state, put(batch(step), BATCH), microbatches=microbatches)
        losses.append(float(metrics["loss"]))
      assert [x.sharding for x in jax.tree.leaves(state)] == shardings
      assert int(state.step) == 6 and int(state.skipped_in_a_row) == 0
    return before, losses, unpadded(state.model, shapes)

  return run


MESHES = [
  (TINY, (1, 8, 1), 1),
  (TINY, (2, 2, 2), 1),
  (TINY, (1, 1, 8), 1),
  (FIVE, (1, 4, 2), 1),
  (FIVE, (1, 2, 4), 1),
  (TINY, (1, 1, 1), 4),
  (TINY, (2, 2, 2), 4),
]
IDS = [f"{config.n_head} heads {sizes} {32 // m} rows at a time" for config, sizes, m in MESHES]


@pytest.mark.parametrize("config, sizes, microbatches", MESHES, ids=IDS)
def test_six_losses_are_those_of_one_device(config, sizes, microbatches, six_steps):
  """float32 sums in another order: a few units of 5e-7 in a loss of 4.6."""
  before, losses, after = six_steps(config, (1, 1, 1))
  assert losses[0] - losses[5] > 0.1, "it learns, so that the updates are compared too"
  found_before, found_losses, found_after = six_steps(config, sizes, microbatches)
  np.testing.assert_allclose(found_losses, losses, rtol=0, atol=1e-5)
  for name, value in before.items():
    # The same random bits; XLA may round the last bits of the normal distribution's polynomial
    # otherwise.
    np.testing.assert_allclose(
      found_before[name], value, rtol=1e-6, atol=0, err_msg=f"{name} at initialization"
    )


@pytest.mark.parametrize("size", ["117M", "345M", "762M", "1542M"])
def test_a_published_size_traces_a_step_on_a_pod(size):
  """128 devices that are not here; the state that comes out is laid out as the one that went in."""
  config = dataclasses.replace(SIZES[size], pad_heads=True)
  optimizer = adamw(cosine(1e-3, 10, 2, 0.1), 0.9, 0.95, 0.1, 1.0)
  with jax.sharding.use_abstract_mesh(abstract_mesh(2, 16, 4)):
    state = jax.eval_shape(lambda: init_state(jax.random.key(0), config, optimizer))
    tokens_BT = jax.eval_shape(lambda: jnp.zeros((64, 1025), jnp.int32, out_sharding=BATCH))
    after, metrics = jax.eval_shape(
      functools.partial(train_step, optimizer=optimizer, microbatches=2),
      state,
      Batch(tokens_BT),
      NextToken(),
    )
  assert jax.tree.structure(state) == jax.tree.structure(after)
  for x, y in zip(jax.tree.leaves(state), jax.tree.leaves(after), strict=True):
    assert (x.shape, x.dtype) == (y.shape, y.dtype)
    assert x.sharding == y.sharding or not x.shape  # a scalar constant has none
  assert metrics["loss"].shape == metrics["grad_norm"].shape == ()
  sharded = sum(x.size for x in jax.tree.leaves(state.model) if "data" in str(x.sharding.spec))
  assert sharded > 0.99 * sum(x.size for x in jax.tree.leaves(state.model)), (
    "FSDP holds a part on each"
  )
  moments = jax.tree.leaves(state.opt_state)
  assert sum(x.size for x in moments) >= 2 * sum(x.size for x in jax.tree.leaves(state.model))


def test_microbatches_draw_their_own_dropout(mesh, parameters, place):
  """The same row everywhere: with one mask for both slices, the mean would be the first slice's
  loss."""
  config = dataclasses.replace(TINY, n_layer=1, embd_pdrop=0.5)
  tokens_BT = np.repeat(batch(0)[:1], 4, 0)
  loss = jax.jit(lambda *args: gradients(*args)[0], static_argnums=2)
  with mesh(1, 1, 1):
    model, key = place(config, parameters(config)), jax.random.key(0)
    first = loss(model, tokens_BT[:2], 1, jax.random.fold_in(key, 0))
    both = loss(model, tokens_BT, 2, key)
    second = loss(model, tokens_BT[:2], 1, jax.random.fold_in(key, 1))
  assert abs(float(first) - float(second)) > 1e-3
  assert float(both) == pytest.approx((float(first) + float(second)) / 2, abs=1e-5)


def test_gradients_are_those_of_the_mean_loss(mesh, parameters, place, put):
  """Along a random direction, against a central difference in the float64 sense of 1e-3 steps."""
  arrays = parameters(TINY)
  direction = parameters(TINY, seed=7)
  with mesh(1, 1, 1):
    tokens_BT = put(batch(0), BATCH)
    model, toward = place(TINY, arrays), place(TINY, direction)
    loss, grads = jax.jit(gradients, static_argnums=2)(model, tokens_BT, 1)
    slope = sum(
      float((g * d).sum())
      for g, d in zip(jax.tree.leaves(grads), jax.tree.leaves(toward), strict=True)
    )

    def f(t):
      return nats(jax.tree.map(lambda x, d: x + t * d, model, toward), tokens_BT)

    f = jax.jit(f)
    h = 1e-2
    difference = (8 * (f(h) - f(-h)) - (f(2 * h) - f(-2 * h))) / (12 * h)
    assert float(loss) == pytest.approx(float(f(0.0)), rel=1e-6)
  assert slope == pytest.approx(float(difference), rel=1e-2)


@pytest.fixture(scope="module")
def one_device(mesh, put):
  """A state that has made two good steps, and the batch it has not seen."""
  with mesh(1, 1, 1):
    state = init(jax.random.key(0), model_config=TINY)
    for step in range(2):
      state, _ = step_once(state, put(batch(step), BATCH))
    return state, put(batch(2), BATCH)


def spoiled(state, put, name):
  """The state with a model whose next update cannot be finite."""
  leaves, structure = jax.tree.flatten(state.model)
  model = jax.tree.unflatten(structure, leaves)  # a copy: modules are objects
  if name == "a NaN in one weight":
    w = np.array(model.h.mlp.c_fc.w[...].array)
    w[1, 3, 5] = np.nan
    model.h.mlp.c_fc.w = nnx.Param(Dense(put(w, P(None, "data", "model"))))
  elif name == "an infinity in one bias":
    b = np.array(model.h.attn.c_proj.b[...])
    b[0, 7] = np.inf
    model.h.attn.c_proj.b[...] = put(b, P(None, None))
  elif name == "a finite loss with gradients too large to be squared":
    model.wte = nnx.Param(jax.tree.map(jnp.zeros_like, model.wte[...]))
    model.ln_f.g[...] = jnp.full_like(model.ln_f.g[...], 1e25)
  return dataclasses.replace(state, model=model)


@pytest.mark.parametrize(
  "what",
  [
    "a NaN in one weight",
    "an infinity in one bias",
    "a finite loss with gradients too large to be squared",
  ],
)
def test_an_update_that_is_not_finite_is_not_made(what, one_device, mesh, put):
  good, tokens_BT = one_device
  with mesh(1, 1, 1):
    bad = spoiled(good, put, what)
    state, metrics = step_once(bad, tokens_BT)
    assert math.isfinite(metrics["loss"]) == ("finite loss" in what)
    assert not math.isfinite(metrics["grad_norm"])
    for skips in (1, 2):
      assert int(state.skipped_in_a_row) == int(metrics["skips"]) == skips
      assert int(state.step) == 2 + skips  # the batch is used up: the next one is another
      assert same(state.model, bad.model) and same(state.opt_state, bad.opt_state)
      state, metrics = step_once(state, tokens_BT)
    assert int(state.skipped_in_a_row) == 3
    state, metrics = step_once(dataclasses.replace(state, model=good.model), tokens_BT)
    assert int(state.skipped_in_a_row) == int(metrics["skips"]) == 0
    assert not same(state.model, good.model) and not same(state.opt_state, good.opt_state)
    expected, _ = step_once(good, tokens_BT)
    assert same(state.model, expected.model), "what was skipped left no trace"


def test_several_steps_in_one_call_are_those_steps(one_device, mesh, put):
  """Bit for bit, dropout included: every call must end where single steps do, or a restart would
  not repeat a run."""
  with mesh(1, 1, 1):
    state, _ = one_device
    model = state.model
    config = dataclasses.replace(TINY, resid_pdrop=0.1)
    state = init(jax.random.key(0), model_config=config)
    state = dataclasses.replace(
      state, model=jax.tree.unflatten(jax.tree.structure(state.model), jax.tree.leaves(model))
    )
    how = {"optimizer": OPTIMIZER, "dropout_key": jax.random.key(5)}
    steps = jax.jit(lambda state, tokens: scan_steps(state, Batch(tokens), NextToken(), **how))
    batches = [batch(step) for step in range(4)]
    together, stacked = steps(state, put(np.stack(batches), P(None, ROWS, None)))
    losses = []
    for tokens_BT in batches:
      state, metrics = steps(state, put(tokens_BT[None], P(None, ROWS, None)))
      losses.append(metrics["loss"][0])
    later = dataclasses.replace(state, step=state.step + 1)
    masks = [
      float(steps(x, put(batches[0][None], P(None, ROWS, None)))[1]["loss"][0])
      for x in (state, later)
    ]
    assert abs(masks[0] - masks[1]) > 1e-5, "each step draws its own dropout"
    assert metrics["loss"].shape == (1,) and stacked["loss"].shape == (4,)
    np.testing.assert_array_equal(stacked["loss"], losses)
    assert same(together, state)


def test_grad_norm_is_the_global_norm_before_the_clip(one_device, mesh):
  state, tokens_BT = one_device
  with mesh(1, 1, 1):
    _, metrics = step_once(state, tokens_BT)
    _, grads = jax.jit(gradients, static_argnums=2)(state.model, tokens_BT, 1)
  norm = math.sqrt(sum(float(np.square(np.float64(g)).sum()) for g in jax.tree.leaves(grads)))
  assert float(metrics["grad_norm"]) == pytest.approx(norm, rel=1e-5)


def test_evaluation_sums_count_real_rows_only(mesh, parameters, place, put):
  """Sums, so that the mean over batches is weighted by tokens; a row that fills the batch up weighs
  nothing."""
  arrays, tokens_BT = parameters(TINY), batch(0)[:8]
  real = np.array([1, 1, 1, 0, 1, 1, 0, 0], np.float32)
  nats = []
  with mesh(1, 1, 1):
    model = place(TINY, arrays)
    for row in tokens_BT:
      logits = np.float64(jax.jit(lambda m, t: m(t))(model, row[None, :-1]))[0, :, :97]
      lse = np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1)) + logits.max(-1)
      nats.append((lse - logits[np.arange(8), row[1:]]).sum())
  for sizes in ((1, 1, 1), (2, 2, 2)):
    with mesh(*sizes):
      weights_BT = put(np.repeat(real[:, None], 8, 1), BATCH)
      batch_of_rows = Batch(put(tokens_BT, BATCH), weights_BT)
      sums = evaluation_sums(place(TINY, arrays), batch_of_rows, NextToken())
      assert float(sums["tokens"]) == 5 * 8
      assert float(sums["nats"]) == pytest.approx(float(np.dot(nats, real)), rel=1e-6)


def test_train_state_is_a_tree_of_arrays(one_device):
  state, _ = one_device
  leaves, structure = jax.tree.flatten(state)
  assert isinstance(jax.tree.unflatten(structure, leaves), TrainState)
  assert len(leaves) > len(jax.tree.leaves(state.model)) * 3  # two moments each, and counts
  counts = optax.tree.get_all_with_path(state.opt_state, "count")
  assert counts and all(int(count) == 2 for _, count in counts)
