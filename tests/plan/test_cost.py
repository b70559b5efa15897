# SPDX-License-Identifier: Apache-2.0
"""What an operation costs, counted by hand in a small program of the compiler's form."""

import pytest

from gpt2_jax.chips import TPUS
from gpt2_jax.plan import cost, program
from gpt2_jax.plan.cost import Bundles

CHIP = TPUS["v5e"]
BOUNDS = (
  'backend_config={"window_config":{"iteration_bounds":["2","1","3"],"estimated_cycles":"%d"}}'
)

# As the compiler writes `bhtd,bhsd->bhts`.
DILATED = "window={size=4x12 stride=3x11 lhs_dilate=4x12}, dim_labels=01bf_01oi->01bf"

# The stack of twelve layers lies in HBM, and so does what `update` writes into it; S(1) is VMEM.
STACK, LAYER = "bf16[12,8,128]{2,1,0:T(8,128)(2,1)}", "bf16[8,128]{1,0:T(8,128)(2,1)}"
ON_CHIP = LAYER.replace("}", "S(1)}")
LAYER_BYTES = 8 * 128 * 2
TEXT = f"""HloModule jit_step, is_scheduled=true, entry_computation_layout={{()->f32[8]}}

%slice (p0: bf16[12,8,128], p1: s32[]) -> bf16[8,128] {{
  %p0 = {STACK} parameter(0)
  %p1 = s32[] parameter(1)
  %taken = bf16[1,8,128]{{2,1,0}} dynamic-slice(%p0, %p1), dynamic_slice_sizes={{1,8,128}}
  ROOT %flat = {LAYER} bitcast(%taken)
}}

%slice.clone (q0: bf16[12,8,128], q1: s32[]) -> bf16[8,128] {{
  %q0 = {STACK} parameter(0)
  %q1 = s32[] parameter(1)
  %taken.1 = bf16[1,8,128]{{2,1,0}} dynamic-slice(%q0, %q1), dynamic_slice_sizes={{1,8,128}}
  ROOT %flat.1 = {LAYER} bitcast(%taken.1)
}}

%store (r0: bf16[12,8,128], r1: bf16[8,128], r2: s32[]) -> bf16[12,8,128] {{
  %r0 = {STACK} parameter(0)
  %r1 = {LAYER} parameter(1)
  %r2 = s32[] parameter(2)
  %row = bf16[1,8,128]{{2,1,0}} bitcast(%r1)
  ROOT %stored = {STACK} dynamic-update-slice(%r0, %row, %r2)
}}

%product (a: bf16[8,128], b: bf16[128,64]) -> f32[8,64] {{
  %a = {LAYER} parameter(0)
  %b = bf16[128,64]{{1,0}} parameter(1)
  ROOT %dot = f32[8,64]{{1,0}} convolution(%a, %b), dim_labels=bf_io->bf
}}

%products (c: bf16[4,12,256,64], d: bf16[4,12,256,64]) -> bf16[4,12,256,256] {{
  %c = bf16[4,12,256,64]{{3,2,1,0}} parameter(0)
  %d = bf16[4,12,256,64]{{3,2,1,0}} parameter(1)
  ROOT %scores = bf16[4,12,256,256]{{3,2,1,0}} convolution(%c, %d), {DILATED}
}}

ENTRY %main (x: bf16[12,8,128], i: s32[], w: bf16[128,64]) -> f32[8] {{
  %x = {STACK} parameter(0)
  %i = s32[] parameter(1)
  %w = bf16[128,64]{{1,0}} parameter(2)
  %layer = {ON_CHIP} fusion(%x, %i), kind=kLoop, calls=%slice, {BOUNDS % 999}
  %again = {ON_CHIP} fusion(%x, %i), kind=kLoop, calls=%slice.clone, {BOUNDS % 999}
  %update = {STACK} fusion(%x, %layer, %i), kind=kLoop, calls=%store
  %matmul = f32[8,64]{{1,0:T(8,128)S(1)}} fusion(%layer, %w), calls=%product, {BOUNDS % 70_000}
  %kernel.2 = {ON_CHIP} custom-call(%layer), custom_call_target="tpu_custom_call"
  %copy-start.1 = ({ON_CHIP}, {LAYER}, u32[]{{:S(2)}}) copy-start(%x)
  %copy-done.1 = {ON_CHIP} copy-done(%copy-start.1)
  ROOT %space = f32[8]{{0}} custom-call(), custom_call_target="AllocateBuffer"
}}
"""


def pipeline(around: int, inside: int, trips: int) -> Bundles:
  """Bundles around a loop and in it."""
  return Bundles(around, 1, (Bundles(inside, trips),))


def costs(**bundles):
  """The cost model of the program, and its instructions by name."""
  parsed = program.parse(TEXT)
  named = {name.replace("_", "."): value for name, value in bundles.items()}
  by_name = {x.name: x for x, _ in parsed.executed()}
  return cost.CostModel(parsed, {"kernel.1": pipeline(5, 10, 8)} | named, CHIP), by_name


def test_only_what_moves_through_hbm_is_traffic():
  """A slice moves the slice, an update the update, and what lies in VMEM nothing."""
  model, named = costs()
  traffic = {name: cost.hbm_traffic(model.program, x) for name, x in named.items()}
  scalar = 4
  assert traffic["layer"] == LAYER_BYTES + scalar
  assert traffic["update"] == LAYER_BYTES + scalar, "its layer is in VMEM; the stack stays"
  assert traffic["matmul"] == 128 * 64 * 2
  assert traffic["kernel.2"] == 0
  assert model.cost(named["layer"]).hbm == pytest.approx(
    traffic["layer"] / CHIP.hbm_bandwidth * CHIP.clock
  )
  moved = {name: cost.copied_bytes(x) for name, x in named.items() if cost.copied_bytes(x)}
  assert moved == {"copy-start.1": LAYER_BYTES}, "from HBM into VMEM: once"


def test_an_operation_takes_the_largest_of_its_bounds():
  # 1. Instructions: six steps of ten bundles and five around them, and not the pipeline's two more.
  model, named = costs(layer=pipeline(5, 100, 8))
  layer = model.cost(named["layer"])
  assert layer.instructions == 5 + 6 * 100 == layer.cycles > layer.hbm
  assert model.cost(named["again"]) == layer, "equal code is dumped once"

  # 2. Traffic, where there are few instructions. The compiler's flat rate is no bound.
  model, named = costs(layer=Bundles(1))
  assert model.cost(named["layer"]).cycles == model.cost(named["layer"]).hbm < 999
  assert model.cost(named["update"]).cycles == 0, "neither code nor an estimate: a view"

  # 3. Of a matmul the compiler's estimate too, which knows how the matrix unit waits.
  matmul = model.cost(named["matmul"])
  assert matmul.multiply_adds == pytest.approx(2 * 8 * 128 * 64 / CHIP.flops * CHIP.clock)
  assert matmul.cycles == matmul.compiler == 70_000
  assert model.multiply_adds(named["layer"]) == 0
  scores = model.program.computations["products"][-1]
  assert model.multiply_adds(scores) == pytest.approx(4 * 12 * 256 * 256 * 64)

  # 4. Kernels run their grid; copies and allocations take no time of the core.
  assert model.cost(named["kernel.2"]).cycles == 5 + 6 * 10, "kernel.1 is the same"
  for name in ("copy-start.1", "copy-done.1", "space"):
    assert model.cost(named[name]).cycles == 0


def test_a_kernel_that_was_not_dumped_is_an_error():
  parsed = program.parse(TEXT)
  kernel = {x.name: x for x, _ in parsed.executed()}["kernel.2"]
  with pytest.raises(ValueError, match=r"dumped no instructions of kernel\.2"):
    cost.CostModel(parsed, {}, CHIP).cost(kernel)


def test_bundles_count_by_the_trips_of_the_loops_around_them(tmp_path):
  lines = ["= control target key start", "     0   :  { %a = b }", "   0x1   :  { %c = d }"]
  lines += [
    "   0x2 LB: > { %e = f }",
    "   0x3   :  {}",
    "   0x4 LB: >> { %g = h }",
    "   0x5   : >> { %q = scmp.ge.s32.totalorder %j, 4 /* loop exit test */ }",
    "   0x6 LB: >> { %q = scmp.ge.s32.totalorder %j, 9 /* loop exit test */ }",
    "   0x7   : > { %p = scmp.ge.s32.totalorder %i, 50 /* loop exit test */ }",
    "   0x8   :  { %g = h }",
  ]
  name = "17-fused_attention.1-01-final_bundles.txt"
  (tmp_path / name).write_text("\n".join(lines))
  (tmp_path / name.replace("final", "schedule-analysis_final")).write_text("total: 99")
  (tmp_path / "18-other.1-00-schedule-analysis_final_bundles.txt").write_text("total: 99")
  bundles = cost.read_bundles(tmp_path)["fused_attention.1"]
  # An empty bundle has no mark of its depth; two loops in a third have their own trips.
  assert bundles == Bundles(3, 1, (Bundles(3, 50, (Bundles(2, 4), Bundles(1, 9))),))
  step = 3 + 2 * 4 + 9
  assert bundles.cycles() == 3 + 50 * step
  assert bundles.cycles(grid=48) == 3 + 48 * step, "two trips fill and drain a pipeline"
  assert bundles.cycles(grid=10) == bundles.cycles(), "a loop of another kind keeps its trips"
  assert cost.read_bundles(tmp_path / "nothing") == {}
