# SPDX-License-Identifier: Apache-2.0
"""Every recipe: its example is written and masked as it stands here by hand, it trains, and an
answer ends where the recipe says."""

import dataclasses
import functools
import json
import re

import jax
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict

from configs.recipes import forkme
from gpt2_jax.cli.settings import Settings, recipe_settings
from gpt2_jax.cli.turns import add_stops, next_role, prompt_ids
from gpt2_jax.data.example_records import write_record
from gpt2_jax.data.pack_examples import encode_examples
from gpt2_jax.data.templates import PLAIN, ExampleEncoder, Message
from gpt2_jax.decoding import complete
from gpt2_jax.finetune.classify import Classify, add_head
from gpt2_jax.loss import NextToken
from gpt2_jax.model import GPT2
from gpt2_jax.recipe import FORMS, Recipe, load_recipe, recipes_of, shipped_recipes
from gpt2_jax.runs import knobs
from gpt2_jax.tokenizer import EOT
from gpt2_jax.train import init_state, train_step
from tests.pages.markdown import ROOT
from tests.recipes.tiny import CONFIG, N_CTX

RECIPES = {recipe.name: recipe for recipe in shipped_recipes()}

# The tokens of each example: what is scored stands in brackets, and | is <|endoftext|>.
WRITTEN = {
  "text": "C[all me Ishmael. Some years ago I went to sea.|]",
  "prompt": "Translate to French: cat\nFrench:[ chat|]",
  "labels": "A[ warm and funny film.|]",
  "chat": "D[oes money buy happiness?|It buys time.|]",
  "chat_reverse": "I[t buys time.|Does money buy happiness?|]",
  "story": "A lighthouse keeper finds a door.\n\n[It was there at low tide, ajar.|]",
  "poetry": "#[ The Tyger\n\nTyger Tyger, burning bright,\nIn the forests of the night|]",
  "articles": "D[omain: example.org\nDate: May 29, 2019\nAuthors: Ada Byron\nTitle: A new bridge "
  "opens\n\nThe bridge over the river opened on Monday.|]",
  "support": "Shop: garden tools. Returns within 30 days.\n\nCustomer: The handle broke on the "
  "second day.\nAgent:[ I am sorry. We send a new one today.|]",
  "subreddit": "<[subreddit> askscience </subreddit>\n<title> Why is the sky blue? </title>\n"
  "<post> And red in the evening? </post>\n<reply> Short waves scatter more. </reply>|]",
  "adventure": "Y[ou are a knight in search of a lost crown.\n\nYou stand at a gate.\n> open the "
  "gate\nIt opens, and nobody is there.]",
  "translation": "The cat sleeps. =[ Le chat dort.\n|]",
  "summarization": "The bridge over the river opened on Monday. It cost nine million.\nTL;DR:"
  "[ A bridge opened.|]",
  "questions": "The bridge opened on Monday.\n\nQ: When did the bridge open?\nA:[ on Monday\n|]",
  "code": 'd[ef area(radius):\n  """The area of a circle."""\n  return 3.14159 * radius**2\n|]',
  "tutoring": "Topic: Fractions, grade 5.\n\nStudent: Why is 1/2 more than 1/3?\nTutor:[ Cut one "
  "cake in two, and one in three.|]",
  "reports": "Report: Sales in March\nData: north: 12, south: 9\n\n[The north sold more than the "
  "south.|]",
}
# What is left to write where the first field alone is given.
NEXT_FIELDS = {"articles": "date", "subreddit": "title", "questions": "question"}
# One sampler for all, so that it is compiled once.
FORCED = Settings(n_new=64, greedy=True)
OPTIMIZER = optax.adam(1e-3)


@pytest.fixture(scope="module")
def step():
  """One update, compiled once for each objective."""

  @jax.jit
  def step_once(state, batch, objective):
    return train_step(state, batch, objective, optimizer=OPTIMIZER)

  return step_once


@functools.cache
def initial():
  """The state before the first step. A head for labels is there, whether it is trained or not."""

  @jax.jit
  def make(key):
    return init_state(key, CONFIG, OPTIMIZER, model=add_head(GPT2(CONFIG, key), 2, key))

  return make(jax.random.key(0))


def spell(tokenizer, ids, is_scored) -> str:
  """Tokens as text, with brackets around those that are scored."""
  text, was_scored = "", False
  for token, scored in zip(ids, is_scored, strict=True):
    if scored != was_scored:
      text += "[" if scored else "]"
    text += "|" if token == tokenizer.eot else tokenizer.decode([token])
    was_scored = scored
  return text + "]" * was_scored


def test_the_table_is_whole():
  assert list(RECIPES) == list(WRITTEN) and {r.form for r in RECIPES.values()} == set(FORMS)


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_a_recipe(recipe, bytes_tokenizer, tmp_path, step, mesh, reciting):
  # 1. Its example becomes a row of a store, with the mask that stands above.
  encoder = ExampleEncoder(recipe.template() or PLAIN, bytes_tokenizer, recipe.loss)
  documents = [write_record(dict(recipe.example), "a:1")]
  store = encode_examples(documents, encoder, str(tmp_path / "rows"), {}, N_CTX, 1)
  batch = store.read_rows(np.arange(1))
  n = store.manifest["example_tokens"]
  is_scored = [False, *(batch.weights_BT[0] > 0).tolist()][:n]
  assert spell(bytes_tokenizer, batch.tokens_BT[0, :n].tolist(), is_scored) == WRITTEN[recipe.name]
  assert store.manifest["cut"] == 0

  # 2. Two steps of training lower its loss.
  config = forkme.get_config(recipe.name)
  knobs.check(config)
  classes = config.classify.classes
  objective = Classify(classes) if classes else NextToken()
  with mesh(1, 1, 1):
    state = initial()
    placed = jax.device_put(batch, NamedSharding(state.model.mesh, P()))
    losses = []
    for _ in range(3):
      state, metrics = step(state, placed, objective)
      losses.append(float(metrics["loss"]))
  assert losses[0] > losses[1] > losses[2] > 0

  # 3. Its sampling is settings of gpt2-jax sample.
  settings = recipe_settings(recipe, Settings(), ())
  settings.generation()
  if recipe.form == "labels":
    return

  # 4. An answer ends at the first thing that ends one, and what follows is not seen.
  template = recipe.template()
  fields, typed, answer = split_example(recipe)
  ids = prompt_ids(bytes_tokenizer, settings, template, [], typed, fields)
  ends = [bytes_tokenizer.encode(text) for text in recipe.stop] or [[bytes_tokenizer.eot]]
  generation = dataclasses.replace(FORCED, stop=settings.stop).generation()
  generation = add_stops(generation, template, bytes_tokenizer)
  # A long prompt beside it: all recipes share one compiled shape.
  beside = [0] * 190
  for end in ends:
    said = [*bytes_tokenizer.encode(answer), *end, *bytes_tokenizer.encode(" and more")]
    model = reciting(len(ids), said)
    assert complete(model, bytes_tokenizer, [ids, beside], generation=generation)[0] == answer


def split_example(recipe: Recipe) -> tuple[dict, str, str]:
  """The fields before the prompt of a recipe's example, the prompt, and what is to be answered."""
  if recipe.form == "text":
    typed = recipe.example["text"][:10]
    return {}, typed, recipe.example["text"][10:50].split("\n")[0]

  template = recipe.template()
  messages = [(m["role"], m["content"]) for m in recipe.example.get("messages", [])]
  if not messages and "completion" in recipe.example:
    messages = [("user", recipe.example["prompt"]), ("assistant", recipe.example["completion"])]
  texts = dict(messages or recipe.example)
  before = template.roles[: template.roles.index(template.prompt)]
  fields = {role: texts[role] for role in before if role in texts and role != template.response}
  return fields, texts[template.prompt], texts[template.response][:50]


def test_a_flag_that_is_given_goes_before_the_recipe():
  recipe = RECIPES["translation"]
  plain = recipe_settings(recipe, Settings(), ())
  assert (plain.greedy, plain.n_new, plain.stop) == (True, 100, ("\n",))
  flags = Settings(n_new=7, temperature=0.5, stop=("x",))
  given = recipe_settings(recipe, flags, {"n_new", "temperature", "stop"})
  assert given == flags, "a temperature asks for draws"
  odd = dataclasses.replace(recipe, sampling={"top_q": 1})
  with pytest.raises(ValueError, match="sets 'top_q' of sampling, and there are n_new, greedy"):
    recipe_settings(odd, Settings(), ())


@pytest.mark.parametrize("name", NEXT_FIELDS)
def test_a_model_of_fields_goes_on_from_the_last_that_is_given(name, bytes_tokenizer):
  """So it writes a thread from the subreddit alone, and the prompt is what training saw there."""
  recipe = RECIPES[name]
  template = recipe.template()
  field = template.roles[0]
  fields = {field: recipe.example[field]}
  assert next_role(template, [Message(field, "x")]) == NEXT_FIELDS[name]

  ids = prompt_ids(bytes_tokenizer, Settings(), template, [], "", fields)
  whole = re.sub(r"[][]", "", WRITTEN[name])
  text = bytes_tokenizer.decode(ids)
  assert whole.startswith(text) and whole[len(text) :].lstrip().startswith(
    recipe.example[NEXT_FIELDS[name]]
  )
  with pytest.raises(ValueError, match="the last field of template"):
    prompt_ids(bytes_tokenizer, Settings(), template, [], "", {template.roles[-1]: "x"})


def test_the_commands_of_the_page_are_those_of_the_table():
  """configs/README.md shows what an owner of GPT-2's weights types, for each recipe."""
  page = (ROOT / "configs" / "README.md").read_text()
  for recipe in RECIPES.values():
    assert "\n".join(recipe.commands()) in page, recipe.name


def test_a_copy_of_the_file_is_ones_own_table(tmp_path):
  source = (ROOT / "configs/recipes/forkme.py").read_text()
  (tmp_path / "mine.py").write_text(source.replace('"story",\n', '"saga",\n', 1))
  recipe = load_recipe(f"{tmp_path}/mine.py:saga")
  assert recipe.form == "prompt" and recipe.template().roles == ["plot", "story"]
  assert load_recipe("story") == load_recipe("configs/recipes/forkme.py:story") == RECIPES["story"]


@pytest.mark.parametrize(
  ("name", "message"),
  [
    ("stroy", "no recipe 'stroy'; there are text, .*; did you mean story?"),
    ("", "no recipe ''"),
    ("gone.py:story", r"no file gone\.py"),
    ("broken.py:story", r"broken\.py: ZeroDivisionError: division by zero"),
    ("bare.py:story", "has no RECIPES, a tuple of Recipe"),
    ("odd.py:story", r"odd\.py: ValueError: recipe x has the form 'verse'; it is one of text, "),
  ],
)
def test_what_is_no_recipe_is_one_line(name, message, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  (tmp_path / "broken.py").write_text("1 / 0\n")
  (tmp_path / "bare.py").write_text("RECIPES = 'story'\n")
  (tmp_path / "odd.py").write_text(
    "from gpt2_jax.recipe import Recipe\nRECIPES = (Recipe('x', 'verse', {}),)\n"
  )
  with pytest.raises((ValueError, OSError), match=message) as error:
    load_recipe(name)
  assert "\n" not in str(error.value) and len(str(error.value)) < 600


def test_a_config_of_the_table_knows_its_names():
  assert forkme.get_config("story:lora").adapter.kind == "lora"
  assert forkme.get_config("labels").classify.classes == 2
  assert forkme.get_config("text").model.n_ctx is None, "the checkpoint's"
  with pytest.raises(ValueError, match="no recipe 'novel'; there are text, "):
    forkme.get_config("novel")
  assert isinstance(forkme.get_config(), ConfigDict)


def test_the_examples_are_json_and_end_in_no_special_token():
  for recipe in recipes_of(str(ROOT / "configs/recipes/forkme.py")):
    line = json.dumps(dict(recipe.example))
    assert EOT not in line and len(recipe.data_hint()) < 300
