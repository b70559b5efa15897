# SPDX-License-Identifier: Apache-2.0
"""Plots of cells that are made by hand: what they name, and that points are where they belong."""

import numpy as np
import pytest

from gpt2_jax.evaluate import tasks
from gpt2_jax.evaluate.sweep import plots


def cell(model: str, value=30.0, task="lambada", protocol="stop_words", **more) -> dict:
  """A cell with one score, 2 below and 3 above which its interval ends."""
  [metric, *_] = tasks.get(task, protocol).metrics.items()
  name, definition = metric
  ends = {"value": value, "low": value and value - 2, "high": value and value + 3}
  about = {"run": None, "step": None, "size": None, "parameters": 10, "items": 60, "of": 60}
  identity = {"model": model, "task": task, "protocol": protocol, "shots": 0}
  score = ends | {"unit": definition.unit, "higher": definition.higher}
  return {"identity": identity, "metrics": {name: score}} | about | more


def legend(figure) -> list[str]:
  [shown] = figure.legends or [figure.axes[0].get_legend()]
  return [text.get_text() for text in shown.get_texts()]


def labelled_ticks(figure, axis: str) -> int:
  """The ticks in sight that have a number."""
  figure.canvas.draw()
  axis = getattr(figure.axes[0], axis)
  low, high = axis.get_view_interval()
  texts = zip(axis.get_ticklocs(), axis.get_ticklabels(), strict=False)
  return sum(low <= place <= high and bool(text.get_text()) for place, text in texts)


def sizes(*names_and_parameters, **more) -> list[dict]:
  return [cell(name, parameters=n, **more) for name, n in names_and_parameters]


def test_sizes_and_steps_are_drawn_and_named_and_nothing_else_is(tmp_path):
  cells = sizes(("gpt2", 124_000_000), ("gpt2-medium", 355_000_000))
  cells += [cell(f"run@{n}", run="run", step=n, parameters=1000) for n in (10, 20)]
  rows = {"lambada:stop_words:0": {one["identity"]["model"]: one for one in cells}}
  names = plots.draw(rows, tmp_path)
  assert names == ["lambada_stop_words_0.parameters.png", "lambada_stop_words_0.step.run.png"]
  assert sorted(path.name for path in tmp_path.iterdir()) == names
  assert all((tmp_path / name).read_bytes().startswith(b"\x89PNG") for name in names)


def test_one_size_and_one_step_are_no_curve(tmp_path):
  rows = {"lambada:stop_words:0": {"a": cell("a"), "b": cell("b", run="run", step=3)}}
  assert plots.draw(rows, tmp_path / "plots") == [] and not (tmp_path / "plots").exists()


def test_every_model_has_its_name_and_its_point_beside_the_papers_curve():
  given = [
    ("gpt2", 124e6),
    ("mine", 124e6),
    ("/a/very/long/path/to/some/checkpoint/of/mine@1000", 774e6),
  ]
  cells = sizes(*given, size="117M") + [cell("broken", None, parameters=10)]
  figure = plots.size_figure(cells)
  names = legend(figure)
  assert names[0] == "the paper" and {"gpt2", "mine", "broken"} < set(names)
  assert max(map(len, names)) <= plots.NAME_LENGTH and any("mine@1000" in one for one in names)

  paper, *points = [line for line in figure.axes[0].lines if len(line.get_xdata())][:4]
  assert paper.get_xdata()[0] == 124_439_808
  np.testing.assert_allclose(paper.get_ydata(), [45.99, 55.48, 60.12, 63.24])
  drawn = [
    bars.lines[0].get_xydata().tolist()
    for bars in figure.axes[0].containers
    if len(bars.lines[0].get_xdata())
  ]
  assert sorted(drawn) == sorted([[[n, 30.0]] for _, n in given])
  [bars, *_] = [bars.lines[2][0] for bars in figure.axes[0].containers]
  np.testing.assert_allclose(np.array(bars.get_segments())[0][:, 1], [28, 33])


@pytest.mark.parametrize(
  "task, protocol, chance",
  [("hellaswag", "lm_eval", 25.0), ("cbt_cn", "paper", 10.0), ("lambada", "stop_words", None)],
)
def test_chance_is_drawn_where_it_is_known(task, protocol, chance):
  cells = sizes(("a", 1e6), ("b", 2e6), task=task, protocol=protocol)
  run = [cell(f"r@{n}", task=task, protocol=protocol, run="r", step=n) for n in (1, 2)]
  for figure in (plots.size_figure(cells), plots.step_figure(run)):
    lines = [line for line in figure.axes[0].lines if line.get_linestyle() == ":"]
    assert [line.get_ydata()[0] for line in lines] == ([] if chance is None else [chance])
    assert any("chance" in text for text in legend(figure)) == (chance is not None)
    low, high = figure.axes[0].get_ylim()
    assert chance is None or low < chance < high


def test_a_task_of_choices_has_the_chance_of_its_metrics():
  for protocols in tasks.TASKS.values():
    for task in protocols.values():
      assert set(task.chance) <= set(task.metrics)
      guessed = any("accuracy" in name or name == "auc" for name in task.metrics)
      guessed = guessed and task.name != "lambada"
      # pairs of as many tokens, of which random weights prefer neither
      guessed = guessed or "equal_length" in (task.protocol, *task.metrics)
      assert bool(task.chance) == guessed, task.name


def test_a_limit_is_in_the_title():
  [first, second] = sizes(("a", 1e6), ("b", 2e6), of=5153)
  title = plots.size_figure([first, second]).axes[0].get_title()
  assert title == "lambada:stop_words:0, the first 60 of 5,153 items"
  assert plots.size_figure(sizes(("a", 1e6), ("b", 2e6))).axes[0].get_title() == (
    "lambada:stop_words:0"
  )


@pytest.mark.parametrize("values", [(30.0, 33.0), (20.0, 900.0), (1000.0, 1001.0)])
@pytest.mark.parametrize("parameters", [(124e6, 130e6), (124e6, 1558e6), (1e4, 1.5e9)])
def test_logarithmic_axes_have_numbers(values, parameters):
  cells = [cell("ab"[i], values[i], "wikitext2", "raw", parameters=parameters[i]) for i in range(2)]
  figure = plots.size_figure(cells)
  assert figure.axes[0].get_yscale() == figure.axes[0].get_xscale() == "log"
  for axis in ("xaxis", "yaxis"):
    assert 2 <= labelled_ticks(figure, axis) <= 18
