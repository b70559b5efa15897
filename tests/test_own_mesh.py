# SPDX-License-Identifier: Apache-2.0
"""`model(ids)` without a mesh in force, as a notebook calls it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gpt2_jax.model import ModelConfig

CONFIG = ModelConfig(n_vocab=97, n_ctx=24, n_embd=32, n_head=4, n_layer=2, dtype="float32")


@jax.jit
def forward(model, tokens_BT):
  return model(tokens_BT)


@pytest.fixture(params=[(1, 1, 1), (2, 2, 2)], ids=str)
def model(request, mesh, parameters, place):
  arrays = parameters(CONFIG)
  with mesh(*request.param):
    return place(CONFIG, arrays)


def test_a_call_without_a_mesh_is_the_call_on_the_models_own(model, tokens, put):
  """Bit for bit, on one device and on eight, and for rows that do not fill them."""
  tokens_BT = tokens(4, 9, 97)
  with jax.set_mesh(model.mesh):
    wanted = np.array(forward(model, put(tokens_BT, jax.P(("replica", "data"), None))))
  np.testing.assert_array_equal(model(tokens_BT), wanted)
  np.testing.assert_array_equal(model(tokens_BT[:3].tolist()), wanted[:3])
  assert np.isneginf(wanted[..., 97:]).all() and np.isfinite(wanted[..., :97]).all()


def test_logits_are_plain_to_go_on_with(model):
  """They index, slice, reduce and mix with other arrays, whatever the mesh."""
  logits_BTV = model([[1, 2, 3]])
  p_V = jax.nn.softmax(logits_BTV[0, -1, :97])
  assert float(p_V.sum()) == pytest.approx(1, abs=1e-6)
  assert int(jnp.argmax(logits_BTV[0, -1])) == int(p_V.argmax())
  assert not np.any(logits_BTV[..., :97] - jnp.asarray(np.array(logits_BTV))[..., :97])


def test_inside_jit_and_grad(model):
  def loss(model, tokens_BT):
    return -jax.nn.log_softmax(model(tokens_BT)[:, :-1, :97])[..., 5].sum()

  tokens_BT = jnp.array([[1, 2, 3, 4]])
  value, grads = jax.jit(jax.value_and_grad(loss))(model, tokens_BT)
  np.testing.assert_allclose(value, loss(model, tokens_BT), rtol=1e-6)
  assert all(np.isfinite(np.array(leaf)).all() for leaf in jax.tree.leaves(grads))
  assert np.array(grads.wpe[...])[:4].any()


@pytest.mark.parametrize(
  "tokens, rule",
  [
    ([1, 2], r"tokens of shape \(2,\) are not \[B, T\]; .*\[tokenizer.encode\(text\)\]"),
    ([[]], r"tokens of shape \(1, 0\) are not \[B, T\]"),
    ([[1, 2], [3]], "rows of tokens differ in length"),
    ([[1, 97]], "tokens 1 to 97, and the vocabulary is 97; is it the right tokenizer"),
    ([[-1, 2]], "tokens -1 to 2"),
    ([["Hello"]], "encode the text first"),
    ([[0.5]], "tokens are float64, and ids are whole numbers"),
    ([[1] * 25], "25 tokens exceed the context of 24; give fewer"),
  ],
)
def test_what_is_no_row_of_tokens_is_refused(tokens, rule, mesh, parameters, place):
  with mesh(1, 1, 1):
    model = place(CONFIG, parameters(CONFIG))
  with pytest.raises(ValueError, match=rule) as error:
    model(tokens)
  assert len(str(error.value)) < 300 and "\n" not in str(error.value)


def test_a_model_on_no_mesh_says_the_way_out(model):
  with pytest.raises(ValueError, match="lie on no mesh; load it with load_pretrained"):
    jax.tree.map(np.asarray, model)([[1, 2]])
