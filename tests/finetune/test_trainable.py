# SPDX-License-Identifier: Apache-2.0
"""What is frozen has neither gradient nor optimizer state, and does not move."""

import jax
import numpy as np
import pytest

from gpt2_jax import train
from gpt2_jax.batch import Batch
from gpt2_jax.finetune.trainable import merge, partition, trainable_mask
from gpt2_jax.loss import NextToken
from gpt2_jax.model import ModelConfig, name_of
from gpt2_jax.optimizer import adamw
from gpt2_jax.schedules import cosine
from gpt2_jax.sharding import BATCH

TINY = ModelConfig(n_vocab=97, n_ctx=8, n_embd=24, n_head=3, n_layer=2, dtype="float32")


def names(tree) -> set[str]:
  return {name_of(path) for path, _ in jax.tree_util.tree_leaves_with_path(tree)}


@pytest.mark.parametrize(
  "patterns, expected",
  [
    (("ln_f.*",), {"ln_f.g", "ln_f.b"}),
    (("wte", "wpe"), {"wte", "wpe"}),
    (("mlp",), {"h.mlp.c_fc.w", "h.mlp.c_fc.b", "h.mlp.c_proj.w", "h.mlp.c_proj.b"}),
    (("*.c_attn.b",), {"h.attn.c_attn.b"}),
  ],
)
def test_patterns_match_names_or_parts_of_them(patterns, expected, mesh, parameters, place):
  with mesh(1, 1, 1):
    model = place(TINY, parameters(TINY))
    trained, frozen = partition(model, trainable_mask(model, patterns))
    assert names(trained) == expected and names(trained) | names(frozen) == names(model)
    assert not names(trained) & names(frozen)
    merged = merge(trained, frozen)
  assert jax.tree.structure(merged) == jax.tree.structure(model)
  for ours, theirs in zip(jax.tree.leaves(merged), jax.tree.leaves(model), strict=True):
    assert ours is theirs


def test_a_pattern_that_matches_nothing_is_refused(mesh, parameters, place):
  with mesh(1, 1, 1), pytest.raises(ValueError, match="trainable has 'h.atn.*', which matches no"):
    trainable_mask(place(TINY, parameters(TINY)), ("ln_f", "h.atn.*"))


@pytest.mark.parametrize("microbatches", [1, 2])
def test_frozen_parameters_stay_and_have_no_optimizer_state(microbatches, mesh, put, tokens):
  """The trained ones move as they do when all are trained, but for the clip, which is off here."""
  optimizer = adamw(cosine(1e-2, 9, 2, 0.1), 0.9, 0.95, 0.1, 0.0)
  patterns, after = {"all": ("*",), "norms": ("ln_1", "ln_2", "ln_f")}, {}
  with mesh(1, 2, 1):
    batch = Batch(put(tokens(4, 9, 97), BATCH))
    for name, trainable in patterns.items():

      def init(key, trainable=trainable):
        return train.init_state(key, TINY, optimizer, trainable)

      def step(state, batch, trainable=trainable):
        return train.train_step(
          state,
          batch,
          NextToken(),
          optimizer=optimizer,
          microbatches=microbatches,
          trainable=trainable,
        )

      before = jax.jit(init)(jax.random.key(0))
      after[name], _ = jax.jit(step)(before, batch)
  moments = names(after["norms"].opt_state["adam"].mu)
  assert moments == {"h.ln_1.g", "h.ln_1.b", "h.ln_2.g", "h.ln_2.b", "ln_f.g", "ln_f.b"}
  trees = (before.model, after["norms"].model, after["all"].model)
  leaves = [jax.tree_util.tree_leaves_with_path(tree) for tree in trees]
  for (path, old), (_, new), (_, all_trained) in zip(*leaves, strict=True):
    if name_of(path) in moments:
      np.testing.assert_array_equal(new, all_trained, err_msg=name_of(path))
      assert np.any(np.asarray(new) != np.asarray(old)), name_of(path)
    else:
      np.testing.assert_array_equal(new, old, err_msg=name_of(path))
