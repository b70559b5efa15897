# SPDX-License-Identifier: Apache-2.0
"""The command `gpt2-jax`: finds the file of the command that is named, and runs it."""

import difflib
import importlib
import importlib.metadata
import platform
import sys

import gpt2_jax
from gpt2_jax.cli import interrupts

# The commands, in the order in which a project uses them.
COMMANDS = {
  "webtext": "links and pages into a dataset of documents: WebText's pipeline",
  "tokenize": "a corpus into a token store",
  "train": "a GPT-2, or resume its training",
  "sample": "text from any GPT-2",
  "evaluate": "GPT-2s on tasks, in one table",
  "convert": "checkpoints between formats, and check that two are one model",
  "plan": "a run on TPUs without a TPU: memory, time, price",
  "contamination": "how much of an evaluation set is in a training corpus",
  "card": "a model card of a run, or a data card of a token store",
  "detect": "whether a machine wrote a text: detectors, watermarks",
  "memorization": "which texts are verbatim in a corpus, and which a model gives away",
}

HELP = ("help", "--help", "-help", "-h")
VERSION = ("version", "--version", "-version", "-V")


def main() -> None:
  """The console script: `gpt2-jax COMMAND FLAGS`."""
  words = sys.argv[1:]

  # `gpt2-jax help train` is `gpt2-jax train --help`.
  if len(words) > 1 and words[0] in HELP:
    words = [words[1], "--help"]

  if not words or words[0] in HELP:
    print(_usage())
    sys.exit(0 if words else 2)
  if words[0] in VERSION:
    print(_version())
    sys.exit(0)
  if words[0] not in COMMANDS:
    near = difflib.get_close_matches(words[0], COMMANDS, 1, cutoff=0)[0]
    print(
      f"error: gpt2-jax has no command {words[0][:80]!r}; did you mean {near}? gpt2-jax --help "
      "lists all",
      file=sys.stderr,
    )
    sys.exit(2)

  sys.argv = [f"gpt2-jax {words[0]}", *words[1:]]
  run(words[0])


def run(command: str) -> None:
  """Runs one command with the flags of sys.argv, as `launch/COMMAND.py` and `gpt2-jax` do."""
  interrupts.end_process()  # Ctrl-C during the imports below
  importlib.import_module(f"gpt2_jax.cli.{command}").run()


def _usage() -> str:
  lines = ["usage: gpt2-jax COMMAND [--FLAG=VALUE ...]", ""]
  lines += [f"  {name:<15} {what}" for name, what in COMMANDS.items()]
  lines += [
    "",
    "gpt2-jax COMMAND --help lists the flags of one, and the knobs of its config.",
    "gpt2-jax --version says what is installed.",
    "",
    "A first text:  gpt2-jax sample --model=gpt2 --prompt='Once upon a time'",
  ]
  return "\n".join(lines)


def _version() -> str:
  """The version of this package, and of what its results depend on."""
  versions = []
  for name in ("jax", "jaxlib", "flax"):
    try:
      versions.append(f"{name} {importlib.metadata.version(name)}")
    except importlib.metadata.PackageNotFoundError:
      versions.append(f"no {name}")
  versions.append(f"Python {platform.python_version()}")
  return f"gpt2_jax {gpt2_jax.__version__} ({', '.join(versions)})"
