# SPDX-License-Identifier: Apache-2.0
"""WMT-14 English and French, both ways (section 3.7 of the GPT-2 paper; BLEU 5 and 11.5 at 1542M).

The paper conditions on "example pairs of the format english sentence = french sentence", then `english sentence =`,
decodes greedily and takes the first sentence. It says neither how many pairs nor whence: they are newstest2013's here,
each on its line, and the sweep says how many. BLEU is sacrebleu's (13a, cased, exponential smoothing), from sums.
"""

import functools
import html
import pathlib
import re
from collections.abc import Callable, Iterator

import numpy as np

from gpt2_jax.evaluate.metric import Metric, Sums
from gpt2_jax.evaluate.sources import Row, Source
from gpt2_jax.evaluate.task import Generated, Prompt, Task
from gpt2_jax.evaluate.tasks.summarization import sentences

N_NEW = 200  # tokens; a line ends the translation sooner
ORDERS = (1, 2, 3, 4)
KEYS = (*(f"matches{n}" for n in ORDERS), *(f"ngrams{n}" for n in ORDERS), "length", "reference_length")


def read(path: pathlib.Path) -> Iterator[Row]:
  """Pairs of `NAME.en` and `NAME.fr`, a line each; or of `NAME-src.en.sgm` and `NAME-ref.fr.sgm`, as WMT packs them."""
  if path.name.endswith("-src.en.sgm"):
    other = path.with_name(path.name.removesuffix("-src.en.sgm") + "-ref.fr.sgm")
  elif path.suffix == ".en":
    other = path.with_suffix(".fr")
  else:
    raise ValueError(f"{path} is neither NAME.en, with NAME.fr beside it, nor NAME-src.en.sgm, with NAME-ref.fr.sgm")
  english, french = _segments(path), _segments(other)
  if len(english) != len(french):
    raise ValueError(
      f"{path} has {len(english):,} segments and {other.name} has {len(french):,}; they must be parallel"
    )
  for number, (en, fr) in enumerate(zip(english, french, strict=True), 1):
    if not en or not fr:
      raise ValueError(f"{path}: segment {number:,} is empty here or in {other.name}")
    yield {"en": en, "fr": fr}


def _segments(path: pathlib.Path) -> list[str]:
  text = path.read_text(encoding="utf-8")
  if path.suffix == ".sgm":
    return [html.unescape(found).strip() for found in re.findall(r"<seg\b[^>]*>(.*?)</seg>", text, re.S)]
  return [line.strip() for line in text.removesuffix("\n").split("\n")]


def _tfds_row(record: dict) -> Row:
  return {"en": record["en"].strip(), "fr": record["fr"].strip()}


def _requests(language: str, row: Row) -> list[Prompt]:
  _sacrebleu()  # if it is missing, that is said before anything is written
  return [Prompt(f"{row[language]} =", N_NEW, stop=("\n",))]


def _example(language: str, target: str, row: Row) -> str:
  return f"{row[language]} = {row[target]}"


def first_sentence(text: str) -> str:
  return next(iter(sentences(text)), "")


def first_line(text: str) -> str:
  return text.strip().partition("\n")[0].strip()


def _sums(target: str, clean: Callable[[str], str], row: Row, answers: list[Generated]) -> dict[str, float]:
  return statistics(clean(answers[0].text), row[target])


@functools.cache
def _sacrebleu():
  try:
    from sacrebleu.metrics import BLEU
  except ImportError as error:
    raise ImportError("BLEU needs sacrebleu; pip install -e '.[eval]'") from error
  return BLEU(effective_order=True)  # concerns a single sentence's score alone, which nobody reads


def statistics(translation: str, reference: str) -> dict[str, float]:
  """What BLEU adds up over sentences: n-grams that match, n-grams, words, and the reference's words."""
  found = _sacrebleu().sentence_score(translation, [reference])
  return dict(zip(KEYS, map(float, (*found.counts, *found.totals, found.sys_len, found.ref_len)), strict=True))


def bleu(sums: Sums) -> np.ndarray:
  """sacrebleu's BLEU of a corpus from its sums: 0 where no word matches or no sentence has four words.

  The k-th order without a match counts half of the (k - 1)-th's match, from one half on (`smooth_method="exp"`).
  """
  matches, ngrams = (np.stack([sums[f"{key}{n}"] for n in ORDERS], -1).astype(float) for key in ("matches", "ngrams"))
  none = matches == 0
  smoothed = np.where(none, 0.5 ** np.cumsum(none, -1), matches)
  with np.errstate(divide="ignore", invalid="ignore"):
    precision = np.exp(np.log(smoothed / ngrams).mean(-1))
    brevity = np.exp(np.minimum(0, 1 - sums["reference_length"] / sums["length"]))
    defined = (ngrams > 0).all(-1) & (matches > 0).any(-1)
    return np.where(defined, 100 * brevity * precision, 0.0)


def _source(year: int, split: str, examples: Source | None = None) -> Source:
  return Source(
    name="wmt14",
    files=(f"newstest{year}.en",),
    read=read,
    url=f"https://www.statmt.org/wmt14 (newstest{year}.en and newstest{year}.fr)",
    tfds="wmt14_translate/fr-en",
    split=split,
    row=_tfds_row,
    examples=examples,
  )


def _tasks(language: str, target: str) -> tuple[Task, Task]:
  def task(protocol: str, clean: Callable[[str], str], what: str) -> Task:
    return Task(
      name=f"wmt14_{language}_{target}",
      protocol=protocol,
      about=f"BLEU (sacrebleu, 13a) of the first {what} after `sentence =`, greedy, newstest2014 (paper, 3.7)",
      source=_source(2014, "test", _source(2013, "validation")),
      requests=functools.partial(_requests, language),
      sums=functools.partial(_sums, target, clean),
      metrics={"bleu": Metric(bleu, KEYS, True, "BLEU")},
      example=functools.partial(_example, language, target),
      separator="\n",
    )

  return task("first_sentence", first_sentence, "sentence"), task("first_line", first_line, "line")


TASKS = (*_tasks("en", "fr"), *_tasks("fr", "en"))
