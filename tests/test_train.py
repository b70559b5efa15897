# SPDX-License-Identifier: Apache-2.0
"""The loop: a run that is broken off and resumes is the run that never was, and every bad input is
one line."""

import importlib.util
import json
import math
import pathlib
import re
import shutil
import tempfile

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from configs import gpt2
from gpt2_jax import train
from gpt2_jax.batch import batch_hash
from gpt2_jax.convert.pretrained import load_pretrained
from gpt2_jax.data import TokenStore, encode_corpus
from gpt2_jax.decoding import generate
from gpt2_jax.loss import NextToken
from gpt2_jax.runs.checkpoint import load
from gpt2_jax.runs.validation import validation_loss
from gpt2_jax.runs.workdir import lock
from gpt2_jax.sharding import make_mesh
from gpt2_jax.tokenizer import train_characters

TEXT = "".join(chr(97 + (i * i + i // 7) % 23) for i in range(6000))


@pytest.fixture(scope="session")
def data(tmp_path_factory):
  """Two stores and their tokenizer."""
  folder = tmp_path_factory.mktemp("data")
  tokenizer = train_characters([TEXT])
  (folder / "characters.json").write_text(json.dumps(tokenizer.to_json()))
  for name, text in (("train", TEXT), ("validation", TEXT[1000:1700])):
    encode_corpus([text], tokenizer, str(folder / name), {"made": "for a test"}, processes=1)
  return folder


def config_for(data: pathlib.Path, **knobs) -> ConfigDict:
  config = gpt2.get_config()
  config.model.update(
    n_vocab=23, n_ctx=16, n_embd=16, n_head=2, n_layer=2, dtype="float32", pad_heads=True
  )
  config.data.update(
    {n: str(data / n) for n in ("train", "validation")}, tokenizer=str(data / "characters.json")
  )
  config.mesh.update(data=1, model=1, replica=8)
  config.update(
    steps=24, batch_size=8, learning_rate=1e-3, warmup_steps=4, log_every=1, eval_every=8
  )
  config.update(eval_windows=0, save_every=8, keep=9)
  config.update(knobs)
  return config


def lines(workdir, name="loss") -> dict[int, float]:
  """Step -> value, from metrics.jsonl; a step stands there once."""
  found = [
    json.loads(line) for line in (pathlib.Path(workdir) / "metrics.jsonl").read_text().splitlines()
  ]
  found = [(line["step"], line[name]) for line in found if name in line]
  assert len(found) == len(dict(found))
  return dict(found)


@pytest.fixture(scope="session")
def whole(data, tmp_path_factory):
  """The workdir of a run that nobody disturbed."""
  workdir = tmp_path_factory.mktemp("whole")
  train.run(config_for(data), str(workdir))
  return workdir


def broken_off(whole, workdir, after: int):
  """A copy of the run as a kill after step `after`'s checkpoint left it: later checkpoints are not
  there."""
  shutil.copytree(whole, workdir, dirs_exist_ok=True)
  for step in (workdir / "checkpoints").iterdir():
    if int(step.name) > after:
      shutil.rmtree(step)


def test_a_run_leaves_metrics_a_picture_and_checkpoints(whole):
  assert list(lines(whole)) == list(range(1, 25))
  assert list(lines(whole, "val_loss")) == [8, 16, 24]
  assert lines(whole)[24] < lines(whole)[1]
  first = json.loads((whole / "metrics.jsonl").read_text().splitlines()[0])
  assert {
    "loss",
    "grad_norm",
    "learning_rate",
    "tokens_per_second",
    "step_time",
    "tokens_seen",
    "batch_hash",
  } <= first.keys()
  assert (whole / "loss.png").read_bytes().startswith(b"\x89PNG")
  assert sorted(int(p.name) for p in (whole / "checkpoints").iterdir()) == [8, 16, 24]


def test_a_run_says_where_it_is_how_good_and_what_comes_next(data, tmp_path, capfd):
  """Samples change nothing of what is computed; they are on the terminal and on TensorBoard."""
  workdir = tmp_path / "a run"
  train.run(config_for(data, steps=2, warmup_steps=1, eval_every=1, sample_tokens=5), str(workdir))
  told = capfd.readouterr().err
  best = min(lines(workdir, "val_loss").items(), key=lambda item: item[1])
  last = lines(workdir, "val_loss")[2]
  assert f"{workdir}: 2 of 2 steps; validation loss {last:.4f}, best {best[1]:.4f} at step" in told
  assert f"gpt2-jax sample '--model={workdir}' --interactive" in told
  assert "step 1: sample '" in told and "step 2: sample '" in told

  config = json.loads((workdir / "train_config.json").read_text())
  assert config["steps"] == 2 and config["model"]["n_ctx"] == 16
  events = b"".join(path.read_bytes() for path in (workdir / "tensorboard").iterdir())
  for text in (b"config/text_summary", b"model.n_ctx = 16", b"eval/sample/text_summary"):
    assert text in events
  assert b"batch_hash" not in events


def test_a_project_without_its_library_is_refused_at_the_start(data, tmp_path, monkeypatch):
  monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
  with pytest.raises(ImportError, match="wandb_project needs the library"):
    train.run(config_for(data, wandb_project="gpt2"), str(tmp_path / "run"))
  assert not (tmp_path / "run").exists()


def test_resuming_is_bit_for_bit_the_same(whole, data, tmp_path):
  broken_off(whole, tmp_path, 8)
  with (tmp_path / "metrics.jsonl").open("a") as file:
    file.write('{"step": 25, "lo')  # torn by the kill
  train.run(config_for(data), str(tmp_path))
  for name in ("loss", "grad_norm", "batch_hash", "val_loss"):
    assert lines(tmp_path, name) == lines(whole, name)


@pytest.mark.parametrize("mesh", [(1, 8, 1), (2, 2, 2), (1, 1, 8)])
def test_resuming_on_another_mesh_sees_the_same_batches(whole, data, tmp_path, mesh):
  broken_off(whole, tmp_path, 16)
  config = config_for(data)
  config.mesh.update(dict(zip(("replica", "data", "model"), mesh, strict=True)))
  train.run(config, str(tmp_path))
  assert lines(tmp_path, "batch_hash") == lines(whole, "batch_hash")
  np.testing.assert_allclose(
    list(lines(tmp_path).values()), list(lines(whole).values()), atol=1e-5, rtol=0
  )


def test_several_steps_in_one_dispatch_are_the_same_steps(whole, data, tmp_path):
  train.run(config_for(data, steps_per_call=4), str(tmp_path))
  assert lines(tmp_path, "batch_hash") == lines(whole, "batch_hash")
  np.testing.assert_allclose(
    list(lines(tmp_path).values()), list(lines(whole).values()), atol=1e-6, rtol=0
  )


def test_another_config_is_refused_with_the_difference(whole, data):
  before = sorted(p.name for p in whole.rglob("*"))
  config = config_for(data, learning_rate=5e-4)
  config.model.n_layer = 3
  with pytest.raises(ValueError, match=r"learning_rate: 0.001 -> 0.0005; model.n_layer: 2 -> 3"):
    train.run(config, str(whole))
  assert sorted(p.name for p in whole.rglob("*")) == before


def cut_in_half(file: pathlib.Path):
  file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def flip_a_bit(file: pathlib.Path):
  content = bytearray(file.read_bytes())
  content[len(content) // 2] ^= 1
  file.write_bytes(content)


@pytest.mark.parametrize("damage", [cut_in_half, flip_a_bit])
def test_a_damaged_checkpoint_is_quarantined_and_the_one_before_taken(
  whole, data, tmp_path, capfd, damage
):
  broken_off(whole, tmp_path, 16)
  for file in (tmp_path / "checkpoints/16/state/d").iterdir():  # Orbax's values
    damage(file)
  train.run(config_for(data), str(tmp_path))
  assert "checkpoint 16 cannot be read" in capfd.readouterr().err
  assert (tmp_path / "damaged-16").is_dir()
  assert lines(tmp_path) == lines(whole)


def test_divergence_stops_the_run_in_one_line(data, tmp_path):
  config = config_for(data, learning_rate=1e30, max_skips=3, warmup_steps=10, clip_norm=1e30)
  with pytest.raises(FloatingPointError, match=r"3 updates in a row .*no checkpoint was saved"):
    train.run(config, str(tmp_path))
  assert list(lines(tmp_path, "skips").values()) == [1, 2, 3]


@pytest.mark.parametrize("rate", [1e38, 1e25, 1e8])
def test_a_run_that_diverges_keeps_the_checkpoint_from_before(data, tmp_path, monkeypatch, rate):
  """From step 12 on the rate is absurd: updates that are not finite, or a loss of 1e16. Each step
  would be saved, and one checkpoint kept. The one that the line names is of the weights before."""

  def jump(*_):
    return lambda step: jax.numpy.where(step < 12, 1e-3, rate)

  monkeypatch.setattr(train, "make_schedule", jump)
  config = config_for(data, steps=40, save_every=1, keep=1, eval_every=100, max_skips=3)
  with pytest.raises(FloatingPointError, match=r"3 updates in a row.*; checkpoint 12 is good;"):
    train.run(config, str(tmp_path))
  assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["12"]
  with jax.set_mesh(make_mesh(8, 1, 1)):
    model, _ = load(str(tmp_path))
    store = TokenStore.open(str(data / "validation"))
    assert validation_loss(model, NextToken(), store, 8, 0) < 2 * math.log(23)


def test_a_last_step_that_is_broken_is_not_saved_and_the_run_fails(data, tmp_path):
  """The rate is absurd from the first step on: there is no checkpoint, and the line says so."""
  config = config_for(data, steps=5, learning_rate=1e38, warmup_steps=0, save_every=1, keep=2)
  with pytest.raises(FloatingPointError, match=r"step 5: not saved.*no checkpoint was saved"):
    train.run(config, str(tmp_path))
  assert not list((tmp_path / "checkpoints").iterdir())


def test_a_validation_store_shorter_than_a_window_is_refused_at_the_start(data, tmp_path):
  tokenizer = train_characters([TEXT])
  encode_corpus(
    [TEXT[:16]], tokenizer, str(tmp_path / "short"), {"made": "for a test"}, processes=1
  )
  config = config_for(data)
  config.data.validation = str(tmp_path / "short")
  with pytest.raises(ValueError, match=r"short has 16 tokens, one window needs n_ctx \+ 1 = 17"):
    train.run(config, str(tmp_path / "run"))
  assert not (tmp_path / "run").exists()


def test_a_disk_without_room_for_one_checkpoint_is_refused_at_the_start(
  data, tmp_path, monkeypatch
):
  usage = shutil.disk_usage(tmp_path)._replace(free=10_000)
  monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
  with pytest.raises(OSError, match=r"a checkpoint takes .* MiB, and 0.0 are free in .*make room"):
    train.run(config_for(data), str(tmp_path / "run"))
  assert not (tmp_path / "run").exists()


def test_paths_of_a_run_may_begin_with_the_home_folder(data, tmp_path, monkeypatch, capfd):
  """And what the data and the flags come to is said at the start."""
  monkeypatch.setenv("HOME", str(tmp_path))
  (tmp_path / "data").symlink_to(data)
  config = config_for(data, steps=2, warmup_steps=1, save_every=9, eval_every=9, profile_steps=1)
  config.data.update(
    train="~/data/train", validation="~/data/validation", tokenizer="~/data/characters.json"
  )
  train.run(config, "~/run")
  assert (tmp_path / "run/checkpoints/2").is_dir()
  said = capfd.readouterr().err
  assert "data: 374 windows, 0.04 epochs in 2 steps; 43 of 43 validation windows are scored" in said
  assert "profile_steps: no trace will be written" in said


@pytest.mark.parametrize("workdir", ["file", "file/run", "other"])
def test_a_workdir_that_is_no_folder_is_refused_before_anything_is_computed(
  data, tmp_path, monkeypatch, workdir
):
  monkeypatch.chdir(tmp_path)
  (tmp_path / "file").write_text("a file")
  (tmp_path / "other").mkdir()
  (tmp_path / "other/checkpoints").write_text("a file")
  before = sorted(tmp_path.rglob("*"))
  with pytest.raises(OSError, match=r" cannot be written: .* is no folder that this user may"):
    train.run(config_for(data), workdir)
  assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("workdir", ["", "  ", "~nouser/run", "a\0b"])
def test_a_workdir_that_is_no_path_is_one_line(data, tmp_path, monkeypatch, workdir):
  monkeypatch.chdir(tmp_path)
  with pytest.raises(ValueError, match="path|user"):
    train.run(config_for(data), workdir)
  assert not list(tmp_path.iterdir())


def test_a_config_file_may_not_give_another_type(tmp_path):
  for config in (None, 5, "gpt2", ["steps"]):
    with pytest.raises(ValueError, match="get_config gives a value of type .*, not a Config"):
      train.run(config, str(tmp_path / "run"))


def test_the_best_checkpoint_is_kept_besides_the_last(data, tmp_path):
  train.run(config_for(data, keep=1, learning_rate=3.0, warmup_steps=23), str(tmp_path))
  losses = lines(tmp_path, "val_loss")
  best = min(losses, key=losses.get)
  kept = {int(p.name) for p in (tmp_path / "checkpoints").iterdir()}
  assert best != 24 and kept == {best, 24}
  with jax.set_mesh(make_mesh(8, 1, 1)):
    model, _ = load(str(tmp_path), "best")
    store = TokenStore.open(str(data / "validation"))
    assert validation_loss(model, NextToken(), store, 8, 0) == pytest.approx(losses[best], abs=1e-6)


def test_evaluation_is_token_weighted_over_every_window(whole, data):
  """700 tokens are 43 windows of 16: five full batches of 8 and one of 3."""
  store = TokenStore.open(str(data / "validation"))
  with jax.set_mesh(make_mesh(1, 1, 1, devices=jax.devices()[:1])):
    model, _ = load(str(whole))
    got = validation_loss(model, NextToken(), store, 8, 0)
    windows = store.read(np.arange(43) * 16, 17)
    logits = np.asarray(model(windows[:, :-1])[..., :23], np.float64)
  nats = (
    np.log(np.exp(logits).sum(-1)) - np.take_along_axis(logits, windows[:, 1:, None], -1)[..., 0]
  )
  assert len(store) == 700 and got == pytest.approx(nats.mean(), abs=1e-6)


def test_a_checkpoint_loads_on_any_mesh_and_dtype_and_speaks(whole):
  texts = []
  for mesh in ((8, 1, 1), (1, 4, 2), (1, 1, 8)):
    with jax.set_mesh(make_mesh(*mesh)):
      model, tokenizer = load(str(whole))
      texts.append(tokenizer.decode(generate(model, [tokenizer.encode("abc")], 10)[0].tokens))
  assert texts[0] == texts[1] == texts[2] and len(texts[0]) == 10
  with jax.set_mesh(make_mesh(8, 1, 1)):
    assert load(str(whole), dtype="bfloat16")[0].config.dtype == "bfloat16"
    with pytest.raises(FileNotFoundError, match="no checkpoint of step 7"):
      load(str(whole), "7")


def test_dropout_and_microbatches_train(data, tmp_path):
  config = config_for(data, microbatches=2, batch_size=16, eval_every=24, save_every=24)
  config.model.update(embd_pdrop=0.1, attn_pdrop=0.1, resid_pdrop=0.1)
  train.run(config, str(tmp_path))
  assert lines(tmp_path)[24] < lines(tmp_path)[1]


@pytest.mark.parametrize(
  "knobs, message",
  [
    (
      {"batch_size": 12},
      r"a microbatch .* of 12 does not divide by the replica x data axes of 8; change",
    ),
    ({"microbatches": 3}, r"batch_size of 8 does not divide by microbatches of 3"),
    ({"warmup_steps": 24}, r"warmup_steps of 24 leaves nothing of 24 steps"),
    ({"mesh.replica": 3}, r"\(3, 1, 1\) does not multiply to the 8 devices"),
    ({"mesh.model": 16, "mesh.replica": -1}, r"does not multiply to the 8 devices"),
    ({"model.n_ctx": 6001}, r"6,000 tokens, one window needs n_ctx \+ 1 = 6,002"),
    ({"model.n_vocab": 50257}, r"has 23 tokens, the model 50257; set --config.model.n_vocab=23"),
    ({"model.n_head": 3}, r"n_embd of 16 does not divide by n_head of 3"),
    ({"model.gelu": "relu"}, r"gelu is 'relu'; it is one of tanh, erf"),
    ({"data.train": "/nowhere"}, r"/nowhere"),
    ({"data.train": ""}, r"data.train: a path is empty.*set --config.data.train"),
    (
      {"data.validation": "~nouser/x"},
      r"data.validation: ~nouser/x: this machine has no such user",
    ),
    ({"data.train": "s3://a/b"}, r"s3://a/b is neither a local path nor gs://BUCKET/PATH"),
    ({"batch_size": 10**8}, r"out of memory: an update needs at least"),
    ({"model.n_embd": 2**31 - 1}, r"model.n_embd of 2147483647 is not at least 1"),
    ({"data.tokenizer": "gpt3"}, r"gpt3"),
  ],
)
def test_bad_input_is_one_line_and_leaves_nothing(data, tmp_path, knobs, message):
  config = config_for(data)
  config.update_from_flattened_dict(knobs)
  with pytest.raises((ValueError, OSError), match=message) as raised:
    train.run(config, str(tmp_path / "run"))
  assert "\n" not in str(raised.value)
  assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("workdir", ["s3://bucket/run", "gs:///run"])
def test_a_workdir_elsewhere_is_refused(data, workdir):
  with pytest.raises(ValueError, match=r"is neither a local path nor gs://BUCKET/PATH"):
    train.run(config_for(data), workdir)


def test_a_run_on_gs_that_is_broken_off_resumes_as_the_local_one(
  whole, data, bucket, tmp_path, monkeypatch, capfd
):
  """A dropped mark is a save that a kill cut off; the lines after it, and the torn one, are written
  again."""
  monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
  train.run(config_for(data, profile_steps=2), "gs://bucket/a/run")
  told = bucket.objects["a/run/metrics.jsonl"].decode()
  assert any(name.startswith("a/run/profile/") for name in bucket.objects)
  assert not list(tmp_path.iterdir())
  for step in (16, 24):
    bucket.drop(f"a/run/checkpoints/{step}/commit_success.txt")
  bucket.put("a/run/metrics.jsonl", told[: len(told) - 9].encode())
  train.run(config_for(data), "gs://bucket/a/run")
  assert "resumed from step 8" in capfd.readouterr().err
  (tmp_path / "metrics.jsonl").write_bytes(bucket.objects["a/run/metrics.jsonl"])
  for name in ("loss", "grad_norm", "batch_hash", "val_loss"):
    assert lines(tmp_path, name) == lines(whole, name)
  assert bucket.objects["a/run/loss.png"].startswith(b"\x89PNG")
  assert sum(name.startswith("a/run/tensorboard/events") for name in bucket.objects) == 2
  with jax.set_mesh(make_mesh(8, 1, 1)):
    remote, _ = load_pretrained("gs://bucket/a/run", step="16")
    local, _ = load(str(whole), "16")
  assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), remote, local))


def test_what_a_run_on_gs_wrote_is_there_before_its_checkpoint(data, bucket):
  """A kill right after a checkpoint loses no line up to it: seen from the bucket, at every
  commit."""
  seen = {}
  put = bucket.put

  def watch(name, content):
    put(name, content)
    if found := re.fullmatch(r"run/checkpoints/(\d+)/commit_success.txt", name):
      told = bucket.objects["run/metrics.jsonl"].decode().splitlines()
      seen[int(found[1])] = {json.loads(line)["step"] for line in told}

  bucket.put = watch
  try:
    train.run(config_for(data, steps=16, warmup_steps=4), "gs://bucket/run")
  finally:
    del bucket.put
  assert seen.keys() == {8, 16} and all(
    set(range(1, step + 1)) <= told for step, told in seen.items()
  )


@pytest.mark.parametrize("refused", ["lock", "metrics.jsonl", "checkpoints/8/state"])
def test_what_gs_does_not_take_is_one_line(data, bucket, tmp_path, monkeypatch, refused):
  monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
  bucket.refuse = refused
  with pytest.raises(OSError, match=r"gs://bucket/run.*(Forbidden|may not do this)") as raised:
    train.run(config_for(data, steps=8, warmup_steps=4), "gs://bucket/run")
  assert "\n" not in str(raised.value)
  kept = [lines(path.parent) for path in tmp_path.rglob("metrics.jsonl")]
  assert kept == [] if refused != "metrics.jsonl" else len(kept[0]) == 8


def test_a_bucket_that_may_not_be_looked_at_is_one_line(data, bucket):
  """Orbax asks what kind of bucket it is before it deletes the first checkpoint."""
  bucket.refuse = "storage.buckets.get"
  with pytest.raises(
    OSError, match=r"gs://closed/run/checkpoints.*: 403 .*may not do this"
  ) as raised:
    train.run(config_for(data, keep=1), "gs://closed/run")
  assert "\n" not in str(raised.value)


def test_a_store_of_another_tokenizer_is_refused(data, tmp_path):
  other = train_characters([TEXT.replace("a", "A")])
  (tmp_path / "other.json").write_text(json.dumps(other.to_json()))
  config = config_for(data)
  config.data.tokenizer = str(tmp_path / "other.json")
  with pytest.raises(ValueError, match="was made with another tokenizer"):
    train.run(config, str(tmp_path / "run"))


def test_the_batch_hash_tells_order_and_content():
  tokens = np.arange(24, dtype=np.int32).reshape(4, 6)
  one = int(batch_hash(tokens))
  assert one == int(batch_hash(tokens.copy()))
  assert one != int(batch_hash(tokens[::-1])) and one != int(batch_hash(tokens[:, ::-1]))
  assert math.log2(max(one, 1)) < 32


def test_checkpoints_that_are_all_damaged_stop_the_run_and_stay(whole, data, tmp_path):
  broken_off(whole, tmp_path, 8)
  (tmp_path / "checkpoints/8/about/metadata").write_text("{")
  before = sorted(str(p) for p in tmp_path.rglob("*"))
  with pytest.raises(ValueError, match=r"none of the checkpoints \[8\] in .* can be read"):
    train.run(config_for(data), str(tmp_path))
  assert sorted(str(p) for p in tmp_path.rglob("*")) == before


def test_a_finished_run_says_so_and_changes_nothing(whole, data, tmp_path, capfd):
  broken_off(whole, tmp_path, 24)
  train.run(config_for(data), str(tmp_path))
  assert "all 24 steps were done before" in capfd.readouterr().err
  assert (tmp_path / "metrics.jsonl").read_text() == (whole / "metrics.jsonl").read_text()


@pytest.mark.parametrize(
  "knob", ["eval_every", "save_every", "log_every", "microbatches", "max_skips", "keep"]
)
def test_a_count_of_none_is_refused(data, tmp_path, knob):
  with pytest.raises(ValueError, match=f"{knob} of 0 is not at least 1; set --config.{knob}"):
    train.run(config_for(data, **{knob: 0}), str(tmp_path / "run"))


def test_two_runs_do_not_share_a_workdir(data, tmp_path):
  with lock(str(tmp_path)), pytest.raises(OSError, match="is in use by another run"):
    train.run(config_for(data), str(tmp_path))


def test_a_damaged_checkpoint_does_not_load(whole, tmp_path):
  broken_off(whole, tmp_path, 24)
  (tmp_path / "checkpoints/16/about/metadata").write_text("{")
  with (
    jax.set_mesh(make_mesh(8, 1, 1)),
    pytest.raises(ValueError, match="checkpoint 16 in .* cannot be read"),
  ):
    load(str(tmp_path), "16")
