# SPDX-License-Identifier: Apache-2.0
"""Reports of cells that are made by hand: what is computed of them, and that nothing else gets
in."""

import json
import math

import numpy as np
import pytest

from configs import zero_shot
from gpt2_jax.evaluate import tasks
from gpt2_jax.evaluate.metric import percent, perplexity
from gpt2_jax.evaluate.sources import Source
from gpt2_jax.evaluate.sweep import bootstrap, paper, report
from gpt2_jax.evaluate.sweep.cells import Outcome
from gpt2_jax.evaluate.task import Task
from gpt2_jax.sizes import SIZES

METRICS = {"accuracy": percent("correct"), "perplexity": perplexity("items")}


@pytest.fixture
def config(monkeypatch):
  source = Source("toy", ("*",), None, "https://example.org")
  for name in ("lambada", "toy"):
    protocols = {
      p: Task(name, p, "", source, None, None, METRICS) for p in ("last_word", "stop_words")
    }
    monkeypatch.setitem(tasks.TASKS, name, protocols)
  config = zero_shot.get_config()
  config.resamples = 200
  return config


def cell(
  model: str,
  correct,
  nats=None,
  task="lambada",
  protocol="last_word",
  size=None,
  parameters=10,
  **more,
) -> dict:
  correct = np.asarray(correct, float)
  sums = {
    "items": np.ones(len(correct)),
    "correct": correct,
    "nats": np.ones(len(correct)) if nats is None else nats,
  }
  intervals = bootstrap.intervals(METRICS, sums, 200)
  identity = {
    "model": model,
    "task": task,
    "protocol": protocol,
    "shots": 0,
    "rows": "abc",
    "limit": 0,
  }
  metrics = {}
  for name, metric in METRICS.items():
    value, low, high, method = intervals[name]
    ends = {"value": value, "low": low, "high": high}
    metrics[name] = {key: x if math.isfinite(x) else None for key, x in ends.items()}
    metrics[name] |= {"unit": metric.unit, "higher": metric.higher, "method": method}
  about = {
    "run": None,
    "step": None,
    "size": size,
    "parameters": parameters,
    "truncated": 0,
    "of": len(correct),
  }
  return (
    {"identity": identity, "items": len(correct), "sums": sums, "metrics": metrics} | about | more
  )


def write(tmp_path, config, cells, overlaps=(), failed=None, missing=None) -> str:
  outcome = Outcome(cells, failed or {}, missing or {})
  table, _ = report.write(outcome, str(tmp_path), config, overlaps)
  return table


def entries(table: str, beginning: str) -> list[str]:
  """The entries of the first line that begins so."""
  line = next(line for line in table.splitlines() if line.startswith("| " + beginning))
  return [entry.strip() for entry in line.strip("|").split(" | ")]


def figures(task: str, protocol: str, metric: str, shots: int = 0) -> dict:
  """The paper's scores that a cell would have beside it."""
  return paper.paper_scores({"task": task, "protocol": protocol, "shots": shots}, metric)


def test_the_papers_figures_are_of_metrics_and_protocols_that_there_are():
  assert "Radford et al. 2019" in paper.paper()["source"]
  for one in paper.paper()["figures"]:
    assert set(one["sizes"]) <= set(SIZES), one
    for protocol in one["protocols"]:
      task = tasks.get(one["task"], protocol)
      assert one["metric"] in task.metrics, one
      # where the protocol has a number of examples, it is the figure's
      assert task.shots == one.get("shots", 0), one
  for one in paper.paper()["references"]:
    for protocol in one["protocols"]:
      assert set(one["scores"]) == set(tasks.get(one["task"], protocol).metrics), one


def test_the_papers_lambada_is_with_a_filter_where_there_is_one():
  assert figures("lambada", "stop_words", "accuracy")["1542M"] == 63.24
  assert figures("lambada", "last_word", "accuracy") == {"1542M": 52.66}
  assert figures("lambada", "last_word", "perplexity")["117M"] == 35.13
  assert figures("lambada", "last_word", "f1") == figures("piqa", "lm_eval", "accuracy") == {}


def test_no_figure_of_the_paper_is_beside_another_number_of_examples():
  """Of all tasks, protocols and numbers of examples, those are few that ask as the paper asked."""
  for name, protocols in tasks.TASKS.items():
    for task in protocols.values():
      for metric in task.metrics:
        for shots in (0, 1, 5, 8):
          compared = figures(name, task.protocol, metric, shots)
          assert not compared or shots == task.shots, (name, task.protocol, metric, shots)
  for name in ("wmt14_en_fr", "wmt14_fr_en", "natural_questions"):
    with_figures = [
      p for p in tasks.TASKS[name] for m in ("bleu", "exact_match") if figures(name, p, m, 5)
    ]
    assert with_figures == ["paper_prompt"]


def test_table_4_has_its_mean_and_its_reference_lines(tmp_path, config):
  means = {p: figures("cnn_dailymail", p, "rouge_mean").get("1542M") for p in ("tldr", "no_hint")}
  assert means == {"tldr": 21.40, "no_hint": 15.03}
  # each mean is that of its three
  for protocol, mean in means.items():
    three = [figures("cnn_dailymail", protocol, f"rouge{x}")["1542M"] for x in "12L"]
    assert sum(three) / 3 == pytest.approx(mean, abs=0.006)
  identity = {"task": "cnn_dailymail", "protocol": "tldr", "shots": 0}
  assert paper.paper_references(identity, "rouge_mean") == {"lede-3": 31.55, "random-3": 20.98}
  assert not paper.paper_references(identity | {"shots": 1}, "rouge_mean")
  for one in paper.paper()["references"]:
    scores = one["scores"]
    three = sum(scores[f"rouge{x}"] for x in "12L") / 3
    assert three == pytest.approx(scores["rouge_mean"], abs=0.006)

  scored = cell("small", [1, 0], task="cnn_dailymail", protocol="tldr")
  scored["metrics"] = {"rouge_mean": scored["metrics"]["accuracy"]}
  table = write(tmp_path, config, [scored])
  lines = table.split("## Reference lines (Radford et al. 2019")[1]
  assert "- cnn_dailymail:tldr:0, rouge mean (%) ↑: lede-3 31.55, random-3 20.98" in lines
  [result] = map(json.loads, (tmp_path / "results.jsonl").read_text().splitlines())
  assert result["metrics"]["rouge_mean"]["references"]["lede-3"] == 31.55
  assert "Reference lines" not in write(tmp_path, config, [cell("small", [1, 0])])


def test_all_tasks_of_the_config_exist():
  for text in zero_shot.get_config().tasks:
    name, protocol, shots = (text.split(":") + ["", ""])[:3]
    assert tasks.get(name, protocol or None).example or not shots, text


@pytest.mark.parametrize(
  "score, expected",
  [((30, 28, 32), 0), ((33, 31, 35), 1.5), ((29, 28, 32), -0.5), ((30, 30, 30), None)],
)
def test_drift_is_in_half_widths_of_the_interval(score, expected):
  assert report.drift(dict(zip(("value", "low", "high"), score, strict=True)), 30) == expected


def test_a_score_is_beside_the_papers_of_its_size(tmp_path, config):
  cells = [cell("small", [1, 0, 1, 0], size="117M"), cell("own", [1, 1, 1, 0])]
  table = write(tmp_path, config, cells)
  head = ["task", "metric", "items", "truncated", "small", "paper 117M", "drift", "own"]
  assert entries(table, "task | metric | items") == head
  accuracy = entries(table, "lambada:last_word:0 | accuracy (%) ↑ | 4")
  # 117M has none without the filter
  assert accuracy[4:] == ["50.00 [0.000, 100.00]", "–", "–", "75.00 [25.00, 100.00]"]
  line = entries(table, "lambada:last_word:0 | perplexity per item ↓ | 4")
  assert line[4:] == ["2.718 [2.718, 2.718]", "35.13", "–", "2.718 [2.718, 2.718]"]
  nats = np.log([20.0, 30, 40, 50])
  line = entries(
    write(tmp_path, config, [cell("small", [1, 0, 1, 0], nats, size="117M")]),
    "lambada:last_word:0 | perp",
  )
  value, low, high = map(float, line[4].replace("[", "").replace("]", "").replace(",", "").split())
  assert line[6] == f"{(value - 35.13) / ((high - low) / 2):+.1f}" and float(line[6]) < 0
  assert (
    "drift"
    not in write(tmp_path, config, [cell("own", [1, 0], size="117M", task="toy")]).split(
      "\n| task"
    )[1]
  )


def test_counts_say_of_how_many_and_differ_where_models_do(tmp_path, config):
  cells = [cell("a", [1, 0], truncated=1, of=5_153), cell("b", [1, 0], truncated=2, of=5_153)]
  assert entries(write(tmp_path, config, cells), "lambada:last_word:0 | acc")[2:4] == [
    "2 of 5,153",
    "1 / 2",
  ]
  assert "All items." in (tmp_path / "table.md").read_text()
  config.limit = 2
  assert "The first 2 items of each task, and no others." in write(tmp_path, config, cells)
  # one that all items are within is none
  assert "All items." in write(tmp_path, config, [cell("a", [1, 0])])


def test_a_cell_that_is_not_there_is_a_dash_and_has_its_reason(tmp_path, config):
  cells = [cell("a", [1, 0]), cell("b", [1, 0]), cell("b", [1, 1], task="toy")]
  table = write(
    tmp_path,
    config,
    cells,
    failed={"toy:last_word:0 of a": "row 3"},
    missing={"piqa:acc:0": "get it"},
  )
  assert entries(table, "toy:last_word:0 | acc")[4:] == ["–", "100.00 [100.00, 100.00]"]
  # there is no pair
  assert "toy:last_word:0" not in table.split("## Differences")[1].split("## Without")[0]
  assert (
    "- toy:last_word:0 of a: failed: row 3" in table and "- piqa:acc:0: not run: get it" in table
  )
  assert "Without a score" in write(tmp_path, config, [], missing={"piqa:acc:0": "get it"})


def test_results_are_strict_json_lines_without_the_items(tmp_path, config):
  cells = [cell("a", [1, 0], np.array([9e5, 9e5]), size="117M"), cell("b", [1, 0])]
  write(tmp_path, config, cells)
  lines = (tmp_path / "results.jsonl").read_text().splitlines()
  first, second = (json.loads(line, parse_constant=pytest.fail) for line in lines)
  assert (
    first["metrics"]["perplexity"] | {"paper": 35.13, "drift": None, "value": None}
    == first["metrics"]["perplexity"]
  )
  assert (
    "sums" not in first
    and first["metrics"]["accuracy"]["value"] == 50
    and "paper" not in second["metrics"]["accuracy"]
  )
  assert "– [–, –]" in (tmp_path / "table.md").read_text()


def test_neighbours_are_compared_on_the_same_items(tmp_path, config):
  a, b = np.arange(40) % 4 == 0, np.arange(40) % 2 == 0
  table = write(tmp_path, config, [cell("a", a), cell("b", b), cell("c", b)])
  parts = table.split("## Differences")[1]
  assert entries(parts, "task") == ["task", "metric", "b − a", "c − b"]
  line = entries(parts, "lambada:last_word:0 | acc")
  difference = bootstrap.paired_differences(
    METRICS, {"items": np.ones(40), "correct": b, "nats": b}, cell("a", a)["sums"], 200
  )["accuracy"]
  assert (
    line[2].startswith("25.00 [")
    and line[2].endswith(f"p = {difference.p:.4f}")
    and difference.p < 0.05
  )
  assert line[3] == "0.000 [0.000, 0.000], p = 1.0000"
  assert "Differences" not in write(tmp_path, config, [cell("a", a)])


def test_cells_of_other_items_do_not_pair():
  a, b = cell("a", [1, 0]), cell("b", [1, 0])
  b["identity"]["rows"] = "def"
  with pytest.raises(ValueError, match="rows abc and def"):
    report.compare_cells(a, b, 10, 0)


def overlap(ngrams, found) -> dict:
  return {
    "task": "lambada",
    "fingerprint": "abc",
    "n": 8,
    "rate": 1e-8,
    "ngrams": ngrams,
    "found": found,
  }


def test_clean_and_seen_items_have_scores_of_their_own(tmp_path, config):
  correct, ngrams, found = [1, 1, 0, 0, 1, 1], [10, 10, 10, 10, 0, 4], [0, 5, 1, 0, 0, 4]
  cells = [cell("a", correct), cell("b", np.ones(6)), cell("a", [1], task="toy")]
  table = write(tmp_path, config, cells, [overlap(ngrams, found)]).split("## Clean")[1]
  assert entries(table, "lambada:last_word:0 | accuracy (%) ↑ | clean")[3:] == [
    "3", "66.67 [0.000, 100.00]", "100.00 [100.00, 100.00]"
  ]  # fmt: skip
  assert entries(table, "lambada:last_word:0 | accuracy (%) ↑ | seen")[3].startswith("3")
  config.seen_above = 0.5
  table = write(tmp_path, config, cells, [overlap(ngrams, found)]).split("## Clean")[1]
  assert entries(table, "lambada:last_word:0 | accuracy (%) ↑ | seen")[3:5] == [
    "1",
    "100.00 [–, –]",
  ]
  config.seen_above = 1.0
  table = write(tmp_path, config, cells, [overlap(ngrams, found)]).split("## Clean")[1]
  assert entries(table, "lambada:last_word:0 | accuracy (%) ↑ | seen")[3:] == ["0", "–", "–"]


def test_a_limit_splits_the_items_that_were_scored(tmp_path, config):
  limited = cell("a", [1, 0], of=4)
  table = write(tmp_path, config, [limited], [overlap([5] * 4, [5, 0, 5, 5])]).split("## Clean")[1]
  assert entries(table, "lambada:last_word:0 | accuracy (%) ↑ | seen")[3:] == ["1", "100.00 [–, –]"]


@pytest.mark.parametrize(
  "other", [{"task": "toy"}, {"fingerprint": "def"}, {"ngrams": [5] * 3, "found": [0] * 3}]
)
def test_an_overlap_of_other_rows_splits_nothing_and_is_told(tmp_path, config, other):
  table = write(tmp_path, config, [cell("a", [1, 0])], [overlap([5, 5], [0, 0]) | other])
  split = table.split("## Clean")[1]
  assert "fits no score here" in split and "|" not in split and "| 50.00 [" in table


def test_the_paper_is_beside_its_own_protocols_alone():
  assert figures("wikitext2", "invertible", "perplexity") and figures("cbt_cn", "paper", "accuracy")
  for task, protocol in (("wikitext2", "lm_eval"), ("ptb", "megatron"), ("lm1b", "raw")):
    assert figures(task, protocol, "perplexity") == {}
  for protocol in ("last_piece", "openai_last_piece", "original_stop_words"):
    assert figures("lambada", protocol, "accuracy") == {}


def test_confidence_is_told_beside_the_scores(tmp_path, config):
  scored = cell("a", [1, 0])
  write(
    tmp_path, config, [scored | {"sums": scored["sums"] | {"confidence": np.array([0.9, 0.2])}}]
  )
  [line] = map(json.loads, (tmp_path / "results.jsonl").read_text().splitlines())
  assert line["calibration"]["most_confident"] == {"count": 1, "accuracy": 100.0}


def test_percentiles_are_marked_where_they_stand_for_bca(tmp_path, config):
  scored = cell("a", [1, 0, 0, 1, 1, 0, 0, 0])
  assert scored["metrics"]["accuracy"]["method"] == "BCa"
  assert "†" not in entries(write(tmp_path, config, [scored]), "lambada:last_word:0 | acc")[4]
  scored["metrics"]["accuracy"]["method"] = "percentile"
  table = write(tmp_path, config, [scored])
  assert entries(table, "lambada:last_word:0 | acc")[4].endswith("]†")
  assert "percentiles where a † stands" in table
  # all items are alike: no interval
  assert "†" not in entries(table, "lambada:last_word:0 | perp")[4]


def test_a_pipe_in_a_name_does_not_end_its_column(tmp_path, config):
  assert r"| a\|b |" in write(tmp_path, config, [cell("a|b", [1, 0])])


def test_the_listing_has_every_protocol_and_where_its_data_come_from(config):
  listed = report.task_listing(tasks.TASKS)
  assert {line.split()[0] for line in listed.splitlines() if not line.startswith(" ")} == {
    f"{name}:{protocol}" for name, protocols in tasks.TASKS.items() for protocol in protocols
  }
  # once a task, not once a protocol
  assert listed.count("data: toy/ with * from https://example.org") == 2
