# SPDX-License-Identifier: Apache-2.0
"""Tasks of a user's own file: they work as ours do, and whatever is wrong with them is one line."""

import pathlib
import re
import textwrap

import numpy as np
import pytest

from gpt2_jax.evaluate import runner, sources, tasks, template
from gpt2_jax.evaluate.include import include
from gpt2_jax.evaluate.sweep import bootstrap
from gpt2_jax.evaluate.task import Likelihood

TEMPLATE = pathlib.Path(template.__file__)


class Liker:
  """A scorer in place of a model: what holds an `a` is likely."""

  def answers(self, requests, contiguous=False):
    return [Likelihood(2.0 - ("a" in r.continuation), 1, True, False) for r in requests]


@pytest.fixture
def add(tmp_path, monkeypatch):
  """add(old, new): includes the template with a part of it replaced; nothing of it stays."""
  ours = dict(tasks.TASKS)

  def added(old: str = "", new: str = ""):
    monkeypatch.setattr(tasks, "TASKS", dict(ours))
    text = TEMPLATE.read_text()
    assert old in text
    path = tmp_path / "own.py"
    path.write_text(text.replace(old, new) if old else text)
    [task] = include(str(path))
    return task

  return added


def rows(task, tmp_path, *lines: str):
  folder = tmp_path / "data" / "capitals"
  folder.mkdir(parents=True, exist_ok=True)
  (folder / "capitals.jsonl").write_text("".join(line + "\n" for line in lines))
  return sources.load(task.source, str(tmp_path / "data"))


FRANCE = '{"country": "France", "capital": "Paris", "other": "Toulon"}'
PERU = '{"country": "Peru", "capital": "Quito", "other": "Lima"}'


def score(task, tmp_path) -> runner.Items:
  return runner.run(task, rows(task, tmp_path, FRANCE, PERU), Liker(), 1)


def test_the_template_is_a_task_like_any_other(add, tmp_path):
  task = add()
  assert tasks.get("capitals") is task and tasks.get("capitals", "pair") is task
  items = score(task, tmp_path)
  np.testing.assert_array_equal(items["correct"], [1, 0])
  assert bootstrap.intervals(task.metrics, items, 50)["accuracy"].value == 50
  assert len(rows(task, tmp_path, FRANCE).fingerprint) == 64
  # What follows as a hash is of the file: another version of it is another task.
  other = add("The capital of", "Of").program
  assert task.program != other and len(other) == 64


def refuse(add, old: str, new: str) -> str:
  with pytest.raises((ValueError, OSError)) as error:
    add(old, new)
  assert "capitals" not in tasks.TASKS or not tasks.TASKS["capitals"]
  return one_line(error)


def numbered(said: str) -> str:
  """What is said, with the number of the template's line in place of its {beginning}."""
  found = re.search("{(.*)}", said)
  if not found:
    return said
  text = TEMPLATE.read_text()
  return said.replace(found[0], str(text[: text.index(found[1])].count("\n") + 1))


def one_line(error) -> str:
  line = str(error.value)
  assert "\n" not in line and len(line) < 600
  return line


@pytest.mark.parametrize(
  "old, new, said",
  [
    ("TASKS = (", "TASKS = ((", "own.py:{TASKS = (}: '(' was never closed"),
    ("TASKS = (", "1 / 0\nTASKS = (", "own.py:{TASKS = (}: ZeroDivisionError: division by zero"),
    ("TASKS = (", "raise SystemExit('no')\nTASKS = (", "SystemExit: no"),
    ("import percent", "import percents", "cannot import name 'percents'"),
    ("TASKS = (", "OTHERS = (", "defines no TASKS"),
    ("TASKS = (", "TASKS = () and (", "defines no TASKS"),
    ("TASKS = (", "TASKS = (1,) or (", "a int in TASKS, where a Task should be"),
    ('name="capitals"', 'name="cap:itals"', "'cap:itals' is no name of a task"),
    ('name="capitals"', 'name="lambada"', "there is a task lambada already"),
    ('protocol="pair"', "protocol=None", "'None' is no name of a task or protocol"),
    ('("capitals.jsonl",)', '("capitals.jsonl")', "its files are no tuple of str; mind the comma"),
    ("requests=requests", "requests=None", "its requests is a NoneType, and no function"),
    ("sums=sums", "sums={}", "its sums is a dict, and no function"),
    ('percent("correct")', '"accuracy"', "its metric 'accuracy' is a str"),
    ('{"accuracy": 50.0}', "50.0", "its chance is no dict"),
    ('separator="\\n"', "separator=1", "its separator is a int, and no text"),
    (
      'percent("correct")',
      "__import__('gpt2_jax').evaluate.metric.Metric(sum, ('correct'), True, '')",
      "its keys are no tuple",
    ),
    (
      'percent("correct")',
      "__import__('gpt2_jax').evaluate.metric.Metric("
      "lambda s: s['correct'].sum() / 2, ('correct',), True, '')",
      "a metric's value has the shape () for sums of the shape (3,)",
    ),
  ],
)
def test_a_file_that_defines_no_task_is_refused_at_the_start(add, old, new, said):
  assert numbered(said) in refuse(add, old, new)


def test_a_file_that_is_not_there_names_the_template(tmp_path):
  with pytest.raises(FileNotFoundError, match="evaluate --template prints one"):
    include(str(tmp_path / "none.py"))


RETURN = "  return [Loglikelihood(context"
COUNT = '  return {"correct": float(capital.nats < other.nats)}'


@pytest.mark.parametrize(
  "old, new, said",
  [
    (
      "  context = f",
      "  context = row.country or f",
      "own.py:{  context = f}: AttributeError: 'dict'",
    ),
    (RETURN, "  1 / 0\n" + RETURN, "own.py:{  return [Logl}: ZeroDivisionError"),
    (RETURN, "  return 3\n" + RETURN, "`requests` returns a int, where a list should be"),
    (RETURN, "  return ['a']\n" + RETURN, "`requests` returns a str, where a request should be"),
    ("(context, f\" {row['capital']}\")", "(context, 3)", "a int, where a text should be"),
    (RETURN, "  return []\n" + RETURN, "not enough values to unpack"),
    (COUNT, "  return 1.0", "`sums` returns a float, and no dict"),
    (COUNT, "  return {'right': 1}", "`sums` returns no correct, which a metric reads"),
    (COUNT, "  return {'correct': 'yes'}", "`sums` returns 'yes' as correct, and no number"),
    (COUNT, "  return {'correct': float('nan')}", "'nan' as correct, and no number"),
    (COUNT, "  return {'correct': answers.nats}", "AttributeError: 'list' object has no"),
    ("    yield {", "    yield 3 or {", "`read` gives a int, where a dict should be"),
    ("    yield {", "    yield {1: b''} or {", "not JSON serializable"),
    ("    yield {", "    undefined\n    yield {", "NameError: name 'undefined' is not defined"),
    ('  return f"The capital of', '  return 3 or f"', "`example` returns a int, and no text"),
  ],
)
def test_what_goes_wrong_later_is_one_line_with_the_place(add, tmp_path, old, new, said):
  task = add(old, new)
  with pytest.raises(ValueError) as error:
    score(task, tmp_path)
  line = one_line(error)
  assert numbered(said) in line and f"{tmp_path}/own.py" in line


def test_rows_may_have_more_sums_than_metrics_read(add, tmp_path):
  more = COUNT.replace("{", "{row['country']: 1, ")
  assert score(add(COUNT, more), tmp_path).keys() == {"items", "truncated", "correct"}


def test_a_file_has_several_tasks_and_few_shot_rows_of_its_own(tmp_path, monkeypatch):
  monkeypatch.setattr(tasks, "TASKS", dict(tasks.TASKS))
  text = TEMPLATE.read_text() + textwrap.dedent("""
    import dataclasses
    solved = dataclasses.replace(TASKS[0].source, files=("solved.jsonl",))
    source = dataclasses.replace(TASKS[0].source, examples=solved)
    TASKS += (dataclasses.replace(TASKS[0], protocol="other", source=source),)
    TASKS += (dataclasses.replace(TASKS[0], protocol="third"),)
  """)
  (tmp_path / "own.py").write_text(text)
  first, second, third = include(str(tmp_path / "own.py"))
  assert list(tasks.TASKS["capitals"]) == ["pair", "other", "third"]
  # Rows are loaded once for all tasks of one source: the same source stays the same.
  assert second.source.examples.files == ("solved.jsonl",)
  assert {first.source: 1}[third.source]
  with pytest.raises(ValueError, match="capitals has the protocol pair already"):
    include(str(tmp_path / "own.py"))


def test_a_pattern_is_all_tasks_whose_names_match():
  found = tasks.matching(["lambada:last_word", "arc_*", "blimp_npi*::2"])
  assert found[:3] == ["lambada:last_word", "arc_easy", "arc_challenge"]
  assert found[3:] == ["blimp_npi_present_1::2", "blimp_npi_present_2::2"]
  with pytest.raises(ValueError, match="no task matches 'xy"):
    tasks.matching(["xy*"])
