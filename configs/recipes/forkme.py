# SPDX-License-Identifier: Apache-2.0
"""Fine-tuning for an application: a table of recipes, to be copied and changed.

  gpt2-jax tokenize --recipe=story --examples=story.jsonl --split='train[:90%]' \\
    --out=data/story/train
  gpt2-jax tokenize --recipe=story --examples=story.jsonl --split='train[90%:]' \\
    --out=data/story/validation
  gpt2-jax train --config=recipes/forkme:story --workdir=runs/story --config.init_from=gpt2
  gpt2-jax sample --recipe=story --model=runs/story --prompt='A lighthouse keeper finds a door.'

--config=recipes/forkme:story:lora trains LoRA. A copy of this file is one's own table:
--config=mine.py:story, --recipe=mine.py:story. The recipes set formats and sampling; learning rates
and steps are those of configs/finetune.py, and are where to begin, not the result of a search:
nobody has trained GPT-2 by them with this code yet.
"""

from ml_collections import ConfigDict

from gpt2_jax.configs import finetune
from gpt2_jax.recipe import Recipe

EOT = "<|endoftext|>"
# How texts of some length are drawn, and answers that have to be right.
WRITING = {"n_new": 400, "temperature": 0.9, "top_p": 0.95}
TALKING = {"n_new": 100, "temperature": 0.8, "top_p": 0.95}
PRECISE = {"n_new": 100, "greedy": True}

RECIPES = (
  # The four forms of data, without a format of their own.
  Recipe(
    "text",
    "text",
    {"text": "Call me Ishmael. Some years ago I went to sea."},
    "one author, or any plain text",
    sampling=WRITING,
    # A book is a few hundred windows: it is learned by heart within a few epochs.
    knobs={
      "steps": 500,
      "warmup_steps": 50,
      "eval_every": 50,
      "save_every": 50,
      "sample_tokens": 64,
    },
  ),
  Recipe(
    "prompt",
    "prompt",
    {"prompt": "Translate to French: cat\nFrench:", "completion": " chat"},
    "prompts and completions as they are",
    sampling=TALKING,
  ),
  Recipe(
    "labels",
    "labels",
    {"text": "A warm and funny film.", "label": 1},
    "classes of texts; set classify.classes to their number",
    n_ctx=128,
    knobs={"classify.classes": 2},
  ),
  Recipe(
    "chat",
    "chat",
    {
      "messages": [
        {"role": "user", "content": "Does money buy happiness?"},
        {"role": "assistant", "content": "It buys time."},
      ]
    },
    "conversations as DialoGPT has them (Zhang et al. 2020), every turn of them learned",
    turns="dialogpt",
    loss="all",
    n_ctx=256,
    sampling={"n_new": 100, "top_k": 10},
    knobs={"steps": 2000, "warmup_steps": 200},
  ),
  Recipe(
    "chat_reverse",
    "chat",
    {
      "messages": [
        {"role": "user", "content": "Does money buy happiness?"},
        {"role": "assistant", "content": "It buys time."},
      ]
    },
    "the backward model that ranks the answers of chat: the same data, last turn first",
    backward_of="chat",
    turns="dialogpt_reverse",
    loss="all",
    n_ctx=256,
    knobs={"steps": 2000, "warmup_steps": 200},
  ),
  # Applications.
  Recipe(
    "story",
    "prompt",
    {"plot": "A lighthouse keeper finds a door.", "story": "It was there at low tide, ajar."},
    "a plot becomes a story (Fan et al. 2018: prompts of r/WritingPrompts)",
    turns={"plot": ("", "\n\n"), "story": ("", EOT)},
    n_ctx=1024,
    sampling=WRITING,
  ),
  Recipe(
    "poetry",
    "prompt",
    {"title": "The Tyger", "poem": "Tyger Tyger, burning bright,\nIn the forests of the night"},
    "a title becomes a poem",
    turns={"title": ("# ", "\n\n"), "poem": ("", EOT)},
    loss="all",
    sampling=WRITING | {"n_new": 200, "temperature": 1.0},
  ),
  Recipe(
    "articles",
    "prompt",
    {
      "domain": "example.org",
      "date": "May 29, 2019",
      "authors": "Ada Byron",
      "title": "A new bridge opens",
      "article": "The bridge over the river opened on Monday.",
    },
    "news with Grover's fields (Zellers et al. 2019); any of them may be left out",
    turns={
      "domain": ("Domain: ", "\n"),
      "date": ("Date: ", "\n"),
      "authors": ("Authors: ", "\n"),
      "title": ("Title: ", "\n\n"),
      "article": ("", EOT),
    },
    loss="all",
    n_ctx=1024,
    sampling=WRITING | {"n_new": 600},
  ),
  Recipe(
    "support",
    "chat",
    {
      "messages": [
        {"role": "system", "content": "Shop: garden tools. Returns within 30 days."},
        {"role": "user", "content": "The handle broke on the second day."},
        {"role": "assistant", "content": "I am sorry. We send a new one today."},
      ]
    },
    "customer support: the agent's turns are learned; what holds for all is the field system",
    turns={
      "system": ("", "\n\n"),
      "user": ("Customer: ", "\n"),
      "assistant": ("Agent: ", EOT),
    },
    stop=("\nCustomer:",),
    sampling=TALKING | {"temperature": 0.5},
  ),
  Recipe(
    "subreddit",
    "prompt",
    {
      "subreddit": "askscience",
      "title": "Why is the sky blue?",
      "post": "And red in the evening?",
      "reply": "Short waves scatter more.",
    },
    "subreddit simulation (r/SubSimulatorGPT2): a tag before and after each part of a thread",
    turns={
      "subreddit": ("<subreddit> ", " </subreddit>\n"),
      "title": ("<title> ", " </title>\n"),
      "post": ("<post> ", " </post>\n"),
      "reply": ("<reply> ", " </reply>" + EOT),
    },
    prompt="title",
    response="post",
    stop=("</reply>",),
    loss="all",
    sampling=WRITING | {"n_new": 300, "temperature": 1.0},
  ),
  Recipe(
    "adventure",
    "chat",
    {
      "messages": [
        {"role": "memory", "content": "You are a knight in search of a lost crown."},
        {"role": "assistant", "content": "You stand at a gate."},
        {"role": "user", "content": "open the gate"},
        {"role": "assistant", "content": "It opens, and nobody is there."},
      ]
    },
    "text adventure, AI Dungeon's: the field memory stays, the oldest turns make room",
    turns={"memory": ("", "\n\n"), "user": ("\n> ", "\n"), "assistant": ("", "")},
    stop=("\n>",),
    loss="all",
    n_ctx=1024,
    sampling=TALKING,
  ),
  Recipe(
    "translation",
    "prompt",
    {"english": "The cat sleeps.", "french": "Le chat dort."},
    "the GPT-2 paper's format (3.7): english sentence = french sentence",
    turns={"english": ("", " ="), "french": (" ", "\n" + EOT)},
    stop=("\n",),
    n_ctx=256,
    sampling=PRECISE,
  ),
  Recipe(
    "summarization",
    "prompt",
    {
      "article": "The bridge over the river opened on Monday. It cost nine million.",
      "summary": "A bridge opened.",
    },
    "the GPT-2 paper's format (3.6): the article, and TL;DR: after it",
    turns={"article": ("", "\nTL;DR:"), "summary": (" ", EOT)},
    n_ctx=1024,
    sampling=PRECISE,
  ),
  Recipe(
    "questions",
    "prompt",
    {
      "context": "The bridge opened on Monday.",
      "question": "When did the bridge open?",
      "answer": "on Monday",
    },
    "question answering, with a text or without (the GPT-2 paper's Q: and A:)",
    turns={"context": ("", "\n\n"), "question": ("Q: ", "\n"), "answer": ("A: ", "\n" + EOT)},
    stop=("\n",),
    sampling=PRECISE | {"n_new": 40},
  ),
  Recipe(
    "code",
    "text",
    {"text": 'def area(radius):\n  """The area of a circle."""\n  return 3.14159 * radius**2\n'},
    "code completion; ends where a function does (the stop strings of Chen et al. 2021)",
    stop=("\nclass", "\ndef", "\n#", "\nif", "\nprint"),
    sampling={"n_new": 200, "temperature": 0.2, "top_p": 0.95},
  ),
  Recipe(
    "tutoring",
    "chat",
    {
      "messages": [
        {"role": "system", "content": "Fractions, grade 5."},
        {"role": "user", "content": "Why is 1/2 more than 1/3?"},
        {"role": "assistant", "content": "Cut one cake in two, and one in three."},
      ]
    },
    "a tutor's turns are learned; the field system is the topic",
    turns={
      "system": ("Topic: ", "\n\n"),
      "user": ("Student: ", "\n"),
      "assistant": ("Tutor: ", EOT),
    },
    stop=("\nStudent:",),
    sampling=TALKING | {"temperature": 0.7},
  ),
  Recipe(
    "reports",
    "prompt",
    {
      "subject": "Sales in March",
      "data": "north: 12, south: 9",
      "report": "The north sold more than the south.",
    },
    "figures become a report",
    turns={"subject": ("Report: ", "\n"), "data": ("Data: ", "\n\n"), "report": ("", EOT)},
    n_ctx=1024,
    sampling={"n_new": 300, "temperature": 0.4, "top_p": 0.9},
  ),
)


def get_config(application: str = "text") -> ConfigDict:
  """`application` follows the colon: a name of the table, and :lora for LoRA, as in story:lora."""
  name, _, trained = application.partition(":")
  recipes = {recipe.name: recipe for recipe in RECIPES}
  if name not in recipes:
    raise ValueError(f"there is no recipe {name[:40]!r}; there are {', '.join(recipes)}")
  recipe = recipes[name]

  config = finetune.get_config(trained or "full")
  config.data.update(train=f"data/{name}/train", validation=f"data/{name}/validation")
  # Rows of examples have a length; windows of a text are as long as the checkpoint's context.
  if recipe.form != "text":
    config.model.n_ctx = recipe.n_ctx
  config.update_from_flattened_dict(dict(recipe.knobs))
  return config
