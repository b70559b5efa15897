# SPDX-License-Identifier: Apache-2.0
"""Names on disk are a format: a run that version 0 of it saved resumes as it went on then."""

import json
import pathlib
import shutil
import zipfile

import jax
import numpy as np
import pytest

from configs import gpt2
from gpt2_jax import train
from gpt2_jax.data import encode_corpus
from gpt2_jax.loss import NextToken
from gpt2_jax.optimizer import adamw
from gpt2_jax.runs.checkpoint import FORMAT, NAMES, Checkpoints, by_name, format_of, name_on_disk
from gpt2_jax.schedules import cosine
from gpt2_jax.sharding import make_mesh
from gpt2_jax.tokenizer import train_characters

# Two runs of 70 steps, made by the code before names had a version: what they had saved at step 20,
# and the lines of metrics.jsonl up to their end.
VERSION_0 = pathlib.Path(__file__).with_name("version_0.zip")
TEXT = "".join(chr(97 + (i * i + i // 7) % 23) for i in range(6000))
FIRST_LOSS = {"float32": 1e-6, "bfloat16": 1e-3}  # relative: sums in another order

# What rounding grows to in 50 updates at a learning rate of 1e-2.
ENVELOPE = {"float32": 1e-4, "bfloat16": 2e-2}

# In float32 the schedule is off by up to 2.8 units of 2^-24 of its peak, and how a compiler fuses
# it decides its last bits: jax 0.12.0 differs from 0.10.2 at 5 of 70 steps, by 2 units at most.
LAST_BITS = 2 * 2**-24 * 1e-2


@pytest.fixture(scope="module")
def data(tmp_path_factory):
  """The stores that the runs of version 0 were trained on, made anew."""
  folder = tmp_path_factory.mktemp("data")
  tokenizer = train_characters([TEXT])
  (folder / "characters.json").write_text(json.dumps(tokenizer.to_json()))
  for name, text in (("train", TEXT), ("validation", TEXT[1000:1700])):
    encode_corpus([text], tokenizer, str(folder / name), {"made": "for a test"}, processes=1)
  return folder


@pytest.fixture
def workdir(tmp_path):
  with zipfile.ZipFile(VERSION_0) as archive:
    archive.extractall(tmp_path)
  return tmp_path


def config_for(data, dtype: str, **knobs):
  config = gpt2.get_config()
  config.model.update(n_vocab=23, n_ctx=11, n_embd=12, n_head=2, n_layer=2, dtype=dtype)
  config.model.update(embd_pdrop=0.1, attn_pdrop=0.1, resid_pdrop=0.1)
  for name in ("train", "validation"):
    config.data[name] = str(data / name)
  config.data.tokenizer = str(data / "characters.json")
  config.mesh.update(replica=1, data=2, model=1)
  config.update(steps=70, batch_size=6, microbatches=3, learning_rate=1e-2, warmup_steps=4)
  config.update(log_every=1, eval_every=20, eval_windows=0, save_every=20, keep=9)
  config.update(knobs)
  return config


def lines(workdir, name) -> dict:
  found = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
  return {line["step"]: line[name] for line in found if name in line}


@pytest.fixture
def two_devices(monkeypatch):
  monkeypatch.setattr(
    train, "make_mesh", lambda **sizes: make_mesh(**sizes, devices=jax.devices()[:2])
  )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_run_of_version_0_resumes_as_it_went_on(dtype, data, workdir, two_devices, capfd):
  """On another mesh than it was saved from: data order, schedule and dropout are its own."""
  before = {name: lines(workdir / dtype, name) for name in ("loss", "batch_hash", "learning_rate")}
  train.run(config_for(data, dtype), str(workdir / dtype))
  assert "resumed from step 20" in capfd.readouterr().err
  after = {name: lines(workdir / dtype, name) for name in before}
  assert after["batch_hash"] == before["batch_hash"]
  assert after["learning_rate"] == pytest.approx(before["learning_rate"], rel=0, abs=LAST_BITS)
  assert after["loss"][21] == pytest.approx(before["loss"][21], rel=FIRST_LOSS[dtype])
  np.testing.assert_allclose(
    list(after["loss"].values()), list(before["loss"].values()), rtol=ENVELOPE[dtype]
  )
  assert len(after["loss"]) == 70


def test_arrays_of_version_0_are_restored_bit_for_bit(data, workdir, mesh):
  """Against the arrays as Orbax itself reads them, by the names that version 0 gave them."""
  import orbax.checkpoint as ocp

  folder = workdir / "float32/checkpoints/20/state"
  with ocp.PyTreeCheckpointer() as reader:
    saved = reader.restore(folder)
  config = config_for(data, "float32")
  init, _ = train.make_step(config, train.ModelConfig(**config.model))
  with mesh(1, 2, 1):
    checkpoints = Checkpoints(str(workdir / "float32"), create=False)
    state = checkpoints.restore(20, jax.eval_shape(init, jax.random.key(0)))
  assert saved["opt_state.1.0.mu.h.mlp.c_fc.w"].shape == (2, 12, 48)
  for name, array in by_name(state, version=0).items():
    expected = np.asarray(saved.pop(name))
    inside = tuple(slice(n) for n in array.shape)  # this mesh pads the vocabulary less or more
    cut = tuple(slice(n) for n in expected.shape)
    assert np.asarray(array)[cut].tobytes() == expected[inside].tobytes(), name
  assert not saved, "every array that was saved is restored"
  assert int(state.opt_state["adam"].count) == int(state.opt_state["learning_rate"].count) == 20


def test_this_version_names_arrays_apart_from_attributes(data, tmp_path, two_devices):
  train.run(config_for(data, "float32", steps=6), str(tmp_path))
  checkpoints = Checkpoints(str(tmp_path), create=False)
  assert checkpoints.metadata(6)["format"] == FORMAT == 1
  names = set(checkpoints.sums(6))
  assert {"step", "skipped_total", "skipped_in_a_row", "adam.count", "learning_rate.count"} <= names
  assert {"model.wte", "model.h.attn.c_attn.w", "adam.mu.wte", "adam.nu.h.ln_1.g"} <= names
  assert len(names) == 5 + 3 * 16


def test_names_on_disk_do_not_collide():
  for version in NAMES:
    attributes = ["step", "skipped_total", "skipped_in_a_row", "model.wte", "opt_state.adam.count"]
    attributes += [
      "opt_state.adam.mu.wte",
      "opt_state.adam.nu.wte",
      "opt_state.learning_rate.count",
    ]
    assert len({name_on_disk(name, version) for name in attributes}) == len(attributes)


def test_a_later_format_is_refused():
  assert format_of({}) == 0
  with pytest.raises(ValueError, match="its format is 2, and this code reads up to 1; update"):
    format_of({"format": 2})


def test_a_checkpoint_of_newer_code_is_refused_and_stays(data, workdir, two_devices):
  """It is no damage: moving it aside would resume from an older one."""
  checkpoints = workdir / "float32/checkpoints"
  shutil.copytree(checkpoints / "20", checkpoints / "10")  # an older one that can be read
  metadata = checkpoints / "20/about/metadata"
  metadata.write_text(json.dumps(json.loads(metadata.read_text()) | {"format": FORMAT + 1}))
  with pytest.raises(ValueError, match=f"its format is {FORMAT + 1}"):
    train.run(config_for(data, "float32"), str(workdir / "float32"))
  assert metadata.exists() and not list((workdir / "float32").glob("damaged-*"))


def test_clipping_off_keeps_the_names(data, tmp_path, two_devices):
  """0 is no clipping; a run with it resumes."""
  config = config_for(data, "float32", steps=4, warmup_steps=1, clip_norm=0.0, save_every=2)
  train.run(config, str(tmp_path))
  assert "adam.mu.wte" in Checkpoints(str(tmp_path), create=False).sums(4)


def test_weights_of_one_are_no_weights(mesh, parameters, place, put, tokens):
  """Bit for bit: the loss, the gradients, the update."""
  config = train.ModelConfig(n_vocab=97, n_ctx=24, n_embd=24, n_head=3, n_layer=2, dtype="float32")
  optimizer = adamw(cosine(1e-3, 9, 2, 0.1), 0.9, 0.95, 0.1, 1.0)
  spec = jax.sharding.PartitionSpec(("replica", "data"), None)
  found, arrays = {}, parameters(config)
  with mesh(1, 2, 1):
    model = place(config, arrays)
    trained, _ = train.partition(model, train.trainable_mask(model, ("*",)))
    zero = jax.numpy.int32(0)
    state = train.TrainState(zero, zero, zero, model, jax.jit(optimizer.init)(trained))
    tokens_BT = put(tokens(4, 25, 97), spec)
    for microbatches in (1, 2):
      for weights in (None, put(np.ones((4, 24), np.float32), spec)):
        step = jax.jit(
          lambda state, batch, n=microbatches: train.train_step(
            state, batch, NextToken(), optimizer=optimizer, microbatches=n
          )
        )
        after, metrics = step(state, train.Batch(tokens_BT, weights))
        leaves = [np.asarray(x).tobytes() for x in jax.tree.leaves((after, metrics["loss"]))]
        found.setdefault(microbatches, []).append(leaves)
  assert found[1][0] == found[1][1] and found[2][0] == found[2][1]


def test_converted_weights_are_no_run_to_resume(data, tmp_path, two_devices):
  """One line that says so, and nothing lost."""
  config = config_for(data, "float32", steps=6)
  model = {"model": config.to_dict()["model"]}
  checkpoints = Checkpoints(str(tmp_path))
  checkpoints.save(
    0, {"model": {"wte": np.ones(3, np.float32)}}, {"config": model, "tokenizer": None}
  )
  checkpoints.close()
  with pytest.raises(ValueError, match="holds weights, and no run.*--config.init_from"):
    train.run(config, str(tmp_path))
  assert Checkpoints(str(tmp_path), create=False).steps() == [0]
