# SPDX-License-Identifier: Apache-2.0
"""Summarization (CNN/Daily Mail): ROUGE of what is generated after `TL;DR:`, and of baselines.

Section 3.6 and table 4 of the GPT-2 paper. Published for 1542M, ROUGE-1 / 2 / L: 29.34 / 8.27 /
26.58 with the hint, 21.58 / 4.03 / 19.47 without. The first three sentences of the article have
40.38 / 17.66 / 36.62, three random ones 28.78 / 8.63 / 25.52. Figure 1 there shows the mean of the
three.

The paper does not say what it did with articles longer than the context. Here the prompt has an
article's first 600 words (700 to 860 tokens of English prose), which leaves room for the hint and
the summary. An article that is cut counts as truncated. ROUGE-L is that of the summary as a whole,
with a line for each sentence (`rougeLsum`), and words are stemmed. So does ROUGE-1.5.5 with the
options of See et al. (2017), whose data and baselines the paper uses.
"""

import functools
import hashlib
import pathlib
import random
import re
from collections.abc import Callable, Iterator

from gpt2_jax.evaluate.metric import Metric, percent
from gpt2_jax.evaluate.sources import Row, Source, at_place, json_lines, text_field
from gpt2_jax.evaluate.task import Generated, GenerateUntil, Task

HINT = "\nTL;DR:"
WORDS = 600  # of the article in a prompt
N_NEW = 100
TOP_K = 2
SENTENCES = 3  # of a summary

# ---- sentences

# A sentence ends at . ! or ?, perhaps in a closing quote or bracket, before white space and a
# capital or digit ...
_GAP = re.compile(
  r"""(?:(?<=[.!?])|(?<=[.!?]["'”’)\]])|(?<=[.!?]\s»))\s+(?=(?:["'“‘(\[]|«\s?)?[A-ZÀ-ÖØ-Þ0-9])"""
)
# ... but not at an initial or a common abbreviation.
_ABBREVIATION = re.compile(
  r"\b(?:[A-Z]|Mr|Mrs|Ms|Dr|St|Sen|Rep|Gov|Gen|Col|Lt|Capt|Sgt|Prof|Rev|Hon|Jr|Sr|vs|No"
  r"|Mme|Mlle|MM)\.$"
)


def sentences(text: str) -> list[str]:
  """Splits a text into sentences, by rule; the end of a line ends a sentence, too."""
  split = []
  for line in map(str.strip, text.splitlines()):
    begin = 0
    for gap in _GAP.finditer(line):
      if not _ABBREVIATION.search(line, begin, gap.start()):
        split.append(line[begin : gap.start()])
        begin = gap.end()
    # the rest of the line, after its last gap
    if line:
      split.append(line[begin:])
  return split


# ---- files to rows

# A line of a story that ends otherwise gets a period (make_datafiles.py of abisee/cnn-dailymail,
# and TFDS).
_ENDS = (".", "!", "?", "'", "`", '"', "’", "”", ")")


def read(path: pathlib.Path) -> Iterator[Row]:
  """Reads JSON lines, or the `.story` files of the URLs that a list names.

  The stories lie in two folders beside the list, `cnn` and `dailymail`.
  """
  if path.suffix.lower() == ".jsonl":
    yield from json_lines(path, _row)
    return

  for number, url in enumerate(path.read_text(encoding="utf-8").split(), 1):
    # a story's file is named after its URL
    name = hashlib.sha1(url.encode()).hexdigest() + ".story"
    cnn = path.parent / "cnn" / "stories" / name
    daily_mail = path.parent / "dailymail" / "stories" / name
    if not cnn.is_file() and not daily_mail.is_file():
      raise FileNotFoundError(
        f"{path}:{number}: neither {cnn} nor {daily_mail} is there; get all stories"
      )

    story = cnn if cnn.is_file() else daily_mail
    yield at_place(str(story), lambda story=story: _row_of_story(story))


def _row_of_story(path: pathlib.Path) -> Row:
  """Row of a published story: the article's lines, then `@highlight` and a line, several times."""
  # 1. Part the article from its highlights.
  lines = list(filter(None, map(str.strip, path.read_text(encoding="utf-8").split("\n"))))
  first = lines.index("@highlight") if "@highlight" in lines else len(lines)
  highlights = [line for line in lines[first:] if line != "@highlight"]

  # 2. A headline or a highlight without a period would run into the sentence after it.
  article = " ".join(map(_with_period, lines[:first]))
  return _row({"article": article, "highlights": "\n".join(map(_with_period, highlights))})


def _with_period(line: str) -> str:
  return line if line.endswith(_ENDS) else line + "."


def _row(record: dict) -> Row:
  article = text_field(record, "article").strip()
  highlights = text_field(record, "highlights").strip()

  if not article:
    raise ValueError("its article is empty")
  if not highlights:
    raise ValueError("its highlights are empty")
  return {"article": article, "highlights": highlights}


# ---- rows to requests


def _beginning(row: Row) -> str:
  return " ".join(row["article"].split()[:WORDS])


def _requests_with_hint(row: Row) -> list[GenerateUntil]:
  _rouge()  # if it is missing, that is said before anything is generated
  return [GenerateUntil(_beginning(row) + HINT, N_NEW, top_k=TOP_K)]


def _requests_without_hint(row: Row) -> list[GenerateUntil]:
  _rouge()
  return [GenerateUntil(_beginning(row), N_NEW, top_k=TOP_K)]


def _no_requests(row: Row) -> list[GenerateUntil]:
  return []


def _example(row: Row) -> str:
  return f"{_beginning(row)}{HINT} {' '.join(row['highlights'].split())}"


# ---- summaries: a row and the model's answers to sentences

Summarize = Callable[[Row, list[Generated]], list[str]]


def _generated(row: Row, answers: list[Generated]) -> list[str]:
  return sentences(answers[0].text)[:SENTENCES]


def _lead(row: Row, answers: list[Generated]) -> list[str]:
  return sentences(row["article"])[:SENTENCES]


def _random(row: Row, answers: list[Generated]) -> list[str]:
  """Three sentences in the article's order; the article itself is the seed."""
  article = sentences(row["article"])
  # random.Random and not NumPy: its seed may be a text
  count = min(SENTENCES, len(article))
  drawn = random.Random(row["article"]).sample(range(len(article)), count)
  return [article[i] for i in sorted(drawn)]


# ---- summaries to sums


@functools.cache
def _rouge():
  try:
    from rouge_score.rouge_scorer import RougeScorer
  except ImportError as error:
    raise ImportError("ROUGE needs rouge-score: pip install 'gpt2_jax[eval]'") from error
  return RougeScorer(["rouge1", "rouge2", "rougeLsum"], use_stemmer=True)


def rouge(summary: list[str], highlights: str) -> dict[str, float]:
  """ROUGE F1 of a summary's sentences against highlights, a line each, from 0 to 1."""
  # rougeLsum takes each line for a sentence
  scores = _rouge().score(highlights, "\n".join(summary))
  return {key.removesuffix("sum"): score.fmeasure for key, score in scores.items()}


def _sums(summarize: Summarize, row: Row, answers: list[Generated]) -> dict[str, float]:
  scores = rouge(summarize(row, answers), row["highlights"])

  # The scorer sees only what the prompt has left of the article. The baselines read all of it.
  is_cut = bool(answers) and len(row["article"].split()) > WORDS
  truncated = is_cut or any(answer.truncated for answer in answers)
  return scores | {"truncated": float(truncated)}


# ---- the tasks

KEYS = ("rouge1", "rouge2", "rougeL")


def _rouge_mean(sums):
  """Mean of the three, in per cent, as in figure 1 of the paper."""
  return 100 * sum(sums[key] for key in KEYS) / (3 * sums["items"])


METRICS = {"rouge_mean": Metric(_rouge_mean, (*KEYS, "items"), True, "%")}
METRICS |= {key: percent(key) for key in KEYS}

CNN_DAILY_MAIL = Source(
  name="cnn_dailymail",
  files=("all_test.txt",),
  read=read,
  url="https://github.com/abisee/cnn-dailymail (all_test.txt, cnn/stories, dailymail/stories; or "
  "--data=FILE.jsonl)",
  tfds="cnn_dailymail",
  row=_row,
)


def _task(
  protocol: str,
  description: str,
  requests: Callable[[Row], list[GenerateUntil]],
  summarize: Summarize,
  example: Callable[[Row], str] | None = None,
) -> Task:
  sums = functools.partial(_sums, summarize)
  return Task(
    "cnn_dailymail", protocol, description, CNN_DAILY_MAIL, requests, sums, METRICS, example
  )


TASKS = (
  _task(
    "tldr",
    "ROUGE of the first 3 sentences in 100 tokens after the article and TL;DR:, top-k 2 (paper, "
    "3.6)",
    _requests_with_hint,
    _generated,
    _example,
  ),
  _task(
    "no_hint",
    "as tldr, with nothing after the article (paper, Table 4)",
    _requests_without_hint,
    _generated,
  ),
  _task(
    "lead_3",
    "ROUGE of the article's first 3 sentences; no model (paper, Table 4)",
    _no_requests,
    _lead,
  ),
  _task(
    "random_3",
    "ROUGE of 3 random sentences of the article; no model (paper, Table 4)",
    _no_requests,
    _random,
  ),
)
