# SPDX-License-Identifier: Apache-2.0
"""A finished cell is computed once, and its identity decides which cell it is. Answers come from a
fake scorer here."""

import dataclasses
import json
import os
import resource
import signal
import types

import numpy as np
import pytest
from ml_collections import ConfigDict

from configs import zero_shot
from gpt2_jax.evaluate import tasks
from gpt2_jax.evaluate.metric import bits, percent, perplexity
from gpt2_jax.evaluate.sources import Source, json_lines
from gpt2_jax.evaluate.sweep import cells, compute, report
from gpt2_jax.evaluate.task import Likelihood, Loglikelihood, Task
from gpt2_jax.model import ModelConfig


def toy(name: str, protocol: str = "plain", examples: Source | None = None) -> Task:
  def requests(row):
    return [Loglikelihood(row["text"], row["word"])]

  def sums(row, answers):
    return {"nats": answers[0].nats, "correct": float(answers[0].greedy)}

  source = Source(
    name, ("rows.jsonl",), json_lines, "https://example.org/" + name, examples=examples
  )
  metrics = {"accuracy": percent("correct"), "perplexity": perplexity("items")}
  return Task(
    name,
    protocol,
    "toy",
    source,
    requests,
    sums,
    metrics,
    example=lambda row: row["text"] + row["word"],
  )


class FakeScorer:
  """Answers as a scorer would, from the length of the texts, and remembers the requests."""

  def __init__(self, requests: list):
    self.model, self.requests = types.SimpleNamespace(config=ModelConfig()), requests

  def answers(self, requests, contiguous=False):
    self.requests += requests
    return [
      Likelihood(len(x.context) / 10, 1, len(x.context) % 2 == 0, len(x.context) > 11)
      for x in requests
    ]


@pytest.fixture
def place(tmp_path, monkeypatch):
  """A data folder with three tasks, two models, and a config of all that; `loads` and
  `requests` are what was done."""
  for name in ("first", "second"):
    monkeypatch.setitem(tasks.TASKS, name, {p: toy(name, p) for p in ("plain", "other")})
    write_rows(tmp_path, name)
  pool = Source("pool", ("rows.jsonl",), json_lines, "https://example.org/pool")
  monkeypatch.setitem(tasks.TASKS, "taught", {"plain": toy("taught", examples=pool)})
  write_rows(tmp_path, "taught")
  write_rows(tmp_path, "pool", begin=30)
  config = zero_shot.get_config()
  with config.unlocked():
    config.models = tuple(str(model(tmp_path, name)) for name in "ab")
    config.tasks, config.data, config.resamples = ("first", "second"), str(tmp_path / "data"), 50
  loads, requests = [], []

  def loaded(chosen, config):
    loads.append(os.path.basename(chosen.path))
    return FakeScorer(requests)

  monkeypatch.setattr(compute, "_load_scorer", loaded)
  out = tmp_path / "out"
  return types.SimpleNamespace(
    config=config,
    out=str(out),
    folder=tmp_path,
    loads=loads,
    requests=requests,
    log=lambda: log(out),
  )


def write_rows(folder, name: str, n: int = 9, begin: int = 3):
  path = folder / "data" / name / "rows.jsonl"
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text(
    "".join(json.dumps({"text": "x" * (begin + i), "word": " w"}) + "\n" for i in range(n))
  )
  return path


def model(folder, name: str):
  path = folder / name
  path.mkdir(exist_ok=True)
  (path / "weights").write_text(name)
  (path / "config.json").write_text("{}")
  return path


def log(out) -> list[str]:
  path = out / cells.COMPUTED
  return (
    [json.loads(line)["cell"] for line in path.read_text().splitlines()] if path.exists() else []
  )


def run(place, skip_missing: bool = False):
  return compute.run(compute.prepare(place.config, place.out, skip_missing))


def scores(outcome) -> list:
  return [cell["metrics"] for cell in outcome.cells]


def test_a_finished_cell_is_kept_and_no_model_is_loaded_for_it(place, capfd):
  first = run(place)
  assert place.loads == ["a", "b"] and len(set(place.log())) == 4
  assert [(cell["identity"]["model"][-1], cell["identity"]["task"]) for cell in first.cells] == [
    ("a", "first"), ("a", "second"), ("b", "first"), ("b", "second")
  ]  # fmt: skip
  again = run(place)
  assert place.loads == ["a", "b"] and len(place.log()) == 4 and scores(again) == scores(first)
  assert capfd.readouterr().err.count("] kept ") == 4


@pytest.mark.parametrize("count", [1, 2, 3, 4, 7])
def test_processes_divide_the_cells_evenly_and_leave_none_out(place, count):
  place.config.tasks = ("first", "second", "first:other", "second:other")
  by_model = compute.prepare(place.config, place.out).cells
  there = {by_model[0][1].file, by_model[1][2].file, by_model[1][3].file}
  parts = [compute._cells_of_process(by_model, there, rank, count) for rank in range(count)]

  files = [cell.file for part in parts for of_model in part for cell in of_model]
  assert sorted(files) == sorted(cell.file for of_model in by_model for cell in of_model)
  assert all(cell in by_model[i] for part in parts for i in range(2) for cell in part[i])
  missing = [[cell for cell in sum(part, []) if cell.file not in there] for part in parts]
  assert max(map(len, missing)) - min(map(len, missing)) <= 1


def test_no_process_has_the_same_task_of_every_model(place):
  by_model = compute.prepare(place.config, place.out).cells
  for rank in range(2):
    part = compute._cells_of_process(by_model, set(), rank, 2)
    assert len({cell.task.name for of_model in part for cell in of_model}) == 2


def test_a_cell_holds_what_its_items_are(place):
  cell = run(place).cells[0]
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
def test_the_identity_of_a_cell_decides_whether_it_is_another(place, changed, computed):
  before = run(place)
  changed(place)
  after = run(place)
  assert len(place.log()) == 4 + computed == len(set(place.log()))
  assert len(after.cells) == len(before.cells) == 4


def test_examples_belong_to_the_identity_of_a_cell(place):
  place.config.tasks = ("taught::2",)
  run(place)
  assert all(request.context.count(" w\n\n") == 2 for request in place.requests)
  write_rows(place.folder, "pool", begin=5)
  run(place)
  assert len(set(place.log())) == 4


def test_a_limit_takes_the_first_items_and_says_of_how_many(place):
  place.config.limit = 4
  computed = run(place).cells
  assert {(cell["items"], cell["of"], len(cell["sums"]["nats"])) for cell in computed} == {
    (4, 9, 4)
  }
  assert [len(request.context) for request in place.requests[:4]] == [3, 4, 5, 6]


def test_another_number_of_resamples_draws_new_intervals_of_the_same_items(place):
  before = run(place)
  place.config.resamples = 999
  after = run(place)
  assert place.loads == ["a", "b"] and len(place.log()) == 4
  for old, new in zip(before.cells, after.cells, strict=True):
    assert old["metrics"]["perplexity"]["value"] == new["metrics"]["perplexity"]["value"]
    assert old["metrics"]["perplexity"]["high"] != new["metrics"]["perplexity"]["high"]
    np.testing.assert_array_equal(old["sums"]["nats"], new["sums"]["nats"])


def test_a_cell_with_percentiles_gets_bca_of_the_same_sums_and_no_model_is_loaded(place):
  before = run(place)
  for path in (place.folder / "out" / "cells").iterdir():
    old = json.loads(path.read_text())
    del old["sha256"]
    # as it was written before: the percentiles, and no word of how they were found
    for score in old["metrics"].values():
      del score["method"]
      score["low"], score["high"] = score["value"] * 0.9, score["value"] * 1.1
    cells.write(path, old)
  after = run(place)
  assert place.loads == ["a", "b"] and len(place.log()) == 4
  assert scores(after) == scores(before)
  assert after.cells[0]["metrics"]["perplexity"]["method"] == "BCa"


def test_a_cell_that_counted_unscored_bytes_is_computed_again(place, monkeypatch):
  """A tokenizer without <|endoftext|> leaves a text's first token without a score."""
  task = toy("first")
  metrics = {"bits_per_byte": bits("bytes")}
  older = {"nats": 1.0, "tokens": 1.0, "bytes": 4.0}

  def protocol(extra: dict) -> dict:
    sums = lambda row, answers: older | extra  # noqa: E731
    return {"plain": dataclasses.replace(task, sums=sums, metrics=metrics)}

  eots = {"a": None, "b": 0}

  def opened(model):
    return types.SimpleNamespace(eot=eots[os.path.basename(model.path)])

  monkeypatch.setattr(compute, "_tokenizer", opened)
  place.config.tasks = ("first",)
  monkeypatch.setitem(tasks.TASKS, "first", protocol({}))
  run(place)
  assert place.loads == ["a", "b"]

  # cells of before: that of the tokenizer without it is computed again, once
  monkeypatch.setitem(tasks.TASKS, "first", protocol({"unscored": 1.0}))
  run(place)
  assert place.loads == ["a", "b", "a"]
  run(place)
  assert place.loads == ["a", "b", "a"]


def test_a_cell_says_of_each_interval_how_it_was_found(place):
  run(place)
  [path, *_] = (place.folder / "out" / "cells").iterdir()
  content = json.loads(path.read_text())
  assert {score["method"] for score in content["metrics"].values()} <= {"BCa", "percentile"}
  content["metrics"]["perplexity"]["method"] = "guess"
  del content["sha256"]
  cells.write(path, content)
  [text] = run(place).failed.values()
  assert "interval by 'guess'" in text and str(path) in text


def test_all_missing_datasets_are_one_error_before_any_model_is_loaded(place):
  place.config.tasks = ("first", "second", "taught::1")
  for name in ("second", "pool"):
    (place.folder / "data" / name / "rows.jsonl").unlink()
  place.config.models = ("no/such/model",)
  with pytest.raises(
    FileNotFoundError, match=r"2 datasets .* second \(rows.jsonl\), pool .*--list.*--skip_missing"
  ) as error:
    run(place)
  assert "\n" not in str(error.value) and not place.loads
  place.config.tasks = ("first", "second")
  with pytest.raises(FileNotFoundError, match="a dataset is .*https://example.org/second and put"):
    run(place)


def test_what_is_missing_is_left_out_if_asked_for_and_said(place):
  (place.folder / "data" / "second" / "rows.jsonl").unlink()
  outcome = run(place, skip_missing=True)
  assert [cell["identity"]["task"] for cell in outcome.cells] == ["first", "first"]
  assert list(outcome.missing) == ["second:plain:0"] and not outcome.failed


def test_a_malformed_row_is_a_line_and_the_other_cells_are_computed(place, capfd):
  path = place.folder / "data" / "second" / "rows.jsonl"
  path.write_text(path.read_text() + '{"text": "a"}\n')
  outcome = run(place)
  assert [cell["identity"]["task"] for cell in outcome.cells] == ["first", "first"]
  assert list(outcome.failed) == ["second:plain:0"]
  assert "row 9 is malformed: it has no 'word'" in outcome.failed["second:plain:0"]
  assert capfd.readouterr().err.count("failed second:plain:0") == 1
  write_rows(place.folder, "second")
  assert len(run(place).cells) == 4 and len(set(place.log())) == 4


def test_a_file_that_cannot_be_read_fails_its_task_alone(place, capfd):
  (place.folder / "data" / "second" / "rows.jsonl").write_text("no JSON")
  outcome = run(place)
  assert len(outcome.cells) == 2 and "rows.jsonl:1" in outcome.failed["second:plain:0"]
  assert "failed second:plain:0" in capfd.readouterr().err


def test_a_model_that_cannot_be_loaded_is_tried_once_and_the_others_are_computed(
  place, monkeypatch
):
  fake, tried = compute._load_scorer, []

  def loaded(chosen, config):
    tried.append(chosen.path[-1])
    return ValueError("it is damaged") if chosen.path.endswith("a") else fake(chosen, config)

  monkeypatch.setattr(compute, "_load_scorer", loaded)
  outcome = run(place)
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
    run(place)
  assert len(place.log()) == 1
  outcome = run(place)
  assert len(outcome.cells) == 4 and len(set(place.log())) == len(place.log()) == 4


def test_a_damaged_cell_is_named_with_the_way_out(place):
  run(place)
  victim = place.folder / "out" / "cells" / place.log()[0]
  victim.write_text(victim.read_text()[:-9])
  outcome = run(place)
  [text] = outcome.failed.values()
  assert str(victim) in text and "remove it" in text and len(outcome.cells) == 3
  victim.unlink()
  assert len(run(place).cells) == 4


def test_no_number_is_null(place, monkeypatch):
  monkeypatch.setitem(tasks.TASKS, "first", {"plain": toy("first")})
  place.config.tasks = ("first",)
  monkeypatch.setattr(
    FakeScorer,
    "answers",
    lambda self, requests, contiguous=False: [Likelihood(1e6, 1, False, False)] * 9,
  )
  run(place)
  cell = json.loads(
    (place.folder / "out" / "cells" / place.log()[0]).read_text(), parse_constant=pytest.fail
  )
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
    run(place)


def test_nothing_to_do_is_said(place):
  place.config.models = ()
  with pytest.raises(ValueError, match="at least one model"):
    run(place)


def test_no_row_under_test_is_an_example_where_one_file_would_serve_for_both(place):
  place.config.tasks, place.config.models = ("taught::1",), place.config.models[:1]
  place.config.data = str(place.folder / "data" / "taught" / "rows.jsonl")
  with pytest.raises(ValueError, match="9 of the 9 examples in .*taught/rows.jsonl are rows under"):
    run(place)
  assert not place.loads
  # without examples the file serves
  place.config.tasks = ("taught",)
  assert len(run(place).cells) == 1


def test_examples_of_a_file_lie_beside_it(place, monkeypatch):
  pool = Source("pool", ("pool.jsonl",), json_lines, "https://example.org/pool")
  monkeypatch.setitem(tasks.TASKS, "taught", {"plain": toy("taught", examples=pool)})
  place.config.tasks, place.config.models = ("taught::1",), place.config.models[:1]
  path = write_rows(place.folder, "taught")
  place.config.data = str(path)
  with pytest.raises(FileNotFoundError, match="pool: pool.jsonl not found.*--skip_missing"):
    run(place)
  write_rows(place.folder, "pool", begin=50).rename(path.parent / "pool.jsonl")
  run(place)
  examples = [request.context.split(" w\n\n")[0] for request in place.requests]
  assert len(examples) == 9 and all(len(example) >= 50 for example in examples)


def test_rows_under_test_are_left_out_of_the_examples_and_said(place, capfd):
  write_rows(place.folder, "pool", n=20)
  place.config.tasks = ("taught::1",)
  run(place)
  assert "9 of the 20 examples in" in capfd.readouterr().err
  tested = {"x" * n for n in range(3, 12)}
  examples = {request.context.split(" w\n\n")[0] for request in place.requests}
  assert examples and not examples & tested

  # what is left is what the cell is of
  [[cell], _] = compute.prepare(place.config, place.out).cells
  write_rows(place.folder, "pool", n=11, begin=12)
  [[alone], _] = compute.prepare(place.config, place.out).cells
  assert alone.identity == cell.identity


@pytest.mark.parametrize(
  "task, name, owners",
  [
    ("ptb", "wiki.test.tokens", "wikitext2, wikitext103"),
    ("lambada", "NQ-open.dev.jsonl", "natural_questions"),
    ("wmt14_en_fr", "ptb.test.txt", "ptb"),
    ("coqa", "newstest2014-fren-src.en.sgm", "wmt14"),
  ],
)
def test_a_file_that_is_by_its_name_another_tasks_is_refused(
  place, monkeypatch, task, name, owners
):
  path = place.folder / name
  path.write_text(" = A =\n")
  place.config.tasks, place.config.data = (task,), str(path)
  with pytest.raises(ValueError, match=f"{name} is by its name the file of {owners}, and"):
    run(place)
  assert not place.loads


def test_the_other_tasks_of_a_sweep_read_the_file_that_is_theirs(place):
  path = place.folder / "ptb.test.txt"
  path.write_text(" no it was n't black monday \n" * 40)
  place.config.tasks, place.config.data = ("ptb", "wikitext2", "text"), str(path)
  sweep = compute.prepare(place.config, place.out)
  assert [cell.task.name for cell in sweep.cells[0]] == ["ptb:invertible:0", "text:whole:0"]
  assert "is by its name the file of ptb" in sweep.failed["wikitext2:invertible:0"]


# ---- what can be known at the start is said at the start


@pytest.mark.parametrize(
  "knob, value, message",
  [
    ("tasks", ("second:plain:9",), "9 examples are asked for, and there are 8"),
    ("tasks", ("first:plain:" + "9" * 400,), "is not task:protocol:shots"),
    ("tasks", ("x" * 5000,), "there is no task 'xxx"),
    ("tasks", ("second:" + "x" * 5000,), "second has no protocol 'xxx"),
    ("tasks", "first", "tasks is first, which is not of type tuple of names"),
    ("models", (3,), "models is .3,., which is not of type tuple of names"),
    ("models", ("~nobody_of_this_name/a",), "no such user"),
    ("models", ("",), "a path is empty"),
    ("models", ("a\0b",), "NUL"),
    ("models", ("a\udcffb",), "is not UTF-8"),
    ("data", "~nobody_of_this_name/data", "no such user"),
    ("data", "s3://bucket/data", "neither a local path nor gs://"),
    ("tfds_dir", "~nobody_of_this_name", "no such user"),
    ("tfds_dir", "/no/such/folder", "tfds_dir /no/such/folder is no folder"),
    ("limit", -1, "limit is -1"),
    ("limit", True, "limit is True"),
    ("batch_size", 0, "batch_size is 0"),
    ("stride", 2**40, "stride is "),
    ("resamples", 10**12, "resamples is 1000000000000"),
    ("seed", 2**40, "seed is "),
    ("seen_above", float("nan"), "seen_above is nan"),
    ("dtype", "float16", "dtype is 'float16'"),
    ("mesh", {"replica": 3, "data": 5, "model": 7}, "does not multiply"),
    ("mesh", {"replica": 1, "data": 1}, "has no mesh.model"),
    ("mesh", 3, "has no mesh.replica"),
  ],
)
def test_what_makes_no_sweep_is_one_line_and_nothing_is_written(place, knob, value, message):
  config = place.config.to_dict() | {knob: value}
  place.config = ConfigDict(config)
  with pytest.raises((ValueError, OSError), match=message) as error:
    run(place)
  assert "\n" not in str(error.value) and len(str(error.value)) < 600
  assert not place.loads and not os.path.exists(place.out)


@pytest.mark.parametrize("out", ["", "~nobody_of_this_name/out", "s3://bucket/out", "a\0b"])
def test_an_out_that_is_no_folder_is_refused(place, out):
  with pytest.raises(ValueError, match="path|user"):
    compute.prepare(place.config, out)


def test_a_config_of_another_kind_is_refused(place):
  place.config = ConfigDict({"steps": 3})
  with pytest.raises(ValueError, match="has no models .*configs/zero_shot.py"):
    run(place)


def test_a_home_folder_may_be_written_short_in_every_place(place, monkeypatch):
  monkeypatch.setenv("HOME", str(place.folder))
  place.config.models, place.config.data, place.out = ("~/a", "~/b"), "~/data", "~/out"
  assert len(run(place).cells) == 4 and len(list((place.folder / "out" / "cells").iterdir())) == 4


def test_a_row_that_cannot_be_asked_is_found_before_a_model_is_loaded(place, capfd):
  path = place.folder / "data" / "second" / "rows.jsonl"
  path.write_text(path.read_text() + '{"text": "a", "word": ""}\n')
  place.config.tasks = ("second",)
  with pytest.raises(ValueError, match="none of the 1 tasks can be run: second: row 9 has nothing"):
    run(place)
  assert not place.loads and not os.path.exists(place.out)


def test_many_missing_datasets_are_a_line_of_bounded_length(place, monkeypatch):
  names = [f"dataset_of_a_long_name_{i}" for i in range(40)]
  for name in names:
    monkeypatch.setitem(tasks.TASKS, name, {"plain": toy(name)})
  place.config.tasks = tuple(names)
  with pytest.raises(FileNotFoundError, match="40 datasets .*and 32 more; --list") as error:
    run(place)
  assert len(str(error.value)) < 900


def test_a_sweep_without_a_cell_in_the_end_is_an_error(place, monkeypatch):
  monkeypatch.setattr(compute, "_load_scorer", lambda *_: FloatingPointError("NaN everywhere"))
  with pytest.raises(ValueError, match="none of the 4 cells could be computed: NaN everywhere"):
    run(place)


def test_memory_that_is_short_is_a_line_with_the_knobs(place, monkeypatch, capfd):
  def answers(self, requests, contiguous=False):
    raise RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 99 bytes.\nallocator dump")

  fake = FakeScorer.answers
  monkeypatch.setattr(FakeScorer, "answers", answers)
  with pytest.raises(ValueError, match="out of memory in batches of 32 rows .99 bytes|batch_size"):
    run(place)
  assert "--config.batch_size lower" in capfd.readouterr().err
  monkeypatch.setattr(FakeScorer, "answers", fake)
  assert len(run(place).cells) == 4


def test_a_cell_under_the_name_of_another_is_refused(place):
  run(place)
  folder = place.folder / "out" / "cells"
  first, second = (folder / name for name in place.log()[:2])
  second.write_bytes(first.read_bytes())
  [text] = run(place).failed.values()
  assert str(second) in text and "of another model or task" in text


def test_the_report_of_before_is_kept_when_the_disk_is_full(place, monkeypatch):
  outcome = run(place)
  report.write(outcome, place.out, place.config)
  names = [place.folder / "out" / name for name in ("table.md", "results.jsonl")]
  before = [path.read_bytes() for path in names]
  limits = resource.getrlimit(resource.RLIMIT_FSIZE)
  handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
  resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
  try:
    with pytest.raises(OSError):
      report.write(outcome, place.out, place.config)
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    signal.signal(signal.SIGXFSZ, handler)
  assert [path.read_bytes() for path in names] == before
