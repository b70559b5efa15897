# SPDX-License-Identifier: Apache-2.0
"""Fine-tuning: any checkpoint is step 0 of a run, and what the run came from is recorded."""

import dataclasses
import functools
import importlib.util
import json
import shutil

import jax
import numpy as np
import pytest

from configs import gpt2
from gpt2_jax import train
from gpt2_jax.convert.pretrained import load_pretrained
from gpt2_jax.convert.weights import from_model, weights_sha256
from gpt2_jax.data import TokenStore, encode_corpus
from gpt2_jax.evaluate.runner import run as evaluate_task
from gpt2_jax.evaluate.runner import totals
from gpt2_jax.evaluate.scorers import Scorer
from gpt2_jax.evaluate.tasks import perplexity
from gpt2_jax.finetune.init_from import base_sha256, open_origin
from gpt2_jax.loss import NextToken
from gpt2_jax.model import ModelConfig, name_of
from gpt2_jax.runs.checkpoint import Checkpoints
from gpt2_jax.runs.validation import validation_loss
from gpt2_jax.sharding import make_mesh
from gpt2_jax.tokenizer import train_characters
from tests.convert.test_pretrained import write

TEXT = "".join(chr(97 + (i * i + i // 7) % 23) for i in range(3000))
BASE = ModelConfig(23, 16, 16, 2, 2, dtype="float32", pad_heads=True)
FORMATS = ["hf", "openai", "nanogpt", "llmc", "orbax"]
FORMATS_HERE = [x for x in FORMATS if x != "nanogpt" or importlib.util.find_spec("torch")]

# Whole windows of 16 predicted tokens, side by side: the first token of all is not scored.
VALIDATION = TEXT[1000 : 1000 + 16 * 20 + 1]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
  """Two stores and their tokenizer."""
  folder = tmp_path_factory.mktemp("data")
  tokenizer = train_characters([TEXT])
  (folder / "characters.json").write_text(json.dumps(tokenizer.to_json()))
  for name, text in (("train", TEXT), ("validation", VALIDATION)):
    encode_corpus([text], tokenizer, str(folder / name), {"made": "for a test"}, processes=1)
  return folder


@pytest.fixture(scope="module")
def checkpoints(mesh, parameters, place, tmp_path_factory):
  """checkpoints(form): the same model in that format, made once."""
  folder = tmp_path_factory.mktemp("checkpoints")
  with mesh(1, 1, 1):
    made = from_model(place(BASE, parameters(BASE)), train_characters([TEXT]), "a test")

  @functools.cache
  def checkpoint(form, seed=0):
    weights = made
    if seed:
      with mesh(1, 1, 1):
        weights = from_model(place(BASE, parameters(BASE, seed=seed)), made.tokenizer)
    write(weights, folder / f"{form}-{seed}", form)
    return str(folder / f"{form}-{seed}")

  return checkpoint


def config_for(data, init_from, **knobs):
  config = gpt2.get_config()
  with config.unlocked():
    config.model.update(dict.fromkeys(config.model))  # all of it is the checkpoint's
  config.data.update({n: str(data / n) for n in ("train", "validation")}, tokenizer="")
  config.mesh.update(data=2, model=1, replica=4)
  config.update(init_from=init_from, steps=4, batch_size=8, warmup_steps=1, learning_rate=1e-2)
  config.update(log_every=1, eval_every=2, eval_windows=0, save_every=2, keep=9)
  config.model.dtype = "float32"
  config.update_from_flattened_dict(knobs)
  return config


def lines(workdir, name="loss") -> dict[int, float]:
  rows = [json.loads(row) for row in (workdir / "metrics.jsonl").read_text().splitlines()]
  return {row["step"]: row[name] for row in rows if name in row}


def leaves(model) -> dict[str, np.ndarray]:
  return {
    name_of(path): np.asarray(x) for path, x in jax.tree_util.tree_leaves_with_path(model)
  }


def refused(config, workdir, message: str):
  """The run is refused in one line of bounded length."""
  with pytest.raises((ValueError, OSError), match=message) as error:
    train.run(config, str(workdir))
  assert "\n" not in str(error.value) and len(str(error.value)) < 700


@pytest.fixture(scope="module")
def evaluated(checkpoints):
  """Nats a token of the validation text, as `gpt2-jax evaluate --task=text` has it."""
  model, tokenizer = load_pretrained(checkpoints("hf"), make_mesh(1, 1, 1, jax.devices()[:1]))
  [task] = [task for task in perplexity.TASKS if task.name == "text"]
  sums = totals(evaluate_task(task, [{"text": VALIDATION}], Scorer(model, tokenizer)))
  assert sums["tokens"] == 16 * 20
  return sums["nats"] / sums["tokens"]


@pytest.fixture(scope="module")
def whole(data, checkpoints, tmp_path_factory):
  """The workdir of a run from the Hugging Face folder that nobody disturbed."""
  workdir = tmp_path_factory.mktemp("runs") / "whole"
  train.run(config_for(data, checkpoints("hf")), str(workdir))
  return workdir


@pytest.mark.parametrize("form", FORMATS_HERE)
def test_every_format_is_the_same_step_0(form, checkpoints, data, evaluated, mesh):
  """Its validation loss is `gpt2-jax evaluate`'s: windows of n_ctx predicted tokens, stride n_ctx,
  the first token not scored. So is what the run records of it."""
  origin = open_origin(checkpoints(form))
  architecture = {"n_vocab": 23, "n_ctx": 16, "n_embd": 16, "n_head": 2, "n_layer": 2}
  assert dataclasses.asdict(origin.config).items() >= architecture.items()
  with mesh(4, 2, 1):
    model = origin.load(jax.sharding.get_mesh(), "float32")
    validation = TokenStore.open(str(data / "validation"))
    loss = validation_loss(model, NextToken(), validation, 8, 0)
    assert abs(loss - evaluated) < 1e-6 * evaluated
    assert base_sha256(model) == weights_sha256(
      from_model(load_pretrained(checkpoints("hf"))[0], None)
    )


def test_a_run_begins_at_the_checkpoint_and_records_it(whole, checkpoints, evaluated):
  assert abs(lines(whole, "val_loss")[0] - evaluated) < 1e-6 * evaluated
  assert list(lines(whole)) == [1, 2, 3, 4] and lines(whole)[4] < lines(whole)[1]
  metadata = Checkpoints(str(whole), create=False).metadata(4)
  sha256 = weights_sha256(from_model(load_pretrained(checkpoints("hf"))[0], None))
  assert metadata["init_from"] == {"name": checkpoints("hf"), "sha256": sha256}
  assert metadata["config"]["model"]["n_embd"] == 16
  assert metadata["tokenizer"] == train_characters([TEXT]).to_json()
