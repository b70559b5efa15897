# SPDX-License-Identifier: Apache-2.0
"""Muon: what it does to a matrix, that no mesh changes it, and what it says on the wire."""

import collections
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from configs import gpt2
from gpt2_jax.batch import Batch
from gpt2_jax.loss import NextToken
from gpt2_jax.model import ModelConfig, name_of
from gpt2_jax.muon import (
  COEFFICIENTS,
  block_matrices,
  bound,
  make_optimizer,
  muon,
  newton_schulz,
  orthogonalize,
)
from gpt2_jax.runs.checkpoint import by_name
from gpt2_jax.sharding import BATCH
from gpt2_jax.train import init_state, train_step

# Five heads: on an axis of eight, three of eight are padding.
CONFIG = ModelConfig(
  n_vocab=97,
  n_ctx=8,
  n_embd=40,
  n_head=5,
  n_layer=3,
  use_bias=False,
  dtype="float32",
  pad_heads=True,
)
K = CONFIG.head_size
KNOBS = {"b1": 0.9, "b2": 0.95, "weight_decay": 0.1, "clip_norm": 1.0, "momentum": 0.95}
OPTIMIZER = muon(optax.constant_schedule(1e-2), **KNOBS, head_size=K)
MATRICES = ("h.attn.c_attn.w", "h.attn.c_proj.w", "h.mlp.c_fc.w", "h.mlp.c_proj.w")


def named(tree) -> dict:
  return {name_of(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def quintic(s):
  """What five iterations make of singular values, in float64."""
  a, b, c = COEFFICIENTS
  for _ in range(5):
    s = a * s + b * s**3 + c * s**5
  return s


def test_newton_schulz_is_u_v_of_a_float64_svd_within_the_bound_of_the_iteration():
  """From 0.002 of the norm on, singular values come out between 0.68 and 1.21."""
  grid = quintic(np.geomspace(0.002, 1, 100_000))
  assert grid.min() > 0.68 and grid.max() < 1.21

  rng = np.random.default_rng(0)
  u, _ = np.linalg.qr(rng.normal(size=(3, 16, 16)))
  v, _ = np.linalg.qr(rng.normal(size=(3, 40, 16)))
  s = np.geomspace(0.01, 2, 16)
  x_SDN = (u * s) @ np.swapaxes(v, 1, 2)
  # A zero matrix, as a stack is padded with, and one of any size.
  x_SDN = np.concatenate([x_SDN, np.zeros((1, 16, 40)), 1e-6 * x_SDN[:1]]).astype(np.float32)
  found = np.asarray(jax.jit(newton_schulz)(x_SDN), np.float64)

  # UV^T and the quintic of the singular values, which are divided by the norm.
  u, s, vt = np.linalg.svd(np.float64(x_SDN), full_matrices=False)
  s, u, vt = s[:3], u[:3], vt[:3]
  expected = (u * quintic(s / np.linalg.norm(s, axis=-1, keepdims=True))[:, None]) @ vt
  np.testing.assert_allclose(found[:3], expected, atol=1e-5)
  assert np.linalg.norm(found[:3] - u @ vt, ord=2, axis=(1, 2)).max() < 1 - 0.68
  assert not found[3].any()
  np.testing.assert_allclose(found[4], found[0], atol=0.1, err_msg="the norm is divided out")


@pytest.fixture(scope="module")
def gradient(parameters):
  """gradient(seed): of each parameter by name, without padding."""
  return lambda seed: parameters(CONFIG, seed=seed)


def apart(name: str, w_LIO: np.ndarray) -> list[np.ndarray]:
  """The matrices of a parameter: of c_attn, q, k and v of each layer."""
  if "c_attn" not in name:
    return list(w_LIO)
  L, D, C = w_LIO.shape
  heads = w_LIO.reshape(L, D, C // (3 * K), 3, K)
  return [heads[layer, :, :, part].reshape(D, D) for layer in range(L) for part in range(3)]


@pytest.fixture(scope="module")
def three_updates(mesh, gradient, place, unpadded):
  """The parameters after each of three updates, by name, on one device and no clip."""
  knobs = KNOBS | {"clip_norm": 0.0}
  optimizer = muon(optax.constant_schedule(1e-2), **knobs, head_size=K)
  arrays = gradient(0)
  with mesh(1, 1, 1):
    model = place(CONFIG, arrays)
    state, update = jax.jit(optimizer.init)(model), jax.jit(optimizer.update)
    after = []
    for seed in (1, 2, 3):
      updates, state = update(place(CONFIG, gradient(seed)), state, model)
      model = optax.apply_updates(model, updates)
      after.append(unpadded(model, arrays))
  return arrays, after


def test_updates_are_those_of_optax_for_each_matrix_alone(three_updates, gradient):
  """optax's Muon takes matrices one by one: momentum, Nesterov's form, iterations. Its correction
  of a bias, which this Muon does not have, is off at a large count. The scale is Moonshot's, the
  decay AdamW's."""
  before, after = three_updates
  matrix = optax.contrib.MuonDimensionNumbers()
  theirs = optax.contrib.scale_by_muon(
    beta=0.95, weight_dimension_numbers=lambda tree: dict.fromkeys(tree, matrix)
  )
  x, grads = {}, {}
  for name in MATRICES:
    for number, matrix in enumerate(apart(name, before[name].astype(np.float32))):
      x[name, number] = matrix
  state = theirs.init(x)
  state = state._replace(count=jnp.int32(10**6))
  update = jax.jit(theirs.update)
  for seed, ours in zip((1, 2, 3), after, strict=True):
    arrays = gradient(seed)
    grads = {key: apart(key[0], arrays[key[0]])[key[1]].astype(np.float32) for key in x}
    updates, state = update(grads, state, x)
    for key, direction in updates.items():
      scale = 0.2 * max(direction.shape) ** 0.5
      x[key] = x[key] - 1e-2 * (scale * direction + 0.1 * x[key])

    # An update has entries of 2e-3; what rounds is the parameter, of 0.2.
    for (name, number), expected in x.items():
      np.testing.assert_allclose(apart(name, ours[name])[number], expected, atol=5e-7, rtol=0)


def test_all_else_is_on_adamw(three_updates, gradient):
  """Embeddings and vectors: optax's own."""
  before, (after, *_) = three_updates
  theirs = optax.adamw(1e-2, 0.9, 0.95, 1e-8, weight_decay=0.1)
  names = before.keys() - set(MATRICES)
  assert names == {"wte", "wpe", "h.ln_1.g", "h.ln_2.g", "ln_f.g"}
  for name in names:
    x = before[name].astype(np.float32)
    updates, _ = theirs.update(gradient(1)[name].astype(np.float32), theirs.init(x), x)
    decayed = updates if name in ("wte", "wpe") else updates + 1e-2 * 0.1 * x
    np.testing.assert_allclose(after[name], x + decayed, rtol=1e-5, atol=1e-7, err_msg=name)


@jax.jit
def step(state, tokens_BT, rate):
  optimizer = muon(lambda _: rate, **KNOBS, head_size=K)
  return train_step(state, Batch(tokens_BT), NextToken(), optimizer=optimizer)


@pytest.fixture(scope="module")
def batches():
  """Four of 32 windows, counting up from anywhere: there is something to learn."""
  starts = np.random.default_rng(0).integers(0, 97, (4, 32, 1))
  return ((starts + np.arange(9)) % 97).astype(np.int32)


@pytest.fixture(scope="module")
def four_steps(mesh, parameters, place, put, unpadded, batches):
  """four_steps(sizes): the losses, and the parameters after them; fails where padding is not 0."""
  arrays = parameters(CONFIG)

  @functools.cache
  def run(sizes):
    with mesh(*sizes):
      build = functools.partial(init_state, None, CONFIG, OPTIMIZER, ("*",))
      state = jax.jit(build)(place(CONFIG, arrays))
      shardings = [x.sharding for x in jax.tree.leaves(state)]
      losses = []
      for tokens_BT in batches:
        state, metrics = step(state, put(tokens_BT, BATCH), 1e-2)
        losses.append(float(metrics["loss"]))
      assert [x.sharding for x in jax.tree.leaves(state)] == shardings
      assert int(metrics["skips"]) == 0
    return losses, unpadded(state.model, arrays)

  return run


@pytest.mark.parametrize("sizes", [(1, 8, 1), (2, 2, 2), (1, 1, 8)], ids=str)
def test_losses_are_those_of_one_device(sizes, four_steps):
  """float32 sums in another order, by the slope of the iterations at 0, 485, in small singular
  values."""
  losses, expected = four_steps((1, 1, 1))
  assert losses[0] - losses[3] > 0.3, "it learns, so that the updates are compared too"
  found_losses, found = four_steps(sizes)
  np.testing.assert_allclose(found_losses, losses, rtol=0, atol=1e-5)
  for name in MATRICES:
    np.testing.assert_allclose(found[name], expected[name], atol=1e-4, rtol=0, err_msg=name)


COLLECTIVE = re.compile(
  r" = .*? (all-reduce|all-gather|all-to-all|reduce-scatter|collective-permute)(?:-start)?\("
)


@pytest.mark.parametrize(
  "sizes, exchanges, gathers",
  [((1, 8, 1), 2, 0), ((2, 2, 2), 4, 1), ((8, 1, 1), 0, 1)],
  ids=str,
)
def test_one_reshard_in_and_one_out_and_none_in_an_iteration(
  sizes, exchanges, gathers, mesh, parameters, place
):
  """For each of the two shapes of matrices: an all-to-all over each axis that splits them, in and
  out, and one all-gather over replicas, which have all of them at first."""
  arrays = parameters(CONFIG)
  with mesh(*sizes):
    model = place(CONFIG, arrays)
    mask = block_matrices(model)
    only = jax.tree.map(lambda x, is_matrix: x if is_matrix else None, model, mask)
    text = jax.jit(lambda x: orthogonalize(x, K)).lower(only).compile().as_text()

  counts, computation = collections.defaultdict(collections.Counter), ""
  for line in text.splitlines():
    if line.endswith("{") and not line.startswith(" "):
      computation = line.split()[0]
    if match := COLLECTIVE.search(line):
      counts[computation][match[1]] += 1
  expected = {"all-to-all": 2 * exchanges, "all-gather": 2 * gathers}
  assert dict(counts) == {"ENTRY": {kind: n for kind, n in expected.items() if n}}
  assert text.count(" while(") >= 1, "the iterations are a loop, which is another computation"


def test_the_check_of_an_update_does_not_iterate(mesh, parameters, place):
  """The iterations stand once in a step, and what stands for them is larger than they are."""
  with mesh(1, 1, 1):
    state = jax.eval_shape(lambda: init_state(jax.random.key(0), CONFIG, OPTIMIZER))
    tokens_BT = jnp.zeros((2, 9), jnp.int32)
    text = str(jax.make_jaxpr(step)(state, tokens_BT, 1e-2))
    assert text.count("shard_map[") == 1

    x = parameters(CONFIG, seed=4)["h.mlp.c_fc.w"].astype(np.float32)
    model = place(CONFIG, parameters(CONFIG, seed=4))
    only = {"h.mlp.c_fc.w": model.h.mlp.c_fc.w[...].array}
    found = orthogonalize(only, K)["h.mlp.c_fc.w"]
  assert jnp.linalg.norm(found) < jnp.linalg.norm(bound(x)) < 3 * jnp.linalg.norm(found)
  assert not jnp.isfinite(bound(np.array([np.nan, 1.0]))).all()


def test_an_update_that_is_not_finite_is_skipped(mesh, parameters, place, put, batches):
  """Gradient and loss are finite, the rate is absurd: all of the state keeps its bits."""
  with mesh(1, 1, 1):
    build = functools.partial(init_state, None, CONFIG, OPTIMIZER, ("*",))
    state = jax.jit(build)(place(CONFIG, parameters(CONFIG)))
    after, metrics = step(state, put(batches[0], BATCH), 1e38)
  assert np.isfinite(metrics["loss"]) and int(metrics["skips"]) == 1
  before, after = ((x.model, x.opt_state) for x in (state, after))
  for x, y in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True):
    np.testing.assert_array_equal(x, y)


def test_state_is_one_moment_of_matrices_and_two_of_all_else(mesh):
  """By their names on disk. What is frozen has none."""
  with mesh(1, 1, 1):
    state = jax.eval_shape(lambda: init_state(jax.random.key(0), CONFIG, OPTIMIZER))
    names = set(by_name(state))
    assert {name for name in names if name.startswith("muon.")} == {
      f"muon.mu.{x}" for x in MATRICES
    }
    assert {f"adam.{moment}.{x}" for moment in ("mu", "nu") for x in ("wte", "h.ln_1.g")} <= names
    assert not [name for name in names if name.startswith("adam.") and name.endswith(".w")]

    trainable = ("c_fc", "ln_f.*")
    part = jax.eval_shape(lambda: init_state(jax.random.key(0), CONFIG, OPTIMIZER, trainable))
    names = set(by_name(part.opt_state, "opt_state."))
    assert "muon.mu.h.mlp.c_fc.w" in names and "adam.nu.ln_f.g" in names
    assert not [name for name in names if "c_attn" in name or "wte" in name]

    with pytest.raises(ValueError, match="trains none of them; set --config.optimizer=adamw"):
      jax.eval_shape(lambda: init_state(jax.random.key(0), CONFIG, OPTIMIZER, ("wte", "g")))


def test_an_optimizer_that_there_is_not_is_one_line():
  config = gpt2.get_config()
  config.optimizer = "sgd"
  with pytest.raises(ValueError, match="^optimizer is 'sgd'; it is one of adamw, muon$"):
    make_optimizer(config, optax.constant_schedule(1e-3), K)
