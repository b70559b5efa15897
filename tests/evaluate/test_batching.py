# SPDX-License-Identifier: Apache-2.0
import itertools
import json
import os
import pathlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpt2_jax.evaluate.batching import padded_lengths, plan_batches
from gpt2_jax.tokenizer import Gpt2Bpe

lists = st.lists(st.integers(0, 9), min_size=1, max_size=30)


@given(lengths=lists, price=st.floats(0, 20))
def test_no_choice_of_shapes_costs_less(lengths, price):
  def cost(chosen):
    return sum(
      min(shape for shape in chosen if shape >= length) for length in lengths
    ) + price * len(chosen)

  found, distinct = padded_lengths(np.array(lengths), price).tolist(), sorted(set(lengths))
  assert found == sorted(set(found)) and set(found) <= set(distinct)
  others = (
    chosen for n in range(len(distinct)) for chosen in itertools.combinations(distinct[:-1], n)
  )
  assert cost(found) == pytest.approx(min(cost((*chosen, distinct[-1])) for chosen in others))


@given(lengths=lists, size=st.integers(1, 8))
def test_every_sequence_is_in_one_batch_and_fits(lengths, size):
  found = plan_batches(lengths, size)
  assert sorted(np.concatenate([batch.rows for batch in found.batches])) == list(
    range(len(lengths))
  )
  assert all(len(batch.rows) == size for batch in found.batches[:-1]), (
    "only the last batch is filled up"
  )
  assert all(lengths[i] <= batch.length for batch in found.batches for i in batch.rows)


def test_waste_by_hand():
  few, many = plan_batches([3, 1, 5, 3], 2), plan_batches([3000, 1000, 5000, 3000], 2)
  assert [batch.rows.tolist() for batch in few.batches] == [[2, 0], [3, 1]], (
    "longest first, else in their order"
  )
  assert [batch.length for batch in few.batches] == [5, 5], "a length more would save 4 slots"
  assert [batch.length for batch in many.batches] == [5000, 3000], "here it saves 4,000"
  assert few.padding_share == pytest.approx(8 / 20) and many.padding_share == pytest.approx(4 / 16)
  assert plan_batches([4, 4, 4], 2).padding_share == pytest.approx(1 / 4), (
    "rows that fill the last batch are padding, too"
  )
  assert plan_batches([], 2).batches == [] and plan_batches([], 2).padding_share == 0


@pytest.mark.skipif("GPT2_JAX_TEST_DATA" not in os.environ, reason="GPT2_JAX_TEST_DATA is not set")
@pytest.mark.skipif("TIKTOKEN_CACHE_DIR" not in os.environ, reason="TIKTOKEN_CACHE_DIR is not set")
def test_lambada_wastes_less_than_a_twentieth():
  path = pathlib.Path(os.environ["GPT2_JAX_TEST_DATA"]) / "lambada/lambada_test.jsonl"
  texts = [json.loads(line)["text"] for line in path.read_text("utf-8").splitlines()]
  lengths = [len(ids) - 1 for ids in Gpt2Bpe().encode_batch(texts)]
  assert len(lengths) == 5153
  for size in (32, 64):
    found = plan_batches(lengths, size)
    assert found.padding_share < 0.05 and len({batch.length for batch in found.batches}) <= 16
