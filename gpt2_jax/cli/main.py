# SPDX-License-Identifier: Apache-2.0
"""The command `gpt2-jax`: finds the file of the command that is named, and runs it."""

import difflib
import importlib
import sys

from gpt2_jax.cli import interrupts

# The commands, in the order in which a project uses them.
COMMANDS = {
  "tokenize": "a corpus into a token store",
  "train": "a GPT-2, or resume its training",
  "sample": "text from any GPT-2",
  "evaluate": "GPT-2s on tasks, in one table",
  "convert": "checkpoints between formats, and check that two are one model",
  "plan": "a run on TPUs without a TPU: memory, time, price",
  "contamination": "how much of an evaluation set is in a training corpus",
}


def main() -> None:
  """The console script: `gpt2-jax COMMAND FLAGS`."""
  words = sys.argv[1:]
  if not words or words[0] in ("help", "--help", "-h", "-help"):
    print(_usage())
    sys.exit(0 if words else 2)
  command = words[0]
  if command not in COMMANDS:
    near = difflib.get_close_matches(command, COMMANDS, 1, cutoff=0)[0]
    print(
      f"error: gpt2-jax has no command {command[:80]!r}; did you mean {near}? gpt2-jax --help "
      "lists all",
      file=sys.stderr,
    )
    sys.exit(2)
  sys.argv[:2] = [f"gpt2-jax {command}"]
  run(command)


def run(command: str) -> None:
  """Runs one command with the flags of sys.argv, as `launch/COMMAND.py` and `gpt2-jax` do."""
  interrupts.end_process()  # Ctrl-C during the imports below
  importlib.import_module(f"gpt2_jax.cli.{command}").run()


def _usage() -> str:
  lines = ["usage: gpt2-jax COMMAND [--FLAG=VALUE ...]", ""]
  lines += [f"  {name:<15} {what}" for name, what in COMMANDS.items()]
  return "\n".join([*lines, "", "gpt2-jax COMMAND --help lists the flags of one."])
