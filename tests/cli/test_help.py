# SPDX-License-Identifier: Apache-2.0
"""`--help` of every command: status 0, no JAX, every flag, every knob with what it is for."""

import importlib
import os
import pathlib
import subprocess
import sys

import pytest

import gpt2_jax
from gpt2_jax.cli import help_text
from gpt2_jax.cli.main import COMMANDS
from gpt2_jax.runs import knobs

ROOT = pathlib.Path(__file__).parents[2]
HEAVY = "jax jaxlib flax numpy orbax optax grain tensorstore tensorflow_datasets matplotlib torch"

# Runs the command, then prints which modules it has imported.
PROBE = f"""
import atexit, sys
atexit.register(lambda: print("HEAVY", [m for m in {HEAVY.split()} if m in sys.modules]))
from gpt2_jax.cli.main import main
main()
"""


def gpt2_jax_command(*words: str, code: str = PROBE) -> subprocess.CompletedProcess:
  return subprocess.run(
    [sys.executable, "-c", code, *words],
    capture_output=True,
    text=True,
    timeout=60,
    env=os.environ | {"PYTHONPATH": str(ROOT)},
  )


@pytest.mark.parametrize("command", COMMANDS)
def test_help_imports_nothing_heavy_and_has_every_flag(command):
  result = gpt2_jax_command(command, "--help")
  assert (result.returncode, result.stderr) == (0, "")
  assert result.stdout.endswith("HEAVY []\n")
  assert result.stdout.startswith(f"usage: gpt2-jax {command} ")

  source = (ROOT / "gpt2_jax/cli" / f"{command}.py").read_text().split("DEFINE_")[1:]
  for definition in source:
    name = definition.partition('"')[2].partition('"')[0]
    if name.isidentifier() and name not in ("help", "type"):
      assert f"--{name}=" in result.stdout or f"--[no]{name} " in result.stdout
  assert max(map(len, result.stdout.splitlines())) <= 120


@pytest.mark.parametrize(
  "words",
  [
    ["--help"],
    ["-h"],
    ["help"],
    ["help", "train"],
    ["train", "-h"],
    ["train", "-help"],
    ["train", "--helpfull"],
    ["train", "--helpshort"],
    ["train", "--help=true"],
    ["train", "help"],
    ["train", "--config=no_such", "--help"],
    ["train", "--config=demo", "--config.no_such=3", "--help"],
    ["train", "--no_such_flag", "--help"],
    ["--version"],
  ],
)
def test_every_spelling_of_help_has_status_0_and_no_jax(words):
  result = gpt2_jax_command(*words)
  assert (result.returncode, result.stderr) == (0, "")
  assert result.stdout.endswith("HEAVY []\n")


def test_what_is_not_a_command_is_one_line():
  result = gpt2_jax_command("trian", "--config=gpt2")
  assert result.returncode == 2 and len(result.stderr.splitlines()) == 1
  assert "did you mean train?" in result.stderr
  assert gpt2_jax_command().returncode == 2
  assert gpt2_jax.__version__ in gpt2_jax_command("--version").stdout


def test_help_goes_through_a_pager_that_ends_early():
  command = f"{sys.executable} -m gpt2_jax train --help | head -1; echo ${{PIPESTATUS[0]}}"
  result = subprocess.run(
    ["bash", "-c", command], capture_output=True, text=True, cwd=ROOT, timeout=60
  )
  assert result.stdout.splitlines()[1:] == ["0"] and result.stderr == ""


# ---- the knobs


def knob_texts(text: str) -> dict[str, str]:
  """The entries of the help's last part: "name=value" and what is said of it, by name."""
  entries = {}
  for line in text.partition("\nKnobs of ")[2].splitlines()[1:]:
    if line[2:3] != " ":
      name = line[2:].partition("=")[0]
      entries[name] = line
    else:
      entries[name] += " " + line.strip()
  return entries


def test_the_knobs_have_the_values_of_the_config_and_what_they_are_for():
  demo = gpt2_jax_command("train", "--help", "--config=demo").stdout
  entries = knob_texts(demo.replace("HEAVY []\n", ""))
  values = knobs.flatten(config_of("demo"))
  assert entries.keys() == values.keys() == knobs.KNOBS.keys()
  for name, knob in knobs.KNOBS.items():
    assert entries[name].startswith("* " if knob.resumable else "  ")
    assert str(values[name]) in entries[name] and knob.type.__name__ in entries[name]
    assert " ".join(entries[name].split()).endswith(f"({knob.allowed()})")
  assert values["steps"] != config_of("gpt2").steps


def config_of(name: str):
  return importlib.import_module(f"gpt2_jax.configs.{name}").get_config()


def test_what_a_file_says_of_its_knobs_stands_in_the_help(tmp_path):
  own = tmp_path / "own.py"
  own.write_text('''"""A run of our own."""
from ml_collections import ConfigDict
from gpt2_jax.configs import gpt2

def get_config(size="345M"):
  config = gpt2.get_config(size)
  config.update(ConfigDict({
    # tuned on our corpus,
    # in March
    "learning_rate": 1e-5,
    "data": {
      "train": "x",  # the cleaned one
      "validation": "y",
    },
  }))
  return config
''')
  text = gpt2_jax_command("plan", "--help", f"--config={own}").stdout
  entries = knob_texts(text.replace("HEAVY []\n", ""))
  assert "tuned on our corpus, in March (float above 0)" in entries["learning_rate"]
  assert "the cleaned one (str)" in entries["data.train"] and "=x " in entries["data.train"]
  assert knobs.KNOBS["data.validation"].help in entries["data.validation"]
  assert "model.n_embd=1024" in entries["model.n_embd"]


def test_a_sweep_has_its_own_knobs():
  entries = knob_texts(gpt2_jax_command("evaluate", "--help").stdout.replace("HEAVY []\n", ""))
  assert entries.keys() == knobs.flatten(config_of("zero_shot")).keys()
  assert "first items of each task that are scored" in entries["limit"]
  assert knobs.KNOBS["seed"].help not in entries["seed"]


def test_help_lists_the_configs_that_come_with_it():
  text = gpt2_jax_command("train", "--help").stdout
  listed = text.partition("\nConfigs that come with")[2].partition("\nKnobs of ")[0]
  for file in (ROOT / "configs").rglob("*.py"):
    assert f"\n  {file.relative_to(ROOT / 'configs').with_suffix('').as_posix()}" in listed
  for size in gpt2_jax.SIZES:
    assert size in listed


def test_a_command_line_asks_for_help_only_before_the_words():
  assert help_text.is_asked(["x", "--config=a", "-h"])
  assert not help_text.is_asked(["x", "--prompt=--help", "--", "--help"])
