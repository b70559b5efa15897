# SPDX-License-Identifier: Apache-2.0
"""Command-line entry of the scripts: parses flags, turns errors into one line and status 2."""

import difflib
import importlib
import logging as standard_logging
import os
import re
import sys
import traceback
from collections.abc import Callable, Mapping
from types import MappingProxyType

from absl import app, flags, logging

from gpt2_jax.cli import config_file, help_text, interrupts

# Characters of an error's line at most: it is for people, at a terminal.
LINE_LIMIT = 1000

# These carry our own messages, or are of the machine; any other is a defect.
EXPECTED = (ValueError, OSError, ImportError, FloatingPointError, MemoryError, RecursionError)


def run(
  main: Callable[..., None],
  description: str,
  imports: tuple[str, ...] = (),
  exit_process: Callable[[int], None] = sys.exit,
  config: str | None = None,
  hints: Mapping[str, str] | None = None,
  words: str | None = None,
) -> None:
  """Parses the flags and calls `main`; an error with a message for the user becomes that line.

  --help prints `description`, the flags and the config's knobs. After an error the process exits
  through `exit_process`. `config` is the file that the flag --config has if it is not given.
  `imports` are the modules that `main` imports and that take seconds, as JAX does: --help waits for
  none of them, and Ctrl-C meanwhile ends the process. `hints` say what to give in place of flags
  that people try and that there are not. `words` is what words that are no flags are, as FILE: then
  `main` takes a list of them.
  """

  def parse(argv):
    if help_text.is_asked(argv):
      text = help_text.command_help(main.__module__, description, argv, config, words)
      sys.exit(_print_help(text))
    try:
      return parse_flags(argv, config, hints or {})
    except (flags.Error, AttributeError, ValueError, OSError) as error:
      sys.exit(_line(error))

  def guarded(argv):
    logging.set_verbosity(logging.FATAL)  # the flags have set another
    standard_logging.getLogger("asyncio").setLevel(standard_logging.CRITICAL)
    try:
      _call(main, imports, argv[1:], words is not None)

    # Any error may come of the output's end, or leave something that cannot be written to it.
    except KeyboardInterrupt:
      _discard_unwritable_output()
      print("interrupted", file=sys.stderr)
      exit_process(130)
    except Exception as error:
      _discard_unwritable_output()
      exit_process(_report(error))

  _check_output()
  # What libraries log as an error, they raise too: it would be told twice.
  logging.use_absl_handler()
  logging.set_verbosity(logging.FATAL)
  app.run(guarded, flags_parser=parse)


def _check_output() -> None:
  """Ends the process if its output is closed.

  Nobody could read what it does; and a file that is opened next would get the number of the output,
  and what libraries write there.
  """
  if sys.stdout is None:
    sys.exit(_line(OSError("the standard output is closed; give it a file, or /dev/null")))


def _call(
  main: Callable[..., None], imports: tuple[str, ...], words: list[str], takes_words: bool
) -> None:
  """Imports what `main` needs, and calls it. Raises ValueError for words that it does not take."""
  # An unquoted glob comes as several words, and only the first would be the flag's.
  if words and not takes_words:
    raise ValueError(f"{words[0]!r} is no flag; see --help, and quote patterns")
  for module in imports:
    importlib.import_module(module)

  with interrupts.raise_interrupts():
    main(*[words] if takes_words else [])
    sys.stdout.flush()


def _print_help(text: str) -> int:
  """Prints the help, and returns the exit status: a pager may have closed the output."""
  try:
    print(text, flush=True)
  except OSError as error:
    _discard_unwritable_output()
    return 0 if isinstance(error, BrokenPipeError) else _line(error)
  return 0


# JAX's errors, by name: the scripts that need no JAX do not import it for them.
_OF_JAX = ("JaxRuntimeError", "XlaRuntimeError")


def parse_flags(
  argv: list[str], config: str | None = None, hints: Mapping[str, str] = MappingProxyType({})
) -> list[str]:
  """Parses the flags; `config` and `hints` are those of `run`. Returns the words that are no flags.

  Raises flags.Error or ValueError, with the nearest name for an unknown flag or knob.
  """
  if "config" in flags.FLAGS:
    config_file.check_errors(argv)
    is_given = any(word in ("--config", "-config") or word.startswith(_CONFIG) for word in argv)
    if config is not None and not is_given:
      argv = [argv[0], f"--config={config}", *argv[1:]]

  # absl names near flags only where they are very near, and none for --confg.KNOB.
  try:
    return flags.FLAGS(argv)
  except flags.UnrecognizedFlagError as error:
    # People leave out the `config.` of a knob, and write - for _.
    name = error.flagname.replace("-", "_")
    if name in hints:
      raise ValueError(f"there is no flag --{name}; {hints[name]}; --help shows all") from error
    if "config" in flags.FLAGS and config_file.has_knob(flags.FLAGS["config"].value, name):
      raise ValueError(
        f"there is no flag --{name[:80]}; it is a knob of the config: --config.{name[:80]}=VALUE"
      ) from error
    group, dot, knob = error.flagname.partition(".")
    near = difflib.get_close_matches(group, list(flags.FLAGS), 1, cutoff=0)[0]
    raise ValueError(
      f"there is no flag --{error.flagname[:80]}; did you mean --{near}{dot}{knob[:80]}? "
      f"--help shows all"
    ) from error
  except flags.IllegalFlagValueError as error:
    missing = re.search(r"flag --(\S+)=None: .* other than None", str(error))
    if missing is None:
      raise
    raise ValueError(f"--{missing[1]} is missing; give it, --help says what it is") from error


_CONFIG = ("--config=", "-config=")


def _discard_unwritable_output() -> None:
  """Points the output at /dev/null if what is left to write cannot be written.

  Otherwise Python would try again at its end, and print a traceback. Raises nothing.
  """
  try:
    sys.stdout.flush()
  except OSError:
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _report(error: Exception) -> int:
  """Prints the error of a command: a line, or the traceback of a defect. Returns the status."""
  is_expected = isinstance(error, EXPECTED) or type(error).__name__ in _OF_JAX
  # Of a defect, the traceback is what helps.
  if flags.FLAGS.traceback or not is_expected:
    traceback.print_exc()
  return _line(error) if is_expected else 1


def _line(error: BaseException) -> int:
  """Prints the error as one line of bounded length, and returns the exit status."""
  print(f"error: {message(error)}", file=sys.stderr)
  return 2


def message(error: BaseException) -> str:
  """An error as one line of bounded length; the class stands before what is no message of ours."""
  text = str(error).replace("\\n", "\n").replace("\\'", "'")
  lines = [line.strip() for line in text.splitlines() if line.strip()]

  # 1. What the machine has too little of: by name, since the texts are the libraries'.
  if isinstance(error, BrokenPipeError):
    lines = ["nobody reads the output any more (broken pipe)"]
  elif isinstance(error, MemoryError):
    lines = [f"out of memory; give less at a time {' '.join(lines[:1])}"]
  elif isinstance(error, RecursionError):
    lines = ["something that was given is nested too deep; --traceback shows where"]
  elif type(error).__name__ in _OF_JAX:
    lines = [_of_jax(lines[:1])]
  elif not lines or not isinstance(error, (*EXPECTED, flags.Error)):
    lines = [": ".join((type(error).__name__, *lines[-1:]))]

  # 2. Some libraries put a traceback into the text: what matters is before and after it.
  if len(lines) > 2:
    lines = [lines[0], lines[-1]]

  # 3. No control characters, which a terminal would obey. The way out is at the end: it stays.
  line = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in " ".join(lines))
  if len(line) > LINE_LIMIT:
    line = f"{line[: LINE_LIMIT - 305]} ... {line[-300:]}"
  return line


def _of_jax(lines: list[str]) -> str:
  """JAX's error with the ways out of too little memory."""
  text = lines[0] if lines else "JAX gives no reason"
  if "RESOURCE_EXHAUSTED" not in text and "ut of memory" not in text:
    return text
  return (
    f"out of device memory: {text[:400]}; give less at a time (batch_size, samples, shorter "
    f"texts), more microbatches, remat, a larger mesh, or --quantize where there is that flag"
  )


flags.DEFINE_bool("traceback", False, "Show where in the code an error came from.")
