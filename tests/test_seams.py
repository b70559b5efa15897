# SPDX-License-Identifier: Apache-2.0
"""The seams are wide enough for what is not built yet: an adapter, a teacher, a prefix, labels."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

from gpt2_jax import train
from gpt2_jax.attention import by_heads, causal_attention, masked_attention
from gpt2_jax.batch import Batch
from gpt2_jax.linear import Context, Dense
from gpt2_jax.loss import NextToken, mean_loss
from gpt2_jax.model import ModelConfig, name_of
from gpt2_jax.optimizer import adamw
from gpt2_jax.quantization import quantize
from gpt2_jax.schedules import cosine
from gpt2_jax.sharding import BATCH, ROWS

TINY = ModelConfig(n_vocab=97, n_ctx=24, n_embd=24, n_head=3, n_layer=2, dtype="float32")


@pytest.fixture(scope="module")
def model(mesh, parameters, place):
  arrays = parameters(TINY)
  with mesh(1, 1, 1):
    return place(TINY, arrays)


def forward(model, *args, **options):
  with jax.set_mesh(model.mesh):
    return jax.jit(lambda model: model.hidden(*args, **options))(model)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Adapter:
  """A weight and a low-rank one for each adapter, with dropout: over `Dense`, or over `Int8`."""

  base: object
  a_NIR: jax.Array
  b_NRO: jax.Array

  def __getitem__(self, index):
    return jax.tree.map(lambda x: x[index], self)

  def matmul(self, x_BTI, bias_O, gathered, context=Context(), out_dtype=None):  # noqa: B008
    y_BTO = self.base.matmul(x_BTI, bias_O, gathered, context, out_dtype)
    if context.key is not None:
      x_BTI = x_BTI * jax.random.bernoulli(context.key, 0.5, x_BTI.shape)
    rows = P(ROWS, None, None)
    a_BIR = self.a_NIR.at[context.adapter_B].get(out_sharding=rows)
    b_BRO = self.b_NRO.at[context.adapter_B].get(out_sharding=rows)
    return y_BTO + jnp.einsum("bti,bir,bro->bto", x_BTI, a_BIR, b_BRO)


def adapted(model):
  """The model with two adapters on c_fc: number 0 adds nothing, number 1 does."""
  copy = jax.tree.unflatten(jax.tree.structure(model), jax.tree.leaves(model))
  rng = np.random.default_rng(0)
  scale_N = np.array([0.0, 0.3])[None, :, None, None]
  a = jnp.float32(rng.normal(size=(2, 2, 24, 4)))
  b = jnp.float32(rng.normal(size=(2, 2, 4, 96)) * scale_N)
  copy.h.mlp.c_fc.w = nnx.Param(Adapter(model.h.mlp.c_fc.w[...], a, b))
  return copy


@pytest.mark.parametrize("weights", ["float32", "int8"])
def test_a_weight_composes_with_another_and_gets_an_adapter_for_each_row(model, tokens, weights):
  base = quantize(model) if weights == "int8" else model
  tokens_BT = tokens(2, 12, 97)
  with jax.set_mesh(model.mesh):
    changed, x_BTD = adapted(base), base.embed(tokens_BT)
    mixed = forward(changed, x_BTD, context=Context(None, jnp.array([0, 1])))[0]
    plain = forward(base, x_BTD)[0]
  np.testing.assert_allclose(mixed[0], plain[0], atol=1e-5)
  assert np.abs(mixed[1] - plain[1]).max() > 1e-2


def test_the_objective_hands_keys_and_adapters_to_the_weights(model, tokens):
  """And each layer draws its own dropout: with one mask for both, swapping them changes nothing."""
  tokens_BT = tokens(2, 13, 97)
  with jax.set_mesh(model.mesh):
    changed = adapted(model)
    loss = jax.jit(lambda m, b, k: mean_loss(NextToken(), m, b, k)[0])
    batch = Batch(tokens_BT, extras={"adapter_B": jnp.array([1, 1])})
    losses = [float(loss(changed, batch, key)) for key in (None, jax.random.key(0))]
    losses.append(float(loss(changed, batch, jax.random.key(1))))
  assert len(set(losses)) == 3


def test_each_layer_and_weight_has_its_own_key():
  context = Context(jax.random.key(0))
  keys = [context.fold(layer).fold(weight).key for layer in range(3) for weight in range(4)]
  assert len({jax.random.key_data(key).tobytes() for key in keys}) == 12
  assert Context(None, 3).fold(1) == Context(None, 3)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Distill:
  """Cross-entropy against a teacher's distribution, and a sum of its own; its leaf is a model."""

  teacher: object

  def __call__(self, model, batch, key=None):
    inputs_BT = batch.tokens_BT[:, :-1]
    targets = jax.nn.softmax(self.teacher(inputs_BT)[..., :97])
    logp = jax.nn.log_softmax(model(inputs_BT, key)[..., :97])
    nats = -(targets * logp).sum()
    return {"nats": nats, "tokens": jnp.float32(inputs_BT.size), "labels": batch.extras["y"].sum()}


@pytest.mark.parametrize("microbatches", [1, 2])
def test_a_teacher_is_an_argument_of_the_step_and_never_a_constant(model, tokens, microbatches):
  """Another teacher is another loss without another compilation; it has no gradient."""
  optimizer = adamw(cosine(1e-3, 9, 2, 0.1), 0.9, 0.95, 0.1, 1.0)
  traces = []

  @jax.jit
  def step(state, batch, objective):
    traces.append(1)
    options = {"optimizer": optimizer, "microbatches": microbatches}
    return train.train_step(state, batch, objective, **options)

  with jax.set_mesh(model.mesh):
    zero = jnp.int32(0)
    state = train.TrainState(zero, zero, zero, model, jax.jit(optimizer.init)(model))
    labels = jnp.arange(4.0).reshape(4, 1)
    batch = Batch(jax.device_put(tokens(4, 13, 97)), extras={"y": labels})
    other = jax.tree.map(lambda x: x * 0.5, model)
    (_, first), (_, second) = (step(state, batch, Distill(t)) for t in (model, other))
  assert len(traces) == 1 and float(first["loss"]) != float(second["loss"])
  assert float(first["grad_norm"]) < 1e-4 < float(second["grad_norm"]), "a model is its own optimum"
  assert float(first["labels"]) == pytest.approx(6 / 48)


def test_attend_remembers_layer_by_layer_and_takes_a_prefix(model, tokens):
  """Keys and values of a prefix, a layer each, in front of a row's own: as if it were its text."""
  tokens_BT, config = tokens(2, 20, 97), TINY
  past, T = 8, 12

  def remember(q, k, v):
    return causal_attention(q, k, v), (k, v)

  def attend(c_BTC, key=None, prefix=None):
    def attention(q, k, v):
      k, v = (jnp.concatenate(pair, axis=1) for pair in zip(prefix, (k, v), strict=True))
      mask = jnp.arange(past + T) <= jnp.arange(past, past + T)[:, None]
      return masked_attention(q, k, v, mask), None

    return by_heads(attention, config.head_size)(c_BTC, key)

  with jax.set_mesh(model.mesh):
    whole = model.embed(tokens_BT)
    expected, _, memory = forward(model, whole, attend=by_heads(remember, config.head_size))
    prefix = jax.tree.map(lambda x_LBTHK: x_LBTHK[:, :, :past], memory)
    found, _, _ = forward(model, whole[:, past:], attend=attend, prefix_L=prefix)
  assert memory[0].shape == (2, 2, 20, 3, 8)
  np.testing.assert_allclose(found, expected[:, past:], atol=2e-5)


def test_packed_rows_train_as_if_each_text_stood_alone(model, tokens):
  """Segments, positions and weights together: sums of two texts in one row are those of two."""
  first, second = tokens(1, 10, 97)[0], tokens(2, 8, 97)[1]
  row = np.concatenate([first, second])[None]
  segments = np.repeat([0, 1], [10, 8])[None, :-1]
  positions = np.concatenate([np.arange(10), np.arange(8)])[None, :-1]
  weights = np.ones((1, 17), np.float32)
  weights[0, 9] = 0  # the first token of the second text does not follow from the first text
  objective = jax.jit(NextToken())
  with jax.set_mesh(model.mesh):
    packed = objective(model, Batch(row, weights, segments, positions))
    alone = [objective(model, Batch(text[None])) for text in (first, second)]
  assert float(packed["tokens"]) == 16 == sum(float(sums["tokens"]) for sums in alone)
  assert float(packed["nats"]) == pytest.approx(sum(float(s["nats"]) for s in alone), rel=1e-6)


def test_a_batch_of_prompts_alone_changes_nothing_and_is_no_error(model, tokens, put):
  optimizer = adamw(cosine(1e-3, 9, 2, 0.1), 0.9, 0.95, 0.0, 1.0)
  with jax.set_mesh(model.mesh):
    zero = jnp.int32(0)
    state = train.TrainState(zero, zero, zero, model, jax.jit(optimizer.init)(model))
    batch = Batch(put(tokens(2, 13, 97), BATCH), put(np.zeros((2, 12), np.float32), BATCH))
    step = jax.jit(functools.partial(train.train_step, optimizer=optimizer))
    after, metrics = step(state, batch, NextToken())
  assert int(metrics["skips"]) == 0 and float(metrics["loss"]) == 0
  for (path, old), new in zip(
    jax.tree_util.tree_leaves_with_path(model), jax.tree.leaves(after.model), strict=True
  ):
    np.testing.assert_array_equal(old, new, err_msg=name_of(path))


def test_dense_holds_a_matrix_or_a_table(mesh, put):
  rng = np.random.default_rng(0)
  w = np.float32(rng.normal(size=(8, 6)))
  with mesh(1, 1, 1):
    x = put(np.float32(rng.normal(size=(2, 3, 8))), P(("replica", "data"), None, None))
    matrix, table = Dense(put(w, P(None, None))), Dense(put(w.T, P(None, None)), True)
    y = matrix.matmul(x, None, P(None, None))
    np.testing.assert_allclose(y, table.matmul(x, None, P(None, None)), rtol=1e-6)
    np.testing.assert_array_equal(table.lookup(np.array([[1, 5]])), w.T[[[1, 5]]])
