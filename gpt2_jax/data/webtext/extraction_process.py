# SPDX-License-Identifier: Apache-2.0
"""The process that extracts main texts: a program of its own, which imports nothing of gpt2_jax.

It reads requests (JSON of the settings, then the page) from a connection and answers each: b"+" and
the text, or b"-" and a reason. What takes too long, or too much memory, ends this process, and not
the one that asked. The kernel ends it, so that code that holds the interpreter is stopped, too.
"""

import json
import resource
import signal
import sys
from multiprocessing.connection import Connection

# On a busy machine a page may wait so many times its own limit.
WALL_PER_CPU = 10


def extract_main_text(page: bytes, extractor: str) -> str | None:
  """The library's own call: trafilatura in precision mode, or resiliparse ("fast")."""
  if extractor == "fast":
    from resiliparse.extract.html2text import extract_plain_text
    from resiliparse.parse.encoding import bytes_to_str, detect_encoding

    return extract_plain_text(bytes_to_str(page, detect_encoding(page)), main_content=True)

  import trafilatura

  return trafilatura.extract(page, favor_precision=True, include_comments=False)


def main() -> None:
  connection = Connection(int(sys.argv[1]))
  limit = int(sys.argv[2])
  resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
  resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
  while True:
    try:
      settings = json.loads(connection.recv_bytes())
      page = connection.recv_bytes()
    except EOFError:
      return

    # The default action of both signals ends the process. The first counts its CPU time alone.
    signal.setitimer(signal.ITIMER_PROF, settings["seconds"])
    signal.setitimer(signal.ITIMER_REAL, settings["seconds"] * WALL_PER_CPU)
    try:
      text = extract_main_text(page, settings["extractor"])
      answer = b"+" + (text or "").encode("utf-8", "replace")
    except MemoryError:
      answer = b"-extract_memory"
    except Exception as error:
      # Whatever a parser raises for somebody's page is a reason to drop that page.
      answer = b"-extract_error " + type(error).__name__.encode()
    signal.setitimer(signal.ITIMER_PROF, 0)
    signal.setitimer(signal.ITIMER_REAL, 0)
    connection.send_bytes(answer)


if __name__ == "__main__":
  main()
