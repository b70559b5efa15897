# SPDX-License-Identifier: Apache-2.0
"""Watermark detection: the z-score and p-value of texts for the key of a watermark.

  gpt2-jax sample --model=gpt2 --prompt='Once upon a time' --watermark=gumbel:1234 > story.txt
  gpt2-jax detect --files=story.txt --watermark=gumbel:1234

A p-value is the probability of so high a score in a text that does not know the key. It is no
verdict: other keys, other tokenizers and edited texts give high ones.
"""

import glob

from absl import flags

from gpt2_jax.cli import shell
from gpt2_jax.files import local_path, read_text

_FILES = flags.DEFINE_string("files", None, "Globs of texts, with commas between them.")
_WATERMARK = flags.DEFINE_string(
  "watermark",
  None,
  "KIND:KEY, as of gpt2-jax sample: KIND is green, selfhash, gumbel or synthid, KEY a number.",
)
_TOKENIZER = flags.DEFINE_string(
  "tokenizer", "gpt2", "The model's tokenizer: gpt2, a file or a folder."
)


def main() -> None:
  from gpt2_jax.decoding.watermark import parse_watermark
  from gpt2_jax.evaluate.watermark_detection import SHORTEST, detect
  from gpt2_jax.tokenizer import load_tokenizer

  # 1. What cannot be is refused before anything is printed.
  watermark = parse_watermark(_WATERMARK.value)
  tokenizer = load_tokenizer(_TOKENIZER.value)
  detections = {}
  for path in _paths():
    text = read_text(local_path(path))
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


def _paths() -> list[str]:
  """The files of the flag. Raises FileNotFoundError for a glob that names none."""
  paths = []
  for pattern in _FILES.value.split(","):
    matches = sorted(glob.glob(str(local_path(pattern)), recursive=True))
    if not matches:
      raise FileNotFoundError(f"--files names no file: {pattern[:200]!r}")
    paths += matches
  return paths


def run() -> None:
  flags.mark_flags_as_required(["files", "watermark"])
  shell.run(main, __doc__, imports=("gpt2_jax.decoding.watermark",))
