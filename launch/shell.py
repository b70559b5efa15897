# SPDX-License-Identifier: Apache-2.0
"""What every script here shares: flags in, one line and exit status 2 out where the input cannot be."""

import sys
from collections.abc import Callable

from absl import app, flags, logging


def run(main: Callable[[], None]) -> None:
  """Parses the flags and calls `main`; an error that carries a message for the user becomes that line."""

  def parse(argv):
    try:
      return app.parse_flags_with_usage(argv)
    except (ValueError, OSError) as error:  # a config file refused its argument
      sys.exit(_line(error))

  def guarded(argv):
    logging.set_verbosity(logging.ERROR)
    try:
      if argv[1:]:
        raise ValueError(f"{argv[1]!r} is no flag; see --help, and quote patterns")
      main()
    except (ValueError, OSError, FloatingPointError) as error:
      if flags.FLAGS.traceback:
        raise
      sys.exit(_line(error))
    except KeyboardInterrupt:
      print("interrupted", file=sys.stderr)
      sys.exit(130)

  app.run(guarded, flags_parser=parse)


def _line(error: Exception) -> int:
  print(f"error: {error}", file=sys.stderr)
  return 2


flags.DEFINE_bool("traceback", False, "Show where in the code an error came from.")
