# SPDX-License-Identifier: Apache-2.0
"""Knobs are declared once: ranges are checked, help is written, resuming is decided by that."""

import math

import pytest

from configs import demo, gpt2, shakespeare
from gpt2_jax.runs import knobs


def config(**changes) -> dict:
  values = gpt2.get_config()
  values.update_from_flattened_dict(changes)
  return values.to_dict()


@pytest.mark.parametrize("file", [gpt2, demo, shakespeare])
def test_every_config_holds_every_knob_in_its_range(file):
  values = file.get_config().to_dict()
  knobs.check(values)
  assert list(knobs.flatten(values)) and set(knobs.flatten(values)) == set(knobs.KNOBS)


@pytest.mark.parametrize(
  "name, value, problem",
  [
    ("learning_rate", math.inf, "is not a finite number of 32 bits"),
    ("learning_rate", 1e39, "is not a finite number of 32 bits"),
    ("steps", 2**31, r"is not below 2\^31"),
    ("model.n_vocab", 10**20, r"is not at least 1 and at most 2\^28"),
    ("model.n_embd", 2**31 - 1, r"is not at least 1 and at most 2\^28"),
    ("data.train", "x" * 5000, "is longer than 1,000 characters"),
    ("trainable", (1,), "is not of type tuple of names"),
    ("learning_rate", math.nan, "is not a finite number of 32 bits"),
    ("learning_rate", -1e-3, "is not above 0"),
    ("learning_rate", 0.0, "is not above 0"),
    ("b1", 2.0, "is not at least 0 and below 1"),
    ("b2", 1.0, "is not at least 0 and below 1"),
    ("b2", -0.1, "is not at least 0 and below 1"),
    ("final_lr_fraction", 5.0, "is not at least 0 and at most 1"),
    ("weight_decay", -0.1, "is not at least 0"),
    ("weight_decay", math.inf, "is not a finite number of 32 bits"),
    ("clip_norm", -1.0, "is not at least 0"),
    ("seed", 2**32, r"is not at least 0 and below 2\^32"),
    ("seed", -1, r"is not at least 0 and below 2\^32"),
    ("warmup_steps", -1, "is not at least 0"),
    ("steps", 0, "is not at least 1"),
    ("keep", 0, "is not at least 1"),
    ("eval_windows", -1, "is not at least 0"),
    ("profile_steps", -1, "is not at least 0"),
  ],
)
def test_a_value_out_of_range_is_refused_in_one_line(name, value, problem):
  with pytest.raises(ValueError, match=f"^{name} of .* {problem}; set --config.{name}") as raised:
    knobs.check(config(**{name: value}))
  assert "\n" not in str(raised.value) and len(str(raised.value)) < 300


@pytest.mark.parametrize(
  "name, value", [("steps", 2.5), ("steps", True), ("learning_rate", "1e-3"), ("data", "train")]
)
def test_a_value_of_another_type_is_refused(name, value):
  values = config()
  values[name] = value
  with pytest.raises(ValueError, match=f"{name}"):
    knobs.check(values)


def test_an_unknown_knob_names_the_nearest_and_a_missing_one_its_sense():
  with pytest.raises(ValueError, match="a knob 'learning_rte' that nothing reads; is it learning_"):
    knobs.check(config() | {"learning_rte": 1e-3})
  values = config()
  del values["keep"]
  with pytest.raises(ValueError, match="no keep .newest checkpoints kept"):
    knobs.check(values)


@pytest.mark.parametrize("name", knobs.KNOBS)
def test_a_resumed_run_may_change_what_is_declared_so_and_nothing_else(name):
  old = config()
  changed = knobs.flatten(old)[name]
  changed = changed + 1 if isinstance(changed, int | float) else "another"
  new = config()
  *parents, leaf = name.split(".")
  (new[parents[0]] if parents else new)[leaf] = changed
  differing = knobs.differences(old, new)
  assert bool(differing) != knobs.KNOBS[name].resumable
  assert not differing or differing[0].startswith(f"{name}: ")


def test_a_knob_that_a_saved_run_did_not_have_counts_as_what_it_did():
  old = config()
  del old["trainable"]
  assert not knobs.differences(old, config())
  assert knobs.differences(old, config() | {"trainable": ("b",)}) == ["trainable: ['*'] -> ['b']"]


@pytest.mark.parametrize(
  "name, allowed",
  [
    ("b1", "float at least 0 and below 1"),
    ("seed", "int at least 0 and below 2^32"),
    ("learning_rate", "float above 0"),
    ("trainable", "tuple"),
  ],
)
def test_type_and_range_are_in_words(name, allowed):
  assert knobs.KNOBS[name].allowed() == allowed
