# SPDX-License-Identifier: Apache-2.0
"""Children's Book Test (CBT; Hill et al., 2016): cloze questions after 20 sentences of a book.

One of ten words was left out of the 21st sentence. Section 3.2 of the GPT-2 paper chooses the word
for which "each choice and the rest of the sentence conditioned on this choice" is likeliest. It
uses the validation set, whose books are not in WebText, after a "de-tokenizer was applied to remove
PTB style tokenization artifacts". That de-tokenizer was not published. The one here undoes what
Stanford CoreNLP, which the authors of the test ran, does to English. The protocol `raw` leaves the
text as it is published.
"""

import pathlib
from collections.abc import Callable, Iterator

from gpt2_jax.evaluate.sources import Download, Row, Source, at_place
from gpt2_jax.evaluate.task import Likelihood, Loglikelihood, Task
from gpt2_jax.evaluate.tasks.choice import ACCURACY, likeliest_choice
from gpt2_jax.files import summarize

# Facebook's own copy, which ParlAI fetches: its address and its SHA-256 of the archive
# (parlai/tasks/cbt/build.py).
ARCHIVE = "http://parl.ai/downloads/cbt/cbt.tar.gz"
ARCHIVE_SHA256 = "932df0cadc1337b2a12b4c696b1041c1d1c6d4b6bd319874c6288f02e4a61e92"

BLANK = "XXXXX"
SENTENCES, CANDIDATES = 20, 10

# ---- files to rows


def read(path: pathlib.Path) -> Iterator[Row]:
  """Reads the questions of a published file.

  Lines 1 to 20 of a question are its context; line 21 has the question and its candidates.
  """
  sentences = []
  with open(path, encoding="utf-8") as file:
    for file_line, line in enumerate(file, 1):
      # An empty line separates questions.
      if not line.strip():
        continue

      # Every line begins with its number within the question.
      place = f"{path}:{file_line}"
      number, _, text = line.rstrip("\n").partition(" ")
      due = len(sentences) + 1
      if number != str(due):
        raise ValueError(
          f"{place} is malformed: it begins with {number[:40]!r}, where line {due} of 21 is due"
        )

      if len(sentences) < SENTENCES:
        sentences.append(text.strip())
      else:
        yield at_place(place, lambda text=text: _row(sentences, text))  # noqa: B023
        sentences = []

  if sentences:
    raise ValueError(f"{path} ends after line {len(sentences)} of a question's 21")


def _row(sentences: list[str], text: str) -> Row:
  # 1. Split line 21: the question, the answer, an empty field, and the candidates.
  fields = list(map(str.strip, text.split("\t")))
  if len(fields) < 3:
    raise ValueError("it has no answer and candidates after its question, with tabs between")
  question = fields[0]
  answer = fields[1]
  candidates = fields[-1].split("|")

  # 2. Refuse what would be scored wrongly without a word.
  if BLANK not in question:
    raise ValueError(f"its question has no blank {BLANK}")
  if len(candidates) != CANDIDATES or not all(candidates):
    raise ValueError(f"it has {len(list(filter(None, candidates)))} candidates, not {CANDIDATES}")
  if answer not in candidates:
    raise ValueError(
      f"its answer {answer[:80]!r} is none of its candidates {summarize(candidates, 10, 20)}"
    )

  label = candidates.index(answer)
  return {"sentences": sentences, "question": question, "candidates": candidates, "label": label}


# ---- the de-tokenizer

# PTB's escapes, and how people write them
UNESCAPED = {
  "``": '"',
  "''": '"',
  "`": "'",
  "-LRB-": "(",
  "-RRB-": ")",
  "-LSB-": "[",
  "-RSB-": "]",
  "-LCB-": "{",
  "-RCB-": "}",
}
# no space follows these
OPENING = frozenset("`` ` -LRB- -LSB- -LCB- ( [ { $ £".split())
# no space precedes these
CLOSING = frozenset([*",.;:!?)]}%'", *"'' -RRB- -RSB- -RCB- ... n't 's 'm 'd 're 've 'll".split()])
# words that CoreNLP splits in two
SPLIT_WORDS = frozenset(
  [
    ("can", "not"),
    ("gon", "na"),
    ("got", "ta"),
    ("wan", "na"),
    ("gim", "me"),
    ("lem", "me"),
    ("'t", "is"),
    ("'t", "was"),
  ]
)


def detokenized(text: str) -> str:
  """Detokenizes PTB-style text: as people write it, with straight quotes."""
  written = ""
  before = None
  for token in text.split():
    if before is not None and not _sticks(before, token):
      written += " "
    written += UNESCAPED.get(token, token)
    before = token
  return written


def _sticks(before: str, token: str) -> bool:
  """Whether no space stands between two tokens."""
  if before in OPENING:
    return True
  # -RRB- is in upper case; 'S and N'T count like 's and n't
  if token in CLOSING or token.lower() in CLOSING:
    return True
  return (before.lower(), token.lower()) in SPLIT_WORDS


# ---- the task


def _filled(row: Row, write: Callable[[str], str]) -> list[Loglikelihood]:
  """Requests for each candidate, as it is spelled in the list, with the rest of the sentence."""
  text = write(" ".join([*row["sentences"], row["question"]]))
  before, _, after = text.partition(BLANK)

  # The space before the blank belongs to the continuation: in GPT-2's BPE a word begins with it.
  context = before.rstrip()
  space = before[len(context) :]

  requests = []
  for candidate in row["candidates"]:
    # a question may leave the word out more than once
    rest = after.replace(BLANK, candidate)
    requests.append(Loglikelihood(context, space + candidate + rest))
  return requests


def _sums(row: Row, answers: list[Likelihood]) -> dict[str, float]:
  return {"correct": float(likeliest_choice(answers) == row["label"])}


DESCRIPTIONS = {
  "paper": "the choice and the rest of its sentence, after a de-tokenizer, on the validation set "
  "(the GPT-2 paper)",
  "raw": "the choice and the rest of its sentence in the published, tokenized text of the "
  "validation set",
}


def _task(word_class: str, protocol: str, write: Callable[[str], str]) -> Task:
  def requests(row: Row) -> list[Loglikelihood]:
    return _filled(row, write)

  def example(row: Row) -> str:
    right = requests(row)[row["label"]]
    return right.context + right.continuation

  file = f"cbtest_{word_class}_valid_2000ex.txt"
  return Task(
    name=f"cbt_{word_class.lower()}",
    protocol=protocol,
    description=DESCRIPTIONS[protocol],
    source=Source(
      name="cbt",
      files=(file,),
      read=read,
      url="https://research.facebook.com/downloads/babi",
      downloads=(Download(ARCHIVE, ARCHIVE_SHA256, (f"CBTest/data/{file}",)),),
    ),
    requests=requests,
    sums=_sums,
    metrics=ACCURACY,
    example=example,
    chance={"accuracy": 100 / CANDIDATES},
  )


# common nouns and named entities
TASKS = (
  _task("CN", "paper", detokenized),
  _task("CN", "raw", str),
  _task("NE", "paper", detokenized),
  _task("NE", "raw", str),
)
