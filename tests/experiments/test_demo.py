# SPDX-License-Identifier: Apache-2.0
"""The demo's parts that do not train: which length it takes, and what it prints."""

import importlib.util
import json
import pathlib

import pytest

from configs.demo import STEPS, get_config

ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture
def demo():
  spec = importlib.util.spec_from_file_location("demo", ROOT / "experiments" / "demo.py")
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


@pytest.mark.parametrize(("seconds", "length"), [(0.5, "long"), (2.2, "long"), (2.3, "short")])
def test_the_long_run_is_for_machines_that_have_time_for_it(
  demo, tmp_path, monkeypatch, capsys, seconds, length
):
  monkeypatch.setattr(demo, "seconds_of_ten_steps", lambda: seconds)
  assert demo.choose_length(tmp_path) == length
  assert f"the {length} run, {STEPS[length]} steps" in capsys.readouterr().out


@pytest.mark.parametrize("length", STEPS)
def test_a_run_that_was_broken_off_keeps_its_length_and_times_nothing(
  demo, tmp_path, monkeypatch, length
):
  monkeypatch.setattr(demo, "seconds_of_ten_steps", lambda: pytest.fail("it was timed again"))
  config = get_config(length).to_dict()
  (tmp_path / "train_config.json").write_text(json.dumps(config))
  assert demo.choose_length(tmp_path) == length


def test_each_length_has_a_loss_to_expect_and_others_are_refused(demo):
  assert demo.EXPECTED.keys() == STEPS.keys() and 0 < demo.EXPECTED["long"] < demo.EXPECTED["short"]
  with pytest.raises(ValueError, match="no length 'medium' of the demo; take long or short"):
    get_config("medium")


def test_a_command_is_printed_whole_and_its_failure_ends_the_demo(demo, capfd):
  demo.command("-c", f"print(2)  # {'long ' * 100}")
  out = capfd.readouterr().out
  assert out == f"\n$ {demo.PYTHON} -c 'print(2)  # {'long ' * 100}'\n2\n"
  with pytest.raises(SystemExit) as stop:
    demo.command("-c", "raise SystemExit(3)")
  assert stop.value.code == 3


def test_the_text_is_python_alone_and_copied_the_same_again(demo, tmp_path):
  def state():
    return {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}

  demo.copy_text(tmp_path)
  before = state()
  assert len(before) > 300 and {path.suffix for path in before} == {".py"}
  demo.copy_text(tmp_path)
  assert state() == before
