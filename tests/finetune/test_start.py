# SPDX-License-Identifier: Apache-2.0
"""A run's initial model: the 1.5B shape on eight devices, by value and by bytes."""

import dataclasses
import functools

import jax
import numpy as np

from configs import gpt2
from gpt2_jax import train
from gpt2_jax.batch import Batch
from gpt2_jax.compat import get_mesh
from gpt2_jax.convert import names
from gpt2_jax.convert.weights import Weights, to_model
from gpt2_jax.finetune.start import build_on, saved_part
from gpt2_jax.loss import NextToken
from gpt2_jax.model import ModelConfig
from gpt2_jax.runs.limits import local_bytes
from gpt2_jax.runs.validation import evaluation_sums
from gpt2_jax.sharding import BATCH

WIDE = ModelConfig(128, 16, 1600, 25, 2, dtype="float32", pad_heads=True)


def random_weights(config) -> Weights:
  """Weights that are drawn when they are first read, each by its name."""
  shapes = names.shapes(config)

  @functools.cache
  def read(name):
    rng = np.random.default_rng(list(name.encode()))
    return 0.2 * rng.random(shapes[name], np.float32) - 0.1 + name.endswith(".g")

  return Weights(config, read, None, "a test")


def test_width_1600_and_25_heads_start_alike_on_one_device_and_on_eight(mesh, put, tokens):
  """Two layers of the 1.5B shape; the model axis of 2 pads the heads to 26."""
  config = gpt2.get_config("1542M")
  weights, losses = random_weights(WIDE), []
  for shape in ((1, 1, 1), (1, 4, 2)):
    with mesh(*shape):
      base = to_model(weights, get_mesh(), "float32")
      shorter = dataclasses.replace(WIDE, n_ctx=8)
      model = build_on(config, shorter, jax.random.key(0), base)
      batch = Batch(put(tokens(8, 9, 128), BATCH))
      sums = jax.device_get(evaluation_sums(model, batch, NextToken()))
      losses.append(sums["nats"] / sums["tokens"])
  assert abs(losses[0] - losses[1]) < 1e-6 * losses[0]


def bytes_a_device(config) -> tuple[int, int, int]:
  """Of the model, the optimizer state and a checkpoint, on the mesh in force."""
  init, _ = train.make_step(config, ModelConfig(**config.model))
  state = jax.eval_shape(init, jax.random.key(0))
  parts = (state.model, state.opt_state, saved_part(config, state))
  return tuple(local_bytes(part, get_mesh()) for part in parts)


def test_48_layers_of_1600_on_eight_devices_by_their_bytes(mesh):
  """Parameters are split in eight and have two moments each; with LoRA of rank 8 on all matrices
  only its own arrays have moments, and are saved."""
  config = gpt2.get_config("1542M")
  config.model.pad_heads = True
  with mesh(1, 4, 2):
    model, moments, saved = bytes_a_device(config)
    config.adapter.update(kind="lora", targets=("c_attn", "c_proj", "c_fc"))
    adapted, adapter_moments, adapter_saved = bytes_a_device(config)

  # Heads are padded by a 25th of attention's 4 D^2, the vocabulary by little; biases and norms are
  # whole on every device. Counts are 4 bytes each: 2 of the optimizer, 3 of the run.
  assert 1.0 < model / (1_557_611_200 * 4 / 8) < 1.02
  assert moments == 2 * model + 2 * 4 and saved == model + moments + 3 * 4

  # Each of four matrices has a scale a layer, which is not trained.
  trained = adapted - model - 4 * 48 * 4
  inputs_and_outputs = (1600 + 4800) + (1600 + 1600) + (1600 + 6400) + (6400 + 1600)
  assert trained < 4 * 8 * 48 * inputs_and_outputs * 1.04
  assert adapter_moments == 2 * trained + 2 * 4
  assert adapter_saved == trained + adapter_moments + 3 * 4 and adapter_saved < saved / 40
