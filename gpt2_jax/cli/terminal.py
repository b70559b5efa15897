# SPDX-License-Identifier: Apache-2.0
"""Terminal of a session: reads lines, writes text in colour, shows a spinner during long waits.

Lines are edited by prompt_toolkit where it is installed (extra [console]): completion with Tab,
suggestions from the lines before, pasted text of several lines. Without it input() reads them, with
readline. Where there is no terminal, nothing but the text is written.
"""

import contextlib
import itertools
import os
import sys
import threading
import time
import unicodedata
from collections.abc import Callable, Iterable, Iterator
from typing import TextIO

from gpt2_jax.files import announce, shows_wait

# ANSI's numbers (SGR): they fit a dark screen and a light one.
STYLES = {"dim": "2", "bold": "1", "error": "31"}
RESET = "\033[0m"
CLEAR_LINE = "\r\033[K"

# Seconds before a spinner is shown: what is quicker leaves no trace.
SPINNER_DELAY = 0.5

# (word, how many characters of the line it replaces, what it is for)
Completions = Iterable[tuple[str, int, str]]


class Terminal:
  """Reads with input() and writes to `output`, which need not be a terminal.

  None is an output that was closed; nothing is written to it.
  """

  editing = False

  def __init__(self, output: TextIO | None):
    self.output = output
    is_dumb = os.environ.get("TERM", "") in ("", "dumb")
    self.is_terminal = output is not None and output.isatty() and not is_dumb
    # https://no-color.org
    self.has_colour = self.is_terminal and not os.environ.get("NO_COLOR")

  def read(self, prompt: str, status: str = "") -> str:
    """The next line. Raises EOFError at the end, KeyboardInterrupt at Ctrl-C.

    `status` is for the foot of the screen, where there is an editor of lines.
    """
    return input(self._coloured_prompt(prompt))

  def write(self, text: str = "", style: str = "", end: str = "\n") -> None:
    """Writes a text. A terminal shows control characters, and never obeys them."""
    if self.output is None:
      return
    if self.is_terminal:
      text = printable(text)
    if style and text and self.has_colour:
      text = f"\033[{STYLES[style]}m{text}{RESET}"
    print(text, end=end, file=self.output, flush=True)

  @contextlib.contextmanager
  def waiting(self, what: str) -> Iterator[None]:
    """Shows a spinner with `what` and the seconds while its body runs.

    Where there is no terminal, one line after three seconds.
    """
    if not self.is_terminal:
      with announce(what):
        yield
      return

    is_over = threading.Event()
    spinner = threading.Thread(target=self._spin, args=(what, is_over), daemon=True)
    spinner.start()
    try:
      with shows_wait():
        yield
    finally:
      is_over.set()
      spinner.join()

  def _spin(self, what: str, is_over: threading.Event) -> None:
    begin = time.monotonic()
    if is_over.wait(SPINNER_DELAY):
      return

    # A terminal that is gone is an error of the next text, not of this thread.
    with contextlib.suppress(OSError):
      for frame in itertools.cycle("|/-\\"):
        line = f"{frame} {what}, {time.monotonic() - begin:.0f} s"
        self.output.write(CLEAR_LINE)
        self.write(line, "dim", end="")
        if is_over.wait(0.1):
          break
      self.output.write(CLEAR_LINE)
      self.output.flush()

  def _coloured_prompt(self, prompt: str) -> str:
    # readline counts what is not between these two marks as a column.
    is_marked = self.has_colour and "readline" in sys.modules
    return f"\001\033[1m\002{prompt}\001{RESET}\002" if is_marked else prompt


class EditingTerminal(Terminal):
  """A terminal whose lines are edited by prompt_toolkit.

  `complete(line)` gives the completions of a line. Raises ImportError without prompt_toolkit.
  """

  editing = True

  def __init__(self, output: TextIO, complete: Callable[[str], Completions]):
    from prompt_toolkit import PromptSession
    from prompt_toolkit.auto_suggest import AutoSuggestFromHistory
    from prompt_toolkit.completion import Completer, Completion
    from prompt_toolkit.styles import Style

    super().__init__(output)

    class LineCompleter(Completer):
      def get_completions(self, document, complete_event):
        for word, n_replaced, what in complete(document.text_before_cursor):
          yield Completion(word, -n_replaced, display_meta=what)

    # The history is of this session, in memory: prompts may be private.
    self._session = PromptSession(
      completer=LineCompleter(),
      auto_suggest=AutoSuggestFromHistory(),
      reserve_space_for_menu=6,
      style=Style.from_dict({"bottom-toolbar": "noreverse ansibrightblack"}),
    )

  def read(self, prompt: str, status: str = "") -> str:
    from prompt_toolkit.formatted_text import FormattedText

    return self._session.prompt(FormattedText([("bold", prompt)]), bottom_toolbar=status)


def open_terminal(complete: Callable[[str], Completions]) -> Terminal:
  """The terminal of stdin and stdout, with an editor of lines where there can be one."""
  plain = Terminal(sys.stdout)
  if not (plain.is_terminal and sys.stdin.isatty()):
    return plain
  try:
    return EditingTerminal(sys.stdout, complete)
  except ImportError:
    # Arrow keys and line history in input(); not on every platform.
    with contextlib.suppress(ImportError):
      import readline  # noqa: F401
    return plain


def printable(text: str) -> str:
  """A text whose control characters, but for newline and tab, are spelled out as escapes."""
  shown = []
  for character in text:
    is_control = unicodedata.category(character) == "Cc" and character not in "\n\t"
    shown.append(ascii(character)[1:-1] if is_control else character)
  return "".join(shown)
