# SPDX-License-Identifier: Apache-2.0
"""E2E's files: what is read is what stands there, and BLEU takes all references of an input."""

import json

import pytest

from experiments.e2e_files import bleu, read_pairs, references, to_examples

LINES = "name : A | food : B||A serves B . \nname : A | food : B||B is at A . \nname : C||C .\n"


@pytest.fixture
def pairs(tmp_path):
  (tmp_path / "e2e.txt").write_text(LINES)
  return read_pairs(tmp_path / "e2e.txt")


def test_lines_are_pairs_and_examples(pairs):
  assert pairs[1] == ("name : A | food : B", "B is at A .") and len(pairs) == 3
  assert references(pairs)["name : A | food : B"] == ["A serves B .", "B is at A ."]
  first, *_ = map(json.loads, to_examples(pairs).splitlines())
  assert first == {"prompt": "name : A | food : B", "completion": " A serves B ."}


def test_another_line_is_refused_with_its_place(tmp_path):
  (tmp_path / "e2e.txt").write_text(LINES + "name : D\n")
  with pytest.raises(ValueError, match=r"e2e.txt:4 is no line `slots\|\|text`"):
    read_pairs(tmp_path / "e2e.txt")


def test_any_reference_counts_whatever_the_case():
  pytest.importorskip("sacrebleu")
  references_of = [["the cat sat on a mat"], ["a dog", "there was a dog by the sea"]]
  line = bleu(["The cat sat on a mat", "there was a dog by the sea"], references_of)
  assert line.startswith("BLEU 100.00 over 2 inputs")
  assert not bleu(["x y z v w", "a b c d e f"], references_of).startswith("BLEU 100")
