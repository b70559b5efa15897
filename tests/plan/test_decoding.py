# SPDX-License-Identifier: Apache-2.0
"""Decoding and evaluation as the TPU's compiler schedules them, beside sizes counted by hand."""

import importlib.util

import jax
import pytest

from configs import gpt2
from gpt2_jax.chips import parse_topology
from gpt2_jax.plan import decoding
from gpt2_jax.plan.decoding import Throughput, TooLarge, Workload
from gpt2_jax.plan.estimate import estimate_program

if importlib.util.find_spec("libtpu") is None:
  pytest.skip("could not import libtpu", allow_module_level=True)
if jax.__version_info__ < (0, 10):
  pytest.skip("a plan is made with JAX 0.10 or newer", allow_module_level=True)

# Together above what the chip's VMEM holds, 128 MiB: a step reads them from HBM.
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
def decoded():
  """Throughput of decoding in bfloat16, and what the program does around its loop."""
  parts = []
  split = decoding.split_last_loop

  def spy(scheduled):
    parts.extend(split(scheduled))
    return parts

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(decoding, "split_last_loop", spy)
    return workload().throughput("bfloat16", ROWS), parts[0]


def test_a_step_reads_weights_and_cache_once(decoded):
  """So the bound says, and HBM holds little more: no axis of a cache is padded, and there is no
  second one. A step may read less, for what fits VMEM stays there from step to step."""
  throughput, _ = decoded
  n_bytes = 2 * (MATRICES + TABLE + CACHE)
  assert throughput.bound_seconds * 819e9 == pytest.approx(n_bytes, rel=0.05)
  assert throughput.step_seconds[0] > 0.5 * throughput.bound_seconds
  assert throughput.hbm_needed < 1.1 * n_bytes + 4 * (TABLE + CONTEXT * WIDTH)


def test_nothing_is_done_in_a_call_that_can_be_done_once(decoded):
  """A call casts no table, and turns no cache into another layout."""
  throughput, outside = decoded
  assert estimate_program(outside, 0.0, ROWS).hbm_bytes < TABLE / 10
  assert throughput.call_seconds[1] < throughput.step_seconds[0] / 10


def test_a_batch_of_lambada_is_above_its_bound():
  small = workload(scores=True, n_embd=128, n_head=2, n_vocab=512, n_ctx=128)
  throughput = small.throughput("int8", ROWS)
  multiply_adds = 12 * LAYERS * 128**2 * ROWS * decoding.LAMBADA_LENGTH
  assert throughput.tokens == decoding.LAMBADA_LENGTH
  assert throughput.bound_seconds >= 2 * multiply_adds / 197e12
  assert throughput.step_seconds[0] > throughput.bound_seconds


def test_a_batch_that_does_not_fit_is_a_row_of_the_table():
  large = workload()
  row = large.throughput("bfloat16", 4096)
  assert isinstance(row, TooLarge) and "does not fit v5e:1x1: it needs" in row.reason
  rows = [row, Throughput("int8", 8, 1, (1e-3, 2e-3), (0, 1e-4), 5e-4, 2.0**30, 1.0)]
  lines = decoding.throughput_table(large, rows).splitlines()
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
