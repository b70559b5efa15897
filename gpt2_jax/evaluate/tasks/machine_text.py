# SPDX-License-Identifier: Apache-2.0
"""Detection of machine text: how well a model's statistics tell a machine's texts from people's.

The published pairs are those of Fast-DetectGPT (Bao et al. 2024): 500 news articles of XSum, and
what GPT-2 XL wrote after the first 30 tokens of each. Their detectors' areas under the ROC with
GPT-2 XL's own statistics are .864 (likelihood), .892 (log-rank), .918 (LRR), .583 (entropy), .794
(rank) and .993 (Fast-DetectGPT). Your own texts are JSON lines of {"text", "label", "document"}.

An item is a document: a person's text, a machine's, or one of each. So the bootstrap draws
documents, and keeps both texts of one together. A protocol is a criterion (detection.py); all say
how texts look to the model that is evaluated, whoever wrote them.
"""

import pathlib
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from gpt2_jax.evaluate.detection import CRITERIA, weighted_auc, weighted_true_positives
from gpt2_jax.evaluate.metric import RankMetric, Sums
from gpt2_jax.evaluate.sources import Download, Row, Source, json_lines, text_field, text_list
from gpt2_jax.evaluate.task import Statistics, Task, TokenStatistics
from gpt2_jax.files import parse_json_object, read_text

LABELS = {"human": "human", "machine": "machine", 0: "human", 1: "machine"}
KINDS = ("human", "machine")
RAW = (
  "https://raw.githubusercontent.com/baoguangsheng/fast-detect-gpt/"
  "971b05202bac2bb504d60c0ac0812fea7a8f7c82/exp_main/data/xsum_gpt2-xl.raw_data.json"
)
SHA256 = "7446b8d8e35196bfa94b7b7ecaab44a36df7fa1bdb7e92603b5bc023b2cfe68a"

# ---- files to rows


def read(path: pathlib.Path) -> Iterator[Row]:
  """Reads Fast-DetectGPT's pairs, or JSON lines of labelled texts: documents by kind of text."""
  if path.suffix == ".jsonl":
    yield from _documents(json_lines(path, _labelled))
    return

  content = parse_json_object(read_text(path), str(path))
  human, machine = text_list(content, "original"), text_list(content, "sampled")
  if len(human) != len(machine):
    raise ValueError(f"{path} has {len(human):,} texts of people and {len(machine):,} of a machine")
  for pair in zip(human, machine, strict=True):
    yield dict(zip(KINDS, pair, strict=True))


def _labelled(record: dict) -> Row:
  label = record["label"]
  if isinstance(label, bool | list | dict) or label not in LABELS:
    raise ValueError(f"its label is {str(label)[:40]!r}; it is human or machine, 0 or 1")
  return {"document": record.get("document"), LABELS[label]: text_field(record, "text")}


def _documents(rows: Iterator[Row]) -> Iterator[Row]:
  """Puts the texts of a document into one row; a text without a document is one by itself."""
  documents = {}
  for number, row in enumerate(rows):
    name = row.pop("document")
    document = documents.setdefault((number,) if name is None else str(name), {})
    [kind] = row
    if kind in document:
      raise ValueError(
        f"the document {str(name)[:80]!r} has two {kind} texts; give one of each kind, or other "
        f"names"
      )
    document |= row
  yield from documents.values()


def labelled_texts(rows: Sequence[Row]) -> tuple[list[str], list[int]]:
  """The texts of rows, and 1 for a machine's or 0 for a person's, for what learns from them."""
  texts, labels = [], []
  for row in rows:
    for label, kind in enumerate(KINDS):
      if kind in row:
        texts.append(row[kind])
        labels.append(label)
  return texts, labels


# ---- rows to requests and sums


def _requests(row: Row) -> list[TokenStatistics]:
  return [TokenStatistics(row[kind]) for kind in KINDS if kind in row]


def _task(protocol: str) -> Task:
  criterion = CRITERIA[protocol]

  def sums(row: Row, answers: list[Statistics]) -> dict[str, float]:
    """The score of each kind of text, and whether there is one."""
    scores = {kind: 0.0 for kind in KINDS} | {f"has_{kind}": 0.0 for kind in KINDS}
    kinds = [kind for kind in KINDS if kind in row]
    for kind, statistics in zip(kinds, answers, strict=True):
      scores |= {kind: criterion(statistics), f"has_{kind}": 1.0}
    return scores

  return Task(
    name="machine_text",
    protocol=protocol,
    description=f"whether {protocol} tells GPT-2 XL's news from people's (XSum), or your texts",
    source=SOURCE,
    requests=_requests,
    sums=sums,
    metrics=METRICS,
    chance={"auc": 0.5, "tpr_at_1_fpr": 1.0},
  )


# ---- metrics of the scores' order


def _metric(measure, unit: str) -> RankMetric:
  def value(items: Sums) -> np.ndarray:
    counts_RN = np.atleast_2d(items["items"])
    scores, weights = [], []
    for kind in KINDS:
      is_there_N = items[f"has_{kind}"] > 0
      scores.append(items[kind][is_there_N])
      weights.append(counts_RN[:, is_there_N])
    return measure(*scores, *weights).reshape(np.shape(items["items"])[:-1])

  keys = (*KINDS, *(f"has_{kind}" for kind in KINDS))
  return RankMetric(value, keys, higher=True, unit=unit, ranks=_ranks)


def _ranks(items: Sums) -> Mapping[str, np.ndarray]:
  """The items with the ranks of their scores among all scores of both kinds."""
  scores = [items[kind][items[f"has_{kind}"] > 0] for kind in KINDS]
  ordered = np.sort(np.concatenate(scores))
  return dict(items) | {kind: np.searchsorted(ordered, items[kind]) for kind in KINDS}


METRICS = {
  "auc": _metric(weighted_auc, "area"),
  "tpr_at_1_fpr": _metric(lambda *scores: 100 * weighted_true_positives(*scores), "%"),
}

SOURCE = Source(
  name="detection",
  files=("xsum_gpt2-xl.raw_data.json",),
  read=read,
  url="https://github.com/baoguangsheng/fast-detect-gpt (exp_main/data)",
  downloads=(Download(RAW, SHA256),),
  alternatives=("xsum_gpt2-xl.json",),
  other_names=("machine_text.jsonl",),
)

# Binoculars needs a second model, which a sweep does not have.
TASKS = tuple(
  _task(name) for name in ("fast_detectgpt", "likelihood", "log_rank", "lrr", "rank", "entropy")
)
