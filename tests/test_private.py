# SPDX-License-Identifier: Apache-2.0
"""DP-SGD's gradients: those of single examples, clipped, summed and noised, on any mesh."""

import dataclasses

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from gpt2_jax import train
from gpt2_jax.batch import Batch
from gpt2_jax.compat import has_unreduced
from gpt2_jax.finetune.classify import Classify
from gpt2_jax.finetune.trainable import merge, partition, trainable_mask
from gpt2_jax.loss import NextToken, mean_loss
from gpt2_jax.private import PrivateGradients, add_noise
from gpt2_jax.sharding import BATCH, ROWS, axis_size
from tests.test_unreduced import KINDS, TINY, batch_of, without_zeros

B = 8
# Noise compiles for seconds a parameter: two of them do.
KINDS = KINDS | {"some": (lambda model: model, ("wte", "h.attn.c_attn.w"))}
needs_unreduced = pytest.mark.skipif(not has_unreduced(), reason="JAX without unreduced sums")


def rows_of(kind: str, put) -> Batch:
  """Eight examples with weights of their own; the sixth and the last are padding."""
  batch = jax.tree.map(lambda x: np.asarray(x)[:B], batch_of(kind, put))
  weights_BT = np.random.default_rng(3).integers(0, 2, batch.tokens_BT[:, 1:].shape)
  weights_BT[:, 0] = 1
  weights_BT[[5, 7]] = 0
  extras = {name: labels.copy() for name, labels in batch.extras.items()}
  for labels_BT in extras.values():
    labels_BT[[5, 7]] = -1
  return dataclasses.replace(batch, weights_BT=weights_BT.astype(np.float32), extras=extras)


@pytest.fixture(scope="module")
def problem(parameters, place, put):
  """problem(kind): on the mesh in force, (objective, trained, frozen, batch)."""
  arrays = parameters(TINY)

  def make(kind):
    build, names = KINDS[kind]
    objective = Classify(3) if kind == "classifier" else NextToken()
    model = jax.jit(build)(place(TINY, arrays))
    model = jax.tree_util.tree_map_with_path(without_zeros, model)
    trained, frozen = partition(model, trainable_mask(model, names))
    batch = jax.tree.map(lambda x: put(x, BATCH), rows_of(kind, put))
    return objective, trained, frozen, batch

  return make


def by_name(grads) -> dict[str, np.ndarray]:
  leaves = jax.tree_util.tree_leaves_with_path(grads)
  return {jax.tree_util.keystr(path): np.asarray(x) for path, x in leaves}


def private(problem, clip_norm, noise=0.0, expected=1, key=None):
  """Sums and gradients by name, on the mesh in force."""
  aggregate = PrivateGradients(clip_norm, noise, expected)
  objective, trained, frozen, batch = problem
  step = jax.jit(aggregate, static_argnums=4)
  sums, grads = step(objective, trained, frozen, batch, B // axis_size(*ROWS), key)
  for grad, parameter in zip(jax.tree.leaves(grads), jax.tree.leaves(trained), strict=True):
    assert grad.sharding == parameter.sharding
  return jax.device_get(sums), by_name(grads)


def loop(problem, clip_norm):
  """The same by hand: an example at a time through the plain gradient, clipped in NumPy."""
  objective, trained, frozen, batch = problem
  gradient = jax.jit(train.gradients, static_argnums=4)
  total, norms = None, []
  for row in range(B):
    example = jax.tree.map(lambda x, row=row: x[row : row + 1], batch)
    _, grads = gradient(objective, trained, frozen, example, 1)
    grads = by_name(grads)
    norm = np.sqrt(sum(np.square(x, dtype=np.float64).sum() for x in grads.values()))
    norms.append(norm)
    clipped = {name: x * min(1.0, clip_norm / max(norm, 1e-30)) for name, x in grads.items()}
    total = clipped if total is None else {name: total[name] + clipped[name] for name in total}
  return total, np.array(norms)


def assert_equal(grads, expected, tolerance=1e-5) -> None:
  """float32 sums in another order: to a part of the largest value of each parameter."""
  assert grads.keys() == expected.keys()
  for name, gradient in grads.items():
    cut = tuple(map(slice, expected[name].shape))  # padding of the vocabulary
    error = np.abs(gradient[cut] - expected[name]).max()
    assert error <= tolerance * np.abs(expected[name]).max(), name


@pytest.fixture(scope="module")
def by_hand(mesh, problem):
  """by_hand(kind): a clip_norm between the norms of the examples, and what the loop gives."""
  cache = {}

  def get(kind):
    if kind not in cache:
      with mesh(1, 1, 1):
        _, norms = loop(problem(kind), 1.0)
        real = norms[[0, 1, 2, 3, 4, 6]]
        assert not norms[[5, 7]].any(), "padding contributes nothing"
        clip_norm = float(np.median(real))
        assert real.min() < clip_norm < real.max(), "some are clipped, and some are not"
        cache[kind] = clip_norm, loop(problem(kind), clip_norm)[0]
    return cache[kind]

  return get


@pytest.mark.parametrize("kind", ["all", "classifier"])
def test_clipped_gradients_are_those_of_a_loop(kind, mesh, problem, by_hand):
  clip_norm, expected = by_hand(kind)
  with mesh(1, 1, 1):
    sums, grads = private(problem(kind), clip_norm)
  assert sums["tokens"] == 6, "examples are counted, not their tokens"
  assert_equal(grads, expected)


@needs_unreduced
@pytest.mark.parametrize(("kind", "sizes"), [("all", (2, 2, 2)), ("lora over int8", (1, 4, 2))])
def test_they_are_the_same_on_any_mesh(kind, sizes, mesh, problem, by_hand):
  """int8 products round x by its largest value, a sum's or not."""
  clip_norm, expected = by_hand(kind)
  with mesh(*sizes):
    _, grads = private(problem(kind), clip_norm)
  assert_equal(grads, expected, 1e-4 if "int8" in kind else 1e-5)


@needs_unreduced
def test_they_are_those_of_jax_privacy(mesh, problem, by_hand, put):
  """Its `clipped_grad` on one device, ours on eight."""
  jax_privacy = pytest.importorskip("jax_privacy")

  clip_norm, _ = by_hand("all")
  with mesh(1, 1, 1):
    objective, trained, frozen, batch = problem("all")

    def mean_of(trained, batch):
      return mean_loss(objective, merge(trained, frozen), batch)[0]

    clipped_grad = jax_privacy.clipped_grad(
      mean_of, l2_clip_norm=clip_norm, batch_argnums=1, keep_batch_dim=True
    )
    batch = jax.tree.map(lambda x: put(np.asarray(x), P(None, None)), batch)
    expected = by_name(jax.jit(clipped_grad)(trained, batch))
  with mesh(1, 4, 2):
    _, grads = private(problem("all"), clip_norm)
  assert_equal(grads, expected)


def test_noise_is_of_the_sum(mesh, problem, by_hand):
  """N(0, (sigma C)^2) for each parameter, over the examples that are expected."""
  clip_norm, clipped = by_hand("some")
  with mesh(1, 1, 1):
    _, grads = private(problem("some"), clip_norm, noise=1.5, expected=10, key=jax.random.key(5))
  noise = np.concatenate([(grads[name] - clipped[name] / 10).ravel() for name in grads])

  # The standard error of a standard deviation is its part 1 / sqrt(2 n). The padding of the
  # vocabulary has none.
  noise, expected = noise[noise != 0], 1.5 * clip_norm / 10
  assert abs(noise.std() / expected - 1) < 5 / np.sqrt(2 * len(noise))
  assert abs(noise.mean()) < 5 * expected / np.sqrt(len(noise))
  assert len(np.unique(noise)) > 0.99 * len(noise), "no two parameters share theirs"


def test_noise_is_the_same_on_any_mesh_and_padding_stays_zero(mesh, place, parameters, unpadded):
  noise, zeros = [], {name: np.zeros_like(x) for name, x in parameters(TINY).items()}
  for sizes in [(1, 1, 1), (1, 4, 2)]:
    with mesh(*sizes):
      model = place(TINY, zeros)
      trained, _ = partition(model, trainable_mask(model, KINDS["some"][1]))
      noisy = jax.jit(add_noise, static_argnums=3)(trained, 1.0, jax.random.key(5), TINY.n_vocab)
      noise.append(unpadded(noisy, zeros))
  for name, x in noise[0].items():
    np.testing.assert_allclose(noise[1][name], x, rtol=1e-6)


def test_an_example_that_is_not_finite_contributes_nothing(mesh, problem, by_hand, put):
  """Its gradient would have no norm to be clipped by."""
  clip_norm, expected = by_hand("all")
  with mesh(1, 1, 1):
    objective, trained, frozen, batch = problem("all")
    weights_BT = np.array(batch.weights_BT)
    weights_BT[5] = np.inf  # a row that was padding
    batch = dataclasses.replace(batch, weights_BT=put(weights_BT, BATCH))
    _, grads = private((objective, trained, frozen, batch), clip_norm)
  assert_equal(grads, expected)


def test_a_microbatch_of_several_examples_is_refused(mesh, problem):
  with mesh(1, 1, 1):
    arguments = problem("all")
    with pytest.raises(ValueError, match=r"set --config.microbatches=8$"):
      PrivateGradients(1.0, 0.0, 1)(*arguments, 4)
