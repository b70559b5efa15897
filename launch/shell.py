# SPDX-License-Identifier: Apache-2.0
"""Command-line entry of the scripts: parses flags, turns errors into one line and status 2."""

import logging as standard_logging
import sys
import traceback
from collections.abc import Callable

from absl import app, flags, logging


def run(main: Callable[[], None], exit_process: Callable[[int], None] = sys.exit) -> None:
  """Parses the flags and calls `main`; an error with a message for the user becomes that line.

  After an error the process exits through `exit_process`.
  """

  def parse(argv):
    try:
      return flags.FLAGS(argv)
    except (flags.Error, AttributeError, ValueError, OSError) as error:
      sys.exit(_line(error))

  def guarded(argv):
    # What libraries log as an error, they raise too: it would be told twice.
    logging.set_verbosity(logging.FATAL)
    standard_logging.getLogger("asyncio").setLevel(standard_logging.CRITICAL)
    try:
      # An unquoted glob comes as several words, and only the first would be the flag's.
      if argv[1:]:
        raise ValueError(f"{argv[1]!r} is no flag; see --help, and quote patterns")
      main()

    # These carry our own messages; any other is a defect, and its traceback is what helps.
    except (ValueError, OSError, ImportError, FloatingPointError) as error:
      if flags.FLAGS.traceback:
        traceback.print_exc()
      exit_process(_line(error))
    except Exception:
      traceback.print_exc()
      exit_process(1)
    except KeyboardInterrupt:
      print("interrupted", file=sys.stderr)
      exit_process(130)

  app.run(guarded, flags_parser=parse)


def _line(error: BaseException) -> int:
  """Prints the error as one line, and returns the exit status."""
  text = str(error).replace("\\n", "\n").replace("\\'", "'")
  lines = [line.strip() for line in text.splitlines() if line.strip()]

  # config_flags puts a traceback into the text: what matters is before and after it.
  if len(lines) > 2:
    lines = [lines[0], lines[-1]]
  print(f"error: {' '.join(lines)}", file=sys.stderr)
  return 2


flags.DEFINE_bool("traceback", False, "Show where in the code an error came from.")
