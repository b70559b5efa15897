# SPDX-License-Identifier: Apache-2.0
"""Detection of machine text as a task: documents, scores, and the published areas."""

import json
import os
import pathlib

import numpy as np
import pytest

from gpt2_jax.evaluate import runner, sources, tasks
from gpt2_jax.evaluate.detection import CRITERIA, roc
from gpt2_jax.evaluate.scorers import Scorer
from gpt2_jax.evaluate.sweep import bootstrap
from gpt2_jax.evaluate.task import TokenStatistics
from gpt2_jax.evaluate.tasks import machine_text
from gpt2_jax.model import ModelConfig
from gpt2_jax.tokenizer import Characters

TINY = ModelConfig(n_vocab=28, n_ctx=16, n_embd=16, n_head=4, n_layer=2, dtype="float32")
CHARACTERS = Characters(" .abcdefghijklmnopqrstuvwxyz")
HUMAN = ["the cat sat on the mat. it purrs.", "a dog barks", "rain fell on the fair"]
MACHINE = ["the the the the", "zq zq zq zq zq", "rain on rain on"]


def write_lines(path: pathlib.Path, *records: dict) -> pathlib.Path:
  path.write_text("".join(json.dumps(record) + "\n" for record in records))
  return path


def read(path: pathlib.Path) -> list[dict]:
  return sources.load(machine_text.SOURCE, str(path)).rows


def test_the_published_pairs_and_lines_are_the_same_rows(tmp_path):
  pairs = tmp_path / "xsum_gpt2-xl.json"
  pairs.write_text(json.dumps({"original": HUMAN, "sampled": MACHINE}))
  lines = []
  for number, (human, machine) in enumerate(zip(HUMAN, MACHINE, strict=True)):
    lines.append({"text": human, "label": "human", "document": number, "domain": "news"})
    lines.append({"text": machine, "label": 1, "document": number})
  path = write_lines(tmp_path / "own.jsonl", *lines)
  assert read(pairs) == read(path)
  assert read(pairs)[2] == {"human": HUMAN[2], "machine": MACHINE[2]}

  # A text that names no document is one of its own.
  alone = [{"text": line["text"], "label": line["label"]} for line in lines]
  assert read(write_lines(tmp_path / "alone.jsonl", *alone))[:2] == [
    {"human": HUMAN[0]},
    {"machine": MACHINE[0]},
  ]


@pytest.mark.parametrize(
  "content, error",
  [
    ([{"text": "a", "label": "robot"}], "label is 'robot'"),
    ([{"text": "a", "label": True}], "label is 'True'"),
    ([{"text": "a"}], "own.jsonl:1 is malformed: it has no 'label'"),
    ([{"text": "a", "label": 0, "document": 3}] * 2, "document '3' has two human texts"),
  ],
)
def test_lines_that_say_no_label_are_refused(content, error, tmp_path):
  with pytest.raises(ValueError, match=error):
    read(write_lines(tmp_path / "own.jsonl", *content))


def test_pairs_that_do_not_pair_are_refused(tmp_path):
  path = tmp_path / "own.json"
  path.write_text(json.dumps({"original": HUMAN, "sampled": MACHINE[:2]}))
  with pytest.raises(ValueError, match="3 texts of people and 2 of a machine"):
    read(path)


@pytest.mark.parametrize("protocol", ["fast_detectgpt", "lrr"])
def test_the_area_is_that_of_the_texts_scores(protocol, mesh, parameters, place):
  task = tasks.get("machine_text", protocol)
  with mesh(1, 1, 1):
    scorer = Scorer(place(TINY, parameters(TINY, scale=0.5)), CHARACTERS, batch_size=4)
  rows = [{"machine": MACHINE[0]}]
  rows += [{"human": h, "machine": m} for h, m in zip(HUMAN, MACHINE[1:] + HUMAN[:1], strict=True)]
  items = runner.run(task, rows, scorer)

  kinds = []
  for kind in ("human", "machine"):
    texts = [row[kind] for row in rows if kind in row]
    answers = scorer.answers([TokenStatistics(text) for text in texts])
    kinds.append(list(map(CRITERIA[protocol], answers)))
  curve = roc(*map(np.array, kinds))
  assert 0 < curve.auc < 1
  scores = bootstrap.intervals(task.metrics, items, 50)
  assert scores["auc"].value == pytest.approx(curve.auc)
  assert scores["tpr_at_1_fpr"].value == pytest.approx(100 * curve.at_false_positives(0.01)[0])


def test_the_published_areas_have_an_interval_by_document():
  folder = os.environ.get("GPT2_JAX_TEST_DATA")
  if not folder:
    pytest.skip("GPT2_JAX_TEST_DATA is not set: detection/published_xsum_*.json")
  metrics = {"auc": machine_text.METRICS["auc"]}
  published = {"likelihood": 0.864, "lrr": 0.918, "sampling_discrepancy": 0.993}
  items = {}
  for name, area in published.items():
    path = pathlib.Path(folder) / "detection" / f"published_xsum_{name}.json"
    predictions = json.loads(path.read_text())["predictions"]
    of_text = {"human": np.array(predictions["real"]), "machine": np.array(predictions["samples"])}
    ones = {key: np.ones(500) for key in ("items", "has_human", "has_machine")}
    items[name] = of_text | ones
    interval = bootstrap.intervals(metrics, items[name], 500)["auc"]
    assert round(interval.value, 3) == area
    assert interval.low < area < interval.high < interval.low + 0.06
  [difference] = bootstrap.paired_differences(
    metrics, items["lrr"], items["likelihood"], 500
  ).values()
  assert difference.low > 0 and difference.p < 0.01
