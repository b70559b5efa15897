# SPDX-License-Identifier: Apache-2.0
"""Seconds of collectives and copies, and what of them is exposed, counted by hand."""

import pathlib

import jax
import numpy as np
import pytest

from configs import gpt2
from gpt2_jax.chips import parse_topology
from gpt2_jax.finetune.start import initial_model
from gpt2_jax.model import ModelConfig
from gpt2_jax.plan import compiling, cost, program
from gpt2_jax.plan.estimate import COPY, MEMORY_BOUND, estimate_program

DUMPS = pathlib.Path(__file__).parent / "dumps"
TOPOLOGY = parse_topology("v6e:8x8")
CHIP = TOPOLOGY.chip
CYCLES = 'backend_config={"window_config":{"estimated_cycles":"1"}}'

# A copy of `x` reads and writes 8 MiB of HBM. `gathered` is over the eight chips of a row, along
# which one link of a chip carries in each direction.
MIB = 2**20
COPY_SECONDS = 8 * MIB / CHIP.hbm_bandwidth
GATHER_SECONDS = 16 * MIB * 7 / 8 / CHIP.ici_bandwidth
GATHER = (
  "(f32[512,1024]{{1,0}}, f32[4096,1024]{{1,0}}) all-gather-start(%w), dimensions={{0}}, "
  "replica_groups=mesh['replica'=8,'data'=8,'model'=1] {{'{}'}}"
)
OVER_DATA, OVER_REPLICA = GATHER.format("data"), GATHER.format("replica")
GATHERED = "f32[4096,1024]{1,0} all-gather-done"
COPIED = f"f32[1024,1024]{{1,0}} copy(%x), {CYCLES}"


def estimated(text: str):
  """The estimate of a program on 8 x 8 chips, of which a row is `data`."""
  places = [(0, *divmod(device, 8), 0) for device in range(64)]
  mesh = {"replica": 8, "data": 8, "model": 1}
  scheduled = compiling.Scheduled(
    TOPOLOGY, mesh, np.array(places), program.parse(text), bundles={}, seconds=0.0
  )
  return estimate_program(scheduled, 0.0, 0)


def entry(*instructions: str) -> str:
  """A program of these instructions, after its parameters x and w."""
  lines = [
    "HloModule jit_step, is_scheduled=true",
    "",
    "%body (s: f32[8]) -> f32[8] {",
    "  %s = f32[8]{0} parameter(0)",
    f"  ROOT %inner = {COPIED}",
    "}",
    "",
    "%condition (s.1: f32[8]) -> pred[] {",
    "  %s.1 = f32[8]{0} parameter(0)",
    "  %three = s32[]{:T(128)} constant(3)",
    "}",
    "",
    "ENTRY %main (x: f32[1024,1024], w: f32[512,1024]) -> f32[8] {",
    "  %x = f32[1024,1024]{1,0} parameter(0)",
    "  %w = f32[512,1024]{1,0} parameter(1)",
    *(f"  {instruction}" for instruction in instructions),
    "}",
  ]
  return "\n".join(lines)


def exposed(*instructions: str) -> float:
  times = estimated(entry(*instructions))
  assert all(0 <= x.exposed <= x.seconds for x in times.collectives)
  return times.exposed


def test_collectives_of_the_sparsecore_count_and_hide_what_stands_after_their_operands():
  """Real instructions of a step of 1.5B, shortened: the compiler starts such a collective without
  its operands, which an update hands over."""
  times = estimated((DUMPS / "sparsecore.hlo").read_text())
  matrix = 1600 * 4800
  by_kind = {x.kind: x for x in times.collectives}
  assert {x.kind: (x.axes, x.count, x.bytes) for x in times.collectives} == {
    "all-gather": ("data", 1, 2 * matrix),
    "reduce-scatter": ("data", 1, 4 * matrix),
    "all-reduce": ("replica", 1, 4 * matrix / 8),
  }
  assert by_kind["all-gather"].seconds == pytest.approx(2 * matrix * 7 / 8 / CHIP.ici_bandwidth)
  # 4,800 columns are 37.5 tiles of 128.
  copied = 2 * 4 * 1600 * 4864 / CHIP.hbm_bandwidth
  hidden = {x.kind: x.seconds - x.exposed for x in times.collectives}
  assert hidden == {
    "all-gather": pytest.approx(copied),  # by the copy after the update, not the one before
    "reduce-scatter": pytest.approx(0),
    "all-reduce": pytest.approx(0),
  }
  # The lookup of rows is no collective: it reads and writes them.
  rows = 2 * 4 * 8192 * 1664 / CHIP.hbm_bandwidth
  assert times.fast[MEMORY_BOUND] == pytest.approx(2 * copied + rows)
  assert times.hbm_bytes == pytest.approx((2 * copied + rows) * CHIP.hbm_bandwidth)


def test_work_between_start_and_end_hides_a_collective_and_so_does_a_loop():
  done = f"%done = {GATHERED}(%start)"
  assert exposed(f"%start = {OVER_DATA}", done) == pytest.approx(GATHER_SECONDS)
  one = exposed(f"%start = {OVER_DATA}", f"%c = {COPIED}", done)
  assert one == pytest.approx(GATHER_SECONDS - COPY_SECONDS)
  loop = "%loop = f32[8]{0} while(%x), condition=%condition, body=%body"
  assert exposed(f"%start = {OVER_DATA}", loop, done) == pytest.approx(
    GATHER_SECONDS - 3 * COPY_SECONDS
  )
  # One that nothing waits for ends with the program.
  assert exposed(f"%c = {COPIED}", f"%start = {OVER_DATA}") == pytest.approx(GATHER_SECONDS)


def test_two_collectives_over_one_axis_take_turns_and_over_two_run_at_once():
  ends = [f"%done.1 = {GATHERED}(%a)", f"%done.2 = {GATHERED}(%b)"]
  copy = f"%c = {COPIED}"
  turns = exposed(f"%a = {OVER_DATA}", f"%b = {OVER_DATA}", copy, *ends)
  assert turns == pytest.approx(2 * GATHER_SECONDS - COPY_SECONDS)
  at_once = exposed(f"%a = {OVER_DATA}", f"%b = {OVER_REPLICA}", copy, *ends)
  assert at_once == pytest.approx(GATHER_SECONDS - COPY_SECONDS)
  # Whoever waits for the second one has waited for the first.
  assert exposed(f"%a = {OVER_DATA}", f"%b = {OVER_DATA}", *ends[::-1]) == pytest.approx(
    2 * GATHER_SECONDS
  )


def test_bytes_of_a_start_are_those_of_its_results():
  """A start's shape has its operands, too."""
  pairs = "source_target_pairs={{0,1},{1,2},{2,3},{3,4},{4,5},{5,6},{6,7}}"
  times = estimated(
    entry(
      "%p = (f32[24,1024]{1,0}, f32[24,1024]{1,0}, u32[]{:S(2)}, u32[]{:S(2)}) "
      f"collective-permute-start(%w), channel_id=1, {pairs}",
      "%p.1 = f32[24,1024]{1,0} collective-permute-done(%p)",
      "%two = ((f32[8]{0}, f32[16]{0}), (f32[64]{0}, f32[128]{0})) all-gather-start(%w, %x), "
      "replica_groups=mesh['replica'=8,'data'=8,'model'=1] {'data'}, dimensions={0}",
      "%two.1 = (f32[64]{0}, f32[128]{0}) all-gather-done(%two)",
    )
  )
  sizes = {x.kind: (x.count, x.bytes) for x in times.collectives}
  assert sizes == {
    "collective-permute": (1, 4 * 24 * 1024),
    "all-gather": (1, pytest.approx(4 * 192)),
  }


def test_an_all_to_all_is_bound_by_the_middle_of_its_row():
  """Eight chips in a line, 16 MiB each: four send an eighth of it to each of the other four, all
  through one link."""
  groups = "replica_groups=mesh['replica'=8,'data'=8,'model'=1] {'data'}"
  times = estimated(entry(f"%a = f32[4096,1024]{{1,0}} all-to-all(%w), dimensions={{0}}, {groups}"))
  [transfer] = times.collectives
  assert (transfer.kind, transfer.axes, transfer.bytes) == ("all-to-all", "data", 16 * MIB)
  assert transfer.seconds == pytest.approx(4 * 4 * 2 * MIB / CHIP.ici_bandwidth)


def test_a_copy_into_vmem_takes_the_bandwidth_that_work_leaves_over():
  start = "%start = (f32[4096,1024]{1,0:S(1)}, f32[4096,1024]{1,0}, u32[]{:S(2)}) copy-start(%x)"
  done = "%done = f32[4096,1024]{1,0:S(1)} copy-done(%start)"
  # 1. Beside work that is bound by memory itself: all bytes pass through the HBM one by one.
  times = estimated(entry(start, f"%c = {COPIED}", done))
  assert times.hbm_bytes == pytest.approx(24 * MIB) == times.moved
  assert times.step[0] == pytest.approx(24 * MIB / CHIP.hbm_bandwidth) == times.fast[MEMORY_BOUND]
  assert not times.collectives and COPY not in times.fast

  # 2. Beside a matmul of 60 us, which moves 3 MiB: the copy's 10 us are hidden.
  matmul = "%m = f32[8,8]{1,0} convolution(%y, %y), dim_labels=bf_io->bf, " + CYCLES.replace(
    '"1"', '"105000"'
  )
  vmem = "%y = f32[512,1024]{1,0:S(1)} parameter(2)"
  times = estimated(entry(vmem, start, matmul, done))
  assert times.step[0] == pytest.approx(105_000 / CHIP.clock)

  # 3. Two copies do not both hide behind the same work.
  second = [
    line.replace("%start", "%start.1").replace("%done", "%done.1") for line in (start, done)
  ]
  alone = estimated(entry(vmem, start, second[0], done, second[1]))
  assert alone.step[0] == pytest.approx(32 * MIB / CHIP.hbm_bandwidth)


def test_a_kernel_of_two_loops_in_a_pipeline_from_a_real_dump():
  """What the compiler dumped of a kernel of 2 x 8 steps that has two loops of 4 and 9 trips, and of
  the fusion before it."""
  bundles = cost.read_bundles(DUMPS)
  assert set(bundles) == {"tiny.1", "broadcast_add_fusion.x_ref"}
  parsed = program.parse((DUMPS / "tiny.hlo").read_text())
  model = cost.CostModel(parsed, bundles, CHIP)
  named = {x.name: x for x, _ in parsed.executed()}

  # Nine bundles around the pipeline, 31 in it, three in each of its loops; 18 trips fill and drain.
  kernel = named["tiny.1"]
  assert bundles["tiny.1"].cycles() == 9 + 18 * (31 + 4 * 3 + 9 * 3)
  costs = model.cost(kernel)
  assert costs.instructions == 9 + 16 * (31 + 4 * 3 + 9 * 3)
  assert model.cost(named["broadcast_add_fusion.x_ref"]).instructions == 0x19

  # Both operands lie in VMEM. What its author states is a floor, less those: 13 FLOPs an element.
  elements = 16 * 1024
  assert model.multiply_adds(kernel) == 13 * elements / 2
  assert costs.hbm == pytest.approx((200_000 - 2 * 4 * elements) / CHIP.hbm_bandwidth * CHIP.clock)


def test_what_is_frozen_has_no_gradient_in_the_model_flops(mesh):
  """An adapter freezes the layers' matrices and wte; N counts the same."""
  config = gpt2.get_config("117M")
  config.model.update(n_embd=64, n_layer=2, n_head=2, n_ctx=32, n_vocab=256)
  frozen = []
  for kind in ("", "lora"):
    config.adapter.kind = kind
    with mesh(1, 1, 1):
      model = jax.eval_shape(
        lambda: initial_model(config, ModelConfig(**config.model), jax.random.key(0))
      )
      frozen.append(compiling._frozen_weights(model, config))
  assert frozen == [0, 12 * 2 * 64**2 + 256 * 64]
