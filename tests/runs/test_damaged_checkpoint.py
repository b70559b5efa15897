# SPDX-License-Identifier: Apache-2.0
"""A checkpoint that is not the one that was saved: one line, the checkpoint before it, and no file
lost; never other weights, and never another model around the true ones."""

import dataclasses
import json
import os
import pathlib
import random
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import gpt2
from gpt2_jax import train
from gpt2_jax.convert.pretrained import load_pretrained, save_pretrained
from gpt2_jax.model import ModelConfig
from gpt2_jax.runs.checkpoint import Checkpoints, load
from gpt2_jax.runs.metadata import check_same_run
from gpt2_jax.sharding import make_mesh
from gpt2_jax.tokenizer import train_characters

LOSSES = {20: 2.0, 40: 1.0, 60: 3.0}
SIZES = {"n_vocab": 23, "n_ctx": 11, "n_embd": 12, "n_head": 2, "n_layer": 2, "dtype": "float32"}
MUTANTS = int(os.environ.get("GPT2_JAX_MUTANTS", 10))  # of each kind of file


@pytest.fixture(autouse=True)
def one_device():
  with jax.set_mesh(make_mesh(1, 1, 1, devices=jax.devices()[:1])):
    yield


def manifest(parts: int, of: str, source: str = "a folder") -> dict:
  sums = {f"part-{n:05}": {"tokens": 9, "sha256": f"{of}{n:063x}"} for n in range(parts)}
  return {"format": 1, "source": {"sha256": source}, "parts": sums}


def metadata_of(parts: int = 3, train_data: str = "a", source: str = "a folder") -> dict:
  config = gpt2.get_config()
  config.model.update(SIZES)
  tokenizer = train_characters(["abcdefghijklmnopqrstuvw"]).to_json()
  data = {"train": manifest(parts, train_data, source), "validation": manifest(1, "c", source)}
  return {"config": config.to_dict(), "tokenizer": tokenizer, "data": data}


def abstract_state():
  config = gpt2.get_config()
  config.model.update(SIZES)
  init, _ = train.make_step(config, ModelConfig(**config.model))
  return jax.eval_shape(init, jax.random.key(0)), init


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
  """A run's workdir, with checkpoints of other weights at each step."""
  workdir = tmp_path_factory.mktemp("saved")
  with jax.set_mesh(make_mesh(1, 1, 1, devices=jax.devices()[:1])):
    checkpoints = Checkpoints(str(workdir), last=9)
    init = jax.jit(abstract_state()[1])
    for step, val_loss in LOSSES.items():
      state = init(jax.random.key(step))
      state = dataclasses.replace(state, step=jnp.int32(step))
      checkpoints.save(step, state, metadata_of(), val_loss)
    checkpoints.close()
  return workdir


@pytest.fixture(params=["new", "old"])
def age(request):
  return request.param


@pytest.fixture
def run(saved, tmp_path, age):
  """A copy of it; an "old" one is as it was saved before metadata had a checksum and a step."""
  workdir = tmp_path / "run"
  shutil.copytree(saved, workdir)
  if age == "old":
    for folder in (workdir / "checkpoints").iterdir():
      edit(folder / "about/metadata", lambda about: about.pop("step"))
      edit(folder / "sums/metadata", lambda sums: sums.pop("seal"))
      edit(folder / "metrics/metrics", lambda metrics: (metrics.pop("step"), metrics.pop("sha256")))
  return workdir


def edit(path: pathlib.Path, change):
  """Changes a JSON file in place."""
  payload = json.loads(path.read_text())
  change(payload)
  path.write_text(json.dumps(payload))


def resume(workdir, metadata=None):
  """What training does first: the step that it resumes from, and the state."""
  checkpoints = Checkpoints(str(workdir), last=9)
  state, step = checkpoints.restore_latest(abstract_state()[0], metadata or metadata_of())
  checkpoints.close()
  return step, state


def files(folder: pathlib.Path) -> list[bytes]:
  """The contents of all files below it, wherever they were moved to."""
  return sorted(path.read_bytes() for path in folder.rglob("*") if path.is_file())


def one_line(error) -> str:
  text = str(error.value)
  assert "\n" not in text and len(text) < 600
  return text


def weights_of(workdir, step: str) -> list[bytes]:
  model, _ = load(str(workdir), step)
  return [repr(model.config).encode(), *(np.asarray(x).tobytes() for x in jax.tree.leaves(model))]


# A config that arrays of these shapes cannot have, and one that they can (and did not).
SHAPES = [{"n_layer": 4}, {"n_layer": 1}, {"n_ctx": 13}, {"n_ctx": 1}, {"n_embd": 24}]
SHAPES += [{"use_bias": False}, {"n_vocab": 13}, {"n_vocab": 230}, {"n_layer": 10**9}]
NO_MODEL = [{"n_layer": "2"}, {"n_layers": 2}, {"gelu": ["tanh"]}, {"n_head": 5}, {"use_bias": 1}]
UNSEEN = [{"n_head": 4}, {"gelu": "erf"}, {"n_vocab": 24}, {"embd_pdrop": 0.1}]


@pytest.mark.parametrize("change", SHAPES + NO_MODEL + UNSEEN, ids=str)
def test_a_config_that_is_not_the_saved_one_does_not_load(run, age, change):
  if age == "old" and change in UNSEEN:
    pytest.skip("without a checksum of the metadata, no array shows it")
  edit(run / "checkpoints/60/about/metadata", lambda about: about["config"]["model"].update(change))
  with pytest.raises(ValueError, match="checkpoint 60 in .* cannot be read") as error:
    load(str(run))
  assert "others there: 40, 20" in one_line(error)
  assert load(str(run), "40")[0].config.n_layer == 2  # the others load


def test_a_flipped_digit_in_the_metadata_takes_the_checkpoint_before(saved, tmp_path, capfd):
  """It is damage, and no other config: the run resumes, and nothing is deleted."""
  shutil.copytree(saved, tmp_path / "run")
  path = tmp_path / "run/checkpoints/60/about/metadata"
  path.write_text(path.read_text().replace('"batch_size": ', '"batch_size": 1', 1))
  before = files(tmp_path / "run")
  assert resume(tmp_path / "run")[0] == 40
  assert "checkpoint 60 cannot be read (the checksum of its metadata" in capfd.readouterr().err
  assert files(tmp_path / "run") == before and (tmp_path / "run/damaged-60").is_dir()


@pytest.mark.parametrize("name", ["55", "70"])
def test_a_renamed_checkpoint_is_not_of_that_step(run, name, capfd):
  folder = run / "checkpoints"
  (folder / "60").rename(folder / name)
  with pytest.raises(
    ValueError, match="it was saved at step 60, and its folder is called"
  ) as error:
    load(str(run), name)
  one_line(error)

  before = files(run)
  step, state = resume(run)
  assert step == int(state.step) == 40 and files(run) == before
  assert f"checkpoint {name} cannot be read (it was saved at step 60" in capfd.readouterr().err

  # What the line says, helps.
  (run / f"damaged-{name}").rename(folder / "60")
  assert resume(run)[0] == 60


NO_METRICS = [
  "",
  "{",
  "[]",
  "null",
  "[" * 100_000,
  '{"val_loss": "1"}',
  '{"val_loss": NaN}',
  b"\xff",
]


@pytest.mark.parametrize("content", [*NO_METRICS, None], ids=lambda content: repr(content)[:16])
def test_damaged_metrics_of_one_checkpoint_block_nothing_and_are_not_rotated(run, content, capfd):
  """40 was the best; whether it still is cannot be told, and so it stays."""
  path = run / "checkpoints/40/metrics/metrics"
  path.unlink()
  if content is not None:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
  load(str(run))
  told = capfd.readouterr().err.splitlines()
  assert len(told) == 1 and len(told[0]) < 600
  assert "validation loss of checkpoint 40 in" in told[0]

  checkpoints = Checkpoints(str(run), last=1)
  assert (checkpoints.best, checkpoints.best_step()) == (2.0, 20)
  state, step = checkpoints.restore_latest(abstract_state()[0], metadata_of())
  state = dataclasses.replace(state, step=jnp.int32(80))
  checkpoints.save(80, state, metadata_of(), 5.0)
  checkpoints.close()
  assert step == 60 and Checkpoints(str(run), create=False).steps() == [80, 40, 20]


def test_a_flipped_digit_of_a_validation_loss_is_seen(saved, tmp_path, capfd):
  shutil.copytree(saved, tmp_path / "run")
  path = tmp_path / "run/checkpoints/60/metrics/metrics"
  path.write_text(path.read_text().replace("3.0", "0.0"))
  assert Checkpoints(str(tmp_path / "run"), create=False).best_step() == 40
  assert "checksum of metrics/metrics is wrong" in capfd.readouterr().err


def test_without_evaluations_the_newest_is_the_best(saved, tmp_path):
  checkpoints = Checkpoints(str(tmp_path), last=2)
  for step in (1, 2, 3):
    checkpoints.save(step, {"x": jnp.ones(2)}, {})
  checkpoints.close()
  checkpoints = Checkpoints(str(tmp_path), create=False)
  assert checkpoints.steps() == [3, 2] and checkpoints.best_step() == 3


JSON_FILES = ["about/metadata", "sums/metadata", "_CHECKPOINT_METADATA", "state/_METADATA"]
JSON_FILES += ["state/_sharding", "state/array_metadatas/process_0", "state/manifest.ocdbt"]
NO_JSON = ["", "{", "[]", "3", "null", "[" * 100_000, '{"a": ' * 500 + "1" + "}" * 500]
NO_JSON += ['{"config": {"model": 3}}', '{"config": {}, "data": [1], "tokenizer": 3}']


@pytest.mark.parametrize("name", JSON_FILES)
def test_metadata_of_another_shape_is_one_line_and_the_checkpoint_before(run, name, capfd):
  """Or it is metadata that is not needed: then the weights are the true ones."""
  expected, path = weights_of(run, "60"), run / "checkpoints/60" / name
  original = path.read_bytes()
  for content in NO_JSON:
    path.write_text(content)
    try:
      assert weights_of(run, "60") == expected
      resumes_from = 60
    except ValueError as error:
      assert len(str(error)) < 600 and "\n" not in str(error)
      resumes_from = 40
    before = files(run)
    assert resume(run)[0] in (resumes_from, 40) and files(run) == before
    if (run / "damaged-60").is_dir():
      (run / "damaged-60").rename(run / "checkpoints/60")
  path.write_bytes(original)
  assert weights_of(run, "60") == expected
  assert "Traceback" not in capfd.readouterr().err


def test_metadata_that_leave_an_array_out_are_refused(run):
  def leave_out(metadata):
    entry = next(x for name, x in metadata["tree_metadata"].items() if "model.wpe" in name)
    entry["key_metadata"][0]["key"] = "model.wpd"

  edit(run / "checkpoints/60/state/_METADATA", leave_out)
  with pytest.raises(ValueError, match="checkpoint 60 .* cannot be read .*model.wp") as error:
    load(str(run))
  assert "tensorstore_spec" not in one_line(error) and resume(run)[0] == 40


def test_a_file_in_the_place_of_the_checkpoints_is_one_line(tmp_path):
  (tmp_path / "checkpoints").write_text("a text")
  with pytest.raises(NotADirectoryError, match="checkpoints is a file; move it away"):
    Checkpoints(str(tmp_path))
  assert (tmp_path / "checkpoints").read_text() == "a text"


def test_several_damaged_checkpoints_are_each_told_and_none_is_lost(run, capfd):
  (run / "checkpoints/60/sums/metadata").write_text("{}")
  (run / "checkpoints/40/metrics/metrics").write_text("")
  (run / "checkpoints/40/about/metadata").unlink()
  before = files(run)
  assert resume(run)[0] == 20 and files(run) == before
  told = capfd.readouterr().err.splitlines()
  assert len(told) == 3 and all(len(line) < 600 for line in told)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("where", ["wte", "nu"])
def test_a_state_that_is_not_finite_replaces_no_checkpoint(saved, tmp_path, bad, where):
  """Neither weights nor optimizer state: with keep=1 it would be all that is left."""
  shutil.copytree(saved, tmp_path / "run")
  checkpoints = Checkpoints(str(tmp_path / "run"), last=1)
  state, _ = checkpoints.restore_latest(abstract_state()[0], metadata_of())

  def spoil(path, x):
    name = jax.tree_util.keystr(path)
    if "wte" not in name or "mu" in name or ("nu" in name) != (where == "nu"):
      return x
    array = np.array(x)
    array[3, 4] = bad
    return jax.device_put(array, x.sharding)

  state = jax.tree_util.tree_map_with_path(spoil, state)
  before = files(tmp_path / "run")
  with pytest.raises(FloatingPointError, match="step 80 is not saved.*wte.*is of step 60") as error:
    checkpoints.save(80, state, metadata_of(), 0.5)
  one_line(error)
  checkpoints.close()
  assert files(tmp_path / "run") == before and checkpoints.best == 1.0


def test_other_data_and_another_tokenizer_are_one_item_each(tmp_path):
  """However many parts the stores have; the text's folder is not its content."""
  saved, new = metadata_of(400, "a"), metadata_of(400, "b")
  new["data"]["train"]["parts"]["part-00007"] = saved["data"]["train"]["parts"]["part-00007"]
  new["tokenizer"] = {"kind": "huggingface", "payload": "{}" * 90_000}
  with pytest.raises(
    ValueError, match="data.train: other data .sha256 .*, 1 of 400 parts"
  ) as error:
    check_same_run(new, saved, "/a/run")
  text = one_line(error)
  assert "data.validation" not in text and "tokenizer: another one" in text

  new["config"] |= {f"knob_{n}": "x" * 500 for n in range(90)}
  with pytest.raises(ValueError, match="and 8[0-9] more") as error:
    check_same_run(new, saved, "/a/run")
  one_line(error)
  check_same_run(metadata_of(source="another folder"), metadata_of(), "/a/run")


@pytest.mark.parametrize("change", [{"n_head": 4}, {"gelu": "erf"}, {"n_vocab": 24}], ids=str)
def test_converted_weights_have_a_checksum_of_their_config(saved, tmp_path, change):
  model, tokenizer = load(str(saved))
  save_pretrained(model, tokenizer, str(tmp_path / "converted"), "orbax")
  load_pretrained(str(tmp_path / "converted"))
  path = tmp_path / "converted/checkpoints/0/about/metadata"
  edit(path, lambda about: about["config"]["model"].update(change))
  with pytest.raises(ValueError, match="the checksum of its metadata") as error:
    load_pretrained(str(tmp_path / "converted"))
  one_line(error)


LOADS = """
import sys, time
from gpt2_jax.convert.pretrained import load_pretrained
for workdir in sys.argv[1:]:
  try:
    load_pretrained(workdir)
  except ValueError as error:
    print("error:", error, file=sys.stderr)
time.sleep(0.5)
"""


def test_a_read_that_fails_is_told_once(saved, tmp_path):
  """In a process of its own: asyncio and TensorStore print from other threads, and at its end."""
  damages = {"state/manifest.ocdbt": "{}", "state/array_metadatas/process_0": "[]"}
  workdirs = []
  for n, (name, content) in enumerate(2 * list(damages.items())):
    workdirs.append(str(tmp_path / str(n)))
    shutil.copytree(saved, workdirs[-1])
    (tmp_path / str(n) / "checkpoints/60" / name).write_text(content)
  environment = os.environ | {"PYTHONPATH": str(pathlib.Path(__file__).parents[2])}
  command = [sys.executable, "-c", LOADS, *workdirs]
  ended = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
  # A slow machine says that it is loading.
  lines = [line for line in ended.stderr.splitlines() if not line.startswith("loading ")]
  assert len(lines) == 4 and all(line.startswith("error: checkpoint 60 in") for line in lines)


def mutate(content: bytes, rng: random.Random) -> bytes:
  """One damage: a flipped bit, another digit, a cut, a hole, a repetition."""
  at, length = rng.randrange(len(content)), rng.randrange(1, 20)
  match rng.randrange(5):
    case 0:
      return content[:at] + bytes([content[at] ^ 1 << rng.randrange(8)]) + content[at + 1 :]
    case 1:
      digits = [n for n, byte in enumerate(content) if chr(byte).isdigit()] or [at]
      at = rng.choice(digits)
      return content[:at] + str(rng.randrange(10)).encode() + content[at + 1 :]
    case 2:
      return content[:at]
    case 3:
      return content[:at] + content[at + length :]
    case _:
      return content[: at + length] + content[at:]


KINDS = ["about/metadata", "sums/metadata", "metrics/metrics", "_CHECKPOINT_METADATA"]
KINDS += ["state/_METADATA", "state/_sharding", "state/array_metadatas/*", "state/manifest.ocdbt"]
KINDS += ["state/ocdbt.process_0/manifest.ocdbt", "state/*d/*"]


@pytest.mark.parametrize("kind", KINDS)
def test_no_mutant_of_a_file_loads_as_anything_but_the_truth(saved, tmp_path, kind):
  """Bounded by default; GPT2_JAX_MUTANTS=2000 looks longer."""
  shutil.copytree(saved, tmp_path / "run")
  for step in ("20", "40"):
    shutil.rmtree(tmp_path / "run/checkpoints" / step)
  folder = tmp_path / "run/checkpoints/60"
  paths = sorted(path for path in folder.rglob("*") if path.match(kind) and path.stat().st_size)
  if kind == "state/*d/*":
    paths = sorted(path for path in folder.rglob("d/*") if path.stat().st_size)
  expected, rng = weights_of(tmp_path / "run", "60"), random.Random(kind)
  outcomes = {"true": 0, "refused": 0}
  for _ in range(MUTANTS):
    path = rng.choice(paths)
    original = path.read_bytes()
    path.write_bytes(mutate(original, rng))
    try:
      assert weights_of(tmp_path / "run", "60") == expected, (path, path.read_bytes()[:2000])
      outcomes["true"] += 1
    except (ValueError, OSError) as error:
      assert "\n" not in str(error) and len(str(error)) < 600
      outcomes["refused"] += 1
    path.write_bytes(original)
  print(kind, outcomes)
