# SPDX-License-Identifier: Apache-2.0
"""The page of a sweep: its pictures have the cells' scores, intervals and chance, and no others."""

import re

import numpy as np
import pytest

from configs import responsible
from gpt2_jax.evaluate import tasks
from gpt2_jax.evaluate.sweep import cells, compute, page


def cell(task: str, protocol: str, model: str, seed: int, items: int = 9) -> dict:
  """A cell of random scores, whose intervals are skewed."""
  rng = np.random.default_rng(seed)
  metrics = {}
  for name, metric in tasks.get(task, protocol).metrics.items():
    value = float(rng.uniform(20, 80))
    ends = {"low": value - float(rng.uniform(1, 9)), "high": value + float(rng.uniform(1, 9))}
    metrics[name] = ends | {"value": value, "unit": metric.unit, "higher": metric.higher}
  identity = {"task": task, "protocol": protocol, "shots": 0, "model": model}
  return {"identity": identity, "metrics": metrics, "items": items, "of": 9}


def drawn(figure) -> dict[str, dict[str, tuple]]:
  """The points of a picture: (value, low, high) by line's label and model; chance as a value."""
  points = {}
  for axes in figure.axes:
    labels = [label.get_text() for label in axes.get_yticklabels()]
    for container in axes.containers:
      [bars] = container.lines[2]
      for (x, y), bar in zip(container.lines[0].get_xydata(), bars.get_segments(), strict=True):
        row = points.setdefault(labels[round(y)], {})
        assert container.get_label() not in row
        row[container.get_label()] = (x, bar[0][0], bar[1][0])
    for line in axes.lines:
      if line.get_label() == "chance":
        for x, y in line.get_xydata():
          points[labels[round(y)]]["chance"] = x
  return points


def test_a_picture_has_every_score_of_a_task_once():
  pairs = [
    cell("crows_pairs", protocol, model, seed)
    for seed, protocol in enumerate(("lm_eval", "by_type"))
    for model in ("a", "b")
  ]
  pairs[1]["metrics"]["stereotype"] |= {"low": None, "high": None}  # no interval
  pairs[2]["metrics"]["age"]["value"] = None  # no score
  points = drawn(page.metrics_figure(pairs))

  expected = {}
  for content in pairs:
    identity = content["identity"]
    for name, score in content["metrics"].items():
      if score["value"] is not None:
        label = f"{identity['protocol']}: {name.replace('_', ' ')} ↓"
        ends = [score["value"] if score[end] is None else score[end] for end in ("low", "high")]
        expected.setdefault(label, {})[identity["model"]] = (score["value"], *ends)
  assert points.keys() == expected.keys() and len(points) == 35
  for label, row in expected.items():
    for model, numbers in row.items():
      assert points[label][model] == pytest.approx(numbers), (label, model)
    has_chance = "equal length" in label
    assert points[label].get("chance") == (50.0 if has_chance else None)


def test_the_page_has_a_picture_of_each_task_under_what_it_measures(tmp_path):
  names = ("machine_text", "winogender", "memorization", "lambada")
  some = [cell(name, next(iter(tasks.TASKS[name])), "a|b", 0, items=5) for name in names]
  pictures = page.write_page(some, "# Scores\n\nthe table\n", tmp_path)
  text = (tmp_path / "report.md").read_text()

  assert re.findall(r"(?m)^## (.*)|!\[(\w+)\]", text) == [
    (page.DETECTION, ""),
    ("", "machine_text"),
    (page.BIAS, ""),
    ("", "winogender"),
    (page.MEMORIZATION, ""),
    ("", "memorization"),
    (page.LANGUAGE, ""),
    ("", "lambada"),
    ("Scores", ""),
  ]
  for path in re.findall(r"\]\((.*)\)", text):
    assert (tmp_path / path).read_bytes().startswith(b"\x89PNG")
  assert len(pictures) == 4 and text.endswith("the table\n")


def test_the_responsible_sweep_is_of_tasks_that_there_are():
  config = responsible.get_config()
  compute.check_knobs(config)
  assert config.page and any(name.startswith("random:") for name in config.models)
  kinds = {page.kind_of(cells.parse_task(name).task.name) for name in config.tasks}
  assert kinds == {page.DETECTION, page.BIAS, page.MEMORIZATION}
  assert all(name in tasks.TASKS for names in page.KINDS.values() for name in names)
