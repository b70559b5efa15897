# SPDX-License-Identifier: Apache-2.0
"""`--help` of a command: what it does, its flags, the configs that come with it, and their knobs.

It imports no JAX. The config file is run, to show the values that it gives; what its knobs are for
is read from its comments, and from the declarations of runs/knobs.py.
"""

import ast
import io
import itertools
import re
import shutil
import textwrap
import tokenize
from collections.abc import Iterator

from absl import flags

from gpt2_jax.cli import config_file
from gpt2_jax.configs import shipped_configs
from gpt2_jax.runs import knobs
from gpt2_jax.sizes import ALIASES, SIZES

# Whose knobs are shown where a command has no config of its own.
EXAMPLE = "gpt2"

_SPELLINGS = re.compile(r"--?(h|help|helpfull|helpshort|helpxml|\?)(=true|=1)?")


def is_asked(argv: list[str]) -> bool:
  """Whether the words of a command line ask for help, in any spelling."""
  words = itertools.takewhile(lambda word: word != "--", argv[1:])
  return argv[1:] == ["help"] or any(_SPELLINGS.fullmatch(word) for word in words)


def command_help(
  module: str, description: str, argv: list[str], config: str | None, words: str | None = None
) -> str:
  """The help of the command whose flags `module` defines; `config` is its default --config.

  `words` is what the words are that it takes beside flags.
  """
  command = module.rpartition(".")[2]
  beside = f" [{words} ...]" if words else ""
  parts = [
    f"usage: gpt2-jax {command}{beside} [--FLAG=VALUE ...]\n"
    f"In a clone, python launch/{command}.py takes the same flags.",
    description.strip(),
    "Flags:\n" + "\n".join(_flag_lines(module)),
  ]
  if "config" in flags.FLAGS:
    parts.append(_shipped())
    parts.append(_knobs(argv, config))
  return "\n\n".join(parts)


def _flag_lines(module: str) -> Iterator[str]:
  """A line for each flag of the package: the command's own, and then those that all have."""
  by_module = flags.FLAGS.flags_by_module_dict()
  names = [name for name in by_module if name.startswith("gpt2_jax.") and name != module]
  for name in [module, *names]:
    for flag in by_module.get(name, []):
      yield _entry(_spelling(flag), _flag_help(flag))


def _spelling(flag: flags.Flag) -> str:
  if flag.boolean:
    return f"--[no]{flag.name}"
  if isinstance(flag, flags.EnumFlag):
    return f"--{flag.name}={'|'.join(flag.parser.enum_values)}"
  kind = {"string": "TEXT", "int": "N", "float": "X", "config object": "FILE"}
  return f"--{flag.name}={kind.get(flag.flag_type().removeprefix('multi '), 'TEXT')}"


def _flag_help(flag: flags.Flag) -> str:
  # absl writes the choices before the help of an enum, and a sentence behind that of a list.
  what = re.sub(r"^<[^>]*>: |;\s+repeat this option to specify a list of values$", "", flag.help)
  if isinstance(flag, flags.MultiFlag) and "repeated" not in what:
    what += " May be repeated."
  # What is required is a validator there, which only its message tells.
  if any("other than None" in validator.message for validator in flag.validators):
    return f"{what} (required)"
  if flag.default in (None, [], False, ""):
    return what
  return f"{what} (default: {flag.default})"


def _entry(head: str, body: str, indent: str = "  ", width: int = 26) -> str:
  """`head` and `body` in two columns; a long head has a line of its own."""
  columns = min(shutil.get_terminal_size((100, 24)).columns, 100)
  gap = " " * (len(indent) + width)
  lines = textwrap.wrap(
    body, max(columns, 60), initial_indent=gap, subsequent_indent=gap, break_on_hyphens=False
  )
  if not lines:
    return indent + head
  if len(head) < width:
    lines[0] = indent + head.ljust(width) + lines[0].lstrip()
    return "\n".join(lines)
  return "\n".join([indent + head, *lines])


def _shipped() -> str:
  """The configs that come with the package, with the first sentence of each."""
  lines = ["Configs that come with gpt2_jax, for --config=NAME (or a path to a file of your own):"]
  for name, file in shipped_configs().items():
    with tokenize.open(file) as source:
      tree = ast.parse(source.read())
    sentence = re.split(r"(?<=\.)\s", ast.get_docstring(tree) or "")[0]
    if _takes_size(tree):
      name = f"{name}:SIZE"
      sentence = f"{sentence} SIZE is {', '.join(_sizes())}."
    lines.append(_entry(name, sentence))
  return "\n".join(lines)


def _takes_size(tree: ast.Module) -> bool:
  """Whether the get_config of a config file has an argument `size`, given behind a colon."""
  for node in tree.body:
    if isinstance(node, ast.FunctionDef) and node.name == "get_config":
      return [argument.arg for argument in node.args.args] == ["size"]
  return False


def _sizes() -> list[str]:
  """The published sizes, each with its other names behind it."""
  return [" or ".join((size, *ALIASES.get(size, ()))) for size in SIZES]


def _knobs(argv: list[str], default: str | None) -> str:
  """The knobs of the config that is given, or of the default: value, what for, type and range."""
  argument = _given_config(argv) or default or EXAMPLE
  config_file.check_errors(argv)
  try:
    config = flags.FLAGS["config"].parser.parse(argument)
    comments = _comments(config_file.find(argument.partition(":")[0]))
  except (ValueError, OSError) as error:
    return f"Knobs: none can be shown, since {error}"

  # Training's knobs are declared. A sweep has others, some of the same name.
  values = knobs.flatten(config)
  declared = knobs.KNOBS if values.keys() <= knobs.KNOBS.keys() else {}
  title = f"Knobs of --config={argument}, changed by --config.KNOB=VALUE"
  if declared:
    title += "; * may change when a run resumes"
  return "\n".join([f"{title}:", *_knob_lines(values, comments, declared)])


def _given_config(argv: list[str]) -> str | None:
  """The value of --config on a command line."""
  for word, following in itertools.pairwise([*argv, ""]):
    if word in ("--config", "-config"):
      return following
    if match := re.match("--?config=(.+)", word):
      return match[1]
  return None


def _knob_lines(values: dict, comments: dict[str, str], declared: dict) -> Iterator[str]:
  """A line for each knob, in the order of the declarations, or else of the file."""
  order = [*declared, *comments, *values]
  for name in sorted(values, key=order.index):
    knob = declared.get(name)
    what = comments.get(name) or (knob and knob.help) or comments.get(name.partition(".")[0], "")
    allowed = knob.allowed() if knob else type(values[name]).__name__
    star = "*" if knob and knob.resumable else " "
    yield _entry(f"{name}={_short(values[name])}", f"{what} ({allowed})".strip(), f"{star} ", 30)


def _short(value) -> str:
  """A value as it is written after --config.KNOB=, of bounded length."""
  words = value if isinstance(value, str) else repr(value)
  if isinstance(value, tuple | list) and len(words) > 40:
    return f"({value[0]!r}, ... {len(value)} in all)"
  return words if len(words) <= 60 else f"{words[:60]}..."


def _comments(file: str) -> dict[str, str]:
  """What a config file says of its knobs: the comment behind each key of its dicts, or above it."""
  with tokenize.open(file) as source:
    content = source.read()
  comments, alone = {}, set()
  for token in tokenize.generate_tokens(io.StringIO(content).readline):
    if token.type == tokenize.COMMENT:
      line = token.start[0]
      comments[line] = token.string.lstrip("# ")
      if token.line.lstrip().startswith("#"):
        alone.add(line)

  def above(line: int) -> str:
    words = []
    while line - 1 in alone:
      line -= 1
      words.insert(0, comments[line])
    return " ".join(words)

  texts = {}
  for name, first, last in _keys(ast.parse(content)):
    behind = comments.get(last) if last not in alone else None
    texts[name] = behind or above(first)
  return texts


def _keys(tree: ast.AST, prefix: str = "") -> Iterator[tuple[str, int, int]]:
  """The keys of the dicts that a config file hands to ConfigDict: name, first and last line."""
  if isinstance(tree, ast.Dict):
    for key, value in zip(tree.keys, tree.values, strict=True):
      if not isinstance(key, ast.Constant) or not isinstance(key.value, str):
        continue
      yield prefix + key.value, key.lineno, value.end_lineno
      # What stands behind a group on one line is said of the group.
      if isinstance(value, ast.Dict) and value.end_lineno > key.lineno:
        yield from _keys(value, f"{prefix}{key.value}.")
    return
  for node in ast.walk(tree):
    match node:
      case ast.Call(func=ast.Name(id="ConfigDict"), args=[ast.Dict() as knobs_of_file, *_]):
        yield from _keys(knobs_of_file)
