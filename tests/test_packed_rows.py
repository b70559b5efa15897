# SPDX-License-Identifier: Apache-2.0
"""Packed rows train as if each example stood alone: every kernel, on one device and on a mesh."""

import jax
import numpy as np
import pytest

from gpt2_jax.batch import Batch
from gpt2_jax.loss import NextToken, mean_loss
from gpt2_jax.model import ModelConfig
from gpt2_jax.sharding import BATCH

CONTEXT, ROWS = 30, 4
LENGTHS = [(9, 2, 13), (24,), (1, 5, 20), (15, 15)]  # of the examples of each row
SHAPE = dict(n_vocab=97, n_ctx=CONTEXT, n_embd=128, n_head=2, n_layer=2, dtype="float32")


@pytest.fixture(scope="module")
def weights(parameters):
  return parameters(ModelConfig(**SHAPE))


@pytest.fixture(scope="module")
def examples():
  """(tokens, loss mask of each but the first) by row; the mask is of responses, the last half."""
  rng = np.random.default_rng(2)
  rows = []
  for lengths in LENGTHS:
    rows.append([(rng.integers(0, 97, n), np.arange(1, n) >= n // 2) for n in lengths])
  return rows


def batch_of(rows, width: int) -> Batch:
  """Each row's examples side by side, then padding, which is a segment of its own."""
  shape = (len(rows), width)
  tokens, weights = np.zeros((len(rows), width + 1), np.int32), np.zeros(shape, np.float32)
  segments, positions = np.full(shape, -1, np.int32), np.zeros(shape, np.int32)
  for row, examples in enumerate(rows):
    at = 0
    for number, (ids, mask) in enumerate(examples):
      span = slice(at, at + len(ids))
      tokens[row, span], segments[row, span] = ids, number
      positions[row, span] = np.arange(len(ids))
      # The last token's label is the next example's first: it has no weight.
      weights[row, at : at + len(mask)] = mask
      at += len(ids)
  return Batch(tokens, weights, segments, positions)


def loss_and_gradients(model, batch: Batch, put):
  batch = jax.tree.map(lambda x: put(x, BATCH), batch)
  step = jax.jit(jax.value_and_grad(lambda m, b: mean_loss(NextToken(), m, b)[0]))
  return step(model, batch)


@pytest.fixture(scope="module")
def alone(weights, examples, mesh, place, put, unpadded):
  """The loss and its gradients of all examples, a row each, without segments."""
  with mesh(1, 1, 1):
    model = place(ModelConfig(**SHAPE, attention="chunked"), weights)
    batch = batch_of([[example] for row in examples for example in row], CONTEXT)
    batch = Batch(batch.tokens_BT, batch.weights_BT)
    loss, gradients = loss_and_gradients(model, batch, put)
    return float(loss), unpadded(gradients, weights)


@pytest.mark.parametrize(
  "kernel, sizes",
  [
    ("chunked", (1, 1, 1)),
    ("chunked", (1, 4, 2)),
    ("fused", (1, 1, 1)),
    ("fused", (1, 4, 2)),
    ("splash", (1, 4, 2)),
  ],
)
def test_packed_examples_are_each_alone(
  kernel, sizes, weights, examples, alone, mesh, place, put, unpadded
):
  with mesh(*sizes):
    model = place(ModelConfig(**SHAPE, attention=kernel), weights)
    loss, gradients = loss_and_gradients(model, batch_of(examples, CONTEXT), put)
    gradients = unpadded(gradients, weights)
  assert float(loss) == pytest.approx(alone[0], rel=1e-5)
  for name, expected in alone[1].items():
    scale = np.abs(expected).max()
    np.testing.assert_allclose(gradients[name], expected, atol=1e-5 * scale, rtol=0, err_msg=name)
