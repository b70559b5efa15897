# SPDX-License-Identifier: Apache-2.0
"""CONTRIBUTING.md: the code of each section is complete and does what the section says."""

import pathlib
import re
import types

import jax.numpy as jnp
import numpy as np
import pytest

from gpt2_jax.cli import convert
from gpt2_jax.convert import names, pretrained
from gpt2_jax.convert.weights import from_model, weights_sha256
from gpt2_jax.decoding import Sample, generate
from gpt2_jax.evaluate import sources
from gpt2_jax.evaluate.task import Likelihood
from gpt2_jax.model import ModelConfig
from gpt2_jax.runs import knobs

ROOT = pathlib.Path(__file__).parents[2]
PAGE = (ROOT / "CONTRIBUTING.md").read_text()
BLOCKS = {
  block.splitlines()[0].removeprefix("# "): block
  for block in re.findall(r"```python\n(.*?)```", PAGE, re.S)
}
SMALL = ModelConfig(n_vocab=16, n_ctx=8, n_embd=8, n_head=2, n_layer=2, dtype="float32")


def module(path: str) -> types.ModuleType:
  """The block that begins with this path, as a module."""
  made = types.ModuleType(pathlib.Path(path).stem)
  exec(compile(BLOCKS[path], path, "exec"), vars(made))
  return made


def test_every_path_of_the_page_is_there():
  paths = re.findall(r"`((?:gpt2_jax|configs|tests|experiments|launch)/[\w/.]*)`", PAGE)
  assert len(paths) > 12
  for path in paths:
    assert path in BLOCKS or (ROOT / path).exists(), path
  for path in BLOCKS:
    assert (ROOT / path).parent.is_dir()


def test_the_names_of_the_page_are_there():
  assert convert.FORMATS == pretrained.WRITABLE
  for name in ("detect_format", "write", "WRITABLE"):
    assert name in vars(pretrained)


def test_the_task(tmp_path):
  [task] = module("gpt2_jax/evaluate/tasks/opposites.py").TASKS
  (tmp_path / "opposites").mkdir()
  file = tmp_path / "opposites/opposites.jsonl"
  file.write_text('{"word": "hot", "opposite": "cold"}\n{"word": "up", "opposite": "down"}\n')
  rows = sources.load(task.source, str(tmp_path))
  assert [request.continuation for request in task.requests(rows[0])] == [" cold", " hot"]

  sure, unsure = Likelihood(1.0, 1, True, False), Likelihood(2.0, 1, False, False)
  items = [task.sums(rows[0], [sure, unsure]), task.sums(rows[1], [unsure, sure])]
  total = {"correct": sum(item["correct"] for item in items), "items": len(items)}
  assert task.metrics["accuracy"].value(total) == 50.0


def test_the_format(mesh, parameters, place, tmp_path):
  with mesh(1, 1, 1):
    weights = from_model(place(SMALL, parameters(SMALL)), None)
  arrays = {name: weights.read(name) for name in names.shapes(SMALL)}
  np.savez(tmp_path / "model.npz", n_head=SMALL.n_head, **arrays)
  read = module("gpt2_jax/convert/npz.py").read
  again = read(tmp_path / "model.npz")
  assert weights_sha256(again) == weights_sha256(weights)
  assert again.config.n_layer == SMALL.n_layer

  del arrays["h.1.ln_1.g"]
  np.savez(tmp_path / "damaged.npz", n_head=SMALL.n_head, **arrays)
  with pytest.raises(ValueError, match="has no h.1.ln_1.g of shape"):
    read(tmp_path / "damaged.npz")


def test_the_recipe():
  config = module("configs/short_context.py").get_config()
  knobs.check(config)
  assert config.model.n_ctx * config.batch_size == 1024 * 512


def test_the_sampler(mesh, parameters, place):
  top_a = module("gpt2_jax/decoding/samplers.py").TopA
  logits = np.random.default_rng(0).normal(size=50).astype(np.float32)
  p = np.exp(logits.astype(np.float64)) / np.exp(logits.astype(np.float64)).sum()
  kept = np.asarray(top_a(0.5)(jnp.asarray(logits))) > -np.inf
  assert (kept == (p >= 0.5 * p.max() ** 2)).all() and 0 < kept.sum() < 50

  # With a = 1 and a sure model one token is left.
  with mesh(1, 1, 1):
    model = place(SMALL, parameters(SMALL, scale=2.0))
  sampler = Sample((top_a(1.0),))
  [completion] = generate(model, [[1, 2]], n_new=3, sampler=sampler)
  assert len(completion.tokens) == 3
  with pytest.raises(ValueError, match="top-a of 0"):
    top_a(0)
