# SPDX-License-Identifier: Apache-2.0
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

from gpt2_jax import train
from gpt2_jax.batch import Batch
from gpt2_jax.decoding import for_inference, generate
from gpt2_jax.finetune.lora import LoRA, block_linears, copied, matrix_layout
from gpt2_jax.finetune.trainable import partition, trainable_mask
from gpt2_jax.loss import NextToken
from gpt2_jax.model import ModelConfig, name_of
from gpt2_jax.quantization import Int8, quantize
from gpt2_jax.sharding import BATCH

# 5 heads, which a model axis of 2 pads to 6; the vocabulary is padded to 128
TINY = ModelConfig(
  n_vocab=97, n_ctx=64, n_embd=40, n_head=5, n_layer=2, dtype="float32", pad_heads=True
)
MESHES = [(1, 1, 1), (1, 4, 2), (2, 2, 2)]


def rounded(name: str, array: np.ndarray) -> np.ndarray:
  """What 127 steps each way leave of a matrix: of each output of a Linear, of each row of the
  embedding."""
  if name != "wte" and not name.endswith(".w"):
    return array
  axis = -1 if name == "wte" else -2
  array = array.astype(np.float32).astype(np.float64)
  step = np.abs(array).max(axis, keepdims=True) / 127
  return np.round(array / step) * step


@pytest.fixture(scope="module")
def weights(parameters):
  return parameters(TINY)


@pytest.fixture(scope="module")
def prompts(tokens):
  return [row[:length].tolist() for row, length in zip(tokens(3, 40, 97), (3, 17, 40), strict=True)]


def forward(model, tokens_BT):
  with jax.set_mesh(model.mesh):
    return np.array(jax.jit(lambda model, tokens: model(tokens))(model, tokens_BT))[
      ..., : TINY.n_vocab
    ]


@pytest.mark.parametrize("sizes", MESHES, ids=str)
def test_a_quantized_model_is_the_model_of_the_rounded_weights(
  sizes, mesh, weights, place, tokens, prompts
):
  """The logits of many rows and of few, and what is decoded."""
  with mesh(*sizes):
    model = quantize(place(TINY, weights))
    expected = place(TINY, {name: rounded(name, array) for name, array in weights.items()})
    for length in (1, 24):
      ids = tokens(8, length, 97)[: None if length == 24 or sizes != (1, 1, 1) else 1]
      logits = forward(expected, ids)
      np.testing.assert_allclose(
        forward(model, ids), logits, atol=1e-5 * np.abs(logits).max(), rtol=0
      )
    assert (
      np.abs(logits - forward(place(TINY, weights), ids)).max() > 1e-3
    )  # the rounding is there to be seen
    for some in (prompts, prompts[:1]):
      assert generate(model, some, 12) == generate(expected, some, 12)


def test_bfloat16_is_as_near_as_without(mesh, weights, place, tokens):
  """To the exact logits: the rounding of activations to bfloat16 is all there is."""
  weights = {name: rounded(name, array) for name, array in weights.items()}
  ids = tokens(1, 24, 97)
  with mesh(1, 1, 1):
    exact = forward(place(TINY, weights), ids)
    model = place(dataclasses.replace(TINY, dtype="bfloat16"), weights)
    plain, int8 = (
      np.sqrt(np.square(forward(model, ids) - exact).mean()) for model in (model, quantize(model))
    )
  assert int8 < 1.1 * plain


@pytest.mark.parametrize("sizes", MESHES, ids=str)
def test_matrices_are_int8_split_as_they_were_and_padding_stays_zero(sizes, mesh, weights, place):
  with mesh(*sizes):
    before = place(TINY, weights)
    for tree, count in (
      (quantize(before), 5),
      # The table is there twice, as embeddings and as the head.
      (for_inference(quantize(before)), 2 + 4 * TINY.n_layer),
    ):
      found = [
        leaf
        for leaf in jax.tree.leaves(tree, is_leaf=lambda x: isinstance(x, Int8))
        if isinstance(leaf, Int8)
      ]
      assert len(found) == count
      floats = [leaf for leaf in jax.tree.leaves(tree) if leaf.dtype == jnp.float32]
      assert sum(leaf.size for leaf in floats) < sum(leaf.q_OI.size for leaf in found) / 2, (
        "matrices are int8"
      )
    model = quantize(before)
    assert model.wte[...].q_OI.sharding == before.wte[...].array.sharding
    assert model.h.mlp.c_fc.w[...].q_OI.sharding.spec == P(None, "model", "data")
    assert not jax.device_get(model.wte[...].q_OI)[97:].any()
    assert not jax.device_get(model.h.attn.c_proj.w[...].q_OI)[..., 40:].any()
    assert all(np.isfinite(jax.device_get(leaf)).all() for leaf in jax.tree.leaves(model))


def test_quantizing_twice_and_training_are_refused(mesh, weights, place, tokens):
  with mesh(1, 1, 1):
    model = quantize(place(TINY, weights))
    with pytest.raises(ValueError, match="quantized already; give the float32 one"):
      quantize(model)
    for patterns in (("*",), ("scale_O",)):
      with pytest.raises(ValueError, match="an int8 model has no gradient; train an adapter"):
        trainable_mask(model, patterns)
    with pytest.raises(TypeError, match="int8"):
      jax.grad(lambda model: model(tokens(1, 4, 97)).max())(model)


def test_lora_over_int8_has_the_gradients_of_lora_over_the_rounded_weights(
  mesh, weights, place, put, tokens
):
  """Through every layer and the head; what is frozen has no gradient."""

  # With b = 0, as it begins, a would have no gradient.
  def with_lora(model):
    rng = np.random.default_rng(3)
    model = copied(model)
    for linear in block_linears(model.h).values():
      (I, O), _ = matrix_layout(linear.w[...])  # noqa: E741
      a, b = (rng.normal(size=(TINY.n_layer, *shape)) for shape in ((I, 2), (2, O)))
      linear.w = nnx.Param(
        LoRA(linear.w[...], jnp.float32(a), jnp.float32(b), jnp.full(TINY.n_layer, 0.05))
      )
    return model

  @jax.jit
  def gradients(model, batch):
    trained, frozen = partition(model, trainable_mask(model, ("lora_a", "lora_b")))
    return train.gradients(NextToken(), trained, frozen, batch, 1)[1]

  with mesh(1, 1, 1):
    batch = Batch(put(tokens(4, 13, 97), BATCH))
    exact = {name: rounded(name, array) for name, array in weights.items()}
    ours = gradients(with_lora(quantize(place(TINY, weights))), batch)
    theirs = gradients(with_lora(place(TINY, exact)), batch)
  assert len(jax.tree.leaves(ours)) == len(jax.tree.leaves(theirs)) == 8
  leaves = jax.tree_util.tree_leaves_with_path(ours)
  for (path, gradient), expected in zip(leaves, jax.tree.leaves(theirs), strict=True):
    np.testing.assert_allclose(
      gradient, expected, atol=1e-5 * np.abs(expected).max(), rtol=0, err_msg=name_of(path)
    )
