# SPDX-License-Identifier: Apache-2.0
"""The Children's Book Test (Hill et al., 2016): which of ten words was left out of the last of 21 sentences?

As section 3.2 of the GPT-2 paper has it: the choice with which "each choice and the rest of the sentence conditioned
on this choice" is likeliest, on the validation set, whose books are not in WebText, after a "de-tokenizer was applied
to remove PTB style tokenization artifacts". That de-tokenizer was not published; the one here undoes what Stanford
CoreNLP, which the authors of the test ran, does to English. `raw` leaves the text as it is published.
"""

import pathlib
from collections.abc import Callable, Iterator

from gpt2_jax.evaluate.sources import Row, Source, at_place
from gpt2_jax.evaluate.task import Continuation, Likelihood, Task
from gpt2_jax.evaluate.tasks.choice import ACCURACY, chosen

BLANK = "XXXXX"
SENTENCES, CANDIDATES = 20, 10


def read(path: pathlib.Path) -> Iterator[Row]:
  """Questions of a published file: lines 1 to 20 are the context, the 21st has the question and its candidates."""
  sentences = []
  with open(path, encoding="utf-8") as file:
    for number, line in enumerate(file, 1):
      if not line.strip():
        continue
      place, (count, _, text) = f"{path}:{number}", line.rstrip("\n").partition(" ")
      if count != str(len(sentences) + 1):
        raise ValueError(
          f"{place} is malformed: it begins with {count!r}, where line {len(sentences) + 1} of 21 is due"
        )
      if len(sentences) < SENTENCES:
        sentences.append(text.strip())
      else:
        yield at_place(place, lambda text=text: _row(sentences, text))  # noqa: B023
        sentences = []
  if sentences:
    raise ValueError(f"{path} ends after line {len(sentences)} of a question's 21")


def _row(sentences: list[str], text: str) -> Row:
  fields = [field.strip() for field in text.split("\t")]
  if len(fields) < 3:
    raise ValueError("it has no answer and candidates after its question, with tabs between")
  question, answer, candidates = fields[0], fields[1], fields[-1].split("|")
  if BLANK not in question:
    raise ValueError(f"its question has no blank {BLANK}")
  if len(candidates) != CANDIDATES or not all(candidates):
    raise ValueError(f"it has {len(list(filter(None, candidates)))} candidates, not {CANDIDATES}")
  if answer not in candidates:
    raise ValueError(f"its answer {answer!r} is none of its candidates {', '.join(candidates)}")
  label = candidates.index(answer)
  return {"sentences": sentences, "question": question, "candidates": candidates, "label": label}


# ---- the de-tokenizer

WRITTEN = {
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
AFTER = frozenset(["``", "`", "-LRB-", "-LSB-", "-LCB-", "(", "[", "{", "$", "£"])  # no space after them
BEFORE = frozenset(
  [*",.;:!?)]}%'", "''", "-RRB-", "-RSB-", "-RCB-", "...", "n't", "'s", "'m", "'d", "'re", "'ve", "'ll"]
)
PAIRS = frozenset(
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
  """Text as people write it, with straight quotes."""
  tokens = text.split()
  pieces = []
  for i, token in enumerate(tokens):
    before = tokens[i - 1] if i else None
    joined = before is None or before in AFTER or token.lower() in BEFORE or token in BEFORE
    pieces.append("" if joined or (before.lower(), token.lower()) in PAIRS else " ")
    pieces.append(WRITTEN.get(token, token))
  return "".join(pieces)


# ---- the task


def _filled(row: Row, write: Callable[[str], str]) -> list[Continuation]:
  """Each candidate, in whatever shape it has in the list, with the rest of the sentence."""
  text = write(" ".join([*row["sentences"], row["question"]]))
  before, _, after = text.partition(BLANK)
  context = before.rstrip()
  return [
    Continuation(context, before[len(context) :] + candidate + after.replace(BLANK, candidate))
    for candidate in row["candidates"]
  ]


def sums(row: Row, answers: list[Likelihood]) -> dict[str, float]:
  return {"correct": float(chosen(answers) == row["label"])}


def _task(kind: str, protocol: str, write: Callable[[str], str]) -> Task:
  def requests(row: Row) -> list[Continuation]:
    return _filled(row, write)

  def example(row: Row) -> str:
    right = requests(row)[row["label"]]
    return right.context + right.continuation

  about = {
    "paper": "the choice and the rest of its sentence, after a de-tokenizer, on the validation set (the GPT-2 paper)",
    "raw": "the choice and the rest of its sentence in the published, tokenized text of the validation set",
  }
  url = "https://research.facebook.com/downloads/babi"
  source = Source("cbt", (f"cbtest_{kind}_valid_2000ex.txt",), read, url)
  return Task(f"cbt_{kind.lower()}", protocol, about[protocol], source, requests, sums, ACCURACY, example)


TASKS = tuple(
  _task(kind, protocol, write) for kind in ("CN", "NE") for protocol, write in (("paper", detokenized), ("raw", str))
)
