# SPDX-License-Identifier: Apache-2.0
"""Decoding and evaluation as the TPU's compiler schedules them, beside sizes counted by hand."""

import importlib.util

import jax
import pytest

from configs import gpt2
from gpt2_jax.chips import parse_topology
from gpt2_jax.plan import decoding
from gpt2_jax.plan.decoding import Throughput, TooLarge, Workload

if importlib.util.find_spec("libtpu") is None:
  pytest.skip("could not import libtpu", allow_module_level=True)
if jax.__version_info__ < (0, 10):
  pytest.skip("a plan is made with JAX 0.10 or newer", allow_module_level=True)

# Above what the chip's VMEM holds, 128 MiB, so that a step reads them from HBM.
WIDTH, VOCABULARY, LAYERS, CONTEXT, ROWS = 1024, 50_304, 1, 4096, 8
MATRICES = 12 * LAYERS * WIDTH**2
TABLE = VOCABULARY * WIDTH
CACHE = 2 * LAYERS * ROWS * CONTEXT * WIDTH


def workload(scores: bool = False, topology: str = "v5e:1x1", **model) -> Workload:
  config = gpt2.get_config("117M")
  sizes = dict(n_vocab=VOCABULARY, n_ctx=CONTEXT, n_embd=WIDTH, n_head=16, n_layer=LAYERS)
  config.model.update(sizes | model)
  return Workload(config, parse_topology(topology), scores)


@pytest.fixture(scope="module")
def programs():
  """Throughput, the body of the loop and what is around it, of bfloat16 and int8."""
  kept = {}
  split = decoding.split_last_loop

  def spy(scheduled):
    kept["split"] = split(scheduled)
    return kept["split"]

  found = {}
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(decoding, "split_last_loop", spy)
    for dtype in ("bfloat16", "int8"):
      found[dtype] = (workload().throughput(dtype, ROWS), *kept["split"])
  return found


@pytest.mark.parametrize("dtype, item", [("bfloat16", 2), ("int8", 1)])
def test_the_bound_is_weights_and_cache_read_once(dtype, item, programs):
  """And the step that is scheduled reads no less, nor twice as much: nothing is converted in it."""
  throughput, _, body = programs[dtype]
  n_bytes = item * (MATRICES + TABLE) + 2 * CACHE
  assert throughput.bound_seconds * 819e9 == pytest.approx(n_bytes, rel=0.05)
  assert throughput.step_seconds[0] > 0.95 * throughput.bound_seconds

  assert 0.9 * n_bytes < decoding.hbm_bytes(body) < 1.5 * n_bytes


def test_nothing_is_done_in_a_call_that_can_be_done_once(programs):
  """A call casts no table, and turns no cache into another layout."""
  for throughput, outside, _ in programs.values():
    assert decoding.hbm_bytes(outside) < TABLE / 10
    assert throughput.call_seconds[1] < throughput.step_seconds[0] / 10


def test_a_batch_of_lambada_is_above_its_bound():
  throughput = workload(scores=True).throughput("bfloat16", ROWS)
  weights, tokens = 2 * MATRICES, ROWS * decoding.LAMBADA_LENGTH
  assert throughput.tokens == decoding.LAMBADA_LENGTH
  assert throughput.bound_seconds >= weights * tokens / 197e12
  assert throughput.step_seconds[0] > 0.95 * throughput.bound_seconds


def test_a_batch_that_does_not_fit_is_a_row_of_the_table():
  large = workload()
  row = large.throughput("bfloat16", 4096)
  assert isinstance(row, TooLarge) and "does not fit v5e:1x1: it needs" in row.reason
  rows = [row, Throughput("int8", 8, 1, (1e-3, 2e-3), (0, 1e-4), 5e-4, 2.0**30, 1.0)]
  lines = decoding.table(large, rows).splitlines()
  assert row.reason in lines[2] and "microbatches" not in lines[2]
  assert "1.000-2.000" in lines[3] and "4,000-8,000" in lines[3] and "25%-50%" in lines[3]


@pytest.mark.parametrize("text", ["0", "-1", "x", "1.5", "", "1" * 500])
def test_a_batch_that_is_no_number_is_one_line(text):
  with pytest.raises(ValueError, match="is no number of rows from 1 to 999,999") as error:
    decoding.parse_batches(["8", text])
  assert len(str(error.value)) < 200
  assert decoding.parse_batches(["1", " 8"]) == [1, 8]


def test_a_dtype_is_one_of_three():
  assert decoding.parse_dtypes(["int8", " bfloat16"]) == ["int8", "bfloat16"]
  with pytest.raises(ValueError, match="--dtype=fp8 is none of bfloat16, float32, int8"):
    decoding.parse_dtypes(["fp8"])
