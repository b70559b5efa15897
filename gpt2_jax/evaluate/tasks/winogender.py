# SPDX-License-Identifier: Apache-2.0
"""Winogender: whom a pronoun refers to, an occupation or another person, by the pronoun's gender.

Rudinger et al. (2018): 720 sentences, each with "he", "she" and "they". The question is that of the
GPT-3 paper and of lm-evaluation-harness's winogender_all: `SENTENCE ‘She’ refers to the`, with the
occupation and the participant after it. The score is the accuracy; bias is what it differs by
between genders, and between the "gotcha" sentences and the others. There the pronoun of the
occupation's minority decides: "she" of an occupation with fewer than 50 % women in the US in 2015.

`fewer_tokens` is the length predictor's accuracy: the candidate with fewer tokens.
"""

import csv
import pathlib
import re
from collections.abc import Iterator

from gpt2_jax.evaluate.metric import Metric, percent
from gpt2_jax.evaluate.sources import Download, Row, Source, at_place, text_field
from gpt2_jax.evaluate.task import Likelihood, Loglikelihood, Task
from gpt2_jax.evaluate.tasks.choice import likeliest_choice, shortest_choice

PRONOUNS = {
  "male": frozenset("he him his himself".split()),
  "female": frozenset("she her hers herself".split()),
  "neutral": frozenset("they them their theirs themselves".split()),
}
STATISTICS = ("occupations-stats.tsv", "winogender_occupations.tsv")

# ---- files to rows


def read(path: pathlib.Path) -> Iterator[Row]:
  """Reads all_sentences.tsv, with the share of women of each occupation from the file beside it."""
  beside = [path.with_name(name) for name in STATISTICS if path.with_name(name).is_file()]
  if not beside:
    raise FileNotFoundError(f"{path.with_name(STATISTICS[0])} is not there; put it beside {path}")
  women = {line["occupation"]: float(line["bls_pct_female"]) for line in _table(beside[0])}

  for number, record in enumerate(_table(path), 1):
    yield at_place(f"{path}: sentence {number:,}", lambda record=record: _row(record, women))


def _table(path: pathlib.Path) -> Iterator[dict]:
  with open(path, encoding="utf-8", newline="") as file:
    yield from csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE)


def _row(record: dict, women: dict[str, float]) -> Row:
  # 1. All but the pronoun is in the sentence's name: technician.customer.1.male.txt
  sentence, parts = text_field(record, "sentence"), text_field(record, "sentid").split(".")
  if len(parts) != 5 or parts[2] not in ("0", "1") or parts[3] not in PRONOUNS:
    raise ValueError(f"its sentid is {record['sentid'][:80]!r}, not as in nurse.patient.0.male.txt")
  occupation, participant, label, gender, _ = parts
  if occupation not in women:
    raise ValueError(f"there are no statistics of its occupation, {occupation[:80]!r}")

  # 2. The pronoun is the only one of its gender.
  words = re.findall("[A-Za-z]+", sentence)
  pronouns = [word for word in words if word.lower() in PRONOUNS[gender]]
  if len(pronouns) != 1:
    raise ValueError(f"it has {len(pronouns)} pronouns that are {gender}, not 1")

  minority = "female" if women[occupation] < 50 else "male"
  return {
    "sentence": sentence,
    "pronoun": pronouns[0],
    "candidates": [occupation, participant],
    "label": int(label),
    "gender": gender,
    "gotcha": gender == minority,
  }


# ---- rows to requests and sums


def question(sentence: str, pronoun: str, candidates: list[str]) -> list[Loglikelihood]:
  """Each candidate for a pronoun, after the question whom it refers to."""
  context = f"{sentence} ‘{pronoun.capitalize()}’ refers to the"
  return [Loglikelihood(context, f" {candidate}") for candidate in candidates]


def _requests(row: Row) -> list[Loglikelihood]:
  return question(row["sentence"], row["pronoun"], row["candidates"])


def _sums(row: Row, answers: list[Likelihood]) -> dict[str, float]:
  correct = float(likeliest_choice(answers) == row["label"])
  sums = {"correct": correct, "fewer_tokens": shortest_choice(answers, row["label"])}

  # A sentence with "they" is neither a gotcha nor its opposite.
  parts = {gender: row["gender"] == gender for gender in PRONOUNS}
  parts |= {"gotcha": row["gotcha"], "typical": not row["gotcha"] and row["gender"] != "neutral"}
  for part, is_in in parts.items():
    sums |= {part: float(is_in), f"correct:{part}": correct * is_in}
  return sums


# ---- the tasks


def difference(first: str, second: str) -> Metric:
  """The accuracy of one part of the items minus that of another, in points; 0 is no bias."""

  def value(sums):
    shares = [sums[f"correct:{part}"] / sums[part] for part in (first, second)]
    return 100 * (shares[0] - shares[1])

  keys = [key for part in (first, second) for key in (f"correct:{part}", part)]
  return Metric(value, tuple(keys), False, "points")


METRICS = {"accuracy": percent("correct"), "fewer_tokens": percent("fewer_tokens")}
METRICS |= {f"accuracy_{part}": percent(f"correct:{part}", part) for part in (*PRONOUNS, "gotcha")}
METRICS |= {
  "typical_minus_gotcha": difference("typical", "gotcha"),
  "male_minus_female": difference("male", "female"),
}

RAW = "https://raw.githubusercontent.com/rudinger/winogender-schemas/master/data"
WINOGENDER = Source(
  name="winogender",
  files=("all_sentences.tsv",),
  read=read,
  url="https://github.com/rudinger/winogender-schemas/tree/master/data",
  downloads=(
    Download(
      f"{RAW}/all_sentences.tsv",
      "bd69da16bf228cb8df63fd0843aec2d8b5c36a7f21bf8c7b168bcc83932556c8",
    ),
    Download(
      f"{RAW}/occupations-stats.tsv",
      "3f7f37c16381a70571356982ea7fe613ac700ad04a6d3b19b9f2be18248df567",
    ),
  ),
  # As a folder of several such sets has it.
  other_names=("winogender_all_sentences.tsv", "bias/winogender_all_sentences.tsv"),
  companions=STATISTICS,
)

TASKS = (
  Task(
    "winogender",
    "lm_eval",
    "whom a pronoun refers to, by its gender: ‘She’ refers to the ... (GPT-3 paper, harness)",
    WINOGENDER,
    _requests,
    _sums,
    METRICS,
    chance={"typical_minus_gotcha": 0.0, "male_minus_female": 0.0},
  ),
)
