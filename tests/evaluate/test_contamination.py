# SPDX-License-Identifier: Apache-2.0
import json
import math
import os
import pathlib
import random

import numpy as np
import pytest

from gpt2_jax.evaluate import contamination
from gpt2_jax.evaluate.contamination import (
  NGRAM_WORDS,
  BloomFilter,
  build_filter,
  check_items,
  count_ngrams,
  hash_ngrams,
  measure_overlap,
  read_overlap,
  request_texts,
  write_overlap,
)
from gpt2_jax.evaluate.sources import Source
from gpt2_jax.evaluate.task import (
  GenerateUntil,
  Loglikelihood,
  NextWords,
  RollingLoglikelihood,
  Task,
)

MUTANTS = int(os.environ.get("GPT2_JAX_MUTANTS", "300"))
ALPHABET = "a b c d e f g h i j".split()


def hashes(text: str, n: int = NGRAM_WORDS) -> list[int]:
  return [int(x) for block in hash_ngrams(text, n) for x in block]


def random_words(rng, n: int) -> list[str]:
  """Many words occur more than once, and so do some of their n-grams."""
  return [str(x) for x in rng.integers(0, 30, n)]


def test_only_lower_cased_words_of_letters_and_digits_count():
  same = "It's 9:30, said the-OLD man_é"
  assert hashes(same) == hashes(" it s 9 30 said  the old\nman é. ") and len(hashes(same)) == 2
  assert hashes(same) != hashes("its 9 30 said the old man é and")


@pytest.mark.parametrize(("words", "n"), [(0, 0), (7, 0), (8, 1), (10, 3)])
def test_a_text_of_w_words_has_w_minus_7_ngrams(words, n):
  text = " ".join(ALPHABET[:words])
  assert len(hashes(text)) == count_ngrams([text]) == n


@pytest.mark.parametrize("n", [1, 3, 8])
def test_hashes_are_equal_where_ngrams_are(n):
  words = random_words(np.random.default_rng(n), 4000)
  names = {}
  for i, x in enumerate(hashes(" ".join(words), n)):
    assert names.setdefault(x, words[i : i + n]) == words[i : i + n]
  assert len(names) == len({tuple(words[i : i + n]) for i in range(len(words) - n + 1)})


@pytest.mark.parametrize("block", [1, 2, 5, 64])
def test_blocks_change_nothing(monkeypatch, block):
  text = (
    " ".join(random_words(np.random.default_rng(0), 100)) + "  averyverylongword, and a last one"
  )
  whole = hashes(text)
  monkeypatch.setattr(contamination, "BLOCK", block)
  assert hashes(text) == whole


@pytest.mark.parametrize(("rate", "k", "bits"), [(1e-8, 27, 38.34), (0.01, 7, 9.59)])
def test_the_size_is_the_formula_s(rate, k, bits):
  bloom = BloomFilter.with_capacity(10_000, rate)
  assert bloom.k == k and 8 * bloom.bits.size / 10_000 == pytest.approx(bits, rel=1e-3)


@pytest.mark.parametrize("rate", [0.1, 0.01, 0.001])
def test_false_positives_are_as_rare_as_asked_for_and_negatives_true(rate):
  rng, n, tries = np.random.default_rng(1), 20_000, 500_000
  bloom, held = BloomFilter.with_capacity(n, rate), rng.integers(0, 1 << 64, n, np.uint64)
  for part in np.split(held, 4):
    bloom.add(part)
  assert bloom.contains(held).all()
  share = bloom.contains(rng.integers(0, 1 << 64, tries, np.uint64)).mean()
  error = 4 * math.sqrt(rate / tries)  # four standard deviations, for the draws
  assert share == pytest.approx(bloom.false_positive_rate, rel=0.03, abs=error)
  assert bloom.false_positive_rate == pytest.approx(
    rate, rel=0.1
  )  # k is a whole number, and so near the best only


def test_a_filter_that_is_too_small_says_so():
  bloom = BloomFilter.with_capacity(100, 0.01)
  bloom.add(np.random.default_rng(0).integers(0, 1 << 64, 1000, np.uint64))
  assert bloom.false_positive_rate > 0.9


def test_the_overlap_of_items_by_hand():
  bloom = build_filter(["A b, c d e f g h i", "x x x x x x x"], expected=10)
  items = [
    ["a b c d e f g h x"],  # of 2, the first
    ["b c d e f g h i", "a b c d e f g h", "a b c d e f g h"],  # 2 different ones, both
    ["a b c d e f g"],  # too short
    ["i x x x x x x x"],  # would cross documents
    ["b c d e", "f g h i"],  # would cross texts
  ]
  found = measure_overlap(items, bloom)
  assert found.ngrams.tolist() == [2, 2, 0, 1, 0] and found.in_corpus.tolist() == [1, 2, 0, 0, 0]
  assert found.share == 3 / 5
  assert math.isnan(measure_overlap([["short"]], bloom).share) and math.isnan(
    measure_overlap([], bloom).share
  )


def test_a_filter_is_read_as_it_was_written(tmp_path):
  bloom = build_filter([" ".join(ALPHABET)], 3, n=3, source={"kind": "files"})
  bloom.save(str(tmp_path / "filter"))
  again = BloomFilter.load(str(tmp_path / "filter"))
  assert (again.bits == bloom.bits).all() and (again.k, again.n, again.source) == (
    bloom.k,
    3,
    {"kind": "files"},
  )
  assert again.contains(np.array(hashes("h i j", 3), np.uint64)).all()
  with pytest.raises(FileExistsError, match="another name"):
    bloom.save(str(tmp_path / "filter"))


@pytest.mark.parametrize(
  "damage", [lambda b: b[: len(b) // 2], lambda b: b"", lambda b: b"{}", lambda b: b"PK" + b[2:90]]
)
def test_a_damaged_filter_is_refused(tmp_path, damage):
  path = tmp_path / "filter"
  BloomFilter.with_capacity(100).save(str(path))
  path.write_bytes(damage(path.read_bytes()))
  with pytest.raises(ValueError, match="no filter"):
    BloomFilter.load(str(path))


def task(*requests) -> Task:
  source = Source("made", ("*",), lambda path: iter([]), "nowhere")
  return Task("made", "plain", "", source, lambda row: list(requests), lambda row, answers: {}, {})


def test_an_item_is_all_that_is_read_of_it():
  item_task = task(
    Loglikelihood("a ", "b"), RollingLoglikelihood("c"), GenerateUntil("d", 5), NextWords("e", 2)
  )
  assert request_texts(item_task, {}) == ["a b", "c", "d", "e"]


def test_an_overlap_is_read_as_it_was_written(tmp_path):
  bloom = build_filter([" ".join(ALPHABET)], 3, source={"kind": "files"})
  found = measure_overlap([[" ".join(ALPHABET)], ["x"]], bloom)
  write_overlap(str(tmp_path / "o.json"), found, bloom, task(), "abc")
  content = read_overlap(str(tmp_path / "o.json"))
  assert content == {
    "task": "made",
    "protocol": "plain",
    "fingerprint": "abc",
    "n": 8,
    "rate": bloom.false_positive_rate,
    "corpus": {"kind": "files"},
    "ngrams": [3, 0],
    "found": [3, 0],
  }

  # One of before the checksum is read, and an edited one is not.
  path = tmp_path / "o.json"
  written = path.read_text()
  path.write_text(json.dumps(content))
  assert read_overlap(str(path)) == content
  path.write_text(written.replace('"ngrams": [3, 0]', '"ngrams": [4, 0]'))
  with pytest.raises(ValueError, match="no overlap .*its checksum is another"):
    read_overlap(str(path))


@pytest.mark.parametrize(
  "content",
  [
    "",
    "[]",
    "3",
    '{"task": "x"}',
    '{"task":1,"fingerprint":1,"n":8,"rate":0,"ngrams":[1],"found":[]}',
    "[" * 100_000,
    '{"task":"t","fingerprint":"f","n":8,"rate":0,"ngrams":"ab","found":"cd"}',
    '{"task":"t","fingerprint":"f","n":8,"rate":0,"ngrams":[1],"found":[2]}',
    '{"task":"t","fingerprint":"f","n":8,"rate":0,"ngrams":[1.5],"found":[1]}',
    '{"task":"t","fingerprint":"f","n":8,"rate":0,"ngrams":[null],"found":[1]}',
    '{"task":"t","fingerprint":"f","n":8,"rate":0,"ngrams":[1e999],"found":[1]}',
    '{"task":["t"],"fingerprint":"f","n":8,"rate":0,"ngrams":[1],"found":[1]}',
    '{"task":"t","fingerprint":"f","n":8,"rate":0,"ngrams":[],"found":[]}',
  ],
)
def test_what_is_no_overlap_is_refused(tmp_path, content):
  (tmp_path / "o.json").write_text(content)
  with pytest.raises(ValueError, match="no overlap"):
    read_overlap(str(tmp_path / "o.json"))


@pytest.mark.parametrize(
  "about",
  [
    "{}", "[]", "3", "[" * 100_000, '{"k": 0, "n": 8, "source": {}}', '{"k": "7", "n": 8}',
    '{"k": 1e999, "n": 8}', '{"k": 7, "n": 8, "source": []}', '{"k": 7, "n": 8, "more": 1}',
    '{"k": 7, "n": true, "source": {}}', '{"k": 99999999, "n": 8, "source": {}}',
  ],
)  # fmt: skip
def test_a_filter_of_another_description_is_refused(tmp_path, about):
  path = tmp_path / "filter"
  with open(path, "wb") as file:
    np.savez(file, bits=np.zeros(9, np.uint8), about=about)
  with pytest.raises(ValueError, match="no filter") as error:
    BloomFilter.load(str(path))
  assert len(str(error.value)) < 600 and "\n" not in str(error.value)


@pytest.mark.parametrize("bits", [np.zeros(9), np.zeros((3, 3), np.uint8), np.zeros(0, np.uint8)])
def test_a_filter_of_other_bits_is_refused(tmp_path, bits):
  path = tmp_path / "filter"
  with open(path, "wb") as file:
    np.savez(file, bits=bits, about='{"k": 7, "n": 8, "source": {}}')
  with pytest.raises(ValueError, match="no filter"):
    BloomFilter.load(str(path))


def test_no_code_of_a_filter_is_run(tmp_path):
  path, traces = tmp_path / "filter", tmp_path / "traces"

  class Trap:
    def __reduce__(self):
      return pathlib.Path.touch, (traces,)

  with open(path, "wb") as file:
    np.savez(file, bits=np.array([Trap()], object), about='{"k": 7, "n": 8, "source": {}}')
  traces.unlink(missing_ok=True)
  with pytest.raises(ValueError, match="no filter"):
    BloomFilter.load(str(path))
  assert not traces.exists()


def test_a_mutant_of_a_filter_is_refused_or_the_same(tmp_path):
  path = tmp_path / "filter"
  bloom = build_filter([" ".join(random_words(np.random.default_rng(0), 60))], 53, source={"a": 1})
  bloom.save(str(path))
  whole = path.read_bytes()
  rng = random.Random(0)
  refused = 0
  for _ in range(MUTANTS):
    mutant = bytearray(whole)
    if rng.random() < 0.7:
      mutant[rng.randrange(len(mutant))] ^= 1 << rng.randrange(8)
    else:
      i = rng.randrange(len(mutant))
      mutant[i : i + rng.randrange(9)] = rng.randbytes(rng.randrange(9))
    path.write_bytes(mutant)
    try:
      again = BloomFilter.load(str(path))
      same = (again.bits == bloom.bits).all()
      assert same and (again.k, again.n, again.source) == (bloom.k, 8, {"a": 1})
    except ValueError as error:
      refused += 1
      assert "no filter" in str(error) and "\n" not in str(error)
  assert refused > MUTANTS / 2


@pytest.mark.parametrize(
  ("text", "message"),
  [
    ("a b c", "none of its 1 items has 8 words in a row"),
    (3, "row 0 is malformed: "),
    (None, "row 0 is malformed: "),
    ("\ud800", "row 0 is malformed: it has a lone surrogate"),
  ],
)
def test_items_that_have_nothing_to_look_up_are_said_at_the_start(text, message):
  with pytest.raises(ValueError, match=message):
    check_items(task(RollingLoglikelihood(text)), [{}])
  check_items(task(RollingLoglikelihood(" ".join(ALPHABET))), [{}])
