# SPDX-License-Identifier: Apache-2.0
"""Detectors of machine text: a model with a criterion, and a threshold that belongs to them.

The criteria are those of detection.py, `classifier` (a GPT-2 with a head for two labels, fine-tuned
on labelled texts) and `tfidf` (tfidf.py). A score is larger for machine text. A threshold is
calibrated on labelled texts, and carries the SHA-256 of the detector's weights: scores of another
model, or by another criterion, have another scale.
"""

import dataclasses
import functools
import json
import math
import pathlib
from collections.abc import Mapping, Sequence

import jax
import numpy as np

from gpt2_jax.convert.pretrained import load_pretrained
from gpt2_jax.data.templates import PLAIN, ExampleEncoder, Message
from gpt2_jax.evaluate.detection import CRITERIA
from gpt2_jax.evaluate.scorers import Scorer
from gpt2_jax.evaluate.sources import Row
from gpt2_jax.evaluate.sweep.models import SweptModel, resolve_models
from gpt2_jax.evaluate.task import TokenStatistics
from gpt2_jax.evaluate.tfidf import Tfidf, load_tfidf
from gpt2_jax.files import atomic_write, local_path, read_json_object, sha256
from gpt2_jax.finetune.classify import Classifier, last_label_logits
from gpt2_jax.model import GPT2
from gpt2_jax.tokenizer import Tokenizer

# Below this many tokens (words, of `tfidf`) a score says little: no verdict.
SHORTEST = 50
CLASSIFIER, TFIDF = "classifier", "tfidf"
KINDS = (*CRITERIA, CLASSIFIER, TFIDF)
# Those that weigh log p by a second model's probabilities.
WITH_REFERENCE = ("fast_detectgpt", "binoculars")


@dataclasses.dataclass(frozen=True)
class Threshold:
  """A score from which on a text is called a machine's, and what it was calibrated on."""

  detector: Mapping[str, str]  # the identity of the detector that it belongs to
  value: float
  false_positives: float  # the share of human texts that it accuses at most
  human: int  # human texts, and how many of them are accused
  accused: int
  machine: int  # machine texts, and how many of them are found
  found: int
  shortest: int  # length from which on it gives verdicts


FIELDS = {
  "detector": dict,
  "value": float,
  "false_positives": float,
  "human": int,
  "accused": int,
  "machine": int,
  "found": int,
  "shortest": int,
}

# ---- detectors


@dataclasses.dataclass(frozen=True)
class Detector:
  """A model and the criterion that reads it. Weights are loaded when they are first needed.

  `reference` is a second model, as in Binoculars, or in Fast-DetectGPT with another one's samples.
  """

  model: SweptModel
  criterion: str
  reference: SweptModel | None = None
  dtype: str = "float32"
  batch_size: int = 8
  mesh: jax.sharding.Mesh | None = None

  def __str__(self) -> str:
    second = f" and {self.reference.name}" if self.reference else ""
    return f"{self.criterion} of {self.model.name}{second}"

  @property
  def identity(self) -> dict[str, str]:
    """All that the scores depend on."""
    identity = {"criterion": self.criterion, "weights": self.model.weights}
    if self.criterion != TFIDF:
      identity["dtype"] = self.dtype
    if self.reference is not None:
      identity["reference"] = self.reference.weights
    return identity

  @property
  def unit(self) -> str:
    """What the length of a text is counted in: words where there is no tokenizer."""
    return "words" if self.criterion == TFIDF else "tokens"

  def count(self, text: str) -> int:
    """The length of a text."""
    if self.criterion == TFIDF:
      return len(text.split())
    return len(self.scorer.tokenizer.encode(text))

  def scores(self, texts: Sequence[str]) -> np.ndarray:
    """A score of each text, [N]."""
    if self.criterion == TFIDF:
      return self._tfidf.scores(texts)
    if self.criterion == CLASSIFIER:
      return _label_odds(self.scorer, texts)
    answers = self.scorer.answers([TokenStatistics(text) for text in texts])
    return np.array([CRITERIA[self.criterion](answer) for answer in answers])

  @functools.cached_property
  def scorer(self) -> Scorer:
    """The loaded model. Raises ValueError for one that is no detector."""
    weights, tokenizer = _load(self.model, self.dtype, self.mesh)
    is_classifier = isinstance(weights, Classifier) and weights.classes == 2
    if self.criterion == CLASSIFIER and not is_classifier:
      raise ValueError(f"{self.model.name[:200]} has no head for two labels, human 0 and machine 1")
    if self.reference is None:
      return Scorer(weights, tokenizer, self.batch_size)

    reference, vocabulary = _load(self.reference, self.dtype, self.mesh)
    if vocabulary.fingerprint != tokenizer.fingerprint:
      names = self.reference.name[:200], self.model.name[:200]
      raise ValueError("{} has another tokenizer than {}".format(*names))
    return Scorer(weights, tokenizer, self.batch_size, reference=reference)

  @functools.cached_property
  def _tfidf(self) -> Tfidf:
    return load_tfidf(pathlib.Path(self.model.path))


def find_detector(model: str, criterion: str, reference: str | None = None, **options) -> Detector:
  """The detector of a model, as `evaluate --model` takes it, or of the file of `tfidf`.

  `options` are the other fields of Detector. Raises ValueError, before anything is loaded, for a
  criterion that there is not, or that a reference does not go with.
  """
  if criterion not in KINDS:
    raise ValueError(f"there is no criterion {criterion[:40]!r}; it is one of {', '.join(KINDS)}")
  if criterion == "binoculars" and reference is None:
    raise ValueError("binoculars is a ratio of two models; give the second as --reference")
  if reference is not None and criterion not in WITH_REFERENCE:
    raise ValueError(f"{criterion} reads one model; leave out --reference")

  if criterion == TFIDF:
    path = local_path(model)
    return Detector(SweptModel(model, str(path), "latest", sha256(path)), criterion)
  second = None if reference is None else _one_model(reference)
  return Detector(_one_model(model), criterion, second, **options)


def _one_model(entry: str) -> SweptModel:
  models = resolve_models([entry])
  if len(models) > 1:
    raise ValueError(f"{entry[:200]} names {len(models)} checkpoints; give one step")
  return models[0]


def _load(model: SweptModel, dtype: str, mesh) -> tuple[GPT2, Tokenizer]:
  weights, tokenizer = load_pretrained(
    model.path, mesh, dtype, step=model.step, adapter=model.adapter
  )
  if tokenizer is None:
    raise ValueError(f"{model.name[:200]} has no tokenizer; put its files beside the checkpoint")
  return weights, tokenizer


def _label_odds(scorer: Scorer, texts: Sequence[str]) -> np.ndarray:
  """The log odds of label 1. Texts are encoded as for training, without their front if too long."""
  encoder = ExampleEncoder(PLAIN, scorer.tokenizer)
  n_ctx = scorer.model.config.n_ctx
  rows = [encoder.encode((Message(None, text),)).ids[-n_ctx:].tolist() for text in texts]
  logits_N2 = last_label_logits(scorer.model, rows, scorer.batch_size)
  return logits_N2[:, 1] - logits_N2[:, 0]


# ---- thresholds


def calibrate(
  detector: Detector, rows: Sequence[Row], rate: float
) -> tuple[Threshold, dict[str, np.ndarray]]:
  """The lowest threshold that accuses at most `rate` of the rows' human texts; and the scores.

  Rows are those of tasks/machine_text.py. Texts that are too short for a verdict are left out; the
  threshold then serves for texts that are no shorter than those that are left. Raises ValueError
  where the human texts are too few for the rate.
  """
  # 1. The texts that are long enough.
  texts, lengths = {}, []
  for kind in ("human", "machine"):
    of_kind = [row[kind] for row in rows if kind in row]
    counts = list(map(detector.count, of_kind))
    pairs = zip(of_kind, counts, strict=True)
    texts[kind] = [text for text, count in pairs if count >= SHORTEST]
    lengths += [count for count in counts if count >= SHORTEST]
  needed = math.ceil(1 / rate)
  if len(texts["human"]) < needed:
    raise ValueError(
      f"{len(texts['human']):,} human texts of {SHORTEST} {detector.unit} or more do not tell a "
      f"rate of {rate:g}: calibrate with {needed:,} or more, or for a larger --false_positives"
    )

  # 2. The threshold, midway between the last human score that may not be reached and the next.
  both = detector.scores(texts["human"] + texts["machine"])
  human, machine = np.split(both, [len(texts["human"])])
  limit = np.sort(human)[::-1][math.floor(rate * len(human) + 1e-9)]
  above = both[both > limit]
  following = above.min() if len(above) else limit
  value = float(max((limit + following) / 2, np.nextafter(limit, np.inf)))
  if not np.isfinite(value):
    raise ValueError("so many human texts have an infinite score that no threshold parts them")

  threshold = Threshold(
    detector.identity,
    value,
    rate,
    len(human),
    int((human >= value).sum()),
    len(machine),
    int((machine >= value).sum()),
    min(lengths),
  )
  return threshold, {"human": human, "machine": machine}


def write_threshold(path: pathlib.Path, threshold: Threshold) -> None:
  """Writes JSON. Raises FileExistsError if `path` is there."""
  with atomic_write(path) as partial:
    partial.write_text(json.dumps(dataclasses.asdict(threshold), indent=2) + "\n")


def read_threshold(path: pathlib.Path, identity: Mapping[str, str]) -> Threshold:
  """Reads a threshold. Raises ValueError for that of another detector, and for another file."""
  content = read_json_object(path)
  types = {name: type(value) for name, value in content.items()}
  if types != FIELDS or not math.isfinite(content["value"]):
    raise ValueError(f"{path} is no threshold of gpt2-jax detect --calibrate")

  threshold = Threshold(**content)
  for name in sorted({*threshold.detector, *identity}):
    theirs, ours = threshold.detector.get(name), identity.get(name)
    if theirs != ours:
      raise ValueError(
        f"{path} is the threshold of another detector: its {name} is {str(theirs)[:16]}, and this "
        f"one's {str(ours)[:16]}; calibrate this one with --calibrate"
      )
  return threshold
