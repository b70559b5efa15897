# SPDX-License-Identifier: Apache-2.0
"""What cannot run is refused before anything is compiled; running out of memory is one line."""

import time

import jax
import jax.numpy as jnp
import pytest

from configs import gpt2
from gpt2_jax import train
from gpt2_jax.compat import get_mesh
from gpt2_jax.loss import NextToken
from gpt2_jax.model import ModelConfig
from gpt2_jax.runs import limits
from gpt2_jax.sharding import concrete


def check(mesh, sizes=(1, 1, 1), **knobs):
  """Checks the memory of a run of `knobs`; returns what it needs at least."""
  config = gpt2.get_config()
  config.model.update(n_vocab=23, n_ctx=16, n_embd=16, n_head=2, n_layer=2, dtype="float32")
  config.update(steps=24, batch_size=8, warmup_steps=4)
  config.update_from_flattened_dict(knobs)
  model_config = ModelConfig(**config.model)
  with mesh(*sizes):
    init, _ = train.make_step(config, model_config)
    state = jax.eval_shape(init, jax.random.key(0))
    limits.check_update_fits(config, model_config, state)
    return limits.memory_needs(config, model_config, state)


@pytest.mark.parametrize(
  "knobs, part, way_out",
  [
    ({"batch_size": 10**8}, "logits 762.94", "microbatches"),
    ({"steps_per_call": 10**9, "steps": 10**9}, "batches 506.64", "steps_per_call"),
    ({"model.n_layer": 10**7}, "the state 366.57", "n_layer"),
    ({"model.n_embd": 2**20}, "gradients 98,304", "n_embd"),
    ({"model.n_ctx": 2**28}, "activations 256.00", "n_ctx"),
  ],
)
def test_what_cannot_fit_is_refused_at_once_with_the_numbers(mesh, knobs, part, way_out):
  begin = time.monotonic()
  with pytest.raises(ValueError, match=r"^out of memory: an update needs at least") as raised:
    check(mesh, **knobs)
  line = str(raised.value)
  assert part in line and "GiB" in line and way_out in line.split(";")[-1] and len(line) < 500
  assert time.monotonic() - begin < 5


def test_the_estimate_is_below_what_the_compiler_needs(mesh):
  """A lower bound refuses nothing that runs: against XLA's own count of one step."""
  needs = check(mesh, batch_size=64)
  config = gpt2.get_config()
  config.model.update(n_vocab=23, n_ctx=16, n_embd=16, n_head=2, n_layer=2, dtype="float32")
  config.update(steps=24, batch_size=64, warmup_steps=4)
  with mesh(1, 1, 1):
    init, step = train.make_step(config, ModelConfig(**config.model))
    state = concrete(jax.eval_shape(init, jax.random.key(0)), get_mesh())
    tokens_BT = jax.ShapeDtypeStruct((1, 64, 17), jnp.int32)
    signals = jax.ShapeDtypeStruct((1,), jnp.int32)
    memory = (
      step.lower(state, train.Batch(tokens_BT), NextToken(), signals).compile().memory_analysis()
    )
  needed = memory.argument_size_in_bytes + memory.temp_size_in_bytes
  assert needed / 10 < sum(needs.values()) <= needed


def test_more_devices_need_less_each(mesh):
  alone, together = check(mesh), check(mesh, (1, 8, 1))
  assert all(together[name] < alone[name] for name in alone)


def test_running_out_of_memory_is_one_line_with_the_knobs(mesh):
  config = gpt2.get_config()
  model_config = ModelConfig(**config.model)
  with mesh(1, 1, 1):
    init, _ = train.make_step(config, model_config)
    state = jax.eval_shape(init, jax.random.key(0))
    with (
      pytest.raises(
        ValueError, match=r"^out of memory \(RESOURCE_EXHAUSTED: .*\): batch_size 512"
      ) as raised,
      limits.out_of_memory(config, model_config, state),
    ):
      jnp.zeros((2**45,)).block_until_ready()
    guard = limits.out_of_memory(config, model_config, state)
    with pytest.raises(ValueError, match=r"^out of memory"), guard:
      raise MemoryError
    with pytest.raises(TypeError), limits.out_of_memory(config, model_config, state):
      raise TypeError("another error stays what it is")
  line = str(raised.value)
  assert "\n" not in line and len(line) < 600 and "--config.model.remat=full" in line
