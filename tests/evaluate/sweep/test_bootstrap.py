# SPDX-License-Identifier: Apache-2.0
"""Intervals against what is known of them in closed form, in plain loops, and over many simulated
models."""

import math
import types

import numpy as np
import pytest

from gpt2_jax.evaluate.detection import roc
from gpt2_jax.evaluate.metric import Metric, mean, percent, perplexity
from gpt2_jax.evaluate.sweep import bootstrap
from gpt2_jax.evaluate.tasks import machine_text

ACCURACY = {"accuracy": percent("correct")}
PERPLEXITY = {"perplexity": perplexity("words")}
LEVELS = (0.025, 0.975)


def answers(correct) -> dict[str, np.ndarray]:
  return {"items": np.ones(len(correct)), "correct": np.asarray(correct, float)}


def texts(n: int, seed: int = 0) -> dict[str, np.ndarray]:
  rng = np.random.default_rng(seed)
  words = rng.integers(1, 40, n)
  return {"items": np.ones(n), "nats": words * rng.gamma(8, 0.4, n), "words": words.astype(float)}


def resampled(metrics, items, seed: int = 0, resamples: int = 999) -> np.ndarray:
  """The scores of the resamples that `intervals` draws."""
  [name] = metrics
  keys, items_NK = bootstrap._stack(metrics, items)
  counts = np.concatenate(list(bootstrap.draw_counts(len(items_NK), resamples, seed)))
  return bootstrap._scores(metrics, keys, counts @ items_NK)[name]


def test_the_interval_of_a_share_is_the_binomials():
  n, k = 2000, 600
  interval = bootstrap.intervals(ACCURACY, answers(np.arange(n) < k))["accuracy"]
  half = 1.96 * math.sqrt(k / n * (1 - k / n) / n) * 100
  assert interval.value == pytest.approx(30)
  assert interval.low == pytest.approx(30 - half, abs=0.1) and interval.high == pytest.approx(
    30 + half, abs=0.1
  )


def test_intervals_hold_the_truth_as_often_as_they_say():
  rng = np.random.default_rng(0)
  held = []
  for seed in range(300):
    [interval] = bootstrap.intervals(
      {"": mean("x")}, {"items": np.ones(80), "x": rng.normal(5, 2, 80)}, 500, seed
    ).values()
    held.append(interval.low <= 5 <= interval.high)
  # 0.95 less what the percentiles lose at 80 items, and 4 of its deviations
  assert 0.90 <= np.mean(held) <= 0.98


def test_a_lower_level_is_a_narrower_interval():
  items = texts(300)
  wide, narrow = (
    bootstrap.intervals(PERPLEXITY, items, 2000, level=level)["perplexity"] for level in (0.95, 0.5)
  )
  assert wide.low < narrow.low < narrow.value < narrow.high < wide.high


def test_items_that_are_all_alike_have_no_spread():
  interval = bootstrap.intervals(ACCURACY | {"mean": mean("correct")}, answers(np.ones(50)), 200)
  assert interval["accuracy"][:3] == (100, 100, 100) and interval["mean"][:3] == (1, 1, 1)
  # BCa asks for a spread
  assert {one.method for one in interval.values()} == {bootstrap.PERCENTILE}


def test_one_item_has_a_score_and_no_interval():
  interval = bootstrap.intervals(ACCURACY, answers([1]), 50)["accuracy"]
  assert interval.value == 100 and math.isnan(interval.low) and math.isnan(interval.high)
  assert interval.method == bootstrap.NO_INTERVAL
  difference = bootstrap.paired_differences(ACCURACY, answers([1]), answers([0]), 50)["accuracy"]
  assert (difference.value, difference.p) == (100, 1) and math.isnan(difference.low)


def test_a_perplexity_is_that_of_each_resample_in_a_plain_loop():
  items, rng = texts(120), np.random.default_rng(1)
  interval = bootstrap.intervals(PERPLEXITY, items, 20_000)["perplexity"]
  drawn = [rng.integers(120, size=120) for _ in range(20_000)]
  loop = [math.exp(items["nats"][at].sum() / items["words"][at].sum()) for at in drawn]
  assert interval.value == pytest.approx(
    math.exp(items["nats"].sum() / items["words"].sum()), rel=1e-12
  )
  ours = resampled(PERPLEXITY, items, resamples=20_000)
  np.testing.assert_allclose(np.quantile(ours, LEVELS), np.quantile(loop, LEVELS), rtol=0.005)


def test_the_seed_decides_and_the_size_of_a_part_does_not(monkeypatch):
  items = texts(90)
  first = bootstrap.intervals(PERPLEXITY, items, 300, seed=3)
  assert (
    first
    == bootstrap.intervals(PERPLEXITY, items, 300, seed=3)
    != bootstrap.intervals(PERPLEXITY, items, 300)
  )
  monkeypatch.setattr(bootstrap, "DRAWS", 7 * 90)
  parts = bootstrap.intervals(PERPLEXITY, items, 300, seed=3)
  assert parts["perplexity"][:3] == pytest.approx(first["perplexity"][:3], rel=1e-12)


def test_the_order_of_the_items_moves_no_end_by_more_than_the_draws_do():
  items = texts(400)
  turned = {key: values[::-1] for key, values in items.items()}
  one, other = (bootstrap.intervals(PERPLEXITY, x)["perplexity"] for x in (items, turned))
  assert one.value == pytest.approx(other.value, rel=1e-12)
  assert one[1:3] == pytest.approx(other[1:3], abs=0.05 * (one.high - one.low))


def test_several_metrics_at_once_are_each_what_they_are_alone():
  items = texts(60) | answers(np.arange(60) % 3 == 0)
  both = bootstrap.intervals(ACCURACY | PERPLEXITY, items, 500)
  for metrics in (ACCURACY, PERPLEXITY):
    [(name, alone)] = bootstrap.intervals(metrics, items, 500).items()
    assert both[name][:3] == pytest.approx(alone[:3], rel=1e-12)


def test_without_a_denominator_there_is_no_number_and_no_error():
  metrics = {"share": mean("correct", "answered")}
  none = answers([0, 0, 0]) | {"answered": np.zeros(3)}
  assert all(map(math.isnan, bootstrap.intervals(metrics, none, 50)["share"][1:3]))
  # one resample in 27 divides by zero
  few = answers([1, 0, 0]) | {"answered": np.array([1.0, 0, 1])}
  assert bootstrap.intervals(metrics, few, 500)["share"].value == 0.5


def test_metrics_without_a_number_are_no_evidence():
  nothing = answers([0, 0, 0]) | {"answered": np.zeros(3)}
  assert (
    bootstrap.paired_differences({"share": mean("correct", "answered")}, nothing, nothing, 50)[
      "share"
    ].p
    == 1
  )


def test_p_values_are_uniform_where_two_models_are_alike():
  rng = np.random.default_rng(0)
  p = []
  for seed in range(400):
    a, b = ({"items": np.ones(60), "x": rng.normal(size=60)} for _ in "ab")
    p.append(bootstrap.paired_differences({"": mean("x")}, a, b, 199, seed)[""].p)
  assert np.mean(p) == pytest.approx(0.5, abs=0.06)
  assert np.mean(np.array(p) <= 0.05) == pytest.approx(0.05, abs=0.045)
  assert min(p) >= 1 / 200


def test_a_difference_that_shows_only_in_pairs_is_found():
  rng = np.random.default_rng(0)
  difficulty = rng.normal(0, 10, 200)
  a, b = (
    {"items": np.ones(200), "x": difficulty + rng.normal(shift, 0.5, 200)} for shift in (0.5, 0)
  )
  difference = bootstrap.paired_differences({"": mean("x")}, a, b, 2000)[""]
  assert (
    difference.p == pytest.approx(1 / 2001)
    and 0 < difference.low < difference.value < difference.high < 1
  )
  alone = [bootstrap.intervals({"": mean("x")}, x, 2000)[""] for x in (a, b)]
  assert alone[0].low < alone[1].high  # unpaired, the intervals overlap


def test_the_p_value_of_few_items_is_the_exact_one():
  """Five differences, all 1: of the 32 ways to swap them only two are as far out."""
  a, b = answers(np.ones(5)), answers(np.zeros(5))
  assert bootstrap.paired_differences(ACCURACY, a, b, 20_000)["accuracy"].p == pytest.approx(
    2 / 32, abs=0.006
  )


def test_a_pair_turned_around_is_the_same_with_the_other_sign():
  a, b = texts(80, 1), texts(80, 2)
  one, other = (
    bootstrap.paired_differences(PERPLEXITY, *pair, 1000)["perplexity"] for pair in ((a, b), (b, a))
  )
  assert one.value == pytest.approx(-other.value) and one.p == pytest.approx(other.p, abs=1e-9)
  assert one.low == pytest.approx(-other.high, rel=0.05, abs=0.5)
  itself = bootstrap.paired_differences(PERPLEXITY, a, a, 100)["perplexity"]
  assert itself == (0, 0, 0, bootstrap.PERCENTILE, 1)


def test_only_the_same_number_of_items_pairs():
  with pytest.raises(ValueError, match="3 items do not pair with 4"):
    bootstrap.paired_differences(ACCURACY, answers(np.ones(3)), answers(np.ones(4)))


def test_a_metric_sees_the_sums_of_all_resamples_at_once():
  seen = []
  metric = Metric(lambda sums: seen.append(np.shape(sums["x"])) or sums["x"], ("x",), True, "")
  bootstrap.intervals({"": metric}, {"x": np.arange(5.0)}, 70)
  assert seen == [(), (70,), (5,)]  # all items, the resamples, and all but one item


# ---- BCa


def scipy_edges(statistic, columns, scores_R):
  """The ends of scipy's BCa interval of these resamples."""
  from scipy import stats

  drawn = types.SimpleNamespace(bootstrap_distribution=scores_R)
  result = stats.bootstrap(
    columns, statistic, n_resamples=0, paired=True, vectorized=False, bootstrap_result=drawn
  )
  return result.confidence_interval


def between_neighbors(scores_R, end: float, expected: float) -> bool:
  """Whether an end is the resample's score next to scipy's, which lies between two."""
  in_order = np.sort(scores_R)
  at = np.searchsorted(in_order, expected)
  return in_order[max(0, at - 1)] <= end <= in_order[min(len(in_order) - 1, at + 1)]


@pytest.mark.parametrize("n", [5, 12, 40])
def test_bca_is_scipys(n):
  pytest.importorskip("scipy.stats")
  rng = np.random.default_rng(n)
  words = rng.integers(1, 9, n).astype(float)
  nats = words * rng.lognormal(0, 1, n)
  items = {"items": np.ones(n), "words": words, "nats": nats, "correct": (nats > 3) * 1.0}
  cases = [
    (PERPLEXITY, lambda nats, words: np.exp(nats.sum() / words.sum()), (nats, words)),
    ({"mean": mean("nats")}, lambda nats: nats.mean(), (nats,)),
    (ACCURACY, lambda correct: 100 * correct.mean(), (items["correct"],)),
  ]
  for metrics, statistic, columns in cases:
    scores_R = resampled(metrics, items)
    [interval] = bootstrap.intervals(metrics, items, 999).values()
    expected = scipy_edges(statistic, columns, scores_R)
    assert interval.method == bootstrap.BCA
    assert between_neighbors(scores_R, interval.low, expected.low)
    assert between_neighbors(scores_R, interval.high, expected.high)
    # and it is another than the percentiles': the perplexity is skewed to the right
    if metrics is PERPLEXITY:
      assert interval.high > np.quantile(scores_R, 0.975)


def test_bca_of_a_difference_is_scipys():
  pytest.importorskip("scipy.stats")
  a, b = texts(30, 1), texts(30, 2)

  def statistic(nats_a, words_a, nats_b, words_b):
    return np.exp(nats_a.sum() / words_a.sum()) - np.exp(nats_b.sum() / words_b.sum())

  scores_R = resampled(PERPLEXITY, a) - resampled(PERPLEXITY, b)
  difference = bootstrap.paired_differences(PERPLEXITY, a, b, 999)["perplexity"]
  columns = (a["nats"], a["words"], b["nats"], b["words"])
  expected = scipy_edges(statistic, columns, scores_R)
  assert difference.method == bootstrap.BCA
  assert between_neighbors(scores_R, difference.low, expected.low)
  assert between_neighbors(scores_R, difference.high, expected.high)


def test_where_bca_is_not_defined_the_percentiles_stand_and_say_so():
  metrics = {"share": mean("correct", "answered")}
  # without the third item nothing is left to divide by
  few = answers([1, 0, 1]) | {"answered": np.array([0.0, 0, 1])}
  share = bootstrap.intervals(metrics, few, 500)["share"]
  assert share.method == bootstrap.PERCENTILE and share.value == 2
  scores_R = resampled(metrics, few, resamples=500)
  ends = np.quantile(scores_R[~np.isnan(scores_R)], LEVELS, method="inverted_cdf")
  assert (share.low, share.high) == tuple(ends)

  # an infinite perplexity
  many = {"nats": np.array([1e9, 1.0, 2]), "words": np.ones(3)}
  assert bootstrap.intervals(PERPLEXITY, many, 99)["perplexity"].method == bootstrap.PERCENTILE
  # a statistic that every resample exceeds
  spread = Metric(lambda sums: np.abs(sums["x"]), ("x",), False, "")
  x = np.random.default_rng(0).normal(size=9)
  balanced = {"x": np.concatenate([x, -x])}
  assert bootstrap.intervals({"": spread}, balanced, 99)[""].method == bootstrap.PERCENTILE


def test_bca_covers_skewed_perplexities_more_often_than_the_percentiles():
  rng = np.random.default_rng(0)
  truth = math.exp(math.exp(0.5))
  covered = {"BCa": 0, "percentile": 0}
  for seed in range(200):
    items = {"nats": rng.lognormal(0, 1, 50), "words": np.ones(50)}
    interval = bootstrap.intervals(PERPLEXITY, items, 499, seed)["perplexity"]
    covered["BCa"] += interval.low <= truth <= interval.high
    low, high = np.quantile(resampled(PERPLEXITY, items, seed, 499), LEVELS)
    covered["percentile"] += low <= truth <= high
  assert covered["percentile"] < covered["BCa"] <= 197, covered


# ---- metrics of the items' order


AREA = {"auc": machine_text.METRICS["auc"]}
TRUE_POSITIVES = {"tpr_at_1_fpr": machine_text.METRICS["tpr_at_1_fpr"]}


def detected(n: int, seed: int = 0, shift: float = 1.0) -> dict[str, np.ndarray]:
  """Documents with a person's text, a machine's, or both; whole scores, so that many are equal."""
  rng = np.random.default_rng(seed)
  has_human = rng.random(n) < 0.8
  has_machine = ~has_human | (rng.random(n) < 0.7)
  human, machine = np.round(4 * rng.normal(0, 1, n)), np.round(4 * rng.normal(shift, 1, n))
  items = {"human": human, "machine": machine, "has_human": has_human, "has_machine": has_machine}
  return {"items": np.ones(n)} | {key: value.astype(float) for key, value in items.items()}


def area_of(items) -> float:
  metrics = pytest.importorskip("sklearn.metrics")
  kinds = [items[kind][items[f"has_{kind}"] > 0] for kind in ("human", "machine")]
  labels = np.repeat([0, 1], list(map(len, kinds)))
  return metrics.roc_auc_score(labels, np.concatenate(kinds))


def test_a_metric_of_the_order_is_that_of_each_resample_written_out():
  items = detected(60)
  counts = np.concatenate(list(bootstrap.draw_counts(60, 70, 0)))
  areas, rates = [], []
  for count in counts.astype(int):
    resample = {key: np.repeat(value, count) for key, value in items.items()}
    areas.append(area_of(resample))
    kinds = [resample[kind][resample[f"has_{kind}"] > 0] for kind in ("human", "machine")]
    rates.append(100 * roc(*kinds).at_false_positives(0.01)[0])
  [area] = bootstrap.intervals(AREA, items, 70).values()
  np.testing.assert_allclose(AREA["auc"].of_counts(items, counts), areas)
  np.testing.assert_allclose(TRUE_POSITIVES["tpr_at_1_fpr"].of_counts(items, counts), rates)
  assert area.value == pytest.approx(area_of(items)) == pytest.approx(AREA["auc"].value(items))
  assert area.method == bootstrap.BCA and area.low < area.value < area.high
  assert {area.low, area.high} <= set(AREA["auc"].of_counts(items, counts))


def test_a_difference_of_areas_does_not_depend_on_the_models_scales():
  a, b = detected(80), detected(80, seed=1, shift=0.2)
  b |= {key: a[key] for key in ("has_human", "has_machine")}
  scaled = b | {kind: np.exp(b[kind]) + 100 for kind in ("human", "machine")}
  [difference] = bootstrap.paired_differences(AREA, a, b, 500).values()
  [same] = bootstrap.paired_differences(AREA, a, scaled, 500).values()
  assert difference == same and difference.p < 0.05
  assert difference.value == pytest.approx(area_of(a) - area_of(b))
  [none] = bootstrap.paired_differences(AREA, a, a, 500).values()
  assert (none.value, none.low, none.high, none.p) == (0, 0, 0, 1)


def test_metrics_of_both_kinds_stand_side_by_side():
  items = detected(50) | {"correct": np.arange(50) % 2.0}
  both = bootstrap.intervals(AREA | ACCURACY, items, 300)
  assert both["auc"] == bootstrap.intervals(AREA, items, 300)["auc"]
  assert both["accuracy"] == bootstrap.intervals(ACCURACY, items, 300)["accuracy"]
