# SPDX-License-Identifier: Apache-2.0
"""The wheel, built and installed into a folder: a new user's first hour outside the clone."""

import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import zipfile

import jax
import pytest

import gpt2_jax

pytest.importorskip("setuptools")  # extra [test] has it

ROOT = pathlib.Path(__file__).parents[2]
PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]

TEXT = "the cat sat on a mat while many birds sang over old green hills.\n" * 200
SMALL = """\"\"\"A small model of our own.\"\"\"
from gpt2_jax.configs import shakespeare

def get_config():
  config = shakespeare.get_config()
  config.model.update(n_vocab=%d, n_ctx=16, n_embd=16, n_head=2, n_layer=1)
  config.update(steps=20, warmup_steps=2, steps_per_call=10, batch_size=4)
  config.update(save_every=20, eval_every=20, log_every=10)
  return config
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
  """The wheel's file, built from a copy: a build leaves folders beside setup.py."""
  folder = tmp_path_factory.mktemp("wheel")
  for name in ("gpt2_jax", "configs"):
    shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
  for name in ("setup.py", "README.md", "LICENSE"):
    shutil.copy(ROOT / name, folder)
  build = [*PIP, "wheel", "--no-deps", "--no-build-isolation", "--no-index", "-w", folder, folder]
  subprocess.run(build, check=True, timeout=120)
  [file] = folder.glob("*.whl")
  return file


@pytest.fixture(scope="module")
def user(wheel, tmp_path_factory):
  """run(words, status): `gpt2-jax WORDS` of the installed wheel, in a folder that has a text."""
  site = tmp_path_factory.mktemp("site")
  install = [*PIP, "install", "--no-deps", "--no-index", "--target", site, wheel]
  subprocess.run(install, check=True, timeout=120)

  home = tmp_path_factory.mktemp("user")
  (home / "input.txt").write_text(TEXT)
  environment = os.environ | {
    "PYTHONPATH": str(site),
    "JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir or "",
  }

  def run(*words: str) -> str:
    command = [sys.executable, site / "bin/gpt2-jax", *words]
    result = subprocess.run(
      command, capture_output=True, text=True, cwd=home, env=environment, timeout=120
    )
    assert result.returncode == 0, result.stderr
    assert str(ROOT) not in result.stdout + result.stderr
    return result.stdout

  run.home, run.site, run.environment = home, site, environment
  return run


@pytest.fixture(scope="module")
def vocabulary(user):
  """The vocabulary of two token stores, which the commands alone made of a text."""
  shared = ["--files=input.txt", "--tokenizer=data/shakespeare/characters.json"]
  user(
    "tokenize",
    *shared,
    "--characters=:90%",
    "--train_tokenizer=characters",
    "--out=data/shakespeare/train",
  )
  out = user("tokenize", *shared, "--characters=90%:", "--out=data/shakespeare/validation")
  return int(re.search(r"vocabulary (\d+)", out)[1])


@pytest.fixture(scope="module")
def trained(user, vocabulary):
  """A run's workdir, made by the command alone."""
  # A config of one's own, in one's own folder, that imports a shipped one.
  (user.home / "small.py").write_text(SMALL % vocabulary)
  user("train", "--config=small.py", "--workdir=runs/small")
  return "runs/small"


def test_the_wheel_has_the_package_the_configs_and_nothing_at_the_top(wheel):
  names = zipfile.ZipFile(wheel).namelist()
  assert {name.partition("/")[0].partition("-")[0] for name in names} == {"gpt2_jax"}
  for file in (ROOT / "configs").rglob("*.py"):
    assert f"gpt2_jax/configs/{file.relative_to(ROOT / 'configs')}" in names
  for file in (ROOT / "gpt2_jax").rglob("*.py"):
    assert str(file.relative_to(ROOT)) in names
  assert "gpt2_jax/py.typed" in names and "gpt2_jax/evaluate/sweep/paper.json" in names
  assert "gpt2_jax/evaluate/model_card.md" in names


def test_the_metadata_say_what_it_is(wheel):
  archive = zipfile.ZipFile(wheel)
  [name] = [name for name in archive.namelist() if name.endswith("dist-info/METADATA")]
  head, _, body = archive.read(name).decode().partition("\n\n")
  assert f"\nVersion: {gpt2_jax.__version__}\n" in head
  assert "\nSummary: GPT-2 in JAX" in head and "\nClassifier: Typing :: Typed" in head
  assert body.strip() == (ROOT / "README.md").read_text().strip()
  citation = (ROOT / "CITATION.cff").read_text()
  assert f"\nversion: {gpt2_jax.__version__}\n" in citation
  assert f"\n## {gpt2_jax.__version__}" in (ROOT / "CHANGELOG.md").read_text()


def test_a_text_becomes_token_stores(vocabulary):
  assert vocabulary == len(set(TEXT))


def test_a_new_users_run(user, trained):
  lines = (user.home / trained / "metrics.jsonl").read_text().splitlines()
  assert any("val_loss" in json.loads(line) for line in lines)
  text = user("sample", f"--model={trained}", "--prompt=the cat", "--n_new=8", "--greedy")
  assert text.startswith("the cat") and len(text) == len("the cat") + 8 + 1


def test_a_checkpoint_is_converted_and_is_the_same_model(user, trained):
  assert "read back, the same" in user("convert", f"--from={trained}", "--to=out", "--format=hf")
  out = user("convert", "--verify=out", f"--against={trained}")
  assert (user.home / "parity.json").is_file() and out


def test_a_model_is_evaluated_on_a_text_of_ones_own(user, trained):
  flags = [f"--model={trained}", "--task=text", "--data=input.txt", "--out=runs/scores"]
  table = user("evaluate", *flags, "--config.resamples=10")
  assert (user.home / "runs/scores/table.md").read_text() == table and "text" in table


def test_the_package_is_the_installed_one_and_its_configs_import(user):
  code = "import gpt2_jax; from gpt2_jax.configs import gpt2, demo; print(gpt2.__file__)"
  result = subprocess.run(
    [sys.executable, "-c", code],
    capture_output=True,
    text=True,
    cwd=user.home,
    env=user.environment,
    timeout=60,
  )
  assert result.stdout.strip() == str(user.site / "gpt2_jax/configs/gpt2.py")
