# SPDX-License-Identifier: Apache-2.0
"""LAMBADA (Paperno et al., 2016): accuracy and perplexity of the last word of a passage.

Perplexity is per last word, however many tokens the word has. What was published under the one name
LAMBADA differs in the text and in what counts as right.

The texts:

- OpenAI's file as it is: with the last word whole, lm-evaluation-harness's `lambada_openai`.
- `openai`: that file as OpenAI's researchers said they had fed it (openai/gpt-2, issue 131), with
  smart quotes straightened and a newline before each passage.
- `original`: the authors' file, in lower case and tokenized, which TFDS has; it is the harness's
  `lambada_standard`.

What is right:

- last_word: each token of the word is the model's first choice after those before it.
- last_piece: only the word's last token is scored, given the others. Many re-implementations do
  that, and it is too easy.
- stop_words: the likeliest next word that is no stop word is the right one. In the paper this
  "approximation" of a filter takes 1542M from 52.66 % to 63.24 %. Neither its list nor its search
  was published. Here it is NLTK's list, and each of the 16 likeliest first tokens is continued
  greedily to the word's end. Perplexity is that of last_word.

The protocol `openai_stop_words` is the paper's: stop_words on OpenAI's text as OpenAI fed it.
"""

import functools
import pathlib
from collections.abc import Callable, Iterator

from gpt2_jax.evaluate.metric import percent, perplexity
from gpt2_jax.evaluate.sources import (
  Download,
  Row,
  Source,
  at_place,
  check_plain_text,
  json_lines,
  text_field,
)
from gpt2_jax.evaluate.task import (
  Answer,
  Likelihood,
  Loglikelihood,
  NextWords,
  Request,
  Task,
  Words,
)

N_WORDS = 16  # first tokens that the stop-word filter looks through

# NLTK 3's English stop words (nltk_data, corpora/stopwords, 179 words).
STOP_WORDS = frozenset(
  """
  i me my myself we our ours ourselves you you're you've you'll you'd your yours yourself yourselves
  he him his himself she she's her hers herself it it's its itself they them their theirs themselves
  what which who whom this that that'll these those am is are was were be been being have has had
  having do does did doing a an the and but if or because as until while of at by for with about
  against between into through during before after above below to from up down in out on off over
  under again further then once here there when where why how all any both each few more most other
  some such no nor not only own same so than too very s t can will just don don't should should've
  now d ll m o re ve y ain aren aren't couldn couldn't didn didn't doesn doesn't hadn hadn't hasn
  hasn't haven haven't isn isn't ma mightn mightn't mustn mustn't needn needn't shan shan't shouldn
  shouldn't wasn wasn't weren weren't won won't wouldn wouldn't
  """.split()
)

# ---- files to rows


def _row(record: dict) -> Row:
  """Row of a passage. Raises ValueError if no context would be left without its last word."""
  context, _, word = text_field(record, "text").rpartition(" ")
  if not context.strip() or not word.strip():
    raise ValueError("its text has no last word after others and a space")
  return {"text": record["text"]}


def _tfds_row(record: dict) -> Row:
  return _row({"text": record["passage"].strip()})


def read_original(path: pathlib.Path) -> Iterator[Row]:
  """Reads the authors' file, one passage a line."""
  check_plain_text(path)
  with open(path, encoding="utf-8") as file:
    for number, line in enumerate(file, 1):
      # the last line may be empty
      if line.strip():
        yield at_place(f"{path}:{number}", lambda line=line: _row({"text": line.strip()}))


# ---- rows to requests

Write = Callable[[str], str]  # from a passage's text to what the model reads


def as_openai_fed_it(text: str) -> str:
  """The passage with straight quotes, after a newline."""
  for quotes, straight in (("“”", '"'), ("‘’", "'")):
    for quote in quotes:
      text = text.replace(quote, straight)

  # the file also has quotes as TeX and PTB write them
  return "\n" + text.replace("``", '"').replace("''", '"').strip()


def _split_last_word(text: str) -> tuple[str, str]:
  context, _, word = text.rpartition(" ")
  return context, word


def _last_word_requests(write: Write, row: Row) -> list[Request]:
  # the space belongs to the word: in GPT-2's BPE a word begins with it
  context, word = _split_last_word(write(row["text"]))
  return [Loglikelihood(context, f" {word}")]


def _last_token_requests(write: Write, row: Row) -> list[Request]:
  context, word = _split_last_word(write(row["text"]))
  return [Loglikelihood(context, f" {word}", last_token_only=True)]


def _stop_word_requests(write: Write, row: Row) -> list[Request]:
  # The first request gives the perplexity, the second one the accuracy.
  context, _ = _split_last_word(write(row["text"]))
  return [*_last_word_requests(write, row), NextWords(context, N_WORDS)]


# ---- answers to sums


def _greedy_sums(row: Row, answers: list[Likelihood]) -> dict[str, float]:
  [answer] = answers
  return {"nats": answer.nats, "words": 1.0, "correct": float(answer.greedy)}


def _stop_word_sums(write: Write, row: Row, answers: list[Answer]) -> dict[str, float]:
  likelihood, words = answers

  # as the word is written in the text that the model reads, with its quotes
  _, last_word = _split_last_word(write(row["text"]))
  correct = likeliest_content_word(words) == last_word
  return {"nats": likelihood.nats, "words": 1.0, "correct": float(correct)}


def likeliest_content_word(words: Words) -> str | None:
  """The likeliest word that is no stop word and not punctuation alone; None without such a word."""
  for word in words.words:
    is_punctuation = not any(map(str.isalnum, word))
    if not is_punctuation and word.lower() not in STOP_WORDS:
      return word

  # all of them were stop words: the answer counts as wrong
  return None


# ---- the tasks

OPENAI_URL = "https://openaipublic.blob.core.windows.net/gpt-2/data/lambada_test.jsonl"
OPENAI = Source(
  name="lambada",
  files=("lambada_test.jsonl",),
  read=lambda path: json_lines(path, _row),
  url=OPENAI_URL,
  # Early versions of lm-evaluation-harness (lm_eval/tasks/lambada.py) have this SHA-256.
  downloads=(
    Download(OPENAI_URL, "4aa8d02cd17c719165fc8a7887fddd641f43fcafa4b1c806ca8abc31fabdb226"),
  ),
)
ORIGINAL = Source(
  name="lambada",
  files=("lambada_test_plain_text.txt",),
  read=read_original,
  url="https://zenodo.org/record/2630551",
  tfds="lambada",
  split="test",
  row=_tfds_row,
  # The SHA-256 is that of TFDS.
  downloads=(
    Download(
      "https://zenodo.org/record/2630551/files/lambada-dataset.tar.gz?download=1",
      "8fbe499096ddbdcbbd0cac406861b5026fb451d15b8fe04e0e4f3d082f2ad5d7",
      ("lambada_test_plain_text.txt",),
    ),
  ),
)
METRICS = {"accuracy": percent("correct"), "perplexity": perplexity("words")}

# how a passage is written: the source, the function, and its description
TEXTS = {
  "as published": (OPENAI, str, "OpenAI's text"),
  "openai": (OPENAI, as_openai_fed_it, "OpenAI's text with straight quotes after a newline"),
  "original": (ORIGINAL, str, "the authors' lower-case text"),
}
# what is right: the requests, and their description
SCORED = {
  "last_word": (_last_word_requests, "the last word"),
  "last_token": (_last_token_requests, "the last word's last token"),
  "stop_words": (_stop_word_requests, "the last word past stop words"),
}


def _task(protocol: str, text: str, scored: str) -> Task:
  source, write, text_description = TEXTS[text]
  requests, scored_description = SCORED[scored]
  sums = functools.partial(_stop_word_sums, write) if scored == "stop_words" else _greedy_sums

  return Task(
    name="lambada",
    protocol=protocol,
    description=f"{scored_description}; {text_description}",
    source=source,
    requests=functools.partial(requests, write),
    sums=sums,
    metrics=METRICS,
    example=lambda row: write(row["text"]),
  )


TASKS = (
  _task("last_word", "as published", "last_word"),
  _task("last_piece", "as published", "last_token"),
  _task("stop_words", "as published", "stop_words"),
  _task("openai_stop_words", "openai", "stop_words"),
  _task("openai_last_word", "openai", "last_word"),
  _task("openai_last_piece", "openai", "last_token"),
  _task("original_last_word", "original", "last_word"),
  _task("original_last_piece", "original", "last_token"),
  _task("original_stop_words", "original", "stop_words"),
)
