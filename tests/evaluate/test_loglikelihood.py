# SPDX-License-Identifier: Apache-2.0
import dataclasses

import jax
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

from gpt2_jax.evaluate import loglikelihood
from gpt2_jax.evaluate.batching import plan_batches
from gpt2_jax.evaluate.loglikelihood import score_last, score_rows, sliding_windows, tree_row
from gpt2_jax.kernels import chunked_attention
from gpt2_jax.linear import Dense
from gpt2_jax.model import ModelConfig
from gpt2_jax.quantization import quantize

TINY = ModelConfig(n_vocab=97, n_ctx=32, n_embd=16, n_head=4, n_layer=2, dtype="float32")
MESHES = [(1, 1, 1), (1, 4, 2), (2, 2, 2)]


@pytest.fixture(scope="module")
def weights(parameters):
  return parameters(TINY)


@pytest.fixture(scope="module")
def model(mesh, weights, place):
  with mesh(1, 1, 1):
    return place(TINY, weights)


@jax.jit
def _logits(model, tokens_BT):
  return model(tokens_BT)


def logits_of(model, tokens: np.ndarray) -> np.ndarray:
  """The logits [T, V] of the whole model, float64."""
  tokens_BT = np.zeros((4, model.config.n_ctx), np.int32)  # four rows divide every mesh here
  tokens_BT[:, : len(tokens)] = tokens
  with jax.set_mesh(model.mesh):
    placed_BT = jax.device_put(
      tokens_BT, jax.sharding.NamedSharding(model.mesh, P(("replica", "data")))
    )
    return np.asarray(_logits(model, placed_BT), np.float64)[
      0, : len(tokens), : model.config.n_vocab
    ]


def expected(model, tokens: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
  """-log p of the last tokens and whether each is the likeliest, by NumPy's log-softmax of the
  model's logits."""
  logits_PV, label_P = logits_of(model, tokens[:-1])[-count:], tokens[-count:]
  logp_PV = logits_PV - np.log(np.exp(logits_PV).sum(-1, keepdims=True))
  return -logp_PV[np.arange(count), label_P], logits_PV.argmax(-1) == label_P


def check(found, wanted, atol=1e-5):
  assert len(found) == len(wanted)
  for (nats, first), (wanted_nats, wanted_first) in zip(found, wanted, strict=True):
    assert nats.dtype == np.float32
    np.testing.assert_allclose(nats, wanted_nats, rtol=0, atol=atol)
    np.testing.assert_array_equal(first, wanted_first)


@pytest.fixture(scope="module")
def texts(model) -> list[tuple[np.ndarray, int]]:
  """Tokens, up to n_ctx + 1, and how many of the last are scored; every fourth text ends as is
  likeliest."""
  rng = np.random.default_rng(0)
  made = []
  for i in range(19):
    tokens = rng.integers(0, 97, (2, 11, 33)[i % 3]).astype(
      np.int32
    )  # few lengths, for each is compiled
    if i % 4 == 0:
      tokens[-1] = logits_of(model, tokens[:-1])[-1].argmax()
    made.append((tokens, 1 if i % 4 == 0 else rng.integers(1, len(tokens))))
  return made


@pytest.fixture(scope="module")
def wanted(model, texts):
  return [expected(model, *text) for text in texts]


@pytest.mark.parametrize("sizes", MESHES, ids=str)
@pytest.mark.parametrize("batch_size", [1, 64])
def test_scores_are_the_log_softmax_of_the_logits(
  sizes, batch_size, mesh, weights, place, texts, wanted
):
  """On every mesh, in every company, in any order."""
  assert sum(first.all() for _, first in wanted) >= 3, "some are the model's own choice"
  with mesh(*sizes):
    model = place(TINY, weights)
  check(score_rows(model, [score_last(*text) for text in texts], batch_size), wanted)
  order = np.random.default_rng(batch_size).permutation(len(texts))
  check(
    score_rows(model, [score_last(*texts[i]) for i in order], batch_size),
    [wanted[i] for i in order],
  )


def test_long_texts_and_short_continuations_take_different_steps_and_score_alike(
  model, monkeypatch, texts, wanted
):
  """In steps of 3 columns up to 6 labels, and of 5 beyond."""
  monkeypatch.setattr(loglikelihood, "SHORT_LOGIT_ROWS", 6)
  monkeypatch.setattr(loglikelihood, "LONG_LOGIT_ROWS", 10)
  longest = [i for i, (tokens, _) in enumerate(texts) if len(tokens) == 33]
  assert {texts[i][1] > 3 for i in longest} == {True, False}
  check(
    score_rows(model, [score_last(*texts[i]) for i in longest], 2), [wanted[i] for i in longest]
  )


def test_without_rows_there_are_no_scores(model):
  assert score_rows(model, [], 4) == []


@pytest.mark.parametrize("sizes", [(1, 1, 1), (2, 2, 2)], ids=str)
def test_a_uniform_model_costs_ln_v_a_token(sizes, mesh, weights, place):
  with mesh(*sizes):
    flat = place(TINY, {name: np.zeros_like(array) for name, array in weights.items()})
  [(nats, first)] = score_rows(flat, [score_last(np.array([5, 0, 96, 0, 7]), 4)], 2)
  np.testing.assert_allclose(nats, np.log(97), rtol=3e-7)  # one bit of float32
  assert first.tolist() == [True, False, True, False], "of equals the first is the choice"


def test_padding_of_the_vocabulary_never_counts(mesh, weights, place, put, texts, wanted):
  """Not even when its rows are loud, one way and the other: one of them is above all others."""
  for sizes in ((1, 1, 1), (2, 2, 2)):
    with mesh(*sizes):
      model = place(TINY, weights)
      loud = np.full((128, 16), 100, np.float32) * np.where(np.arange(128) % 2, 1, -1)[:, None]
      loud[:97] = weights["wte"]
      model.wte = nnx.Param(Dense(put(loud, P(("model", "data"), None)), outputs_are_rows=True))
    check(score_rows(model, [score_last(*text) for text in texts], 8), wanted)


def test_bfloat16_and_int8_score_what_their_models_say(mesh, weights, place, texts):
  for sizes in ((1, 1, 1), (1, 4, 2)):
    with mesh(*sizes):
      half = place(dataclasses.replace(TINY, dtype="bfloat16"), weights)
      small = quantize(place(TINY, weights))
    texts = texts[:3]
    for model in (half, small):
      found = score_rows(model, [score_last(*text) for text in texts], 8)
      for (nats, _), text in zip(found, texts, strict=True):
        assert nats.dtype == np.float32
        np.testing.assert_allclose(
          nats, expected(model, *text)[0], atol=2e-2 if model is half else 1e-5
        )


def test_what_cannot_be_scored_is_an_error(mesh, model, weights, place):
  for tokens, low in (([3, 97], 3), ([97, 3], 3), ([-1, 97], -1)):
    with pytest.raises(ValueError, match=f"tokens {low} to 97, and the vocabulary is 97"):
      score_rows(model, [score_last(np.array(tokens), 1)], 2)
  with mesh(1, 1, 1):
    broken = place(TINY, weights | {"ln_f.g": np.full(16, np.nan)})
  with pytest.raises(FloatingPointError, match="logits are not finite numbers"):
    score_rows(broken, [score_last(np.array([1, 2]), 1)], 2)

  # One weight of a token that is neither read nor a label: its logit is infinite, and the label's
  # -log p is, without a NaN.
  wte = weights["wte"].copy()
  wte[50, 0] = np.inf
  with mesh(1, 1, 1):
    broken = place(TINY, weights | {"wte": wte})
  rows = [score_last(np.array([token, 2]), 1) for token in range(3, 40)]
  with pytest.raises(FloatingPointError, match="logits are not finite numbers"):
    score_rows(broken, rows, 2)


def test_the_next_batch_is_dispatched_before_one_is_read(model):
  order = []

  def dispatch(batch):
    order.append(f"begin {batch.rows[0]}")
    return "made"

  for batch, found in loglikelihood._pipelined(model, plan_batches([3, 2, 1], 1), dispatch):
    assert found == "made"
    order.append(f"read {batch.rows[0]}")
  assert order == ["begin 0", "begin 1", "read 0", "begin 2", "read 1", "read 2"]


# ---- windows


def test_windows_by_hand():
  def found(stride):
    return [
      (row.inputs.tolist(), row.labels.tolist()) for row in sliding_windows(np.arange(8), 3, stride)
    ]

  assert found(3) == [([0, 1, 2], [1, 2, 3]), ([3, 4, 5], [4, 5, 6]), ([4, 5, 6], [7])]
  assert found(2) == [([0, 1, 2], [1, 2, 3]), ([2, 3, 4], [4, 5]), ([4, 5, 6], [6, 7])]
  assert found(1) == [([0, 1, 2], [1, 2, 3]), *(([i, i + 1, i + 2], [i + 3]) for i in range(1, 5))]
  assert [row.labels.tolist() for row in sliding_windows(np.arange(3), 8, 8)] == [[1, 2]]
  assert sliding_windows(np.arange(1), 8, 8) == []


def test_windows_as_wide_as_the_context_are_those_of_the_harness():
  utils = pytest.importorskip("lm_eval.utils")
  for size in (1, 31, 32, 33, 64, 65, 200):
    tokens = np.arange(1, size + 1)
    theirs = utils.get_rolling_token_windows(tokens.tolist(), 0, 32, 1)
    ours = sliding_windows(np.array([0, *tokens]), 32, 32)
    assert [(row.inputs.tolist(), row.labels.tolist()) for row in ours] == [
      (list(a), list(b)) for a, b in theirs
    ]


@pytest.mark.parametrize("stride", [1, 2, 7, 31, 32])
def test_a_token_is_scored_after_all_the_context_its_stride_leaves(stride, model):
  tokens = np.random.default_rng(2).integers(0, 97, 75).astype(np.int32)
  nats = np.concatenate(
    [nats for nats, _ in score_rows(model, sliding_windows(tokens, 32, stride), 16)]
  )
  assert len(nats) == 74
  for place in range(1, 75):
    late = -(-(place - 32) // stride) * stride if place > 32 else 0  # how far the window has moved
    begin = min(late, 74 - 32)
    wanted, _ = expected(model, tokens[begin : place + 1], 1)
    np.testing.assert_allclose(nats[place - 1], wanted[0], atol=1e-5)


# ---- tree attention


def test_a_tree_row_by_hand():
  row = tree_row([7, 8, 9], [[1, 2], [3], [4, 5]])
  assert row.inputs.tolist() == [7, 8, 9, 1, 9, 9, 4]
  assert row.labels.tolist() == [1, 2, 3, 4, 5]
  assert row.tree.tolist() == [[0, 1, 2, 3, 2, 2, 3], [0, 0, 1, 1, 2, 3, 3]]


@pytest.mark.parametrize("sizes", MESHES, ids=str)
def test_continuations_in_one_row_score_as_each_alone(
  sizes, mesh, weights, place, model, monkeypatch
):
  rng = np.random.default_rng(3)
  contexts = [rng.integers(0, 97, n).tolist() for n in (1, 2, 5, 9, 14)]
  endings = [[rng.integers(0, 97, n).tolist() for n in (1, 5, 3)] for _ in contexts]
  with mesh(*sizes):
    placed = place(TINY, weights)
  monkeypatch.setattr(chunked_attention, "QUERIES", 16)  # so that there are several chunks
  found = score_rows(placed, [tree_row(*both) for both in zip(contexts, endings, strict=True)], 8)
  for (nats, first), context, group in zip(found, contexts, endings, strict=True):
    wanted = [expected(model, np.array(context + ending), len(ending)) for ending in group]
    check([(nats, first)], [tuple(map(np.concatenate, zip(*wanted, strict=True)))])
