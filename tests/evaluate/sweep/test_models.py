# SPDX-License-Identifier: Apache-2.0
"""Which models an entry of a sweep means, and what tells their weights apart."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import zero_shot
from gpt2_jax.convert.pretrained import load_pretrained, save_pretrained
from gpt2_jax.evaluate.sweep import compute, models
from gpt2_jax.finetune.lora import LoraSettings, add_lora
from gpt2_jax.finetune.peft import write_adapter
from gpt2_jax.model import GPT2, ModelConfig
from gpt2_jax.runs.checkpoint import Checkpoints
from gpt2_jax.sharding import make_mesh
from gpt2_jax.sizes import SIZES
from gpt2_jax.tokenizer import Characters


def save(workdir, losses: dict[int, float]) -> str:
  """A run's workdir with a checkpoint of one number for each step."""
  checkpoints = Checkpoints(str(workdir), last=9)
  for step, loss in losses.items():
    checkpoints.save(step, {"model": {"x": jnp.full(3, loss)}}, {}, loss)
  checkpoints.close()
  return str(workdir)


def test_the_checkpoints_of_a_run_are_models(tmp_path):
  run = save(tmp_path / "run", {10: 3.0, 20: 1.0, 30: 2.0})
  steps = {
    entry: [model.step for model in models.resolve_models([run + entry])]
    for entry in ("", "@best", "@all", "@10")
  }
  assert steps == {"": ["30"], "@best": ["20"], "@all": ["10", "20", "30"], "@10": ["10"]}
  every = models.resolve_models([run + "@all", run, run + "@best"])
  assert [model.name for model in every] == [f"{run}@{n}" for n in (10, 20, 30)]  # each once
  assert len({model.weights for model in every}) == 3
  other = save(tmp_path / "other", {10: 3.0, 20: 1.5})
  a, b = (models.resolve_models([workdir + "@all"]) for workdir in (run, other))
  # what they hold, not where they lie
  assert a[0].weights == b[0].weights and a[1].weights != b[1].weights
  with pytest.raises(FileNotFoundError, match="no checkpoint of step 11 .* 10, 20, 30, best"):
    models.resolve_models([run + "@11"])


def test_what_is_no_run_has_no_steps(tmp_path):
  path = tmp_path / "a@b"
  path.mkdir()
  (path / "weights").write_text("a")
  with pytest.raises(ValueError, match="no GPT-2 checkpoint"):
    models.resolve_models([str(path)])
  (path / "config.json").write_text("{}")
  assert models.resolve_models([str(path)])[0].path == str(path)  # an @ may be part of a name
  with pytest.raises(ValueError, match="no workdir of a run"):
    models.resolve_models([f"{path}@7"])
  (tmp_path / "empty" / "checkpoints").mkdir(parents=True)
  with pytest.raises(FileNotFoundError, match="holds no checkpoint"):
    models.resolve_models([str(tmp_path / "empty")])


def test_an_adapter_makes_another_model_of_its_base(tmp_path):
  # 1. A base, and an adapter of it that does something.
  mesh = make_mesh(1, 1, 1, jax.devices()[:1])
  base, adapter = tmp_path / "base", tmp_path / "one+two"
  with jax.set_mesh(mesh):
    model = GPT2(ModelConfig(50257, 16, 16, 2, 1, dtype="float32"), jax.random.key(0))
    save_pretrained(model, None, str(base))
    adapted = jax.tree.map(lambda x: x + 0.1, add_lora(model, LoraSettings(2), jax.random.key(1)))
    write_adapter(adapted, tmp_path / "adapter", "base")

  # 2. It is a column of its own, known by its content.
  plain, with_adapter = models.resolve_models([str(base), f"{base}+{tmp_path}/adapter"])
  assert plain.adapter is None
  assert (with_adapter.path, with_adapter.adapter) == (str(base), f"{tmp_path}/adapter")
  assert plain.weights != with_adapter.weights
  (tmp_path / "adapter").rename(adapter)
  (moved,) = models.resolve_models([f"{base}+{tmp_path}/one+two"])
  assert moved.weights == with_adapter.weights

  # 3. What is scored is the base with it.
  config = zero_shot.get_config()
  config.dtype = "float32"
  scorer = compute._load_scorer(moved, config)
  loaded, _ = load_pretrained(str(base), adapter=str(adapter))
  ours, theirs = jax.tree.leaves(scorer.model), jax.tree.leaves(loaded)
  assert len(ours) > len(jax.tree.leaves(model))
  for one, other in zip(ours, theirs, strict=True):
    np.testing.assert_array_equal(one, other)

  # 4. What is none is told before anything is computed.
  with pytest.raises(FileNotFoundError, match="is no adapter of peft's"):
    models.resolve_models([f"{base}+{base}"])


def test_a_tokenizer_is_read_without_the_weights(tmp_path):
  characters = Characters("abc")
  with jax.set_mesh(make_mesh(1, 1, 1, jax.devices()[:1])):
    model = GPT2(ModelConfig(3, 8, 8, 2, 1), jax.random.key(0))
    for form in ("hf", "orbax"):
      save_pretrained(model, characters, str(tmp_path / form), form=form)
      (entry,) = models.resolve_models([str(tmp_path / form)])
      tokenizer = compute._tokenizer(entry)
      assert tokenizer.eot is None and tokenizer.encode("cab") == [2, 0, 1]


def test_a_null_model_has_the_shape_and_tokenizer_of_its_base_and_random_weights(tmp_path):
  """The weights are those that a run begins with, drawn by the seed alone."""
  config, mesh = ModelConfig(3, 8, 8, 2, 1), make_mesh(1, 1, 1, jax.devices()[:1])
  with jax.set_mesh(mesh):
    drawn = [GPT2(config, jax.random.key(seed)) for seed in (0, 7)]
    for form in ("hf", "orbax"):
      save_pretrained(drawn[0], Characters("abc"), str(tmp_path / form), form=form)
  for form in ("hf", "orbax"):
    base = f"random:{tmp_path / form}"
    first, same, other = models.resolve_models([base, f"{base}@0", f"{base}@7"])
    assert first.weights == same.weights != other.weights and other.name == f"{base}@7"
    null, tokenizer = models.load_random(other.path, mesh, "float32")
    assert null.config.n_embd == 8 and null.config.dtype == "float32"
    assert tokenizer.encode("cab") == [2, 0, 1]
    np.testing.assert_allclose(null.wte[...].array, drawn[1].wte[...].array, rtol=1e-6)

  assert models.resolve_models(["random:117M", "random:gpt2@3"])[1].path == "random:gpt2@3"
  for entry, message in (("random:gpt2@x", "has no seed behind its @"), ("random:/x", "not there")):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
      models.resolve_models([entry])


def test_the_papers_sizes_are_known_by_their_shape():
  known = {name: models.paper_size(config) for name, config in SIZES.items()}
  assert known == {name: name for name in ("117M", "345M", "762M", "1542M")} | {"distilgpt2": None}
  assert SIZES["1542M"].n_params == 1_557_611_200
