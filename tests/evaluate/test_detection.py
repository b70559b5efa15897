# SPDX-License-Identifier: Apache-2.0
"""Detection of machine text: statistics against torch's, ROC against what others published."""

import dataclasses
import json
import math
import os
import pathlib

import numpy as np
import pytest

from gpt2_jax.evaluate.detection import CRITERIA, roc, roc_interval
from gpt2_jax.evaluate.scorers import Scorer
from gpt2_jax.evaluate.task import Statistics, TokenStatistics
from gpt2_jax.model import ModelConfig
from gpt2_jax.tokenizer import EOT, Characters, HuggingFace, byte_alphabet

ALPHABET = " .abcdefghijklmnopqrstuvwxyz"
# 28 tokens are padded to 128; 33 characters are more than a window, and read in two.
TINY = ModelConfig(n_vocab=28, n_ctx=16, n_embd=16, n_head=4, n_layer=2, dtype="float32")
TEXTS = ["the cat sat on the mat. it purrs.", "zq", "aaaa bbbb aaaa b"]


@pytest.fixture(scope="module")
def tokenizer():
  return Characters(ALPHABET)


@pytest.fixture(scope="module")
def weights(parameters):
  arrays = parameters(TINY, scale=0.5)
  return arrays | {"wte": 4 * arrays["wte"]}


@pytest.fixture(scope="module")
def others(parameters):
  """Weights of a reference model."""
  return parameters(TINY, scale=0.4, seed=1)


@pytest.fixture(scope="module")
def models(mesh, weights, others, place):
  with mesh(1, 1, 1):
    return place(TINY, weights), place(TINY, others)


def their_statistics(model, reference, ids: list[int]) -> dict[str, np.ndarray]:
  """The same by torch in float64, with the formulas of Fast-DetectGPT's published script."""
  torch = pytest.importorskip("torch")
  logits, labels = _windows(model, ids)
  reference_logits, _ = _windows(reference, ids)
  scores, labels = torch.tensor(logits), torch.tensor(labels)
  logp = torch.log_softmax(scores, -1)
  q = torch.softmax(torch.tensor(reference_logits), -1)
  mean = (q * logp).sum(-1)
  variance = (q * logp.square()).sum(-1) - mean.square()
  order = scores.argsort(-1, descending=True)
  ranks = (order == labels[:, None]).nonzero()[:, 1] + 1
  entropy = -(logp.exp() * logp).sum(-1)
  nats = -logp.gather(-1, labels[:, None])[:, 0]
  values = {"nats": nats, "rank": ranks, "entropy": entropy, "mean": mean, "variance": variance}
  return {name: value.numpy() for name, value in values.items()}


def _windows(model, ids: list[int]) -> tuple[np.ndarray, np.ndarray]:
  """Logits [T, V] that predict each token but the first, float64, and these tokens."""
  import jax

  n_ctx, n_vocab = model.config.n_ctx, model.config.n_vocab
  logits, labels, begin = [], [], 0
  while begin < len(ids) - 1:
    end = min(len(ids) - 1, begin + n_ctx)
    first = max(0, end - n_ctx)
    with jax.set_mesh(model.mesh):
      window = np.asarray(model(np.array([ids[first:end]])), np.float64)[0, :, :n_vocab]
    logits.append(window[begin - first :])
    labels += ids[begin + 1 : end + 1]
    begin = end
  return np.concatenate(logits), np.array(labels)


@pytest.mark.parametrize("sizes", [(1, 1, 1), (1, 4, 2)], ids=str)
@pytest.mark.parametrize("with_reference", [False, True])
def test_statistics_are_torchs(
  sizes, with_reference, mesh, weights, others, place, models, tokenizer
):
  with mesh(*sizes):
    model = place(TINY, weights)
    reference = place(TINY, others) if with_reference else None
  scorer = Scorer(model, tokenizer, batch_size=3, reference=reference)
  answers = scorer.answers([TokenStatistics(text) for text in TEXTS])

  for text, answer in zip(TEXTS, answers, strict=True):
    ids = list(tokenizer.encode(text))
    wanted = their_statistics(models[0], models[1 if with_reference else 0], ids)
    assert len(answer.nats) == len(ids) - 1, "the first token is context only"
    for name, value in wanted.items():
      np.testing.assert_allclose(getattr(answer, name), value, rtol=1e-4, atol=1e-4, err_msg=name)
    if not with_reference:
      np.testing.assert_allclose(answer.mean, -answer.entropy, rtol=1e-5, atol=1e-5)


def test_a_reference_reads_the_same_tokens(models, parameters, mesh, place, tokenizer):
  larger = dataclasses.replace(TINY, n_vocab=40)
  with mesh(1, 1, 1):
    reference = place(larger, parameters(larger))
  with pytest.raises(ValueError, match="n_vocab of 28 and the reference 40"):
    Scorer(models[0], tokenizer, reference=reference)


def test_no_end_of_text_stands_before_a_text(parameters, mesh, place):
  """Where the tokenizer has one, too: the published detectors read the text alone."""
  alphabet = [*byte_alphabet().values(), EOT]
  tokenizer = HuggingFace.from_merges({token: i for i, token in enumerate(alphabet)}, [])
  assert tokenizer.eot is not None
  config = dataclasses.replace(TINY, n_vocab=len(alphabet))
  with mesh(1, 1, 1):
    model = place(config, parameters(config))
  [answer] = Scorer(model, tokenizer).answers([TokenStatistics("the cat")])
  assert len(answer.nats) == len(tokenizer.encode("the cat")) - 1


def test_a_text_needs_two_tokens(models, tokenizer):
  with pytest.raises(ValueError, match="text 1 has 1 tokens"):
    Scorer(models[0], tokenizer).answers([TokenStatistics("ab"), TokenStatistics("a")])


def test_criteria_by_hand():
  """Two tokens: log p of -1 and -3, ranks 1 and 8."""
  statistics = Statistics(
    nats=np.array([1.0, 3.0]),
    rank=np.array([1.0, 8.0]),
    entropy=np.array([2.0, 4.0]),
    mean=np.array([-2.0, -4.0]),
    variance=np.array([1.0, 3.0]),
  )
  values = {name: criterion(statistics) for name, criterion in CRITERIA.items()}
  assert values == pytest.approx(
    {
      "likelihood": -2.0,
      "log_rank": -math.log(8) / 2,
      "lrr": 4 / math.log(8),
      "rank": -4.5,
      "entropy": 3.0,
      "fast_detectgpt": (-4 + 6) / 2,
      "binoculars": -4 / 6,
    }
  )


def test_the_published_areas_come_from_the_published_scores():
  """Fast-DetectGPT's detectors of GPT-2 XL's text on XSum: 500 texts of each kind."""
  folder = os.environ.get("GPT2_JAX_TEST_DATA")
  if not folder:
    pytest.skip("GPT2_JAX_TEST_DATA is not set: detection/published_xsum_*.json")
  published = {
    "likelihood": 0.864,
    "logrank": 0.892,
    "lrr": 0.918,
    "entropy": 0.583,
    "rank": 0.794,
    "sampling_discrepancy": 0.993,
  }
  for name, area in published.items():
    path = pathlib.Path(folder) / "detection" / f"published_xsum_{name}.json"
    content = json.loads(path.read_text())
    scores = content["predictions"]["real"], content["predictions"]["samples"]
    curve = roc(*scores)
    assert round(curve.auc, 3) == area
    assert curve.auc == pytest.approx(content["metrics"]["roc_auc"], abs=1e-9)
    value, low, high = roc_interval(*scores)
    assert value == curve.auc and low < value < high


def test_the_roc_is_scikit_learns():
  metrics = pytest.importorskip("sklearn.metrics")
  rng = np.random.default_rng(0)
  human, machine = rng.integers(0, 9, 200) / 3, rng.integers(2, 12, 150) / 3  # many ties
  curve = roc(human, machine)
  labels, scores = [0] * 200 + [1] * 150, np.concatenate([human, machine])
  false, true, thresholds = metrics.roc_curve(labels, scores, drop_intermediate=False)
  np.testing.assert_allclose(curve.false_positive_rate, false)
  np.testing.assert_allclose(curve.true_positive_rate, true)
  np.testing.assert_array_equal(curve.thresholds, thresholds)
  assert curve.auc == pytest.approx(metrics.roc_auc_score(labels, scores))
  rate, threshold = curve.at_false_positives(0.01)
  assert np.mean(human >= threshold) <= 0.01 and np.mean(machine >= threshold) == rate
  allowed = [t for t in {*human, *machine} if np.mean(human >= t) <= 0.01]
  assert rate == max(np.mean(machine >= t) for t in allowed) > 0, "no other threshold finds more"


def test_scores_that_are_none_or_nan_are_refused_in_one_line():
  with pytest.raises(ValueError, match="no scores of machine text"):
    roc([1.0], [])
  with pytest.raises(ValueError, match="1 of 2 scores of human text are NaN"):
    roc([1.0, math.nan], [1.0])
