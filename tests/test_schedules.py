# SPDX-License-Identifier: Apache-2.0
"""Learning rates by step: the warmup, the cosine, and WSD's stable part and decay."""

import math

import jax
import numpy as np
import pytest

from configs import gpt2
from gpt2_jax.schedules import cosine, make_schedule, wsd


def test_cosine_is_the_formula():
  rate, steps, warmup, floor = 6e-4, 100, 10, 0.1
  found = cosine(rate, steps, warmup, floor)

  def formula(step):
    if step < warmup:
      return rate * (step + 1) / (warmup + 1)
    part = min(1, (step - warmup) / (steps - warmup))
    return rate * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * part)))

  assert found(0) == pytest.approx(rate / 11)
  assert found(10) == pytest.approx(rate)
  assert found(55) == pytest.approx(rate * 0.55)
  assert found(100) == found(1000) == pytest.approx(rate * 0.1)
  for step in range(0, 120, 3):
    assert found(step) == pytest.approx(formula(step)), step


def test_schedule_without_warmup_starts_at_the_top():
  assert cosine(1e-3, 10, 0, 0.1)(0) == pytest.approx(1e-3)


@pytest.mark.parametrize("warmup", [100, 101])
def test_warmup_must_end_before_the_steps_do(warmup):
  with pytest.raises(
    ValueError,
    match=f"warmup_steps of {warmup} leaves nothing of 100 steps; set --config.warmup_st",
  ):
    cosine(1e-3, 100, warmup, 0.1)


@pytest.mark.parametrize("form", ["linear", "1-sqrt"])
def test_wsd_warms_up_stays_and_decays_in_the_last_steps(form):
  """The formula of Hägele et al. 2024, with a floor; at both ends of each part."""
  rate, steps, warmup, floor, decay = 6e-4, 100, 10, 0.1, 20
  found = jax.vmap(wsd(rate, steps, warmup, floor, decay, form))(np.arange(121))

  def formula(step):
    if step < warmup:
      return rate * (step + 1) / (warmup + 1)
    part = min(max(step - (steps - decay), 0) / decay, 1)
    left = 1 - part if form == "linear" else 1 - math.sqrt(part)
    return rate * (floor + (1 - floor) * left)

  np.testing.assert_allclose(found, [formula(step) for step in range(121)], rtol=1e-5)
  assert (found[10:81] == found[10]).all() and found[81] < found[80]


def test_wsd_without_a_decay_never_falls():
  found = jax.vmap(wsd(1e-3, 10, 2, 0.1, 0, "linear"))(np.arange(20))
  np.testing.assert_allclose(found[2:], 1e-3, rtol=1e-6)


def test_the_length_of_a_run_does_not_change_its_stable_part():
  """Or a branch would not be the run it branches from."""
  short, long = (jax.vmap(wsd(1e-3, steps, 5, 0.0, 10, "linear")) for steps in (60, 600))
  np.testing.assert_array_equal(short(np.arange(51)), long(np.arange(51)))


@pytest.mark.parametrize(
  "knobs, message",
  [
    ({"schedule": "linear"}, "schedule is 'linear'; it is one of cosine, wsd"),
    ({"schedule": "wsd", "decay_form": "cosine"}, "decay_form is 'cosine'; it is one of linear, 1"),
    (
      {"schedule": "wsd", "steps": 30, "warmup_steps": 11, "decay_steps": 20},
      "warmup_steps of 11 and decay_steps of 20 are more than 30 steps; set --config.decay_steps",
    ),
    (
      {"schedule": "cosine", "decay_steps": 20},
      "decay_steps is 20, and schedule is cosine, which decays all the way; set --config.schedule",
    ),
  ],
)
def test_a_schedule_that_cannot_be_is_refused_in_one_line(knobs, message):
  config = gpt2.get_config()
  config.update(knobs)
  with pytest.raises(ValueError, match=message) as raised:
    make_schedule(config)
  assert "\n" not in str(raised.value) and len(str(raised.value)) < 300
