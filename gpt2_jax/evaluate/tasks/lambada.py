# SPDX-License-Identifier: Apache-2.0
"""LAMBADA (Paperno et al., 2016): the last word of a passage. Perplexity is per last word, whatever it has in pieces.

What was published under one name differs in the text and in what counts as right. The texts:

- OpenAI's file, as it lies: with the last word whole, lm-evaluation-harness's `lambada_openai`.
- `openai`: that file as OpenAI's researchers said they had fed it (openai/gpt-2, issue 131): smart quotes
  straightened, a newline before each passage.
- `original`: the authors' file, in lower case and tokenized, which TFDS has: the harness's `lambada_standard`.

What is right:

- last_word: each piece of the word is the model's first choice after those before it.
- last_piece: only the last piece is scored, given the others, as in many a re-implementation; too easy.
- stop_words: the likeliest next word that is no stop word is the right one. In the paper this "approximation" of a
  filter takes 1542M from 52.66 % to 63.24 %; neither its list nor its search was published. Here: NLTK's list, and the
  16 likeliest first pieces, each continued greedily to the word's end. Perplexity is that of last_word.

The protocol `openai_stop_words` is the paper's: stop_words on OpenAI's text as OpenAI fed it.
"""

import functools
import pathlib
from collections.abc import Callable, Iterator

from gpt2_jax.evaluate.metric import percent, perplexity
from gpt2_jax.evaluate.sources import Row, Source, at_place, json_lines
from gpt2_jax.evaluate.task import Answer, Continuation, Likelihood, NextWords, Request, Task, Words

N_WORDS = 16  # first pieces that the stop-word filter looks through

# NLTK 3's English stop words (nltk_data, corpora/stopwords, 179 words).
STOP_WORDS = frozenset(
  """
  i me my myself we our ours ourselves you you're you've you'll you'd your yours yourself yourselves he him his himself
  she she's her hers herself it it's its itself they them their theirs themselves what which who whom this that that'll
  these those am is are was were be been being have has had having do does did doing a an the and but if or because as
  until while of at by for with about against between into through during before after above below to from up down in
  out on off over under again further then once here there when where why how all any both each few more most other
  some such no nor not only own same so than too very s t can will just don don't should should've now d ll m o re ve y
  ain aren aren't couldn couldn't didn didn't doesn doesn't hadn hadn't hasn hasn't haven haven't isn isn't ma mightn
  mightn't mustn mustn't needn needn't shan shan't shouldn shouldn't wasn wasn't weren weren't won won't wouldn wouldn't
  """.split()
)


def _row(record: dict) -> Row:
  """A passage. Raises ValueError where no context would be left without its last word."""
  context, _, word = record["text"].rpartition(" ")
  if not context.strip() or not word.strip():
    raise ValueError("its text has no last word after others and a space")
  return {"text": record["text"]}


def read_original(path: pathlib.Path) -> Iterator[Row]:
  """The authors' file: one passage a line."""
  with open(path, encoding="utf-8") as file:
    for number, line in enumerate(file, 1):
      if line.strip():
        yield at_place(f"{path}:{number}", lambda line=line: _row({"text": line.strip()}))


def as_openai_fed_it(text: str) -> str:
  """With quotes straight, and a newline first."""
  for quotes, straight in (("“”", '"'), ("‘’", "'")):
    for quote in quotes:
      text = text.replace(quote, straight)
  return "\n" + text.replace("``", '"').replace("''", '"').strip()


def _parted(text: str) -> tuple[str, str]:
  context, _, word = text.rpartition(" ")
  return context, word


def last_word(write: Callable[[str], str], row: Row) -> list[Request]:
  context, word = _parted(write(row["text"]))
  return [Continuation(context, f" {word}")]


def last_piece(write: Callable[[str], str], row: Row) -> list[Request]:
  context, word = _parted(write(row["text"]))
  return [Continuation(context, f" {word}", last_piece=True)]


def stop_words(write: Callable[[str], str], row: Row) -> list[Request]:
  return [*last_word(write, row), NextWords(_parted(write(row["text"]))[0], N_WORDS)]


def greedy_sums(row: Row, answers: list[Likelihood]) -> dict[str, float]:
  [answer] = answers
  return {"nats": answer.nats, "words": 1.0, "correct": float(answer.greedy)}


def filtered_sums(write: Callable[[str], str], row: Row, answers: list[Answer]) -> dict[str, float]:
  likelihood, words = answers
  right = likeliest(words) == _parted(write(row["text"]))[1]
  return {"nats": likelihood.nats, "words": 1.0, "correct": float(right)}


def likeliest(words: Words) -> str | None:
  """The likeliest word that is no stop word and no mere punctuation, if there is one."""
  return next((word for word in words.words if any(map(str.isalnum, word)) and word.lower() not in STOP_WORDS), None)


# ---- the tasks

OPENAI = Source(
  "lambada",
  ("lambada_test.jsonl",),
  lambda path: json_lines(path, _row),
  "https://openaipublic.blob.core.windows.net/gpt-2/data/lambada_test.jsonl",
)
ORIGINAL = Source(
  "lambada",
  ("lambada_test_plain_text.txt",),
  read_original,
  "https://zenodo.org/record/2630551",
  "lambada",
  "test",
  lambda record: _row({"text": record["passage"].strip()}),
)
METRICS = {"accuracy": percent("correct"), "perplexity": perplexity("words")}


def _task(protocol: str, text: str, asked: Callable) -> Task:
  source, write, what = {
    "": (OPENAI, str, "OpenAI's text"),
    "openai": (OPENAI, as_openai_fed_it, "OpenAI's text with straight quotes after a newline"),
    "original": (ORIGINAL, str, "the authors' lower-case text"),
  }[text]
  about = {last_word: "the last word", last_piece: "its last piece", stop_words: "the last word past stop words"}
  return Task(
    "lambada",
    protocol,
    f"{about[asked]}; {what}",
    source,
    functools.partial(asked, write),
    functools.partial(filtered_sums, write) if asked is stop_words else greedy_sums,
    METRICS,
    lambda row: write(row["text"]),
  )


TASKS = (
  _task("last_word", "", last_word),
  _task("last_piece", "", last_piece),
  _task("stop_words", "", stop_words),
  _task("openai_stop_words", "openai", stop_words),
  _task("openai_last_word", "openai", last_word),
  _task("openai_last_piece", "openai", last_piece),
  _task("original_last_word", "original", last_word),
  _task("original_last_piece", "original", last_piece),
  _task("original_stop_words", "original", stop_words),
)
