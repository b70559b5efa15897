# SPDX-License-Identifier: Apache-2.0
"""E2E's files as microsoft/LoRA has them, a line `slots||text` each; and BLEU over their texts."""

import json
import pathlib


def read_pairs(path: pathlib.Path) -> list[tuple[str, str]]:
  """(slots, text) of each line. Raises ValueError for a line that is not `slots||text`."""
  pairs = []
  for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
    slots, bar, text = line.partition("||")
    if not bar:
      raise ValueError(f"{path}:{number} is no line `slots||text`; it is {line[:60]!r}")
    pairs.append((slots.strip(), text.strip()))
  return pairs


def to_examples(pairs: list[tuple[str, str]]) -> str:
  """JSON lines of prompts and completions, for `gpt2-jax tokenize --template=dialogpt`."""
  lines = [json.dumps({"prompt": slots, "completion": f" {text}"}) for slots, text in pairs]
  return "\n".join(lines) + "\n"


def references(pairs: list[tuple[str, str]]) -> dict[str, list[str]]:
  """All texts of the same slots, in the order of the file."""
  texts = {}
  for slots, text in pairs:
    texts.setdefault(slots, []).append(text)
  return texts


def bleu(texts: list[str], references_of: list[list[str]]) -> str:
  """sacrebleu's line for texts with any number of references each."""
  from sacrebleu.metrics import BLEU

  most = max(map(len, references_of))
  # One stream a reference; a text that has fewer has None there.
  streams = [[refs[n] if n < len(refs) else None for refs in references_of] for n in range(most)]
  metric = BLEU(lowercase=True)
  score = metric.corpus_score(texts, streams)
  return f"BLEU {score.score:.2f} over {len(texts):,} inputs ({metric.get_signature()})"
