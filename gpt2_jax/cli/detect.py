# SPDX-License-Identifier: Apache-2.0
"""Detection of machine text: a model's scores of texts with a calibrated threshold; watermarks.

  gpt2-jax detect story.txt essay.txt --model=gpt2
  gpt2-jax detect --model=gpt2 --calibrate=labelled.jsonl --threshold=gpt2.json
  gpt2-jax detect story.txt --model=gpt2 --threshold=gpt2.json --html=story.html

  gpt2-jax detect --criterion=tfidf --fit=labelled.jsonl --model=tfidf.npz
  gpt2-jax detect story.txt --criterion=classifier --model=runs/labels --threshold=labels.json
  gpt2-jax detect story.txt --watermark=gumbel:1234

Labelled texts are lines of {"text", "label", "document"}, the label human or machine (0 or 1), or
Fast-DetectGPT's JSON of pairs. A larger score is more like a machine; a verdict needs a threshold,
which --calibrate writes for one model and criterion. A watermark's p-value is the probability of so
high a score in a text that does not know the key. None of it is a proof: other models, other keys,
short and edited texts, and a plain style mislead.
"""

import glob
import pathlib

from absl import flags

from gpt2_jax.cli import shell
from gpt2_jax.files import atomic_write, check_folder, local_path, read_text

_FILES = flags.DEFINE_string(
  "files", None, "Globs of texts, with commas between them, in place of FILE ..."
)
_MODEL = flags.DEFINE_string(
  "model", None, "A model as evaluate --model has it; of --criterion=tfidf, its file."
)
_REFERENCE = flags.DEFINE_string(
  "reference",
  None,
  "A second model: that of Binoculars, or whose samples Fast-DetectGPT compares with.",
)
_CRITERION = flags.DEFINE_string(
  "criterion",
  "fast_detectgpt",
  "likelihood, log_rank, lrr, rank, entropy, fast_detectgpt, binoculars; classifier, of a run with "
  "classify.classes=2; or tfidf.",
)
_THRESHOLD = flags.DEFINE_string(
  "threshold", None, "A threshold of this model and criterion; with --calibrate it is written."
)
_CALIBRATE = flags.DEFINE_string(
  "calibrate", None, "Labelled texts, .jsonl or .json, that the threshold is calibrated on."
)
_FALSE_POSITIVES = flags.DEFINE_float(
  "false_positives",
  0.01,
  "With --calibrate: the share of human texts that may be accused.",
  lower_bound=1e-6,
  upper_bound=0.999,
)
_FIT = flags.DEFINE_string(
  "fit", None, "With --criterion=tfidf: labelled texts to learn from; --model is written."
)
_HTML = flags.DEFINE_string(
  "html", None, "Where to write the texts in GLTR's colours: each token by its rank."
)
_DTYPE = flags.DEFINE_enum(
  "dtype", "float32", ["float32", "bfloat16"], "Of the model's activations and matmuls."
)
_BATCH_SIZE = flags.DEFINE_integer("batch_size", 8, "Texts at once.", lower_bound=1)
_WATERMARK = flags.DEFINE_string(
  "watermark",
  None,
  "KIND:KEY, as of gpt2-jax sample: KIND is green, selfhash, gumbel or synthid, KEY a number.",
)
_TOKENIZER = flags.DEFINE_string(
  "tokenizer", "gpt2", "With --watermark, the model's tokenizer: gpt2, a file or a folder."
)


def main(words: list[str]) -> None:
  if _WATERMARK.value is not None:
    if _MODEL.value is not None:
      raise ValueError("give --model, whose scores tell, or --watermark, whose key tells")
    return _find_watermark(_read_texts(words))
  if _MODEL.value is None:
    raise ValueError(
      "--model is missing: whose scores tell; or --watermark=KIND:KEY to find a mark"
    )

  has_files = bool(words or _FILES.value)
  if has_files + (_CALIBRATE.value is not None) + (_FIT.value is not None) != 1:
    raise ValueError("give one of texts (FILE ... or --files), --calibrate and --fit")
  if _HTML.value is not None and not has_files:
    raise ValueError("--html shows texts; give FILE ...")
  if _FIT.value is not None:
    return _fit()
  if _CALIBRATE.value is not None:
    return _calibrate()
  _detect(_read_texts(words))


# ---- detectors


def _detector():
  from gpt2_jax.evaluate.detectors import find_detector

  return find_detector(
    _MODEL.value,
    _CRITERION.value,
    _REFERENCE.value,
    dtype=_DTYPE.value,
    batch_size=_BATCH_SIZE.value,
  )


def _detect(texts: dict[str, str]) -> None:
  """Prints a line for each text: its length, its score, and the verdict where there is one."""
  from gpt2_jax.evaluate.detection import CRITERIA
  from gpt2_jax.evaluate.detectors import SHORTEST, read_threshold

  # 1. What cannot be is refused before anything is loaded.
  detector = _detector()
  threshold = None
  if _THRESHOLD.value is not None:
    threshold = read_threshold(local_path(_THRESHOLD.value), detector.identity)
  if _HTML.value is not None:
    _check_new(_HTML.value)
    if detector.criterion not in CRITERIA:
      raise ValueError(f"--html colours ranks, and {detector.criterion} has none; take another")

  # 2. Scores. A text of one token has none.
  lengths = {}
  for path, text in texts.items():
    try:
      lengths[path] = detector.count(text)
    except ValueError as error:
      raise ValueError(f"{path}: {error}") from error
    if lengths[path] < 2:
      raise ValueError(f"{path} has {lengths[path]} {detector.unit}: too few to score; give more")
  scores = detector.scores(list(texts.values()))

  # 3. Lines.
  shortest = threshold.shortest if threshold else SHORTEST
  if threshold:
    print(_describe(detector, threshold))
  print(f"{detector.unit:>8} {'score':>9}  {'verdict':11}  file")
  for (path, length), score in zip(lengths.items(), scores, strict=True):
    verdict, note = "-", ""
    if length < shortest:
      note = f"  (fewer than {shortest} {detector.unit}: too short for a verdict)"
    elif threshold:
      verdict = "machine" if score >= threshold.value else "not machine"
    print(f"{length:8,} {score:9.4f}  {verdict:11}  {path}{note}")
  if threshold is None:
    print("no verdict without --threshold, which --calibrate writes")

  if _HTML.value is not None:
    _write_page(detector.scorer, texts)


def _write_page(scorer, texts: dict[str, str]) -> None:
  from gpt2_jax.inspection.gltr import rank_page, rank_text

  ranked = [rank_text(scorer.model, scorer.tokenizer, text, path) for path, text in texts.items()]
  with atomic_write(local_path(_HTML.value)) as partial:
    partial.write_text(rank_page(ranked), encoding="utf-8")
  print(f"written to {_HTML.value}")


def _calibrate() -> None:
  """Writes the threshold, and prints how well it parts the texts it was calibrated on."""
  from gpt2_jax.evaluate.detection import roc_interval
  from gpt2_jax.evaluate.detectors import calibrate, write_threshold

  if _THRESHOLD.value is None:
    raise ValueError("--calibrate writes a threshold; say where, as --threshold=FILE.json")
  _check_new(_THRESHOLD.value)
  rows = _read_labelled(_CALIBRATE.value)
  detector = _detector()
  threshold, scores = calibrate(detector, rows, _FALSE_POSITIVES.value)

  print(_describe(detector, threshold))
  if threshold.machine:
    area, low, high = roc_interval(scores["human"], scores["machine"])
    print(f"area under the ROC {area:.3f} [{low:.3f}, {high:.3f}], on the very texts")
  write_threshold(local_path(_THRESHOLD.value), threshold)
  print(f"written to {_THRESHOLD.value}")


def _describe(detector, threshold) -> str:
  return (
    f"{detector}: a machine's from {threshold.value:.4f} on; when that was calibrated, "
    f"{threshold.accused:,} of {threshold.human:,} human texts were accused, and "
    f"{threshold.found:,} of {threshold.machine:,} machine texts found"
  )


def _fit() -> None:
  """Learns the TF-IDF detector, with every tenth document held out for its penalty."""
  from gpt2_jax.evaluate.detectors import TFIDF
  from gpt2_jax.evaluate.tasks.machine_text import labelled_texts
  from gpt2_jax.evaluate.tfidf import fit_tfidf

  if _CRITERION.value != TFIDF:
    raise ValueError("--fit is of --criterion=tfidf; a classifier is trained by gpt2-jax train")
  _check_new(_MODEL.value)
  rows = _read_labelled(_FIT.value)
  held_out = rows[::10]
  train = [row for number, row in enumerate(rows) if number % 10]
  for name, part in {"to learn from": train, "held out": held_out}.items():
    if len(set(labelled_texts(part)[1])) < 2:
      raise ValueError(f"{len(part)} documents {name} have not both kinds of text; give more")

  tfidf = fit_tfidf(labelled_texts(train), labelled_texts(held_out))
  tfidf.save(local_path(_MODEL.value))
  print(f"{len(tfidf.ngrams):,} n-grams of {len(train):,} documents; written to {_MODEL.value}")


def _read_labelled(path: str) -> list[dict]:
  """The documents of labelled texts. Raises ValueError if there are none."""
  from gpt2_jax.evaluate.tasks import machine_text

  rows = list(machine_text.read(local_path(path)))
  if not rows:
    raise ValueError(f"{path} has no texts")
  return rows


def _check_new(name: str) -> None:
  """Raises OSError, before there is anything to write, unless it can be written as a new file."""
  path = local_path(name)
  if path.exists():
    raise FileExistsError(f"{name} is there already; take another name, or move it away")
  check_folder(path.parent)


# ---- watermarks


def _find_watermark(texts: dict[str, str]) -> None:
  """Prints a line for each text: tokens, mean, its expectation, z-score and p-value."""
  from gpt2_jax.decoding.watermark import parse_watermark
  from gpt2_jax.evaluate.watermark_detection import SHORTEST, detect
  from gpt2_jax.tokenizer import load_tokenizer

  # 1. What cannot be is refused before anything is printed.
  watermark = parse_watermark(_WATERMARK.value)
  tokenizer = load_tokenizer(_TOKENIZER.value)
  detections = {}
  for path, text in texts.items():
    try:
      detections[path] = detect(watermark, tokenizer.encode(text))
    except ValueError as error:
      raise ValueError(f"{path}: {error}") from error

  # 2. A line for each text.
  short = f"  (fewer than {SHORTEST} tokens: too short for a verdict)"
  print(f"{'tokens':>8} {'mean':>7} {'expected':>8} {'z':>7} {'p-value':>9}")
  for path, result in detections.items():
    line = f"{result.n_scored:8,} {result.mean:7.3f} {result.expected:8.3f} {result.z:7.2f}"
    note = short if result.is_too_short else ""
    print(f"{line} {result.p_value:9.2g}  {path}{note}")


# ---- texts


def _read_texts(words: list[str]) -> dict[str, str]:
  """The texts of the words and of the flag, by their paths. Raises OSError, ValueError."""
  paths: dict[str, pathlib.Path] = {word: local_path(word) for word in words}
  for word, path in paths.items():
    if not path.exists():
      raise FileNotFoundError(f"there is no file {word[:200]!r}, and it is no flag; see --help")
  for pattern in (_FILES.value or "").split(","):
    if not pattern:
      continue
    matches = sorted(glob.glob(str(local_path(pattern)), recursive=True))
    if not matches:
      raise FileNotFoundError(f"--files names no file: {pattern[:200]!r}")
    paths |= {match: pathlib.Path(match) for match in matches}
  if not paths:
    raise ValueError("there is no text; give FILE ..., or globs as --files")
  return {name: read_text(path) for name, path in paths.items()}


def run() -> None:
  shell.run(main, __doc__, imports=("gpt2_jax.decoding.watermark",), words="FILE")
