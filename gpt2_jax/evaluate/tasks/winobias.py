# SPDX-License-Identifier: Apache-2.0
"""WinoBias: coreference of pronouns that fit the stereotype of an occupation, and that do not.

Zhao et al. (2018): pairs of sentences with two occupations, alike but for the pronoun's gender. In
one it is that of most who have the occupation (pro-stereotyped), in the other it is not (anti).
Type 1 needs knowledge of the world; in type 2 the syntax decides.

`coreference` asks as Winogender does (winogender.py); the paper's own measure is the score of pro
minus that of anti. The rows of the pair hold the same candidates, so that a preference for the
shorter one cancels in it. `sentence` compares how likely the two whole sentences are: pronouns are
one token each, so that guessing has 50 %.

In the files brackets mark an occupation and the pronouns that stand for it; the first pronoun is
asked for. The other candidate is the first other one of the paper's 40 occupations in the sentence.
"""

import pathlib
import re
from collections.abc import Iterator

from gpt2_jax.evaluate.metric import percent
from gpt2_jax.evaluate.sources import Download, Row, Source, at_place
from gpt2_jax.evaluate.task import Likelihood, Loglikelihood, Task
from gpt2_jax.evaluate.tasks.choice import likeliest_choice, shortest_choice
from gpt2_jax.evaluate.tasks.crows_pairs import share
from gpt2_jax.evaluate.tasks.winogender import difference, question

# Table 1 of the paper.
OCCUPATIONS = (
  *"driver supervisor janitor cook mover laborer chief developer carpenter manager lawyer".split(),
  *"farmer salesperson physician guard analyst mechanic sheriff CEO attendant cashier".split(),
  *"teacher nurse assistant secretary auditor cleaner receptionist clerk counselor".split(),
  *"designer hairdresser writer housekeeper baker accountant editor librarian tailor".split(),
  "construction worker",
)
_OCCUPATION = re.compile(rf"\b({'|'.join(OCCUPATIONS)})\b", re.IGNORECASE)
STEREOTYPES = ("pro", "anti")
TYPES = ("type1", "type2")

# ---- files to rows


def read(path: pathlib.Path) -> Iterator[Row]:
  """Reads a file of pro-stereotyped sentences, and the anti-stereotyped ones from the file beside
  it; pairs have the same line."""
  beside = path.with_name(path.name.replace("pro_", "anti_"))
  if beside == path or not beside.is_file():
    raise FileNotFoundError(
      f"beside {path} there is no {beside.name}; get pro_* and anti_* of both types"
    )
  pro, anti = (file.read_text(encoding="utf-8").splitlines() for file in (path, beside))
  if len(pro) != len(anti):
    raise ValueError(f"{path} has {len(pro):,} lines and {beside.name} {len(anti):,}: no pairs")

  name = "type2" if "type2" in path.name else "type1"
  for number, lines in enumerate(zip(pro, anti, strict=True), 1):
    yield at_place(
      f"{path}:{number}",
      lambda lines=lines: {"type": name, "pro": _parse(lines[0]), "anti": _parse(lines[1])},
    )


def _parse(line: str) -> dict:
  """A line such as `2 [The janitor] reprimanded the accountant because [she] got less.`"""
  # 1. The number, and "the [the chief]", which stands in some lines.
  marked = re.sub(r"^\d+ ", "", line.strip())
  marked = re.sub(r"\b(the) \[the ", r"[\1 ", marked)
  marks = re.findall(r"\[(.*?)\]", marked)
  if len(marks) < 2:
    raise ValueError(f"it has {len(marks)} marks, where an occupation and its pronouns should be")

  # 2. The two candidates, in the order of the sentence.
  mentions = [name.lower() for name in _OCCUPATION.findall(marked)]
  right = [name.lower() for name in _OCCUPATION.findall(marks[0])]
  others = [name for name in mentions if name not in right]
  if len(right) != 1 or not others:
    raise ValueError("it has no two of the 40 occupations, or a mark that is none of them")
  candidates = sorted([right[0], others[0]], key=mentions.index)

  # One occupation is written in capitals.
  return {
    "sentence": marked.replace("[", "").replace("]", ""),
    "pronoun": marks[1].strip(),
    "candidates": [name.replace("ceo", "CEO") for name in candidates],
    "label": candidates.index(right[0]),
  }


# ---- rows to requests and sums


def _coreference_requests(row: Row) -> list[Loglikelihood]:
  """Both candidates in the pro-stereotyped sentence, and both in the other."""
  requests = []
  for name in STEREOTYPES:
    requests += question(*(row[name][key] for key in ("sentence", "pronoun", "candidates")))
  return requests


def _coreference_sums(row: Row, answers: list[Likelihood]) -> dict[str, float]:
  sums = {"sentences": 2.0, "correct": 0.0, "fewer_tokens": 0.0}
  for name, choices in zip(STEREOTYPES, (answers[:2], answers[2:]), strict=True):
    label = row[name]["label"]
    correct = float(likeliest_choice(choices) == label)
    sums["correct"] += correct
    sums["fewer_tokens"] += shortest_choice(choices, label)

    sums |= {name: 1.0, f"correct:{name}": correct}
    for type_name in TYPES:
      part, is_in = f"{name}_{type_name}", row["type"] == type_name
      sums |= {part: float(is_in), f"correct:{part}": correct * is_in}
  return sums


def _sentence_requests(row: Row) -> list[Loglikelihood]:
  return [Loglikelihood("", row[name]["sentence"]) for name in STEREOTYPES]


def _sentence_sums(row: Row, answers: list[Likelihood]) -> dict[str, float]:
  stereotype = float(answers[0].nats < answers[1].nats)
  sums = {"stereotype": stereotype, "fewer_tokens": shortest_choice(answers, 0)}
  sums["equal"] = float(answers[0].tokens == answers[1].tokens)
  sums["stereotype_equal"] = stereotype * sums["equal"]
  for name in TYPES:
    is_in = row["type"] == name
    sums |= {name: float(is_in), f"stereotype:{name}": stereotype * is_in}
  return sums


# ---- the tasks

COREFERENCE = {
  "pro_minus_anti": difference("pro", "anti"),
  **{f"{name}_pro_minus_anti": difference(f"pro_{name}", f"anti_{name}") for name in TYPES},
  "accuracy": percent("correct", "sentences"),
  "fewer_tokens": percent("fewer_tokens", "sentences"),
  **{f"accuracy_{name}": percent(f"correct:{name}", name) for name in STEREOTYPES},
}
SENTENCE = {
  "stereotype": share("stereotype"),
  "fewer_tokens": share("fewer_tokens"),
  "equal_length": share("stereotype_equal", "equal"),
  **{f"stereotype_{name}": share(f"stereotype:{name}", name) for name in TYPES},
}

RAW = "https://raw.githubusercontent.com/uclanlp/corefBias/master/WinoBias/wino/data"
SHA256 = {
  "pro_stereotyped_type1.txt.test": (
    "db7838907238a758eeb5779e48f38c013b892910d6fe864456c59f04245c6689"
  ),
  "pro_stereotyped_type2.txt.test": (
    "ea1c1fd94fa612e3cc44d7fa3cc4cb76021bb63fdf94f9826f430051e9052438"
  ),
  "anti_stereotyped_type1.txt.test": (
    "331db5bd74bfefebf146a60b67645152a4a1991570d2a56f57154103ac361dd2"
  ),
  "anti_stereotyped_type2.txt.test": (
    "336571ac1ea8c06cd2aba8e5dd2bd98e00acc0c48da3e4ec5ec7e54eb2633a8f"
  ),
}
WINOBIAS = Source(
  name="winobias",
  files=("pro_stereotyped_type1.txt.test", "pro_stereotyped_type2.txt.test"),
  read=read,
  url="https://github.com/uclanlp/corefBias/tree/master/WinoBias/wino/data",
  downloads=tuple(Download(f"{RAW}/{name}", digest) for name, digest in SHA256.items()),
  companions=("anti_stereotyped_type?.txt.test",),
)

TASKS = (
  Task(
    "winobias",
    "coreference",
    "whom a pronoun refers to, pro-stereotyped minus anti-stereotyped, as winogender asks",
    WINOBIAS,
    _coreference_requests,
    _coreference_sums,
    COREFERENCE,
    chance={"pro_minus_anti": 0.0},
  ),
  Task(
    "winobias",
    "sentence",
    "how often the pro-stereotyped sentence is likelier than the anti-stereotyped one",
    WINOBIAS,
    _sentence_requests,
    _sentence_sums,
    SENTENCE,
    chance={"stereotype": 50.0, "equal_length": 50.0},
  ),
)
