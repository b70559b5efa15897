# SPDX-License-Identifier: Apache-2.0
import dataclasses
import functools
import importlib.util
import json
import os
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest

from gpt2_jax.convert import names, pretrained
from gpt2_jax.convert.weights import Weights, from_model, weights_sha256
from gpt2_jax.model import ModelConfig
from gpt2_jax.sharding import BATCH, make_mesh
from gpt2_jax.tokenizer import Characters, HuggingFace
from tests.convert.tensor_bundles import write_bundle

CONFIG = ModelConfig(131, 16, 16, 4, 2, dtype="float32", pad_heads=True)
ERF = dataclasses.replace(CONFIG, gelu="erf")
PLAIN = dataclasses.replace(ERF, use_bias=False)  # as nanoGPT trains
ALPHABET = Characters("".join(map(chr, range(32, 127))))
SOURCES = ["openai", "hf", "nanogpt", "llmc", "orbax"]
TARGETS = ["hf", "nanogpt", "llmc", "orbax"]
# nanoGPT's is a torch file.
WRITABLE_HERE = [x for x in TARGETS if x != "nanogpt" or importlib.util.find_spec("torch")]


@pytest.fixture(scope="module")
def device_mesh():
  return make_mesh(1, 1, 1, jax.devices()[:1])


@pytest.fixture(scope="module")
def weights(mesh, parameters, place):
  """weights(config): those of a random model, with a tokenizer of characters."""

  def make(config):
    with mesh(1, 1, 1):
      return from_model(place(config, parameters(config)), ALPHABET, "a test")

  return make


@pytest.fixture(scope="module")
def logits(device_mesh, tokens):
  forward = jax.jit(lambda model, tokens_BT: model(tokens_BT))

  def run(model):
    with jax.set_mesh(device_mesh):
      placed = jax.device_put(tokens(2, 16, 131), jax.sharding.NamedSharding(device_mesh, BATCH))
      return np.asarray(forward(model, placed))[..., :131]

  return run


def write_openai(weights, path) -> None:
  """A folder as OpenAI's, which this project does not write."""
  tensors = {}
  for name in names.shapes(weights.config):
    theirs = (
      name.replace("h.", "h", 1).replace(".", "/")
      if name.startswith("h.")
      else name.replace(".", "/")
    )
    tensors[f"model/{theirs}"] = (
      weights.read(name)[None] if name.endswith(".w") else weights.read(name)
    )
  path.mkdir()
  write_bundle(path / "model.ckpt", tensors)
  sizes = {
    name: getattr(weights.config, name)
    for name in ("n_vocab", "n_ctx", "n_embd", "n_head", "n_layer")
  }
  (path / "hparams.json").write_text(json.dumps(sizes))


def write(weights, path, form) -> None:
  if form == "nanogpt":
    pytest.importorskip("torch")
  writer = (
    write_openai
    if form == "openai"
    else functools.partial(pretrained.write, form=form, other_gelu=True)
  )
  writer(weights, path) if form == "openai" else writer(weights, str(path))


@pytest.fixture(scope="module")
def checkpoints(weights, tmp_path_factory):
  """checkpoints(form): a checkpoint of the same model in that format, made once."""
  folder, made = tmp_path_factory.mktemp("checkpoints"), weights(CONFIG)

  @functools.cache
  def checkpoint(form):
    write(made, folder / form, form)
    return folder / form

  return checkpoint


@pytest.fixture(scope="module")
def expected(mesh, parameters, place, logits):
  """The logits of the model itself."""
  with mesh(1, 1, 1):
    return logits(place(CONFIG, parameters(CONFIG)))


@pytest.mark.parametrize("form", TARGETS)
def test_a_tokenizer_round_trips_through_every_format(form, weights, tmp_path):
  """Also one whose texts end with another token than <|endoftext|>."""
  ending = HuggingFace.from_merges({"a": 0, "b": 1, "ab": 2, "c": 3}, [("a", "b")])
  for n, tokenizer in enumerate((ALPHABET, dataclasses.replace(ending, end=3), ending)):
    made = dataclasses.replace(weights(CONFIG), tokenizer=tokenizer)
    write(made, tmp_path / str(n), form)
    found = pretrained.open_weights(str(tmp_path / str(n))).tokenizer
    assert type(found) is type(tokenizer) and found.eot == tokenizer.eot
    assert (
      found.encode("abc") == tokenizer.encode("abc") and found.fingerprint == tokenizer.fingerprint
    )


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("source", SOURCES)
def test_every_format_becomes_every_other(
  source, target, checkpoints, weights, expected, logits, device_mesh, tmp_path
):
  opened = pretrained.open_weights(str(checkpoints(source)))
  write(opened, tmp_path / "to", target)
  model, _ = pretrained.load_pretrained(str(tmp_path / "to"), device_mesh)
  assert (
    weights_sha256(pretrained.open_weights(str(tmp_path / "to")))
    == weights_sha256(opened)
    == weights_sha256(weights(CONFIG))
  )
  assert model.config == CONFIG
  np.testing.assert_array_equal(logits(model), expected)


@pytest.mark.parametrize(
  ("config", "target", "becomes"),
  [
    (ERF, "hf", ERF),
    (ERF, "nanogpt", ERF),
    (ERF, "orbax", ERF),
    (PLAIN, "nanogpt", PLAIN),
    (PLAIN, "orbax", PLAIN),
    (PLAIN, "hf", ERF),
    (dataclasses.replace(PLAIN, gelu="tanh"), "llmc", CONFIG),
    (dataclasses.replace(CONFIG, embd_pdrop=0.1, attn_pdrop=0.2), "hf", None),
    (dataclasses.replace(CONFIG, embd_pdrop=0.1, attn_pdrop=0.2), "orbax", None),
  ],
)
def test_config_is_converted_and_logits_stay(
  config, target, becomes, weights, logits, device_mesh, tmp_path, mesh, parameters, place
):
  """GELU, biases (zeros where a format wants some) and dropout; and the logits stay."""
  write(weights(config), tmp_path / "to", target)
  model, _ = pretrained.load_pretrained(str(tmp_path / "to"), device_mesh)
  assert model.config == (becomes or config)
  with mesh(1, 1, 1):
    np.testing.assert_allclose(logits(model), logits(place(config, parameters(config))), atol=1e-6)


@pytest.mark.parametrize("target", ["hf", "nanogpt", "orbax"])
def test_the_tokenizer_is_converted(target, weights, device_mesh, tmp_path):
  write(weights(ERF), tmp_path / "to", target)
  assert pretrained.load_pretrained(str(tmp_path / "to"), device_mesh)[1] == ALPHABET


def test_what_a_format_cannot_say_is_refused(weights, tmp_path):
  cases = [
    (ERF, "llmc", "float32", "the erf GELU, and llm.c computes the tanh one"),
    (CONFIG, "llmc", "float16", "llm.c has no float16"),
    (CONFIG, "orbax", "bfloat16", "a run's parameters are float32, not bfloat16"),
    (
      CONFIG,
      "openai",
      "float32",
      "format 'openai' cannot be written; take one of hf, orbax, nanogpt, llmc",
    ),
  ]
  for config, form, dtype, message in cases:
    with pytest.raises(ValueError, match=message):
      pretrained.write(weights(config), str(tmp_path / "to"), form, dtype)
  assert not list(tmp_path.iterdir())


def test_save_pretrained_writes_what_write_does(
  mesh, parameters, place, weights, device_mesh, tmp_path
):
  arrays = parameters(CONFIG)
  with mesh(2, 2, 2):
    model = place(CONFIG, arrays)
  for form in ("hf", "orbax"):
    pretrained.save_pretrained(model, ALPHABET, str(tmp_path / form), form)
    assert weights_sha256(pretrained.open_weights(str(tmp_path / form))) == weights_sha256(
      weights(CONFIG)
    )
    assert pretrained.load_pretrained(str(tmp_path / form), device_mesh)[1] == ALPHABET


def test_the_mesh_is_the_one_in_force_or_all_devices(checkpoints, mesh):
  path = str(checkpoints("hf"))
  assert pretrained.load_pretrained(path)[0].mesh.shape == {"replica": 1, "data": 8, "model": 1}
  with mesh(1, 2, 2):
    assert pretrained.load_pretrained(path)[0].mesh.shape == {"replica": 1, "data": 2, "model": 2}
  with mesh(1, 1, 1):
    given = pretrained.load_pretrained(path, make_mesh(2, 2, 2), dtype="bfloat16")[0]
  assert given.mesh.shape == {"replica": 2, "data": 2, "model": 2}
  assert given.config.dtype == "bfloat16"
  assert {leaf.dtype for leaf in jax.tree.leaves(given)} == {np.dtype(np.float32)}


@pytest.mark.parametrize(
  ("sizes", "message"),
  [((1, 8, 1), "n_embd of 20 does not .* the data axes of 8"), ((1, 1, 3), "4 n_embd of 80 does")],
)
def test_a_width_that_the_mesh_does_not_divide_is_one_line(sizes, message, weights, tmp_path):
  write(weights(dataclasses.replace(CONFIG, n_embd=20)), tmp_path / "to", "hf")
  mesh = make_mesh(*sizes, devices=jax.devices()[: sizes[1] * sizes[2]])
  with pytest.raises(ValueError, match=f"{message}.*; give a mesh whose") as error:
    pretrained.load_pretrained(str(tmp_path / "to"), mesh)
  assert "\n" not in str(error.value)


def test_an_int8_model_is_loaded_and_not_written(
  checkpoints, device_mesh, logits, expected, tmp_path
):
  model, tokenizer = pretrained.load_pretrained(
    str(checkpoints("hf")), device_mesh, quantize="int8"
  )
  assert 0 < np.abs(logits(model) - expected).max() < 0.1 * np.abs(expected).max()
  with pytest.raises(ValueError, match="an int8 model is not written; load it without quantize"):
    pretrained.save_pretrained(model, tokenizer, str(tmp_path / "to"))
  with pytest.raises(ValueError, match="quantize is 'int4'; it is None or 'int8'"):
    pretrained.load_pretrained(str(checkpoints("hf")), device_mesh, quantize="int4")
  assert not list(tmp_path.iterdir())


def test_what_is_no_checkpoint_is_one_line(tmp_path):
  (tmp_path / "empty").mkdir()
  (tmp_path / "text").write_text("a text")
  (tmp_path / "nothing").write_text("")
  for name in ("empty", "text", "nothing"):
    with pytest.raises(
      ValueError, match="is no GPT-2 checkpoint: neither Hugging Face's folder"
    ) as error:
      pretrained.load_pretrained(str(tmp_path / name))
    assert "\n" not in str(error.value)
  (tmp_path / "run" / "checkpoints").mkdir(parents=True)
  with pytest.raises(FileNotFoundError, match="holds no checkpoint"):
    pretrained.load_pretrained(str(tmp_path / "run"))


def test_a_damaged_workdir_is_one_line(checkpoints, tmp_path, weights):
  write(weights(CONFIG), tmp_path / "run", "orbax")
  for file in (tmp_path / "run" / "checkpoints" / "0" / "state").rglob("*"):
    if file.is_file() and file.stat().st_size > 3000:
      file.write_bytes(file.read_bytes()[:-1000])
  with pytest.raises(ValueError, match="checkpoint 0 in .* cannot be read") as error:
    pretrained.load_pretrained(str(tmp_path / "run"))
  assert "\n" not in str(error.value)


IMPORTS = """
import sys
import gpt2_jax.convert.parity
print(*sys.modules)
"""


def test_libraries_of_single_formats_are_not_imported_with_the_package():
  """Orbax alone takes a second, and torch and TensorFlow need not be installed."""
  environment = os.environ | {"PYTHONPATH": str(pathlib.Path(__file__).parents[2])}
  command = [sys.executable, "-c", IMPORTS]
  modules = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
  heavy = {"orbax", "huggingface_hub", "safetensors", "torch", "transformers", "tensorflow"}
  assert not heavy & set(modules.stdout.split())


@pytest.mark.parametrize("form", TARGETS)
def test_numbers_that_are_not_finite_are_told(form, weights, tmp_path, capsys):
  """And written as they are; of whole weights nothing is told."""
  whole = weights(CONFIG)
  broken = np.array(whole.read("h.1.mlp.c_fc.w"))
  broken[0, :2] = np.nan, np.inf

  def read(name):
    return broken if name == "h.1.mlp.c_fc.w" else whole.read(name)

  write(whole, tmp_path / "whole", form)
  assert "warning" not in capsys.readouterr().err
  damaged = dataclasses.replace(whole, read=read)
  write(damaged, tmp_path / "damaged", form)
  assert capsys.readouterr().err.splitlines()[-1] == (
    "warning: 2 weights of a test are NaN or infinite, and written as they are: h.1.mlp.c_fc.w"
  )
  again = pretrained.open_weights(str(tmp_path / "damaged"))
  assert weights_sha256(again) == weights_sha256(damaged)


def test_a_workdir_is_written_to_gs_and_other_formats_are_refused(
  bucket, weights, tmp_path, monkeypatch
):
  """Never to a local folder that is called gs:."""
  monkeypatch.chdir(tmp_path)
  made = weights(CONFIG)
  for form in ("hf", "nanogpt", "llmc"):
    with pytest.raises(ValueError, match="is a URL, and .* only a workdir"):
      pretrained.write(made, "gs://bucket/x", form, other_gelu=True)
  for url in ("s3://bucket/x", "file:///x", "gs://"):
    with pytest.raises(ValueError, match="neither a local path nor gs://BUCKET/PATH"):
      pretrained.write(made, url, "orbax")

  pretrained.write(made, "gs://bucket/run", "orbax")
  assert weights_sha256(pretrained.open_weights("gs://bucket/run")) == weights_sha256(made)
  with pytest.raises(FileExistsError, match="gs://bucket/run is there already"):
    pretrained.write(made, "gs://bucket/run", "orbax")
  assert not list(tmp_path.iterdir())


def test_paths_are_expanded_and_their_folders_made(weights, tmp_path, monkeypatch):
  monkeypatch.setenv("HOME", str(tmp_path))
  for form in WRITABLE_HERE:
    pretrained.write(weights(CONFIG), f"~/new/er/{form}", form, other_gelu=True)
    assert pretrained.open_weights(f"~/new/er/{form}").config.n_layer == 2
  assert [path.name for path in tmp_path.iterdir()] == ["new"]


@pytest.mark.parametrize(
  ("path", "message"),
  [
    ("", "a path is empty"),
    ("  ", "a path is empty"),
    ("~nobody-of-this-name/x", "this machine has no such user"),
    ("a\0b", "has a NUL in it"),
  ],
  ids=range(4),
)
def test_what_is_no_path_is_one_line(path, message, weights, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  with pytest.raises(ValueError, match=message):
    pretrained.open_weights(path)
  for form in WRITABLE_HERE:
    with pytest.raises(ValueError, match=message):
      pretrained.write(weights(CONFIG), path, form, other_gelu=True)
  assert not list(tmp_path.iterdir())


def test_what_cannot_be_written_is_told_before_anything_is_read(tmp_path):
  """For want of room, or of a folder; the weights here cannot be read at all."""
  unread = Weights(ModelConfig(10**7, 1024, 10**6, 10, 100), None, None, "a test")
  (tmp_path / "file").write_text("mine")
  (tmp_path / "link").symlink_to(tmp_path / "nowhere")
  before = sorted(tmp_path.iterdir())
  for form in WRITABLE_HERE:
    with pytest.raises(OSError, match=r"new.x takes [\d,.]+ MiB, and .* MiB free; make room"):
      pretrained.write(unread, str(tmp_path / "new" / "x"), form)
    with pytest.raises(OSError, match="file.to cannot be written: .*file is a file, not a folder"):
      pretrained.write(unread, str(tmp_path / "file" / "to"), form)
    with pytest.raises(FileExistsError, match="link is there already"):
      pretrained.write(unread, str(tmp_path / "link"), form)
  assert sorted(tmp_path.iterdir()) == before
