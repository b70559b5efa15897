# SPDX-License-Identifier: Apache-2.0
"""A config is named by its path or by its name, from any folder, and imports others anywhere."""

import os
import pathlib
import subprocess
import sys

import pytest
from absl import flags
from ml_collections import config_flags

from gpt2_jax.cli import config_file
from gpt2_jax.configs import FOLDER, shipped_configs

ROOT = pathlib.Path(__file__).parents[2]
ARCHITECTURE = ("n_vocab", "n_embd", "n_head", "n_layer", "use_bias", "gelu", "family")
NAMES = sorted(
  file.relative_to(ROOT / "configs").with_suffix("").as_posix()
  for file in (ROOT / "configs").rglob("*.py")
)


def parse(*words: str):
  """The config of a command line."""
  argv = ["command", *words]
  values = flags.FlagValues()
  config_flags.DEFINE_config_file("config", None, flag_values=values, sys_argv=argv)
  config_file.check_errors(argv, flag_values=values)
  values(argv)
  return values.config


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)


def test_every_config_is_shipped():
  assert sorted(shipped_configs()) == NAMES and FOLDER == ROOT / "configs"


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("form", ["{}", "configs/{}.py", "./configs/{}.py", "{}.py"])
def test_a_shipped_config_has_a_name_in_every_folder(form, name):
  config = parse(f"--config={form.format(name)}", "--config.seed=7")
  assert config.seed == 7
  assert parse(f"--config={shipped_configs()[name]}", "--config.seed=7") == config


def test_a_size_follows_the_name():
  assert parse("--config=gpt2:345M").model.n_layer == 24
  assert parse("--config=configs/gpt2.py:1.5B").model.n_layer == 48


@pytest.mark.parametrize("name", ["finetune", "recipes/forkme:story", "recipes/forkme:chat"])
def test_fine_tuning_leaves_the_architecture_to_the_checkpoint(name):
  lora = parse(f"--config={name}:lora", "--config.model.n_ctx=64")
  full = parse(f"--config={name}")
  assert all(config.model[knob] is None for knob in ARCHITECTURE for config in (full, lora))
  assert full.data.tokenizer == "" and full.init_from and lora.model.n_ctx == 64
  assert (full.adapter.kind, lora.adapter.kind) == ("", "lora")
  with pytest.raises(flags.IllegalFlagValueError, match="take full or lora"):
    parse(f"--config={name}:all")


def test_a_file_of_ones_own_comes_before_a_shipped_one(tmp_path):
  (tmp_path / "configs").mkdir()
  (tmp_path / "configs/gpt2.py").write_text(
    "from gpt2_jax.configs import gpt2\n"
    "def get_config():\n  c = gpt2.get_config('117M')\n  c.seed = 5\n  return c\n"
  )
  assert parse("--config=configs/gpt2.py").seed == 5
  assert parse("--config=gpt2").seed == 0


@pytest.mark.parametrize("name", NAMES)
def test_a_copy_of_a_shipped_config_is_a_config(name, tmp_path):
  copy = tmp_path / "mine.py"
  copy.write_bytes(pathlib.Path(shipped_configs()[name]).read_bytes())
  assert parse("--config=mine.py") == parse(f"--config={name}")


@pytest.mark.parametrize("name", ["gpt3", "configs/gpt3.py", "/no/such/gpt2.py", "../gpt2"])
def test_an_unknown_config_lists_those_there_are(name):
  with pytest.raises(flags.IllegalFlagValueError) as caught:
    parse(f"--config={name}")
  message = str(caught.value)
  assert f"there is no file {name}" in message and ", ".join(NAMES) in message
  assert len(message) < 600


def test_an_import_of_the_clones_folder_says_what_works_anywhere(tmp_path):
  (tmp_path / "own.py").write_text("from configs import gpt2\n")
  words = [sys.executable, "-m", "gpt2_jax", "train", "--config=own.py", "--workdir=x"]
  environment = os.environ | {"PYTHONPATH": ""}
  # Only the package is on the path, as for someone who installed it.
  (tmp_path / "site").mkdir()
  (tmp_path / "site/gpt2_jax").symlink_to(ROOT / "gpt2_jax")
  environment["PYTHONPATH"] = str(tmp_path / "site")
  result = subprocess.run(words, capture_output=True, text=True, env=environment, timeout=60)
  assert result.returncode == 2 and len(result.stderr.splitlines()) == 1
  assert "from gpt2_jax.configs import" in result.stderr
  assert "own.py" in result.stderr
