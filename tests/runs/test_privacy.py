# SPDX-License-Identifier: Apache-2.0
"""Private runs: their epsilon, their refusals, their resume."""

import math

import jax
import numpy as np
import pytest

pytest.importorskip("dp_accounting")

from gpt2_jax import train
from gpt2_jax.runs.checkpoint import Checkpoints
from gpt2_jax.runs.privacy import rdp_epsilon
from gpt2_jax.sharding import make_mesh
from tests.test_train import broken_off, config_for, data, lines  # noqa: F401

STEPS = 6


def private_config(data, **knobs):  # noqa: F811
  """Of 374 windows, 6 a step are expected. Noise compiles for seconds a parameter: two have it."""
  config = config_for(data, steps=STEPS, eval_every=3, save_every=3, warmup_steps=1)
  config.update(batch_size=32, microbatches=32, trainable=("ln_f",), eval_windows=4)
  config.mesh.update(replica=1, data=1, model=1)
  config.private.update(clip_norm=0.5, noise_multiplier=1.2, batch_size=6, delta=1e-3)
  config.update_from_flattened_dict(knobs)
  return config


@pytest.fixture(scope="module", autouse=True)
def one_device():
  """A run's mesh is over one of the eight."""
  with pytest.MonkeyPatch.context() as patch:
    devices = jax.devices()[:1]
    patch.setattr(train, "make_mesh", lambda **sizes: make_mesh(**sizes, devices=devices))
    yield


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):  # noqa: F811
  """The workdir of a private run that nobody disturbed."""
  workdir = tmp_path_factory.mktemp("private")
  train.run(private_config(data), str(workdir))
  return workdir


def test_epsilon_is_that_of_opacus():
  """opacus 1.5's RDPAccountant for 10,000 steps at a rate of 0.01, a noise of 1.1, delta 1e-5."""
  assert round(rdp_epsilon(1.1, 0.01, 10_000, 1e-5), 3) == 5.632


def test_epsilon_of_one_gaussian_is_near_the_exact_one():
  """Without sampling, the exact delta of epsilon is Balle and Wang's (2018, theorem 8)."""
  sigma, delta = 2.0, 1e-5
  epsilon = rdp_epsilon(sigma, 1.0, 1, delta)

  def phi(x):
    return 0.5 * math.erfc(-x / math.sqrt(2))

  a, b = 1 / (2 * sigma), epsilon * sigma
  exact = phi(a - b) - math.exp(epsilon) * phi(-a - b)
  assert exact <= delta, "a bound, from above"
  b = 0.9 * epsilon * sigma
  assert phi(a - b) - math.exp(0.9 * epsilon) * phi(-a - b) > delta, "and no more than a tenth off"


def test_each_checkpoint_and_the_log_tell_epsilon(whole, data):  # noqa: F811
  rate = 6 / 374
  expected = {step: rdp_epsilon(1.2, rate, step, 1e-3) for step in (3, 6)}
  assert lines(whole, "epsilon") == expected
  checkpoints = Checkpoints(str(whole), 3)
  for step, spent in expected.items():
    record = checkpoints.metadata(step)["private"]
    assert record["epsilon"] == spent
    assert record["accountant"] == "RDP of dp-accounting"
    assert (record["examples"], record["steps"], record["delta"]) == (374, step, 1e-3)
  checkpoints.close()


def test_resuming_is_bit_for_bit_the_same(whole, data, tmp_path):  # noqa: F811
  broken_off(whole, tmp_path, 3)
  resumed = train.run(private_config(data), str(tmp_path))
  for name in ("loss", "grad_norm", "batch_hash", "val_loss", "epsilon"):
    assert lines(tmp_path, name) == lines(whole, name)
  config = private_config(data)
  saved = train.run(config, str(whole))  # all of its steps were done before
  for x, y in zip(jax.tree.leaves(resumed), jax.tree.leaves(saved), strict=True):
    np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


@pytest.mark.parametrize(
  "knobs, message",
  [
    ({"private.clip_norm": 0.0}, r"private.clip_norm is 0, which is no private training"),
    (
      {"private.noise_multiplier": 0.0, "private.epsilon": 1.0},
      r"noise_multiplier is 0, with which no epsilon is finite, and private.epsilon asks for 1;",
    ),
    ({"private.delta": 0.003}, r"delta of 0.003 is above 1 / 374, .*; set .*delta=0.0003$"),
    ({"private.delta": 0.0}, r"private.delta of 0.0 is not above 0"),
    ({"private.epsilon": 0.01}, r"6 steps spend an epsilon of .* and private.epsilon is 0.01"),
    ({"private.batch_size": 0}, r"batch_size of 0 is not from 1 to batch_size, here 32"),
    ({"private.batch_size": 33}, r"batch_size of 33 is not from 1 to batch_size, here 32"),
    (
      {"private.batch_size": 31, "seed": 1},
      r"Poisson sampling draws \d+ examples at step \d, and a batch has room for 32 .*; set",
    ),
    ({"microbatches": 1}, r"takes 32 microbatches and has 1; set --config.microbatches=32"),
  ],
)
def test_bad_input_is_one_line_and_leaves_nothing(data, tmp_path, knobs, message):  # noqa: F811
  with pytest.raises(ValueError, match=message) as raised:
    train.run(private_config(data, **knobs), str(tmp_path / "run"))
  assert "\n" not in str(raised.value)
  assert not (tmp_path / "run").exists()
