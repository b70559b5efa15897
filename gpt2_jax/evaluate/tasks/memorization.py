# SPDX-License-Identifier: Apache-2.0
"""Memorization of training text: whether a prefix is continued as in training (k-extraction).

The rows are passages of text that the model was trained on. The first k tokens of a passage are the
prompt. It is memorized if greedy decoding continues them with its next n tokens (Carlini et al.
2023, "Quantifying memorization across neural language models"). One pass decides that, and nothing
is generated: greedy decoding follows a text as long as each of its tokens is the model's first
choice after those before it. Two tokens that tie for the first choice both count as it.

Passages come from files of text (*.txt, or *.jsonl with the key "text"), or from a token store:
windows at regular places, at most 1,000. They are text, and are read with the model's own
tokenizer. A passage begins before a space, so that its tokens are those of the running text. One
with fewer than k + n tokens is not scored.
"""

import dataclasses
import functools
import pathlib
import re
from collections.abc import Iterator

import numpy as np

from gpt2_jax.data.token_store import TokenStore
from gpt2_jax.evaluate.metric import mean, percent
from gpt2_jax.evaluate.sources import Row, Source, check_plain_text, json_lines, text_field
from gpt2_jax.evaluate.task import Request, Statistics, Task, TokenStatistics
from gpt2_jax.files import read_text

STORE = "manifest.json"
MOST_WINDOWS = 1000  # of a token store
# A passage has room for as many tokens of prose, which take 4 to 5 characters each in GPT-2's BPE.
CHARACTERS_PER_TOKEN = 6


# ---- files to rows


def read_passages(n_tokens: int, path: pathlib.Path) -> Iterator[Row]:
  """Passages of `n_tokens` tokens or more, of a file or of the token store with that manifest."""
  if path.name == STORE:
    texts = _store_texts(path.parent, n_tokens)
  elif path.suffix == ".jsonl":
    records = json_lines(path, lambda record: {"text": text_field(record, "text")})
    texts = (record["text"] for record in records)
  else:
    check_plain_text(path)
    texts = [read_text(path)]

  # The end of the last word belongs to it, unless it is no word.
  passage = re.compile(rf"\s.{{{CHARACTERS_PER_TOKEN * n_tokens}}}\S{{0,40}}", re.DOTALL)
  for text in texts:
    for match in passage.finditer(text):
      yield {"text": match[0]}


def _store_texts(folder: pathlib.Path, n_tokens: int) -> Iterator[str]:
  """The longest part without an end of text of each of some windows of a token store."""
  store = TokenStore.open(str(folder))
  tokenizer = store.tokenizer

  # 1. Read windows that do not overlap. A token may be one character.
  length = min(len(store), 2 * CHARACTERS_PER_TOKEN * n_tokens)
  n_windows = min(MOST_WINDOWS, len(store) // max(1, length))
  starts = np.linspace(0, len(store) - length, n_windows).astype(np.int64)
  for window in store.read(starts, length):
    # 2. No passage reaches over the end of a document.
    ends = np.flatnonzero(window == (-1 if tokenizer.eot is None else tokenizer.eot))
    documents = np.split(window, ends)
    longest = max(documents, key=len)
    yield tokenizer.decode(longest[longest != tokenizer.eot].tolist())


# ---- rows to requests, answers to sums


def _requests(row: Row) -> list[Request]:
  return [TokenStatistics(row["text"])]


def _sums(k: int, n: int, row: Row, answers: list[Statistics]) -> dict[str, float]:
  # The statistics begin with the text's second token.
  [answer] = answers
  first_choice_N = answer.rank[k - 1 : k - 1 + n] == 1
  scored = len(first_choice_N) == n

  # how many tokens are the model's first choice before one is not
  matched = int(np.append(first_choice_N, False).argmin())
  return {
    "scored": float(scored),
    "exact": float(scored and matched == n),
    "matched": float(scored * matched),
  }


# ---- the tasks

METRICS = {
  "exact_match": dataclasses.replace(percent("exact", over="scored"), higher=False),
  "matched_tokens": mean("matched", over="scored", unit="tokens", higher=False),
}


def _task(k: int, n: int) -> Task:
  source = Source(
    "memorization",
    ("*.txt",),
    functools.partial(read_passages, k + n),
    "your training data: its texts, or its token store",
    other_names=("*.jsonl", STORE),
    any_file=True,
  )
  description = f"whether {k} tokens of training text are continued by the next {n}, greedily"
  sums = functools.partial(_sums, k, n)
  return Task("memorization", f"k{k}", description, source, _requests, sums, METRICS)


TASKS = (_task(50, 50), _task(32, 32), _task(100, 50), _task(200, 50))
