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
from gpt2_jax.convert.pretrained import load_pretrained, open_weights, save_adapter
from gpt2_jax.convert.weights import from_model, weights_sha256
from gpt2_jax.data import TokenStore, encode_corpus
from gpt2_jax.evaluate.runner import run as evaluate_task
from gpt2_jax.evaluate.runner import totals
from gpt2_jax.evaluate.scorers import Scorer
from gpt2_jax.evaluate.tasks import perplexity
from gpt2_jax.finetune.init_from import base_sha256, open_origin
from gpt2_jax.finetune.lora import merge_lora
from gpt2_jax.loss import NextToken
from gpt2_jax.model import ModelConfig, name_of
from gpt2_jax.runs.checkpoint import Checkpoints
from gpt2_jax.runs.validation import validation_loss
from gpt2_jax.sharding import make_mesh
from gpt2_jax.tokenizer import train_characters
from tests.convert.test_pretrained import write

TEXT = "".join(chr(97 + (i * i + i // 7) % 23) for i in range(3000))
BASE = ModelConfig(23, 16, 16, 2, 2, dtype="float32", pad_heads=True)
MESH = {"replica": 1, "data": 2, "model": 1}
FORMATS = ["hf", "openai", "nanogpt", "llmc", "orbax"]
FORMATS_HERE = [x for x in FORMATS if x != "nanogpt" or importlib.util.find_spec("torch")]

# Whole windows of 16 predicted tokens, side by side: the first token of all is not scored.
VALIDATION = TEXT[1000 : 1000 + 16 * 20 + 1]


@pytest.fixture(scope="module", autouse=True)
def two_devices():
  """Runs use two devices: compiling for eight takes longer, and shows nothing more here."""
  devices = jax.devices()
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(jax, "devices", lambda *backend: devices[:2])
    yield


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
  config.mesh.update(MESH)
  config.update(init_from=init_from, steps=4, batch_size=8, warmup_steps=1, learning_rate=1e-2)
  config.update(log_every=1, eval_every=2, eval_windows=0, save_every=2, keep=9)
  config.model.dtype = "float32"
  config.update_from_flattened_dict(knobs)
  return config


def lines(workdir, name="loss") -> dict[int, float]:
  rows = [json.loads(row) for row in (workdir / "metrics.jsonl").read_text().splitlines()]
  return {row["step"]: row[name] for row in rows if name in row}


def leaves(model) -> dict[str, np.ndarray]:
  return {name_of(path): np.asarray(x) for path, x in jax.tree_util.tree_leaves_with_path(model)}


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
  with mesh(1, 2, 1):
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


def architecture(**values) -> dict:
  """The knobs of the model, as a run from random weights needs them."""
  return {f"model.{name}": value for name, value in (dataclasses.asdict(BASE) | values).items()}


def cut_off(workdir, after: int):
  """What a kill leaves after a step's checkpoint: later ones are not there."""
  for step in (workdir / "checkpoints").iterdir():
    if int(step.name) > after:
      shutil.rmtree(step)


def test_a_run_resumes_without_what_it_started_from(whole, data, checkpoints, tmp_path):
  """Its own checkpoint has all arrays. The same weights at another place are the same start."""
  workdir, source = tmp_path / "run", tmp_path / "base"
  shutil.copytree(checkpoints("hf"), source)
  train.run(config_for(data, str(source)), str(workdir))
  shutil.rmtree(source)
  for init_from in (str(source), checkpoints("llmc")):
    cut_off(workdir, 2)
    train.run(config_for(data, init_from), str(workdir))
    assert lines(workdir) == lines(whole)
    assert lines(workdir, "val_loss") == lines(whole, "val_loss")

  other = config_for(data, checkpoints("hf", seed=1))
  refused(other, workdir, "run that started from .*sha256 .*, and this one starts from .*sha256")
  random = config_for(data, "", **architecture(), **{"data.tokenizer": tokenizer_of(data)})
  refused(random, workdir, "this one starts from random weights")


def tokenizer_of(data) -> str:
  return str(data / "characters.json")


def test_a_shorter_context_is_the_beginning_of_the_table(data, checkpoints, tmp_path):
  """The rest is frozen here, and stays bit for bit; the run ends for want of patience."""
  knobs = {"model.n_ctx": 8, "trainable": ("ln_f.*",), "steps": 8, "eval_every": 1, "patience": 2}
  config = config_for(data, checkpoints("openai"), **knobs, learning_rate=30.0)
  refused(config, tmp_path / "run", "has no tokenizer; set --config.data.tokenizer")
  assert not (tmp_path / "run").exists()

  config.data.tokenizer = tokenizer_of(data)
  train.run(config, str(tmp_path / "run"))
  before = leaves(load_pretrained(checkpoints("openai"))[0])
  after = leaves(load_pretrained(str(tmp_path / "run"))[0])
  for name, leaf in before.items():
    leaf = leaf[:8] if name == "wpe" else leaf
    assert np.array_equal(leaf, after[name]) is not name.startswith("ln_f"), name

  # Such a learning rate makes nothing better: the run ends after two evaluations, and stays so.
  assert list(lines(tmp_path / "run", "val_loss")) == [0, 1, 2]
  train.run(config, str(tmp_path / "run"))
  assert list(lines(tmp_path / "run", "val_loss")) == [0, 1, 2]


@pytest.fixture(scope="module")
def lora(data, checkpoints, tmp_path_factory):
  """The workdir of a run with LoRA, and its config."""
  workdir = tmp_path_factory.mktemp("runs") / "lora"
  knobs = {"adapter.kind": "lora", "adapter.rank": 2, "adapter.targets": ("c_attn", "c_proj")}
  config = config_for(data, checkpoints("hf"), **knobs)
  train.run(config, str(workdir))
  return workdir, config


def test_a_checkpoint_of_lora_holds_what_is_trained(lora, checkpoints, evaluated):
  """And with its base it loads: no bit of the base has changed."""
  workdir, _ = lora
  assert abs(lines(workdir, "val_loss")[0] - evaluated) < 1e-6 * evaluated
  assert lines(workdir)[4] < lines(workdir)[1]

  names = Checkpoints(str(workdir), create=False).sums(4).keys()
  counts = {"step", "skipped_total", "skipped_in_a_row", "adam.count", "learning_rate.count"}
  arrays = names - counts
  assert counts < names and len(arrays) == 3 * 6  # A and B of three matrices, and their moments
  assert all(name.endswith((".lora_a", ".lora_b")) for name in arrays)

  model, tokenizer = load_pretrained(str(workdir))
  assert tokenizer == train_characters([TEXT])
  adapted = leaves(model)
  for name, leaf in leaves(load_pretrained(checkpoints("hf"))[0]).items():
    parts = [x for x in adapted if x.replace(".base", "") == name]
    assert len(parts) == 1 and np.array_equal(adapted[parts[0]], leaf), name
  assert any(adapted[name].any() for name in adapted if name.endswith("lora_b"))


def test_what_lora_trained_is_written_for_peft_or_merged(lora, checkpoints, tmp_path):
  """And never dropped: without a word for either, nothing is written."""
  workdir, _ = lora
  model, _ = load_pretrained(str(workdir))
  record = save_adapter(str(workdir), str(tmp_path / "adapter"))
  assert record["sha256"] == weights_sha256(open_weights(checkpoints("hf")))

  # Its base in any format takes it.
  again, _ = load_pretrained(checkpoints("llmc"), adapter=str(tmp_path / "adapter"))
  expected = leaves(model)
  for name, leaf in leaves(again).items():
    np.testing.assert_array_equal(leaf, expected[name], err_msg=name)
  merged, here = open_weights(str(workdir), merge=True), from_model(merge_lora(model), None)
  for name in ("wte", "h.0.attn.c_attn.w", "h.1.mlp.c_proj.w", "h.1.mlp.c_fc.w"):
    np.testing.assert_allclose(merged.read(name), here.read(name), atol=1e-6, err_msg=name)
  with pytest.raises(ValueError, match="merge it"):
    open_weights(str(workdir))
  with pytest.raises(ValueError, match="no run that trained an adapter"):
    save_adapter(checkpoints("hf"), str(tmp_path / "none"))
  assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("form, sizes", [("hf", (1, 2, 1)), ("llmc", (1, 1, 2))])
def test_lora_resumes_bit_for_bit_and_its_base_may_move(form, sizes, lora, checkpoints, tmp_path):
  """After a kill, and to 1e-5 on another mesh."""
  whole, config = lora
  config = config.copy_and_resolve_references()
  config.update(init_from=checkpoints(form), mesh=dict(zip(MESH, sizes, strict=True)))
  workdir = tmp_path / "run"
  shutil.copytree(whole, workdir)
  cut_off(workdir, 2)
  train.run(config, str(workdir))

  tolerance = 0 if sizes == tuple(MESH.values()) else 1e-5
  for name in ("loss", "val_loss"):
    before, after = lines(whole, name), lines(workdir, name)
    assert before.keys() == after.keys()
    assert max(abs(before[step] - after[step]) for step in before) <= tolerance
  config.init_from = checkpoints("hf", seed=1)
  refused(config, workdir, "started from .*sha256 .*, and this one starts from .*sha256")


def refusals(data, checkpoints, tmp_path):
  """What a run from a checkpoint cannot be: knobs, and a piece of the line that says so."""
  hf = checkpoints("hf")
  return [
    ({"init_from": str(tmp_path / "none")}, "none is not there"),
    ({"init_from": f"{hf}@3"}, "no workdir of a run, and has no step '3'"),
    ({"model.n_embd": 32}, "has n_embd 16, and model.n_embd is 32"),
    ({"model.n_vocab": 50257}, "has n_vocab 23, and model.n_vocab is 50257"),
    ({"model.n_ctx": 17}, "has n_ctx 16, and a longer model.n_ctx of 17"),
    ({"data.tokenizer": str(tmp_path / "other.json")}, "fingerprint .* has another"),
    ({"adapter.kind": "lora", "adapter.rank": 0}, "adapter.rank of 0 is not at least 1"),
    ({"adapter.kind": "lora", "adapter.targets": ("c_atn",)}, "nearest are c_attn"),
    ({"adapter.kind": "lora", "init_from": ""} | architecture(), "set --config.init_from"),
    ({"init_from": ""}, "is None, which is the checkpoint's, and the run starts from none"),
  ]


def test_what_cannot_be_is_one_line_and_writes_nothing(data, checkpoints, whole, tmp_path):
  other = train_characters(["abc"])
  (tmp_path / "other.json").write_text(json.dumps(other.to_json()))
  for knobs, message in refusals(data, checkpoints, tmp_path):
    knobs = {"init_from": checkpoints("hf")} | knobs
    refused(config_for(data, **knobs), tmp_path / "run", message)
    assert not (tmp_path / "run").exists()


def test_weights_alone_are_no_run_and_a_run_is_no_start_for_another(
  data, checkpoints, whole, tmp_path
):
  """Training in a converted workdir, or in that of another run: one line, nothing lost."""
  shutil.copytree(checkpoints("orbax"), tmp_path / "converted")
  hf = checkpoints("hf")
  refused(config_for(data, hf), tmp_path / "converted", "holds weights, and no run.*init_from")
  for place in (str(whole), f"{whole}@2"):
    config = config_for(data, place)
    refused(config, whole, "holds a run that started from .*, and this one starts from")
  assert Checkpoints(str(whole), create=False).steps() == [4, 2, 1, 0][:2]


def test_a_run_starts_from_a_step_of_another(data, whole, mesh):
  origin = open_origin(f"{whole}@2")
  assert origin.name == f"{whole}@2" and open_origin(str(whole)).name == f"{whole}@4"
  with mesh(1, 1, 1):
    model = origin.load(jax.sharding.get_mesh(), "float32")
  expected = leaves(load_pretrained(str(whole), step="2")[0])
  assert all(np.array_equal(expected[name], leaf) for name, leaf in leaves(model).items())
