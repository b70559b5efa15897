# SPDX-License-Identifier: Apache-2.0
"""What every script here shares: flags in, one line and exit status 2 out where the input cannot be."""

import logging as standard_logging
import sys
import traceback
from collections.abc import Callable

from absl import app, flags, logging


def run(main: Callable[[], None], leave: Callable[[int], None] = sys.exit) -> None:
  """Parses the flags and calls `main`; an error that carries a message for the user becomes that line.

  After an error the process ends through `leave`.
  """

  def parse(argv):
    try:
      return flags.FLAGS(argv)
    except (flags.Error, AttributeError, ValueError, OSError) as error:
      sys.exit(_line(error))

  def guarded(argv):
    logging.set_verbosity(logging.FATAL)  # what libraries log as an error, they raise too
    standard_logging.getLogger("asyncio").setLevel(standard_logging.CRITICAL)
    try:
      if argv[1:]:
        raise ValueError(f"{argv[1]!r} is no flag; see --help, and quote patterns")
      main()
    except (ValueError, OSError, ImportError, FloatingPointError) as error:
      if flags.FLAGS.traceback:
        traceback.print_exc()
      leave(_line(error))
    except Exception:
      traceback.print_exc()
      leave(1)
    except KeyboardInterrupt:
      print("interrupted", file=sys.stderr)
      leave(130)

  app.run(guarded, flags_parser=parse)


def _line(error: BaseException) -> int:
  """Prints the error as one line: of a text with a traceback in it, as config_flags writes them, the two ends."""
  lines = [line.strip() for line in str(error).replace("\\n", "\n").replace("\\'", "'").splitlines() if line.strip()]
  print(f"error: {' '.join(lines if len(lines) < 3 else (lines[0], lines[-1]))}", file=sys.stderr)
  return 2


flags.DEFINE_bool("traceback", False, "Show where in the code an error came from.")
