# SPDX-License-Identifier: Apache-2.0
"""TF-IDF logistic regression: a detector of machine text that needs no language model.

The baseline of openai/gpt-2-output-dataset (baseline.py): words and pairs of words that stand in at
least 5 texts, at most 2^21 of them; the penalty is the best of 13 on texts that were held out. It
learns from labelled texts, and knows the machine that wrote those and no other. Needs scikit-learn.
"""

import dataclasses
import importlib
import pathlib
import zipfile
import zlib
from collections.abc import Sequence

import numpy as np

from gpt2_jax.evaluate.sources import MALFORMED
from gpt2_jax.files import atomic_write

PENALTIES = tuple(2.0**power for power in range(-6, 7))  # C, the inverse of the penalty's strength
NGRAMS = (1, 2)
MIN_TEXTS, MAX_FEATURES = 5, 2**21

Labelled = tuple[Sequence[str], Sequence[int]]  # texts, and 1 for a machine's or 0 for a person's


@dataclasses.dataclass(frozen=True, eq=False)
class Tfidf:
  """A logistic regression of the texts' n-grams of words."""

  ngrams: list[str]
  idf: np.ndarray  # of each n-gram
  weights: np.ndarray
  intercept: float

  def scores(self, texts: Sequence[str]) -> np.ndarray:
    """The log odds that a machine wrote each text, [N]."""
    vectorizer = _vectorizer(vocabulary=self.ngrams)
    vectorizer.idf_ = self.idf
    return vectorizer.transform(texts) @ self.weights + self.intercept

  def save(self, path: pathlib.Path) -> None:
    """Writes an .npz without a pickle. Raises FileExistsError if `path` is there."""
    # A list of Python's texts would be pickled; no n-gram has a line end.
    ngrams = np.frombuffer("\n".join(self.ngrams).encode(), np.uint8)
    with atomic_write(path) as partial, open(partial, "wb") as file:
      np.savez_compressed(
        file, ngrams=ngrams, idf=self.idf, weights=self.weights, intercept=self.intercept
      )


def fit_tfidf(train: Labelled, held_out: Labelled) -> Tfidf:
  """Learns from the first texts, with the penalty that is right most often on the others.

  Raises ValueError where no n-gram stands in five texts.
  """
  # 1. The features of what is learned from; held-out texts have no say in them.
  vectorizer = _vectorizer(min_df=MIN_TEXTS, max_features=MAX_FEATURES)
  try:
    features = vectorizer.fit_transform(train[0])
  except ValueError as error:
    raise ValueError(
      f"no word stands in {MIN_TEXTS} of {len(train[0]):,} texts: there is nothing to learn; give "
      f"more"
    ) from error

  # 2. The penalty: of equals the strongest.
  held_out_features, labels = vectorizer.transform(held_out[0]), np.asarray(held_out[1])
  best, most = None, -1
  for penalty in PENALTIES:
    model = _library("linear_model").LogisticRegression(C=penalty, solver="liblinear")
    model.fit(features, train[1])
    right = (model.predict(held_out_features) == labels).sum()
    if right > most:
      best, most = model, right
  ngrams = vectorizer.get_feature_names_out().tolist()
  return Tfidf(ngrams, vectorizer.idf_, best.coef_[0], float(best.intercept_[0]))


def load_tfidf(path: pathlib.Path) -> Tfidf:
  """Reads what `save` wrote. Raises ValueError for another file, or a damaged one."""
  with open(path, "rb") as stream:
    try:
      with np.load(stream, allow_pickle=False) as file:
        arrays = {name: file[name] for name in ("ngrams", "idf", "weights", "intercept")}
      ngrams = arrays["ngrams"].astype(np.uint8, casting="no").tobytes().decode().split("\n")
      _check(ngrams, arrays)
      return Tfidf(ngrams, arrays["idf"], arrays["weights"], float(arrays["intercept"]))
    # Whatever zipfile and NumPy raise for bytes that are no .npz, or another one.
    except (
      *MALFORMED,
      EOFError,
      MemoryError,
      OSError,
      RuntimeError,
      zipfile.BadZipFile,
      zlib.error,
    ) as error:
      raise ValueError(f"{path} is no TF-IDF detector of gpt2-jax detect, or damaged") from error


def _check(ngrams: list[str], arrays: dict[str, np.ndarray]) -> None:
  """Raises ValueError unless there is a finite number for each n-gram, and each stands once."""
  for name, shape in {"idf": (len(ngrams),), "weights": (len(ngrams),), "intercept": ()}.items():
    array = arrays[name]
    if array.dtype != np.float64 or array.shape != shape or not np.isfinite(array).all():
      raise ValueError(f"its {name} is {array.dtype} {array.shape}")
  if len(set(ngrams)) < len(ngrams):
    raise ValueError("an n-gram stands twice")


def _vectorizer(**options):
  return _library("feature_extraction.text").TfidfVectorizer(ngram_range=NGRAMS, **options)


def _library(name: str):
  """A module of scikit-learn. Raises ImportError with the extra that has it."""
  try:
    return importlib.import_module(f"sklearn.{name}")
  except ImportError as error:
    raise ImportError(
      "the TF-IDF detector needs scikit-learn; pip install 'gpt2_jax[detect]'"
    ) from error
