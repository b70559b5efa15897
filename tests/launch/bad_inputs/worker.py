# SPDX-License-Identifier: Apache-2.0
"""A process that runs command lines one after the other, each as `python SCRIPT FLAGS` would.

Reads requests from stdin and answers on stdout with the exit status, one line of JSON each. A
script runs as `__main__` with its flags defined anew; only what it imports is kept. Descriptors 0,
1 and 2 are files of the request's folder, so that what C++ prints is seen, too.
"""

import json
import os
import pathlib
import resource
import runpy
import sys
import traceback

from absl import flags

# What asks for more memory than that is refused, and the machine keeps its own.
ADDRESS_SPACE = 1 << 36


def run(script: str, arguments: list[str], folder: str) -> int:
  """Runs one command line on the files of `folder`: in, out and err. Returns its exit status."""
  for number, name in enumerate(("in", "out", "err")):
    opened = os.open(pathlib.Path(folder, name), os.O_RDWR)
    os.dup2(opened, number)
    os.close(opened)

  # New objects: what one command has read ahead or not yet written is not for the next.
  sys.stdin = os.fdopen(0, "r", encoding="utf-8", closefd=False)
  sys.stdout = os.fdopen(1, "w", encoding="utf-8", closefd=False)
  sys.stderr = os.fdopen(2, "w", 1, encoding="utf-8", closefd=False, errors="backslashreplace")
  status = _run_as_main(script, arguments)
  sys.stdout.flush()
  sys.stderr.flush()
  return status


def _run_as_main(script: str, arguments: list[str]) -> int:
  sys.argv = [script, *arguments]
  _forget_flags()
  path, cwd, environment = list(sys.path), os.getcwd(), dict(os.environ)
  try:
    runpy.run_path(script, run_name="__main__")
    return 0
  except SystemExit as end:
    return end.code if isinstance(end.code, int) else int(end.code is not None)
  except BaseException:  # as Python ends: a traceback, and status 1
    traceback.print_exc()
    return 1
  finally:
    sys.path[:] = path
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)


def _forget_flags() -> None:
  """Removes the flags of the script before, and its config; libraries' flags become defaults."""
  # A config file is loaded into the module of this name, and would find there what one before it
  # has defined.
  sys.modules.pop("config_config", None)
  flags.FLAGS.unparse_flags()
  names = [name for name in flags.FLAGS if name.startswith("config.")]
  for module, defined in flags.FLAGS.flags_by_module_dict().items():
    if module.endswith(".py") or module.startswith("gpt2_jax.cli."):
      names.extend(flag.name for flag in defined)
  # The package itself, too, since it has its modules as attributes. `process_flags` has no flags of
  # its own; absl keeps its id, which a new module might get.
  for module in list(sys.modules):
    if module.startswith("gpt2_jax.cli") and module != "gpt2_jax.cli.process_flags":
      del sys.modules[module]
  for name in names:
    delattr(flags.FLAGS, name)


def main() -> None:
  # The pipes get numbers of their own: 0, 1 and 2 are the commands'.
  requests = os.fdopen(os.dup(0), encoding="utf-8")
  answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
  resource.setrlimit(resource.RLIMIT_AS, (ADDRESS_SPACE, ADDRESS_SPACE))
  resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
  for line in requests:
    answers.write(json.dumps(run(**json.loads(line))) + "\n")
    answers.flush()


if __name__ == "__main__":
  main()
