# SPDX-License-Identifier: Apache-2.0
"""A finished cell is computed once, and what it means decides which cell it is. Answers come from a stand-in here."""

import json
import os
import types

import jax.numpy as jnp
import numpy as np
import pytest

from configs import zero_shot
from gpt2_jax.checkpoint import Checkpoints
from gpt2_jax.convert.names import shapes
from gpt2_jax.evaluate import sweep, tasks
from gpt2_jax.evaluate.metric import percent, perplexity
from gpt2_jax.evaluate.sources import Source, json_lines
from gpt2_jax.evaluate.task import Continuation, Likelihood, Task
from gpt2_jax.model import SIZES, ModelConfig


def toy(name: str, protocol: str = "plain", examples: Source | None = None) -> Task:
  def requests(row):
    return [Continuation(row["text"], row["word"])]

  def sums(row, answers):
    return {"nats": answers[0].nats, "correct": float(answers[0].greedy)}

  source = Source(name, ("rows.jsonl",), json_lines, "https://example.org/" + name, examples=examples)
  metrics = {"accuracy": percent("correct"), "perplexity": perplexity("items")}
  return Task(name, protocol, "toy", source, requests, sums, metrics, example=lambda row: row["text"] + row["word"])


class Stand:
  """Answers as a scorer would, from the length of the texts, and remembers what it was asked."""

  asked: list

  def __init__(self, asked):
    self.model, self.asked = types.SimpleNamespace(config=ModelConfig()), asked

  def answers(self, requests, joined=False):
    self.asked += requests
    return [Likelihood(len(x.context) / 10, 1, len(x.context) % 2 == 0, len(x.context) > 11) for x in requests]


@pytest.fixture
def place(tmp_path, monkeypatch):
  """A data folder with three tasks, two models, and a config of all that; `loads` and `asked` are what was done."""
  for name in ("first", "second"):
    monkeypatch.setitem(tasks.TASKS, name, {p: toy(name, p) for p in ("plain", "other")})
    write_rows(tmp_path, name)
  pool = Source("pool", ("rows.jsonl",), json_lines, "https://example.org/pool")
  monkeypatch.setitem(tasks.TASKS, "taught", {"plain": toy("taught", examples=pool)})
  for name in ("taught", "pool"):
    write_rows(tmp_path, name)
  config = zero_shot.get_config()
  with config.unlocked():
    config.models = tuple(str(model(tmp_path, name)) for name in "ab")
    config.tasks, config.data, config.resamples = ("first", "second"), str(tmp_path / "data"), 50
  loads, asked = [], []

  def loaded(chosen, config):
    loads.append(os.path.basename(chosen.path))
    return Stand(asked)

  monkeypatch.setattr(sweep, "_loaded", loaded)
  out = tmp_path / "out"
  return types.SimpleNamespace(
    config=config, out=str(out), folder=tmp_path, loads=loads, asked=asked, log=lambda: log(out)
  )


def write_rows(folder, name: str, n: int = 9, begin: int = 3):
  path = folder / "data" / name / "rows.jsonl"
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text("".join(json.dumps({"text": "x" * (begin + i), "word": " w"}) + "\n" for i in range(n)))
  return path


def model(folder, name: str):
  path = folder / name
  path.mkdir(exist_ok=True)
  (path / "weights").write_text(name)
  return path


def log(out) -> list[str]:
  path = out / sweep.COMPUTED
  return [json.loads(line)["cell"] for line in path.read_text().splitlines()] if path.exists() else []


def scores(outcome) -> list:
  return [cell["metrics"] for cell in outcome.cells]


def test_a_finished_cell_is_kept_and_no_model_is_loaded_for_it(place, capfd):
  first = sweep.run(place.config, place.out)
  assert place.loads == ["a", "b"] and len(set(place.log())) == 4
  assert [(cell["identity"]["model"][-1], cell["identity"]["task"]) for cell in first.cells] == [
    ("a", "first"), ("a", "second"), ("b", "first"), ("b", "second")
  ]  # fmt: skip
  again = sweep.run(place.config, place.out)
  assert place.loads == ["a", "b"] and len(place.log()) == 4 and scores(again) == scores(first)
  assert capfd.readouterr().err.count("] kept ") == 4


def test_a_cell_holds_what_its_items_are(place):
  cell = sweep.run(place.config, place.out).cells[0]
  length = np.arange(3, 12)
  np.testing.assert_allclose(cell["sums"]["nats"], length / 10)
  assert (cell["items"], cell["of"], cell["truncated"], cell["size"]) == (9, 9, 0, "117M")
  assert cell["metrics"]["accuracy"]["value"] == pytest.approx(100 * 4 / 9)
  assert cell["metrics"]["perplexity"]["value"] == pytest.approx(np.exp(length.mean() / 10))
  assert cell["metrics"]["perplexity"]["low"] < cell["metrics"]["perplexity"]["value"]
  assert cell["parameters"] == 124_439_808


def change(name, value):
  def changed(place):
    place.config[name] = value

  return changed


@pytest.mark.parametrize(
  "changed, computed",
  [
    (change("limit", 5), 4),
    (change("seed", 1), 4),
    (change("stride", 3), 4),
    (change("dtype", "bfloat16"), 4),
    (change("tasks", ("first", "second:other")), 2),
    (change("tasks", ("first", "second::2")), 2),
    (lambda place: write_rows(place.folder, "second", begin=4), 2),
    (lambda place: (place.folder / "b" / "weights").write_text("trained"), 2),
    (change("batch_size", 3), 0),
    (change("tasks", ("second:plain:0", "first:plain", "first")), 0),
  ],
)
def test_what_a_cell_means_decides_whether_it_is_another(place, changed, computed):
  before = sweep.run(place.config, place.out)
  changed(place)
  after = sweep.run(place.config, place.out)
  assert len(place.log()) == 4 + computed == len(set(place.log()))
  assert len(after.cells) == len(before.cells) == 4


def test_examples_belong_to_what_a_cell_means(place):
  place.config.tasks = ("taught::2",)
  sweep.run(place.config, place.out)
  assert all(request.context.count(" w\n\n") == 2 for request in place.asked)
  write_rows(place.folder, "pool", begin=5)
  sweep.run(place.config, place.out)
  assert len(set(place.log())) == 4


def test_a_limit_takes_the_first_items_and_says_of_how_many(place):
  place.config.limit = 4
  cells = sweep.run(place.config, place.out).cells
  assert {(cell["items"], cell["of"], len(cell["sums"]["nats"])) for cell in cells} == {(4, 9, 4)}
  assert [len(request.context) for request in place.asked[:4]] == [3, 4, 5, 6]


def test_another_number_of_resamples_draws_new_intervals_of_the_same_items(place):
  before = sweep.run(place.config, place.out)
  place.config.resamples = 999
  after = sweep.run(place.config, place.out)
  assert place.loads == ["a", "b"] and len(place.log()) == 4
  for old, new in zip(before.cells, after.cells, strict=True):
    assert old["metrics"]["perplexity"]["value"] == new["metrics"]["perplexity"]["value"]
    assert old["metrics"]["perplexity"]["high"] != new["metrics"]["perplexity"]["high"]
    np.testing.assert_array_equal(old["sums"]["nats"], new["sums"]["nats"])


def test_all_missing_datasets_are_one_error_before_any_model_is_loaded(place):
  place.config.tasks = ("first", "second", "taught::1")
  for name in ("second", "pool"):
    (place.folder / "data" / name / "rows.jsonl").unlink()
  place.config.models = ("no/such/model",)
  with pytest.raises(
    FileNotFoundError, match="2 .*example.org/second and .*example.org/pool and .*--skip_missing"
  ) as error:
    sweep.run(place.config, place.out)
  assert "\n" not in str(error.value) and not place.loads


def test_what_is_missing_is_left_out_if_asked_for_and_said(place):
  (place.folder / "data" / "second" / "rows.jsonl").unlink()
  outcome = sweep.run(place.config, place.out, skip_missing=True)
  assert [cell["identity"]["task"] for cell in outcome.cells] == ["first", "first"]
  assert list(outcome.missing) == ["second:plain:0"] and not outcome.failed


def test_a_malformed_row_is_a_line_and_the_other_cells_go_on(place, capfd):
  path = place.folder / "data" / "second" / "rows.jsonl"
  path.write_text(path.read_text() + '{"text": "a"}\n')
  outcome = sweep.run(place.config, place.out)
  assert [cell["identity"]["task"] for cell in outcome.cells] == ["first", "first"]
  assert len(outcome.failed) == 2 and all("row 9 is malformed: it has no 'word'" in x for x in outcome.failed.values())
  assert capfd.readouterr().err.count("failed second:plain:0") == 2
  write_rows(place.folder, "second")
  assert len(sweep.run(place.config, place.out).cells) == 4 and len(set(place.log())) == 4


def test_a_file_that_cannot_be_read_fails_its_task_alone(place, capfd):
  (place.folder / "data" / "second" / "rows.jsonl").write_text("no JSON")
  outcome = sweep.run(place.config, place.out)
  assert len(outcome.cells) == 2 and "rows.jsonl:1" in outcome.failed["second:plain:0"]
  assert "failed second:plain:0" in capfd.readouterr().err


def test_a_model_that_cannot_be_loaded_is_tried_once_and_the_others_go_on(place, monkeypatch):
  stands, tried = sweep._loaded, []

  def loaded(chosen, config):
    tried.append(chosen.path[-1])
    return ValueError("it is damaged") if chosen.path.endswith("a") else stands(chosen, config)

  monkeypatch.setattr(sweep, "_loaded", loaded)
  outcome = sweep.run(place.config, place.out)
  assert tried == ["a", "b"] and len(outcome.cells) == 2
  assert set(outcome.failed.values()) == {"it is damaged"} and len(outcome.failed) == 2


def test_a_file_is_whole_or_not_there(place, monkeypatch):
  replace, calls = os.replace, []

  def interrupted(source, target):
    calls.append(target)
    if len(calls) == 2:
      raise KeyboardInterrupt
    replace(source, target)

  monkeypatch.setattr(os, "replace", interrupted)
  with pytest.raises(KeyboardInterrupt):
    sweep.run(place.config, place.out)
  assert len(place.log()) == 1
  outcome = sweep.run(place.config, place.out)
  assert len(outcome.cells) == 4 and len(set(place.log())) == len(place.log()) == 4


def test_a_damaged_cell_is_named_with_the_way_out(place):
  sweep.run(place.config, place.out)
  victim = place.folder / "out" / "cells" / place.log()[0]
  victim.write_text(victim.read_text()[:-9])
  outcome = sweep.run(place.config, place.out)
  [text] = outcome.failed.values()
  assert str(victim) in text and "remove it" in text and len(outcome.cells) == 3
  victim.unlink()
  assert len(sweep.run(place.config, place.out).cells) == 4


def test_no_number_is_null(place, monkeypatch):
  monkeypatch.setitem(tasks.TASKS, "first", {"plain": toy("first")})
  place.config.tasks = ("first",)
  monkeypatch.setattr(Stand, "answers", lambda self, requests, joined=False: [Likelihood(1e6, 1, False, False)] * 9)
  sweep.run(place.config, place.out)
  cell = json.loads((place.folder / "out" / "cells" / place.log()[0]).read_text(), parse_constant=pytest.fail)
  assert cell["metrics"]["perplexity"]["value"] is None and cell["sums"]["nats"] == [1e6] * 9


@pytest.mark.parametrize(
  "text, message",
  [
    ("frist", "nearest is first"),
    ("first:odd", "it has plain, other"),
    ("first:plain:x", "is not"),
    ("a:b:1:2", "not"),
  ],
)
def test_a_task_that_is_none_is_refused(place, text, message):
  place.config.tasks = (text,)
  with pytest.raises(ValueError, match=message):
    sweep.run(place.config, place.out)


def test_nothing_to_do_is_said(place):
  place.config.models = ()
  with pytest.raises(ValueError, match="at least one model"):
    sweep.run(place.config, place.out)


def save(workdir, losses: dict[int, float]) -> str:
  """A run's workdir with a checkpoint of one number for each step."""
  checkpoints = Checkpoints(str(workdir), last=9)
  for step, loss in losses.items():
    checkpoints.save(step, {"model": {"x": jnp.full(3, loss)}}, {}, loss)
  checkpoints.close()
  return str(workdir)


def test_the_checkpoints_of_a_run_are_models(tmp_path):
  run = save(tmp_path / "run", {10: 3.0, 20: 1.0, 30: 2.0})
  steps = {entry: [model.step for model in sweep.models([run + entry])] for entry in ("", "@best", "@all", "@10")}
  assert steps == {"": ["30"], "@best": ["20"], "@all": ["10", "20", "30"], "@10": ["10"]}
  every = sweep.models([run + "@all", run, run + "@best"])
  assert [model.name for model in every] == [f"{run}@{n}" for n in (10, 20, 30)]  # each once
  assert len({model.weights for model in every}) == 3
  other = save(tmp_path / "other", {10: 3.0, 20: 1.5})
  a, b = (sweep.models([workdir + "@all"]) for workdir in (run, other))
  assert a[0].weights == b[0].weights and a[1].weights != b[1].weights  # what they hold, not where they lie
  with pytest.raises(FileNotFoundError, match=r"no checkpoint of step 11 .* \[10, 20, 30\]"):
    sweep.models([run + "@11"])


def test_what_is_no_run_has_no_steps(tmp_path):
  path = model(tmp_path, "a@b")
  assert sweep.models([str(path)])[0].path == str(path)  # an @ may be part of a name
  with pytest.raises(ValueError, match="no workdir of a run"):
    sweep.models([f"{path}@7"])
  (tmp_path / "empty" / "checkpoints").mkdir(parents=True)
  with pytest.raises(FileNotFoundError, match="holds no checkpoint"):
    sweep.models([str(tmp_path / "empty")])


def test_the_papers_sizes_are_known_by_their_shape():
  known = {name: sweep.size_of(config) for name, config in SIZES.items()}
  assert known == {name: name for name in ("117M", "345M", "762M", "1542M")} | {"distilgpt2": None}
  assert sum(int(np.prod(shape)) for shape in shapes(SIZES["1542M"]).values()) == 1_557_611_200


def test_no_item_is_its_own_example_where_one_file_serves_for_both(place):
  place.config.tasks, place.config.models = ("taught::1",), place.config.models[:1]
  place.config.data = str(place.folder / "data" / "taught" / "rows.jsonl")
  sweep.run(place.config, place.out)
  parts = [request.context.replace(" w", "").split("\n\n") for request in place.asked]
  assert len(parts) == 9 and all(example != own for example, own in parts)
