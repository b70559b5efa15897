# SPDX-License-Identifier: Apache-2.0
"""The TPU's own compiler, without a TPU: which collectives a step has, and whether it fits."""

import collections
import importlib.util
import math
import re

import jax
import numpy as np
import pytest

from configs import finetune, gpt2
from gpt2_jax import train
from gpt2_jax.chips import GIB, parse_topology
from gpt2_jax.compat import get_mesh
from gpt2_jax.kernels import KERNELS as ATTENTION
from gpt2_jax.loss import NextToken
from gpt2_jax.model import ModelConfig
from gpt2_jax.plan import report, search
from gpt2_jax.plan.compiling import (
  Compiled,
  DoesNotFit,
  _kept_for_backward,
  compile_step,
  open_topology,
)
from gpt2_jax.plan.cost import copied_bytes
from gpt2_jax.plan.estimate import ALLOWANCE, KERNELS, MATMULS, _full_bytes, estimate
from gpt2_jax.plan.program import Instruction
from gpt2_jax.runs.origin import resolve_planned
from gpt2_jax.sharding import concrete, make_mesh

if importlib.util.find_spec("libtpu") is None:
  pytest.skip("could not import libtpu", allow_module_level=True)
if jax.__version_info__ < (0, 10):
  pytest.skip("a plan is made with JAX 0.10 or newer", allow_module_level=True)

WIDTH, VOCABULARY, LAYERS = 512, 1024, 2
# Matrices; biases and norms are less than 1 % of them.
PARAMETERS = 12 * LAYERS * WIDTH**2 + VOCABULARY * WIDTH
POSITIONS = 256 * WIDTH  # wpe, which `model` does not split


def config_for(mesh: tuple[int, int, int], **knobs):
  config = gpt2.get_config("117M")
  config.model.update(n_vocab=VOCABULARY, n_ctx=256, n_embd=WIDTH, n_head=8, n_layer=LAYERS)
  config.mesh.update(dict(zip(("replica", "data", "model"), mesh, strict=True)))
  config.update(batch_size=16, **knobs)
  return config


@pytest.fixture(scope="module")
def small() -> Compiled:
  """Every axis of the mesh above 1; a plan is of one step, however many a call has."""
  return compile_step(config_for((2, 2, 2), steps_per_call=3), parse_topology("v5e:2x4"))


@pytest.fixture(scope="module")
def slices() -> Compiled:
  return compile_step(config_for((2, 4, 1), microbatches=2), parse_topology("v5e:2x2", slices=2))


def axes_by_kind(compiled: Compiled, at_least: float = 4096) -> dict[str, set[str]]:
  """For each kind of collective the axes over which it moves arrays of some size."""
  axes = collections.defaultdict(set)
  for collective in estimate(compiled).collectives:
    if collective.bytes >= at_least:
      axes[collective.kind].add(collective.axes)
  return axes


def test_each_axis_of_the_mesh_has_its_own_collectives(small):
  """What splits parameters gathers and scatters, what splits rows or columns reduces, and nothing
  is shuffled.

  An activation that was gathered where the partitioner saw no other way ("involuntary full
  rematerialization") would be an all-gather over an axis that splits the batch, `replica`, which no
  parameter is split over.
  """
  axes = axes_by_kind(small)
  assert "data" in axes["all-gather"] and "data" in axes["reduce-scatter"]
  assert {"replica", "model"} <= axes["all-reduce"]
  assert "data" not in axes["all-reduce"], "gradients are scattered, those of embeddings too"
  assert not axes["all-to-all"]
  assert not [name for name in axes["all-gather"] | axes["reduce-scatter"] if "replica" in name]
  collectives = [small.program.collective(x) for x, _ in small.program.executed()]
  gathered = [x.shape for x in collectives if x and "gather" in x.opcode]
  assert gathered and not [shape for shape in gathered if "[4,256," in shape], (
    "an activation, [B, T, ...]"
  )
  # One layer's widest matrix, or the embedding, in float32.
  largest = 4 * max(4 * WIDTH**2, VOCABULARY * WIDTH)
  gathers = [x for x in estimate(small).collectives if x.kind == "all-gather"]
  assert all(gather.bytes <= largest for gather in gathers)


def test_hbm_is_what_the_state_takes_and_a_bound_on_the_rest(small):
  """Parameters and two moments, a quarter of each on a chip; the rest is bounded by what the batch
  could ask for."""
  assert small.hbm["parameters"] == pytest.approx(4 * (PARAMETERS / 4 + POSITIONS / 2), rel=0.02)
  assert small.hbm["optimizer state"] == pytest.approx(
    8 * (PARAMETERS / 4 + POSITIONS / 2), rel=0.02
  )
  tokens = 16 * 256 / 4
  bound = (
    12 * PARAMETERS / 4 + 8 * PARAMETERS / 2 + tokens * (40 * WIDTH * LAYERS * 2 + 8 * VOCABULARY)
  )
  assert small.hbm_needed < bound
  assert all(n >= 0 for n in small.hbm.values())


def test_kernels_are_counted_in_every_layer_and_in_the_loss(small):
  kernels = [(x, times) for x, times in small.program.executed() if x.is_kernel]
  assert {x.name.split(".")[0]: times for x, times in kernels} == {
    "fused_attention_backward": LAYERS,
    "fused_attention_forward": LAYERS,
    "cross_entropy_backward": 1,
    "cross_entropy_forward": 1,
  }
  cycles = sum(small.costs.cost(x).cycles * times for x, times in kernels)
  assert estimate(small).fast[KERNELS] * 1.5e9 == pytest.approx(cycles)
  assert all(small.costs.cost(x).instructions > 1000 for x, _ in kernels)


def test_only_replica_crosses_slices(slices):
  """`replica` is over the data center's network, and what goes there is gradients once summed
  inside a slice."""
  assert set(slices.places[:, 0]) == {0, 1} and (slices.places[:4, 0] == slices.places[0, 0]).all()
  axes = axes_by_kind(slices)
  assert axes["all-gather"] == axes["reduce-scatter"] == {"data"}
  assert "slices" in axes["all-reduce"]
  between = [x for x in estimate(slices).collectives if x.axes == "slices"]
  # Once, for two microbatches: the gradients that a chip holds, a quarter.
  sent = sum(x.bytes * x.count for x in between)
  assert sent == pytest.approx(4 * (PARAMETERS + POSITIONS) / 4, rel=0.05)
  assert sum(x.seconds for x in between) == pytest.approx(sent / 3.125e9, rel=1e-6), (
    "half of it twice"
  )
  assert {x.kind for x in between} == {"all-reduce"}


def test_the_estimate_is_made_of_its_parts(small, slices):
  for compiled in (small, slices):
    times = estimate(compiled)
    fast, slow = times.step
    assert 0 < fast <= slow
    assert slow == pytest.approx(sum(times.fast.values()) * (1 + ALLOWANCE) + times.exposed)
    assert all(0 <= x.exposed <= x.seconds for x in times.collectives)
    # All work is in it, and beside it no more than all copies. An all-reduce that one operation
    # begins and ends has code, too; its time is the links'.
    work, with_collectives, copied = 0, 0, 0
    for instruction, n in compiled.program.executed():
      cycles = compiled.costs.cost(instruction).cycles * n
      with_collectives += cycles
      work += 0 if compiled.program.collective(instruction) else cycles
      copied += copied_bytes(instruction) * n
    assert work / 1.5e9 <= sum(times.fast.values())
    assert sum(times.fast.values()) <= with_collectives / 1.5e9 + copied / 819e9
    assert times.fast[MATMULS] > compiled.costs.chip.flops**-1 * times.model_flops / 8 / 2
    assert times.mfu(slow) == pytest.approx(times.model_flops / (8 * 197e12) / slow)


def test_bytes_are_those_of_the_full_array_in_each_way_of_writing():
  def nbytes(shape, opcode):
    return _full_bytes(Instruction("x", shape, opcode, "replica_groups={{0,1,2,3}}"))

  assert nbytes("f32[8,128]", "all-gather") == 4096
  assert nbytes("(f32[2,128], f32[8,128]{1,0:T(8,128)})", "all-gather-start") == 4096
  assert nbytes("f32[2,128]", "reduce-scatter") == nbytes("f32[8,128]", "all-reduce") == 4096
  assert nbytes("(f32[8,128], f32[8,128], u32[], u32[])", "collective-permute-start") == 4096


def test_what_does_not_fit_says_how_much_is_missing():
  config = config_for((1, 1, 1))
  config.model.update(n_embd=4096, n_head=64, n_layer=4)
  message = r"does not fit v5e:1x1: it needs [\d.]+G a chip, ([\d.]+)G are there; raise"
  with pytest.raises(DoesNotFit, match=message) as raised:
    compile_step(config, parse_topology("v5e:1x1"))
  available = re.search(message, str(raised.value))[1]
  assert float(available) * GIB == parse_topology("v5e:1x1").chip.hbm, (
    "the table of chips has what the compiler allows"
  )


def test_a_plan_reads_as_table_json_and_picture(small, tmp_path):
  plan = report.Plan(small, estimate(small), tokens=1e9, usd_per_chip_hour=1.2)
  facts, table = plan.facts(), plan.table()
  assert "it fits" in table and "estimate" in table
  low, high = facts["estimates"]["chip_hours"]
  steps = math.ceil(1e9 / (16 * 256))
  assert [low, high] == pytest.approx(
    [8 * steps * s / 3600 for s in facts["estimates"]["step_seconds"]]
  )
  assert facts["estimates"]["usd"] == pytest.approx([1.2 * low, 1.2 * high])
  report.plot(plan, str(tmp_path / "plan.png"))
  assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG")
  flags = report.flags(plan)
  assert "--config.mesh.model=2" in flags and "--config.model.remat=none" in flags


def test_a_search_offers_only_what_divides_and_is_estimated_to_fit():
  config = gpt2.get_config("1542M")
  for name, slices in (("v5e:8x8", 1), ("v5e:8x8", 2), ("v4:4x4x4", 1)):
    target = parse_topology(name, slices)
    ranked = search.candidates(config, target)
    seconds = [candidate.seconds for candidate in ranked]
    assert seconds == sorted(seconds)
    devices = open_topology(target)
    for candidate in ranked[:5]:
      make_mesh(candidate.replica, candidate.data, candidate.model, devices=devices)
    for candidate in ranked:
      applied = candidate.apply(config)
      assert np.prod(list(applied.mesh.values())) == target.chips
      assert candidate.replica % slices == 0 and config.model.n_embd % candidate.data == 0
      assert candidate.hbm < target.chip.hbm
      rows = candidate.replica * candidate.data
      assert config.batch_size % (rows * candidate.microbatches) == 0
      assert applied.model.pad_heads == (candidate.model > 1)
  assert set(search.BUNDLES) < set(ATTENTION)
  assert config.mesh.data == -1, "the config that was given stays as it was"
  with pytest.raises(ValueError, match="no mesh of v5e:1x1 holds this model"):
    search.candidates(config, parse_topology("v5e:1x1"))


@pytest.mark.parametrize("quantize", ["", "int8"])
def test_a_plan_of_lora_bounds_what_is_kept_over_any_base(mesh, quantize):
  """An adapter's own activations are narrow, and matmuls of a frozen weight ask for no more than
  others. Int8 passes through; a published name is known without its files."""
  kept = {}
  for kind in ("", "lora"):
    config = config_for((1, 1, 1))
    config.adapter.update(kind=kind, quantize=quantize if kind else "")
    with mesh(1, 1, 1):
      init, _ = train.make_step(config, ModelConfig(**config.model))
      state = concrete(jax.eval_shape(init, jax.random.key(0)), get_mesh())
      kept[kind] = _kept_for_backward(state.model, config, get_mesh(), NextToken())
  assert 0.5 * kept[""] < kept["lora"] < 1.01 * kept[""]

  config = finetune.get_config("lora")
  config.init_from = "gpt2-xl"
  assert resolve_planned(config).model.n_layer == 48
