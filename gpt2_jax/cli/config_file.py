# SPDX-License-Identifier: Apache-2.0
"""The flag --config: a config file, which is a program, and its knobs, which have names.

Whatever the file raises becomes one line with the file and the line in it; an unknown knob becomes
one with the nearest name.
"""

import difflib
import os
import re
import sys
import traceback

from absl import flags
from ml_collections import ConfigDict
from ml_collections.config_flags import config_path

from gpt2_jax.configs import shipped_configs
from gpt2_jax.files import first_line, user_path


def check_errors(
  argv: list[str], name: str = "config", flag_values: flags.FlagValues = flags.FLAGS
) -> None:
  """Makes the flag `name` say what is wrong with its file, or with `--config.KNOB` in `argv`."""
  flag = flag_values[name]
  if not isinstance(flag.parser, _Checked):
    flag.parser = _Checked(flag.parser, name, argv)


def find(name: str) -> str:
  """The path of a config: of the file `name`, or else of the config that is shipped by this name.

  So configs/gpt2.py is found without a clone, and gpt2 is short for it. Raises ValueError.
  """
  file = user_path(name)
  if os.path.isfile(file):
    return file

  shipped = shipped_configs()
  stem = name.removeprefix("./").removeprefix("configs/").removesuffix(".py")
  if stem not in shipped:
    raise ValueError(
      f"there is no file {file[:200]}; configs/ of this project has {', '.join(shipped)}, which "
      f"can be named without a path, as --config=gpt2:117M"
    )
  return shipped[stem]


class _Checked(flags.ArgumentParser):
  """A parser of ml_collections with its errors put into words. They are all ValueErrors."""

  def __init__(self, parser: flags.ArgumentParser, name: str, argv: list[str]):
    self.parser = parser
    self.name = name
    self.argv = argv

  def parse(self, argument):
    # 1. The path, which may have a size behind a colon.
    file, colon, size = str(argument).partition(":")
    file = find(file)

    # 2. Run it. It may raise anything, and may end the process. The names of a file that was loaded
    # before would be this one's, too.
    sys.modules.pop(f"{self.name}_config", None)
    try:
      config = self.parser.parse(file + colon + size)
    except (Exception, SystemExit) as error:
      raise ValueError(_describe(error, f"{self.name}_config", file)) from error
    _check_is_config(config, file)

    # 3. The knobs that the command line changes.
    for knob in self._knobs():
      _check_knob(config, self.name, knob)
    return config

  def _knobs(self) -> list[str]:
    knobs = []
    for argument in self.argv[1:]:
      if argument == "--":
        break
      if match := re.match(rf"--?(?:no)?{self.name}\.([^=]+)", argument):
        knobs.append(match[1])
    return knobs

  def flag_type(self) -> str:
    return self.parser.flag_type()


def _describe(error: BaseException, module: str, file: str) -> str:
  """The error that a config file raised, with its place: the innermost of a chain of errors."""
  while cause := error.__cause__ or error.__context__:
    error = cause
  if isinstance(error, SyntaxError):
    return f"{error.msg} (line {error.lineno} of {error.filename})"

  if isinstance(error, AttributeError) and error.name == "get_config":
    return f"{file} defines no get_config(), which returns the ConfigDict"

  # A message of our own explains itself; a name of an error class is what others have to say.
  text = first_line(error)
  if not isinstance(error, ValueError):
    text = f"{type(error).__name__}: {text}"
  if isinstance(error, ModuleNotFoundError) and str(error.name).partition(".")[0] == "configs":
    text += "; write `from gpt2_jax.configs import ...`, which works anywhere"

  # Where in the config file, however deep below it the error came up.
  lines = []
  for frame, line in traceback.walk_tb(error.__traceback__):
    if frame.f_globals.get("__name__") == module:
      lines.append(line)
  return f"{text} (line {lines[-1]} of {file})" if lines else text


def _check_is_config(config: object, file: str) -> None:
  """Raises ValueError unless `get_config` gave a ConfigDict."""
  # What ml_collections gives where a file could not be read raises OSError for every attribute.
  try:
    is_config = isinstance(config, ConfigDict)
    if not is_config:
      getattr(config, "get", None)
  except OSError as error:
    raise ValueError(first_line(error.__cause__ or error)) from error
  if not is_config:
    raise ValueError(f"get_config of {file} returns {type(config).__name__}; it is a ConfigDict")


def _check_knob(config: ConfigDict, name: str, knob: str) -> None:
  """Raises ValueError with the nearest names if the config has no such knob."""
  try:
    config_path.get_value(knob, config)
  except (KeyError, AttributeError, IndexError, TypeError, ValueError) as error:
    names = [leaf for leaf in _names(config) if leaf != knob]
    last = {leaf.rpartition(".")[2]: leaf for leaf in names}
    near = difflib.get_close_matches(knob, names, 1, cutoff=0.6)
    near = near or difflib.get_close_matches(knob.rpartition(".")[2], last, 1, cutoff=0)
    nearest = last.get(near[0], near[0]) if near else "nothing"
    raise ValueError(
      f"there is no knob {knob[:80]!r}; did you mean --{name}.{nearest}? "
      f"The config file lists all {len(names)}"
    ) from error


def has_knob(config: object, knob: str) -> bool:
  """Whether a config that was read has a knob of this name."""
  return isinstance(config, ConfigDict) and knob in _names(config)


def _names(config: ConfigDict, prefix: str = "") -> list[str]:
  """The names of all knobs, with a dot between a group's and its own."""
  names = []
  for key, value in config.items():
    if isinstance(value, ConfigDict):
      names += _names(value, f"{prefix}{key}.")
    else:
      names.append(f"{prefix}{key}")
  return names
