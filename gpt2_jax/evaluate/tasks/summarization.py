# SPDX-License-Identifier: Apache-2.0
"""CNN/Daily Mail: summaries after `TL;DR:`, and the baselines (section 3.6 and Table 4 of the GPT-2 paper).

Published for 1542M, ROUGE-1 / 2 / L: 29.34 / 8.27 / 26.58 with the hint, 21.58 / 4.03 / 19.47 without; for the first
three sentences of the article 40.38 / 17.66 / 36.62, for three random ones 28.78 / 8.63 / 25.52. Their mean is what its
Figure 1 shows.

The paper does not say what it did with articles longer than the context. Here the prompt has an article's first 600
words (700 to 860 tokens of English prose), which leaves room for the hint and the summary; an article that is cut
counts as truncated. ROUGE-L is that of the summary as a whole, with a line for each sentence (`rougeLsum`), and words
are stemmed: so does ROUGE-1.5.5 with the options of See et al. (2017), whose data and baselines the paper uses.
"""

import functools
import hashlib
import pathlib
import random
import re
from collections.abc import Callable, Iterator

from gpt2_jax.evaluate.metric import Metric, percent
from gpt2_jax.evaluate.sources import Row, Source, at_place, json_lines
from gpt2_jax.evaluate.task import Generated, Prompt, Task

HINT = "\nTL;DR:"
WORDS = 600
N_NEW = 100
TOP_K = 2
SENTENCES = 3

# A sentence ends at . ! or ?, perhaps in a closing quote or bracket, before white space and a capital or digit ...
_GAP = re.compile(r"""(?:(?<=[.!?])|(?<=[.!?]["'”’)\]])|(?<=[.!?]\s»))\s+(?=(?:["'“‘(\[]|«\s?)?[A-ZÀ-ÖØ-Þ0-9])""")
# ... but not at an initial or a common abbreviation.
_ABBREVIATION = re.compile(
  r"\b(?:[A-Z]|Mr|Mrs|Ms|Dr|St|Sen|Rep|Gov|Gen|Col|Lt|Capt|Sgt|Prof|Rev|Hon|Jr|Sr|vs|No|Mme|Mlle|MM)\.$"
)
# How a line of a story ends that needs no period (abisee/cnn-dailymail, make_datafiles.py, as TFDS does it).
_ENDS = (".", "!", "?", "'", "`", '"', "’", "”", ")")


def sentences(text: str) -> list[str]:
  """The sentences of a text, by rule; a line break ends one, too."""
  found = []
  for line in map(str.strip, text.splitlines()):
    begin = 0
    for gap in _GAP.finditer(line):
      if not _ABBREVIATION.search(line, begin, gap.start()):
        found.append(line[begin : gap.start()])
        begin = gap.end()
    if line:
      found.append(line[begin:])
  return found


def read(path: pathlib.Path) -> Iterator[Row]:
  """Rows of JSON lines, or of the `.story` files of the URLs that a list names; these lie in two folders beside it."""
  if path.suffix == ".jsonl":
    yield from json_lines(path, _row)
    return
  for number, url in enumerate(path.read_text(encoding="utf-8").split(), 1):
    name = hashlib.sha1(url.encode()).hexdigest() + ".story"
    places = [path.parent / site / "stories" / name for site in ("cnn", "dailymail")]
    story = next((place for place in places if place.is_file()), None)
    if story is None:
      raise FileNotFoundError(f"{path}:{number}: neither {places[0]} nor {places[1]} is there; get all stories")
    yield at_place(str(story), lambda story=story: _row(_story(story.read_text(encoding="utf-8"))))


def _story(text: str) -> dict:
  """A published story: the article's lines, then `@highlight` and a line, some times."""
  lines = [line for line in map(str.strip, text.split("\n")) if line]
  first = lines.index("@highlight") if "@highlight" in lines else len(lines)
  highlights = [line for line in lines[first:] if line != "@highlight"]
  return {"article": " ".join(map(_ended, lines[:first])), "highlights": "\n".join(map(_ended, highlights))}


def _ended(line: str) -> str:
  return line if line.endswith(_ENDS) else line + "."


def _row(record: dict) -> Row:
  row = {key: record[key].strip() for key in ("article", "highlights")}
  for key, text in row.items():
    if not text:
      raise ValueError(f"its {key} are empty" if key == "highlights" else "its article is empty")
  return row


def _beginning(row: Row) -> str:
  return " ".join(row["article"].split()[:WORDS])


def _with_hint(row: Row) -> list[Prompt]:
  _rouge()  # if it is missing, that is said before anything is written
  return [Prompt(_beginning(row) + HINT, N_NEW, top_k=TOP_K)]


def _without_hint(row: Row) -> list[Prompt]:
  _rouge()
  return [Prompt(_beginning(row), N_NEW, top_k=TOP_K)]


def _nothing(row: Row) -> list[Prompt]:
  return []


def _example(row: Row) -> str:
  return f"{_beginning(row)}{HINT} {' '.join(row['highlights'].split())}"


def _written(row: Row, answers: list[Generated]) -> list[str]:
  return sentences(answers[0].text)[:SENTENCES]


def _lead(row: Row, answers: list[Generated]) -> list[str]:
  return sentences(row["article"])[:SENTENCES]


def _random(row: Row, answers: list[Generated]) -> list[str]:
  """Three sentences in the article's order; the article itself is the seed."""
  found = sentences(row["article"])
  drawn = random.Random(row["article"]).sample(range(len(found)), min(SENTENCES, len(found)))
  return [found[i] for i in sorted(drawn)]


@functools.cache
def _rouge():
  try:
    from rouge_score.rouge_scorer import RougeScorer
  except ImportError as error:
    raise ImportError("ROUGE needs rouge-score; pip install -e '.[eval]'") from error
  return RougeScorer(["rouge1", "rouge2", "rougeLsum"], use_stemmer=True)


def rouge(summary: list[str], highlights: str) -> dict[str, float]:
  """F1 of a summary's sentences against highlights, a line each, from 0 to 1."""
  scores = _rouge().score(highlights, "\n".join(summary))
  return {key.removesuffix("sum"): score.fmeasure for key, score in scores.items()}


def _sums(summary: Callable, row: Row, answers: list[Generated]) -> dict[str, float]:
  found = rouge(summary(row, answers), row["highlights"])
  cut = bool(answers) and len(row["article"].split()) > WORDS  # the scorer does not see that cut
  return found | {"truncated": float(cut or any(answer.truncated for answer in answers))}


KEYS = ("rouge1", "rouge2", "rougeL")
METRICS = {
  "rouge_mean": Metric(
    lambda sums: 100 * sum(sums[key] for key in KEYS) / (3 * sums["items"]), (*KEYS, "items"), True, "%"
  ),
  **{key: percent(key) for key in KEYS},
}


def _task(protocol: str, about: str, requests: Callable, summary: Callable, example: Callable | None = None) -> Task:
  source = Source(
    name="cnn_dailymail",
    files=("all_test.txt",),
    read=read,
    url="https://github.com/abisee/cnn-dailymail (all_test.txt, cnn/stories, dailymail/stories; or --data=FILE.jsonl)",
    tfds="cnn_dailymail",
    row=_row,
  )
  return Task("cnn_dailymail", protocol, about, source, requests, functools.partial(_sums, summary), METRICS, example)


TASKS = (
  _task(
    "tldr",
    "ROUGE of the first 3 sentences in 100 tokens after the article and TL;DR:, top-k 2 (paper, 3.6)",
    _with_hint,
    _written,
    _example,
  ),
  _task("no_hint", "as tldr, with nothing after the article (paper, Table 4)", _without_hint, _written),
  _task("lead_3", "ROUGE of the article's first 3 sentences; no model (paper, Table 4)", _nothing, _lead),
  _task("random_3", "ROUGE of 3 random sentences of the article; no model (paper, Table 4)", _nothing, _random),
)
