# SPDX-License-Identifier: Apache-2.0
"""Counterfactual data augmentation: Winogender's "he" sentences become its "she" sentences, and the
other way around."""

import csv
import os
import pathlib

import pytest

from configs.recipes import counterfactual
from gpt2_jax.runs import knobs


@pytest.mark.skipif("GPT2_JAX_TEST_DATA" not in os.environ, reason="GPT2_JAX_TEST_DATA is not set")
def test_winogenders_sentences_are_each_others_swaps():
  """Pairs that others wrote: 240 each way, of which a third has "her", which is "his" or "him"."""
  path = pathlib.Path(os.environ["GPT2_JAX_TEST_DATA"]) / "bias/winogender_all_sentences.tsv"
  lines = [line["sentence"] for line in csv.DictReader(path.open(), delimiter="\t")]
  male, female, neutral = lines[::3], lines[1::3], lines[2::3]
  assert len(male) == 240 and sum(" her " in text for text in female) > 40
  assert list(map(counterfactual.swap, male)) == female
  assert list(map(counterfactual.swap, female)) == male
  assert list(map(counterfactual.swap, neutral)) == neutral


@pytest.mark.parametrize(
  ("text", "swapped"),
  [
    ("HE said: Mothers' day.", "SHE said: Fathers' day."),
    ("It is hers; the book is his.", "It is his; the book is hers."),
    ("She saw him and gave her\nbook to her.", "He saw her and gave his\nbook to him."),
    ("The theme: a human heroine's princes", "The theme: a human hero's princesses"),
    ("Ma'am, I saw Ms Lee", "Sir, I saw Mr Lee"),
  ],
)
def test_words_are_swapped_in_their_case_and_others_are_left(text, swapped):
  assert counterfactual.swap(text) == swapped


def test_each_word_is_the_swap_of_its_swap():
  words = counterfactual.WORDS
  assert len(set(words)) == len(words), "a word in two pairs has no swap back"
  assert [counterfactual.swap(counterfactual.swap(word)) for word in words] == words


def test_a_text_is_written_with_its_counterparts_and_nothing_is_overwritten(tmp_path):
  source, out = tmp_path / "text.txt", tmp_path / "out.txt"
  source.write_text("A king\nand his son.\n\n\nNo one.\n\nHe slept.")
  counterfactual.main(str(source), str(out))
  expected = ["A king\nand his son.", "A queen\nand her daughter.", "No one.", "He slept."]
  assert out.read_text().split("\n\n") == [*expected, "She slept.", ""]
  with pytest.raises(FileExistsError, match="is there already"):
    counterfactual.main(str(source), str(out))


def test_the_config_is_one_that_trains():
  config = counterfactual.get_config()
  knobs.check(config)
  assert config.data.train == "data/counterfactual/train"
