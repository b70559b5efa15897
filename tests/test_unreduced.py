# SPDX-License-Identifier: Apache-2.0
"""One all-reduce of the gradients a step over `replica`, whatever is trained, and the same sums."""

import collections
import re

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from gpt2_jax import linear, train
from gpt2_jax.batch import Batch
from gpt2_jax.compat import has_unreduced
from gpt2_jax.finetune.adapter import TRAINED_NAMES, add_adapter
from gpt2_jax.finetune.classify import Classify, add_head
from gpt2_jax.finetune.trainable import partition, trainable_mask
from gpt2_jax.loss import NextToken
from gpt2_jax.model import ModelConfig, name_of
from gpt2_jax.plan.program import replica_groups
from gpt2_jax.sharding import BATCH

TINY = ModelConfig(n_vocab=97, n_ctx=8, n_embd=16, n_head=4, n_layer=2, dtype="float32")
LORA = ("c_attn", "c_proj", "c_fc")

needs_unreduced = pytest.mark.skipif(not has_unreduced(), reason="JAX without unreduced sums")


def adapted(model, kind: str, quantize=""):
  settings = {"kind": kind, "rank": 2, "alpha": 4.0, "rslora": False, "targets": LORA}
  settings |= {"dropout": 0.0, "tokens": 3, "quantize": quantize}
  return add_adapter(model, ConfigDict(settings), jax.random.key(1))


# What is trained, by name: the model made of a plain one, and the names of its trained parameters.
KINDS = {
  "all": (lambda model: model, ("*",)),
  "lora": (lambda model: adapted(model, "lora"), TRAINED_NAMES["lora"]),
  "lora over int8": (lambda model: adapted(model, "lora", "int8"), (*TRAINED_NAMES["lora"], "b")),
  "prompt": (lambda model: adapted(model, "prompt"), TRAINED_NAMES["prompt"]),
  "prefix": (lambda model: adapted(model, "prefix"), TRAINED_NAMES["prefix"]),
  "classifier": (lambda model: add_head(model, 3, jax.random.key(1)), ("*",)),
}


def batch_of(kind: str, put) -> Batch:
  rng = np.random.default_rng(0)
  length = 5 if kind in ("prompt", "prefix") else 8
  tokens_BT = rng.integers(0, 97, (16, length + 1)).astype(np.int32)
  extras = {}
  if kind == "classifier":
    labels_BT = np.full((16, length), -1, np.int32)
    labels_BT[:, -1] = rng.integers(0, 3, 16)
    extras["labels_BT"] = put(labels_BT, BATCH)
  return Batch(put(tokens_BT, BATCH), extras=extras)


def without_zeros(path, leaf):
  """LoRA's b begins as zeros, which would hide the gradient of a."""
  if not name_of(path).endswith("lora_b"):
    return leaf
  values = np.random.default_rng(2).normal(size=leaf.shape).astype(np.float32)
  return jax.device_put(values, leaf.sharding)


@pytest.fixture(scope="module")
def trained_on(mesh, parameters, place, put):
  """trained_on(kind, sizes, microbatches): gradients by name, and the compiled program's text."""

  def run(kind, sizes, microbatches):
    build, names = KINDS[kind]
    objective = Classify(3) if kind == "classifier" else NextToken()
    arrays = parameters(TINY)
    with mesh(*sizes):
      model = jax.jit(build)(place(TINY, arrays))

      model = jax.tree_util.tree_map_with_path(without_zeros, model)
      trained, frozen = partition(model, trainable_mask(model, names))

      def gradients(trained, frozen, batch):
        return train.gradients(objective, trained, frozen, batch, microbatches)[1]

      compiled = jax.jit(gradients).lower(trained, frozen, batch_of(kind, put)).compile()
      grads = compiled(trained, frozen, batch_of(kind, put))
      assert [x.sharding for x in jax.tree.leaves(grads)] == [
        x.sharding for x in jax.tree.leaves(trained)
      ]
    leaves = jax.tree_util.tree_leaves_with_path(grads)
    arrays = {jax.tree_util.keystr(path): np.asarray(x) for path, x in leaves}
    return arrays, compiled.as_text()

  return run


def reductions_over_replica(text: str) -> dict[str, int]:
  """Of a program for the mesh (2, 2, 2): the arrays reduced over replicas, by computation.

  Scalars are left out. Devices of one group that are four apart are of different replicas.
  """
  counts, computation = collections.Counter(), ""
  for line in text.splitlines():
    if line.endswith("{") and not line.startswith(" "):
      computation = line.split()[0]
    reduction = re.search(r"= (.*?) (?:all-reduce|reduce-scatter)(?:-start)?\(", line)
    if reduction and re.search(r"\[\d", reduction[1]):
      first_group = replica_groups(line)[0]
      if first_group.max() - first_group.min() >= 4:
        counts[computation] += len(re.findall(r"\w\[", reduction[1]))
  return dict(counts)


def assert_equal(grads, expected, tolerance: float) -> None:
  """Of each parameter, as a part of its largest gradient."""
  assert grads.keys() == expected.keys()
  for name, gradient in grads.items():
    cut = tuple(map(slice, expected[name].shape))  # padding of the vocabulary
    error = np.abs(gradient[cut] - expected[name]).max()
    assert error <= tolerance * np.abs(expected[name]).max(), name


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_of_one_device(kind, trained_on):
  """float32 sums in another order; int8 products round x by its largest value, a sum's or not."""
  tolerance = 1e-4 if "int8" in kind else 1e-5
  expected, _ = trained_on(kind, (1, 1, 1), 1)
  grads, text = trained_on(kind, (2, 2, 2), 2)
  assert_equal(grads, expected, tolerance)
  if has_unreduced():
    assert reductions_over_replica(text) == {"ENTRY": len(grads)}, "once, after all microbatches"


@needs_unreduced
def test_the_accelerators_forms_give_the_same_sums(trained_on, monkeypatch):
  """How products are written for TPUs and GPUs, computed here."""
  expected, _ = trained_on("all", (1, 1, 1), 1)
  monkeypatch.setattr(linear, "platform", lambda: "tpu")
  grads, text = trained_on("all", (2, 2, 2), 2)
  assert_equal(grads, expected, 1e-5)
  assert reductions_over_replica(text) == {"ENTRY": len(grads)}
