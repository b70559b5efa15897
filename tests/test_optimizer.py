# SPDX-License-Identifier: Apache-2.0
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax

from gpt2_jax.model import GPT2, ModelConfig, name_of
from gpt2_jax.optimizer import adamw, decayed
from gpt2_jax.schedules import cosine

TINY = ModelConfig(n_vocab=97, n_ctx=8, n_embd=8, n_head=2, n_layer=2, dtype="float32")
MATRICES = {"wte", "wpe", "h.attn.c_attn.w", "h.attn.c_proj.w", "h.mlp.c_fc.w", "h.mlp.c_proj.w"}
VECTORS = {"h.attn.c_attn.b", "h.attn.c_proj.b", "h.mlp.c_fc.b", "h.mlp.c_proj.b"}
VECTORS |= {"h.ln_1.g", "h.ln_1.b", "h.ln_2.g", "h.ln_2.b", "ln_f.g", "ln_f.b"}


def by_name(tree):
  return {name_of(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def test_decay_is_on_matrices_by_name(mesh):
  """Stacked over layers, gains and biases have two dimensions, too: only the name tells."""
  with mesh(1, 1, 1):
    model = jax.eval_shape(lambda: GPT2(TINY, jax.random.key(0)))
  names = by_name(decayed(model))
  assert {name for name, yes in names.items() if yes} == MATRICES
  assert {name for name, yes in names.items() if not yes} == VECTORS
  assert by_name(model)["h.ln_1.g"].ndim == 2


def test_decay_moves_matrices_and_nothing_else(mesh, parameters, place):
  """With zero gradients AdamW is its decay alone: x - rate * decay * x."""
  with mesh(1, 1, 1):
    model = place(TINY, parameters(TINY))
    optimizer = adamw(optax.constant_schedule(0.5), 0.9, 0.95, 0.1, 1.0)
    zero = jax.tree.map(jnp.zeros_like, model)
    updates, _ = jax.jit(optimizer.update)(zero, jax.jit(optimizer.init)(model), model)
    after, before = by_name(optax.apply_updates(model, updates)), by_name(model)
  for name in MATRICES:
    np.testing.assert_allclose(after[name], 0.95 * np.array(before[name]), rtol=1e-6, atol=1e-9)
  for name in VECTORS:
    np.testing.assert_array_equal(after[name], before[name])


def test_adamw_is_the_formula_for_two_steps():
  """The first gradient is above the clip, the second below."""
  rng = np.random.default_rng(0)
  b1, b2, decay, clip = 0.9, 0.95, 0.1, 1.0
  rate = cosine(1e-2, 10, 2, 0.1)
  x = {"w": rng.normal(size=(3, 4)), "g": rng.normal(size=(3, 4))}
  params, expected = jax.tree.map(jnp.float32, x), {name: value.copy() for name, value in x.items()}
  optimizer = adamw(rate, b1, b2, decay, clip)
  state = optimizer.init(params)
  m, v = {name: 0.0 for name in x}, {name: 0.0 for name in x}
  for step, scale in enumerate((3.0, 0.02)):
    grads = {name: rng.normal(size=(3, 4)) * scale for name in x}
    updates, state = optimizer.update(jax.tree.map(jnp.float32, grads), state, params)
    params = optax.apply_updates(params, updates)
    norm = math.sqrt(sum((g**2).sum() for g in grads.values()))
    assert (norm > clip) == (step == 0)
    for name, g in grads.items():
      g = g * min(1, clip / norm)
      m[name], v[name] = b1 * m[name] + (1 - b1) * g, b2 * v[name] + (1 - b2) * g**2
      direction = (
        m[name] / (1 - b1 ** (step + 1)) / (np.sqrt(v[name] / (1 - b2 ** (step + 1))) + 1e-8)
      )
      expected[name] -= float(rate(step)) * (direction + decay * (name == "w") * expected[name])
      np.testing.assert_allclose(
        params[name], expected[name], rtol=1e-5, atol=1e-6, err_msg=f"{name} {step}"
      )
