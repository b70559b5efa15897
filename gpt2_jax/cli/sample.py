# SPDX-License-Identifier: Apache-2.0
"""Generates text with any GPT-2: a published name, a checkpoint of any format, or a run's workdir.

gpt2-jax sample --model=gpt2 --prompt='Once upon a time' --temperature=0.8 --top_k=40
gpt2-jax sample --model=runs/117M --step=best --samples=3 --n_new=200 --window=256
gpt2-jax sample --model=gpt2-xl --quantize=int8 --interactive
gpt2-jax sample --model=chat.hf --template=dialogpt --interactive
gpt2-jax sample --model=runs/chat --recipe=chat --reverse=runs/chat_reverse --interactive
gpt2-jax sample --model=runs/articles --recipe=articles --field=date='May 29, 2019' \\
  --prompt='A new bridge opens'
gpt2-jax sample --model=chat.hf --special=all --prompt='<|user|>Hello<|assistant|>'
"""

import dataclasses
import itertools
import signal
import sys
from collections.abc import Iterator

from absl import flags

from gpt2_jax.cli import shell
from gpt2_jax.cli.console import Console, complete_line
from gpt2_jax.cli.settings import Settings, newlines, recipe_settings, shorten_to_context
from gpt2_jax.cli.terminal import Terminal, open_terminal
from gpt2_jax.cli.turns import (
  Answering,
  Ranking,
  add_stops,
  check_special_tokens,
  parse_fields,
  prompt_ids,
)
from gpt2_jax.files import user_path
from gpt2_jax.recipe import Recipe, load_recipe

_MODEL = flags.DEFINE_string(
  "model",
  None,
  "A published name (gpt2, gpt2-xl, ...), a checkpoint's path, or a workdir (also gs://).",
)
_STEP = flags.DEFINE_string(
  "step", "latest", "Of a workdir: latest, best (least validation loss), or a step."
)
_ADAPTER = flags.DEFINE_string(
  "adapter", None, "An adapter of the model in peft's format: a folder, or a repository of the Hub."
)
_REVISION = flags.DEFINE_string("revision", None, "Branch, tag or commit of the Hub's repository.")
_PROMPT = flags.DEFINE_multi_string(
  "prompt", [], "A text to continue; may be repeated. Default: <|endoftext|>."
)
_SAMPLES = flags.DEFINE_integer("samples", 1, "Continuations of each prompt.", lower_bound=1)
_INTERACTIVE = flags.DEFINE_bool(
  "interactive", False, "Read prompts from the terminal, one after another."
)
_TEMPLATE = flags.DEFINE_string(
  "template",
  None,
  "A prompt is a message of a chat, written by this template: a name, or a .json file.",
)
_RECIPE = flags.DEFINE_string(
  "recipe",
  None,
  "Application: its template, stop strings and sampling, where no flag says else. A name of "
  "configs/recipes/forkme.py (story, chat, ...), or FILE.py:NAME.",
)
_FIELD = flags.DEFINE_multi_string(
  "field",
  [],
  "NAME=TEXT of a turn that stands before the prompt, by its role in the template: memory, title.",
)
_REVERSE = flags.DEFINE_string(
  "reverse", None, "Backward model that ranks the answers of a chat (MMI), as --model."
)
_CANDIDATES = flags.DEFINE_integer(
  "candidates", 16, "With --reverse: answers that are drawn and ranked.", lower_bound=1
)
_REVERSE_WEIGHT = flags.DEFINE_float(
  "reverse_weight",
  1.0,
  "With --reverse: weight of log p(prompt | answer); the rest is that of log p(answer | prompt).",
  lower_bound=0.0,
  upper_bound=1.0,
)
_POLICY = flags.DEFINE_string(
  "policy", None, "Usage policy that the texts follow: a .toml or .json file of rules with words."
)
_POLICY_LOG = flags.DEFINE_string(
  "policy_log", None, "With --policy: file for a line on each text that it matched, without text."
)
_DTYPE = flags.DEFINE_enum(
  "dtype", "float32", ["float32", "bfloat16"], "Of activations and matmuls."
)
_QUANTIZE = flags.DEFINE_enum("quantize", None, ["int8"], "Make the matrices int8.")
_DATA = flags.DEFINE_integer(
  "mesh_data", -1, "Size of the data axis; -1 takes the devices that are left."
)
_MESH_MODEL = flags.DEFINE_integer("mesh_model", 1, "Size of the model axis.")

# Each field of the console's Settings is a flag: the names, defaults and help stand there once.
DEFINE = {
  int: flags.DEFINE_integer,
  float: flags.DEFINE_float,
  bool: flags.DEFINE_bool,
  str: flags.DEFINE_multi_string,
}
_SETTINGS = {
  field.name: DEFINE[field.metadata["type"]](field.name, field.default, field.metadata["help"])
  for field in dataclasses.fields(Settings)
}


def main() -> None:
  from gpt2_jax.convert.pretrained import load_pretrained
  from gpt2_jax.decoding import for_inference
  from gpt2_jax.sharding import make_mesh

  # 1. What cannot be is refused before anything is loaded.
  recipe = load_recipe(_RECIPE.value) if _RECIPE.value else None
  settings = _settings(recipe)
  settings.generation()
  if _INTERACTIVE.value and (_PROMPT.value or _SAMPLES.value > 1):
    raise ValueError(
      "--interactive reads prompts from the terminal, one text each; leave out --prompt, --samples"
    )
  template = _load_template(recipe)
  fields = parse_fields(_FIELD.value, template)
  policy = _load_policy()
  if _INTERACTIVE.value and sys.stdin is None:
    raise ValueError("the standard input is closed, and --interactive reads it; give --prompt")

  # 2. Load.
  mesh = make_mesh(1, _DATA.value, _MESH_MODEL.value)
  model, tokenizer = load_pretrained(
    user_path(_MODEL.value),
    mesh,
    _DTYPE.value,
    revision=_REVISION.value,
    quantize=_QUANTIZE.value,
    step=_STEP.value,
    adapter=_ADAPTER.value,
  )
  if tokenizer is None:
    raise ValueError(f"{_MODEL.value} has no tokenizer; put its files beside the checkpoint")
  check_special_tokens(tokenizer, settings, template)
  # The model is of no other use here, so no second copy of it is held.
  decoder = for_inference(model, donate=True)
  remembers = recipe is None or recipe.form == "chat"
  answering = Answering(template, fields, remembers, _load_reverse(mesh, tokenizer), policy)

  # 3. Generate: in a session, one text as it comes, or several when all of them are there.
  if _INTERACTIVE.value:
    _run_console(decoder, tokenizer, settings, answering)
  else:
    _print_texts(decoder, tokenizer, settings, answering)


def _settings(recipe: Recipe | None) -> Settings:
  """The settings of the flags, and of the recipe where no flag is given."""
  values = {name: flag.value for name, flag in _SETTINGS.items()}
  texts = {name: tuple(map(newlines, values[name])) for name in ("stop", "special")}
  settings = Settings(**values | texts)
  if recipe is None:
    return settings
  given = {name for name, flag in _SETTINGS.items() if flag.present}
  return recipe_settings(recipe, settings, given)


def _load_template(recipe: Recipe | None):
  """The template of the flags, or None. Raises ValueError for flags that make no sense with it."""
  from gpt2_jax.data.templates import load_template

  if recipe is not None and _TEMPLATE.value is not None:
    raise ValueError(f"--recipe={recipe.name[:40]} has its own template; leave out --template")
  template = None
  if recipe is not None:
    template = recipe.template()
  elif _TEMPLATE.value is not None:
    template = load_template(_TEMPLATE.value)

  if _REVERSE.value and (template is None or _SAMPLES.value > 1):
    raise ValueError(
      "--reverse takes the best answer of a chat: give its --recipe or --template, and the number "
      "of answers that are drawn as --candidates, not --samples"
    )
  if template is not None and not (_INTERACTIVE.value or _PROMPT.value or _FIELD.value):
    raise ValueError(
      f"the template {template.name[:80]} writes a message: give it as --prompt, or --interactive"
    )
  return template


def _load_policy():
  """The usage policy of the flags, or None."""
  from gpt2_jax.decoding.moderation import load_policy

  if _POLICY.value is None:
    if _POLICY_LOG.value is not None:
      raise ValueError("--policy_log is of a --policy, which is not there; give both")
    return None
  return load_policy(_POLICY.value, _POLICY_LOG.value)


def _load_reverse(mesh, tokenizer) -> Ranking | None:
  """The backward model of the flags. Raises ValueError for one of another vocabulary."""
  from gpt2_jax.convert.pretrained import load_pretrained
  from gpt2_jax.decoding import for_inference

  if _REVERSE.value is None:
    return None
  model, vocabulary = load_pretrained(
    user_path(_REVERSE.value), mesh, _DTYPE.value, quantize=_QUANTIZE.value
  )
  if vocabulary is None or vocabulary.fingerprint != tokenizer.fingerprint:
    raise ValueError(
      f"{_REVERSE.value[:200]} has another tokenizer than {_MODEL.value[:200]}: a backward model "
      "scores the answers in their own tokens; train it from the same checkpoint"
    )
  return Ranking(for_inference(model, donate=True), _CANDIDATES.value, _REVERSE_WEIGHT.value)


def _run_console(decoder, tokenizer, settings: Settings, answering: Answering) -> None:
  # Bytes that are no UTF-8 make an error of their line, and not of the session; so does what the
  # terminal has no sign for.
  if sys.stdin.encoding:
    sys.stdin.reconfigure(errors="surrogateescape")
  sys.stdout.reconfigure(errors="backslashreplace")

  # A second Ctrl-C does not end the session either: it has texts that nobody has saved.
  if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

  Console(decoder, tokenizer, settings, open_terminal(complete_line), answering).run()


def _print_texts(decoder, tokenizer, settings: Settings, answering: Answering) -> None:
  from gpt2_jax.decoding import complete

  texts = _PROMPT.value or [""]
  template, fields = answering.template, answering.fields
  prompts = [prompt_ids(tokenizer, settings, template, [], text, fields) for text in texts]
  generation = dataclasses.replace(settings.generation(), samples=_SAMPLES.value)
  generation = add_stops(generation, template, tokenizer)
  terminal, waiting = Terminal(sys.stdout), Terminal(sys.stderr)

  # 1. The default number of tokens is for contexts that have room for it.
  if not _SETTINGS["n_new"].present:
    longest = max(map(len, prompts))
    generation, note = shorten_to_context(generation, longest, decoder.model.config.n_ctx)
    if note:
      waiting.write(note, "dim")

  def answer_chunks(row: int) -> Iterator[str]:
    chunks = answering.chunks(decoder, tokenizer, [], texts[row], prompts[row], generation)
    return (chunk for chunk, _ in chunks if chunk)

  # An answer begins a line of its own.
  shown = texts if template is None else [f"{text}\n" for text in texts]

  # 2. One text, as it comes. The prompt is dim on a terminal, and what the model added is not.
  if len(prompts) * _SAMPLES.value == 1:
    with waiting.waiting("compiling and reading the prompt"):
      chunks = answer_chunks(0)
      first = next(chunks, "")
    terminal.write(shown[0], "dim", end="")
    for chunk in itertools.chain([first], chunks):
      terminal.write(chunk, end="")
    terminal.write()
    return

  # 3. Several, when all of them are there; `complete` says so if it takes a while.
  if answering.ranking is None:
    policy = answering.moderation
    answers = complete(decoder, tokenizer, prompts, generation=generation, moderation=policy)
  else:
    answers = ["".join(answer_chunks(row)) for row in range(len(prompts))]
  for row, added in enumerate(answers):
    terminal.write("-" * 80, "dim")
    terminal.write(shown[row // _SAMPLES.value], "dim", end="")
    terminal.write(added)


def run() -> None:
  flags.mark_flags_as_required(["model"])
  shell.run(main, __doc__, imports=("gpt2_jax.convert.pretrained", "gpt2_jax.decoding"))
