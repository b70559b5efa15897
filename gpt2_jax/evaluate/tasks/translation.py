# SPDX-License-Identifier: Apache-2.0
"""Translation (WMT-14 English-French, both ways): corpus BLEU of few-shot translations.

Section 3.7 of the GPT-2 paper: BLEU 5 and 11.5 at 1542M. The paper conditions on "example pairs of
the format english sentence = french sentence", then `english sentence =`, decodes greedily and
takes the first sentence. It says neither how many pairs nor from where. Here they are
newstest2013's, each on its line. The protocol `paper_prompt` has five of them; the other protocols
have as many as the sweep asks for, none by default. BLEU is sacrebleu's (13a, cased, exponential
smoothing), computed from sums.
"""

import functools
import html
import pathlib
import re
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

from gpt2_jax.evaluate.metric import Metric, Sums
from gpt2_jax.evaluate.sources import Download, Row, Source, check_plain_text
from gpt2_jax.evaluate.task import Generated, GenerateUntil, Task
from gpt2_jax.evaluate.tasks.summarization import sentences

N_NEW = 200  # a translation's most tokens; the end of a line ends it sooner
PAPER_SHOTS = 5  # pairs of paper_prompt; the paper does not say how many it took
ORDERS = (1, 2, 3, 4)  # of n-grams
MATCHES = tuple(f"matches{n}" for n in ORDERS)
NGRAMS = tuple(f"ngrams{n}" for n in ORDERS)
KEYS = (*MATCHES, *NGRAMS, "length", "reference_length")

FILE_NAME = re.compile(r"(?P<stem>.+?)(?P<role>-src|-ref)?\.(?P<language>en|fr)(?P<suffix>\.sgm)?")
SGML_TAG = re.compile(r"<(/?)(doc|seg)\b([^<>]*)>", re.IGNORECASE)

# ---- files to rows


def read(path: pathlib.Path) -> Iterator[Row]:
  """Reads parallel text: `NAME.en` and `NAME.fr`, one sentence a line; `path` is either of them.

  Or `NAME-src.en.sgm` and `NAME-ref.fr.sgm`, as WMT packs them, and the same with the languages in
  the other direction. Both files of a pair lie in one folder.
  """
  english_path, french_path = _pair_of_files(path)
  english, french = _segments(english_path), _segments(french_path)

  # Segments pair by their place, so that both files must have as many.
  if len(english) != len(french):
    raise ValueError(
      f"{english_path} has {len(english):,} segments and {french_path.name} has {len(french):,}; "
      "they must be parallel"
    )
  for number, (en, fr) in enumerate(zip(english, french, strict=True), 1):
    # The documents and numbers of SGML say whether the place is the right one.
    if en.key != fr.key:
      raise ValueError(
        f"{english_path}: segment {number:,} is {en.key[:80]!r} here and {fr.key[:80]!r} in "
        f"{french_path.name}; they must be parallel"
      )
    if not en.text or not fr.text:
      raise ValueError(f"{english_path}: segment {number:,} is empty here or in {french_path.name}")
    yield {"en": en.text, "fr": fr.text}


class Segment(NamedTuple):
  """A sentence of one language, and which it is: its document and number, where the file says."""

  key: str
  text: str


def _pair_of_files(path: pathlib.Path) -> tuple[pathlib.Path, pathlib.Path]:
  """The English and the French file of a pair, of which `path` is one."""
  name = FILE_NAME.fullmatch(path.name)
  if not name:
    raise ValueError(
      f"{path} is neither NAME.en or NAME.fr, with the other beside it, nor NAME-src.en.sgm, with "
      "NAME-ref.fr.sgm, nor the same with the languages exchanged"
    )
  stem, role, language, suffix = name.group("stem", "role", "language", "suffix")
  other_language = {"en": "fr", "fr": "en"}[language]
  # A source pairs with a reference. WMT publishes the same text in both roles.
  other_role = {"-src": "-ref", "-ref": "-src", "": ""}[role or ""]
  other = path.with_name(f"{stem}{other_role}.{other_language}{suffix or ''}")
  return (path, other) if language == "en" else (other, path)


def _segments(path: pathlib.Path) -> list[Segment]:
  """The sentences of a file, in their order."""
  text = path.read_text(encoding="utf-8")
  if path.suffix == ".sgm":
    return list(_sgml_segments(path, text))

  check_plain_text(path)
  # not splitlines(), which would also split at U+2028 within a sentence
  lines = text.removesuffix("\n").split("\n")
  return [Segment("", line.strip()) for line in lines]


def _sgml_segments(path: pathlib.Path, text: str) -> Iterator[Segment]:
  """The segments of WMT's SGML: one pass over its tags, of which only doc and seg count.

  Entities are those of characters. Nothing else of SGML is read: neither a DTD nor another file.
  """
  document, key, begin = "", None, 0
  for tag in SGML_TAG.finditer(text):
    is_end, name, attributes = tag.group(1) == "/", tag.group(2).lower(), tag.group(3)
    if name == "doc":
      document = _attribute(attributes, "docid")
    elif not is_end and key is None:
      key, begin = f"{document} {_attribute(attributes, 'id')}".strip(), tag.end()
    elif is_end and key is not None:
      yield Segment(key, html.unescape(text[begin : tag.start()]).strip())
      key = None
    else:
      raise ValueError(f"{path} is malformed: two <seg> or two </seg> at character {tag.start():,}")
  if key is not None:
    raise ValueError(f"{path} is malformed: segment {key[:80]!r} has no end")


def _attribute(attributes: str, name: str) -> str:
  match = re.search(rf"\b{name}\s*=\s*[\"']?([^\s\"']*)", attributes, re.IGNORECASE)
  return match.group(1) if match else ""


def _tfds_row(record: dict) -> Row:
  return {"en": record["en"].strip(), "fr": record["fr"].strip()}


# ---- rows to requests


def _requests(language: str, row: Row) -> list[GenerateUntil]:
  _sacrebleu()  # if it is missing, that is said before anything is generated
  return [GenerateUntil(f"{row[language]} =", N_NEW, stop=("\n",))]


def _example(language: str, target: str, row: Row) -> str:
  return f"{row[language]} = {row[target]}"


# ---- answers to sums


def cut_at_sentence(text: str) -> str:
  """The first sentence of what was generated; empty if there is none."""
  return next(iter(sentences(text)), "")


def cut_at_line(text: str) -> str:
  """The first line of what was generated; empty if there is none."""
  return text.strip().partition("\n")[0].strip()


def _sums(
  target: str, cut: Callable[[str], str], row: Row, answers: list[Generated]
) -> dict[str, float]:
  return bleu_statistics(cut(answers[0].text), row[target])


@functools.cache
def _sacrebleu():
  try:
    from sacrebleu.metrics import BLEU
  except ImportError as error:
    raise ImportError("BLEU needs sacrebleu: pip install 'gpt2_jax[eval]'") from error
  # effective_order changes only the score of a single sentence, which nobody reads
  return BLEU(effective_order=True)


def bleu_statistics(translation: str, reference: str) -> dict[str, float]:
  """What BLEU adds up over sentences.

  The n-grams that match, all n-grams, the translation's words, and the reference's words.
  """
  score = _sacrebleu().sentence_score(translation, [reference])
  counts = (*score.counts, *score.totals, score.sys_len, score.ref_len)
  return dict(zip(KEYS, map(float, counts), strict=True))


def bleu(sums: Sums) -> np.ndarray:
  """sacrebleu's BLEU of a corpus, from its sums.

  It is 0 where no word matches or no sentence has four words. The k-th order without a match counts
  half of the (k - 1)-th's match, from one half on (`smooth_method="exp"`).
  """
  matches = np.stack([sums[key] for key in MATCHES], -1).astype(float)
  ngrams = np.stack([sums[key] for key in NGRAMS], -1).astype(float)

  # Exponential smoothing: the k-th of the orders without a match counts 2^-k of a match.
  no_match = matches == 0
  smoothed = np.where(no_match, 0.5 ** np.cumsum(no_match, -1), matches)

  # Geometric mean of the precisions, times the penalty for a translation shorter than the
  # reference.
  with np.errstate(divide="ignore", invalid="ignore"):
    precision = np.exp(np.log(smoothed / ngrams).mean(-1))
    brevity = np.exp(np.minimum(0, 1 - sums["reference_length"] / sums["length"]))
    defined = (ngrams > 0).all(-1) & (matches > 0).any(-1)
    return np.where(defined, 100 * brevity * precision, 0.0)


# ---- the tasks


# Nobody has recorded a SHA-256 of the first archive. That of the second is TFDS's.
DOWNLOADS = {
  2014: Download(
    "https://www.statmt.org/wmt14/test-full.tgz",
    members=(
      "test-full/newstest2014-fren-src.en.sgm",
      "test-full/newstest2014-fren-ref.fr.sgm",
    ),
  ),
  2013: Download(
    "http://data.statmt.org/wmt19/translation-task/dev.tgz",
    "7a7deccf82ebb05ba508dba5eb21356492224e8f630ec4f992132b029b4b25e7",
    ("dev/newstest2013.en", "dev/newstest2013.fr"),
  ),
}


# As WMT's archives name them, unpacked here or into their own folder, in either direction.
OTHER_NAMES = {
  2014: (
    "newstest2014-fren-ref.en.sgm",
    "test-full/newstest2014-fren-src.en.sgm",
    "test-full/newstest2014-fren-ref.en.sgm",
    "test/newstest2014-fren-src.en.sgm",
    "test/newstest2014-fren-ref.en.sgm",
  ),
  2013: (
    "newstest2013-src.en.sgm",
    "newstest2013-ref.en.sgm",
    "dev/newstest2013.en",
    "dev/newstest2013-src.en.sgm",
    "dev/newstest2013-ref.en.sgm",
  ),
}


def _source(year: int, split: str, examples: Source | None = None) -> Source:
  return Source(
    name="wmt14",
    files=(f"newstest{year}.en",),
    alternatives=(f"newstest{year}-fren-src.en.sgm",),
    other_names=OTHER_NAMES[year],
    companions=(f"newstest{year}.[ef][nr]", f"newstest{year}*.sgm"),
    read=read,
    url=f"https://www.statmt.org/wmt14 (newstest{year}.en and newstest{year}.fr)",
    tfds="wmt14_translate/fr-en",
    split=split,
    row=_tfds_row,
    examples=examples,
    downloads=(DOWNLOADS[year],),
  )


def _tasks(language: str, target: str) -> tuple[Task, ...]:
  """The translation from `language` to `target` under each protocol."""

  def task(protocol: str, prompt: str, cut: Callable[[str], str], shots: int = 0) -> Task:
    # the examples are of the year before: newstest2014 is the test set
    return Task(
      name=f"wmt14_{language}_{target}",
      protocol=protocol,
      description=f"BLEU (sacrebleu, 13a) of the {prompt}, greedy, newstest2014 (paper, 3.7)",
      source=_source(2014, "test", examples=_source(2013, "validation")),
      requests=functools.partial(_requests, language),
      sums=functools.partial(_sums, target, cut),
      metrics={"bleu": Metric(bleu, KEYS, True, "BLEU")},
      example=functools.partial(_example, language, target),
      separator="\n",
      shots=shots,
    )

  after_pairs = f"first sentence after {PAPER_SHOTS} pairs (count not published) and `sentence =`"
  return (
    task("first_sentence", "first sentence after `sentence =`", cut_at_sentence),
    task("first_line", "first line after `sentence =`", cut_at_line),
    task("paper_prompt", after_pairs, cut_at_sentence, PAPER_SHOTS),
  )


TASKS = (*_tasks("en", "fr"), *_tasks("fr", "en"))
