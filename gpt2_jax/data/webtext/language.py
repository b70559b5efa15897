# SPDX-License-Identifier: Apache-2.0
"""Language identification: py3langid, whose model comes with it, or a fastText model by path."""

import dataclasses
import functools
from typing import ClassVar

from gpt2_jax.data.webtext.document import Document, Drop, drop
from gpt2_jax.files import first_line

# fastText's own library, with which any NumPy works.
PACKAGE = "fasttext-numpy2-wheel"


@dataclasses.dataclass(frozen=True)
class Language:
  """Keeps documents in some languages. `model` is a fastText file, such as lid.176.bin."""

  name: ClassVar[str] = "language"

  keep: tuple[str, ...] = ("en",)
  model: str = ""
  min_score: float = 0.65  # FineWeb's; of fastText alone, py3langid ranks and has no such score

  def __call__(self, document: Document) -> Document | Drop:
    if self.model:
      language, score = _classify_by_fasttext(document.text, self.model)
    else:
      language, score = _classify(document.text), 1.0
    document = dataclasses.replace(document, language=language)
    if language not in self.keep:
      return drop(f"language_{language}", document)
    if score < self.min_score:
      return drop("language_unsure", document)
    return document


def check_model(path: str) -> None:
  """Raises ImportError or ValueError if this is no fastText model that can be used here."""
  try:
    _classify_by_fasttext("a word", path)
  except ValueError as error:
    # fasttext 0.9.3 itself fails with NumPy 2, at the first text.
    raise ValueError(
      f"{path[-200:]} is no fastText model that works here: {first_line(error)}; for NumPy 2 "
      f"pip install {PACKAGE} in place of fasttext"
    ) from error


def _classify(text: str) -> str:
  import py3langid

  return str(py3langid.classify(text)[0])


def _classify_by_fasttext(text: str, path: str) -> tuple[str, float]:
  # A text of several lines is an error of fastText's.
  labels, scores = _fasttext_model(path).predict(text.replace("\n", " "))
  return labels[0].removeprefix("__label__"), float(scores[0])


@functools.cache
def _fasttext_model(path: str):
  try:
    import fasttext
  except ImportError as error:
    raise ImportError(f"{path[-200:]} needs fastText: pip install {PACKAGE}") from error
  return fasttext.load_model(path)
