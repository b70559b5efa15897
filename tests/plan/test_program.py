# SPDX-License-Identifier: Apache-2.0
"""A small scheduled program, written by hand in the compiler's form: everything in it can be
counted by hand."""

import pytest

from gpt2_jax.plan import program

CYCLES = 'backend_config={"window_config":{"estimated_cycles":"%d"}}'
METADATA = 'metadata={op_name="jit(f)/dot"}'
TARGET = 'custom_call_target="tpu_custom_call"'
TEXT = f"""HloModule jit_step, is_scheduled=true, entry_computation_layout={{()->f32[8]}}

%fused (p: bf16[8,128]) -> bf16[8,128] {{
  %p = bf16[8,128]{{1,0}} parameter(0)
  ROOT %dot = bf16[8,128]{{1,0}} convolution(%p, %p), dim_labels=bf_io->bf
}}

%all-reduce-scatter.1 (p.1: f32[64,4]) -> f32[8,4] {{
  %p.1 = f32[64,4]{{1,0}} parameter(0)
  %ar = f32[64,4]{{1,0}} all-reduce(%p.1), replica_groups={{{{0,1}},{{2,3}}}}, to_apply=%add
  ROOT %kept = f32[8,4]{{1,0}} dynamic-slice(%ar), dynamic_slice_sizes={{8,4}}
}}

%body (s: (s32[], f32[8])) -> (s32[], f32[8]) {{
  %s = (s32[], f32[8]{{0:T(8,128)S(1)}}) parameter(0)
  %work = bf16[8,128]{{1,0}} fusion(%s), kind=kOutput, calls=%fused, {METADATA}, {CYCLES % 100}
  %kernel = (f32[8]{{0}}, bf16[8,2]{{1,0}}) custom-call(%work), {TARGET}, metadata={{
"a": "several lines, as a kernel's attributes are
}}}}, metadata={{op_name="jit(f)/pallas_call"}}
  %scatter = f32[8,4]{{1,0}} fusion(%work), kind=kCustom, calls=%all-reduce-scatter.1
  ROOT %out = (s32[], f32[8]{{0}}) tuple(%s)
}}

%condition (s.1: (s32[], f32[8])) -> pred[] {{
  %s.1 = (s32[], f32[8]{{0}}) parameter(0)
  %twelve = s32[]{{:T(128)}} constant(12)
  ROOT %less = pred[] compare(%s.1, %twelve), direction=LT
}}

%short (a: f32[8]) -> f32[8] {{
  ROOT %a = f32[8]{{0}} parameter(0)
}}, execution_thread="sparsecore"

%long (b: f32[8]) -> f32[8] {{
  %b = f32[8]{{0}} parameter(0)
  ROOT %update = f32[8]{{0}} copy(%b), {CYCLES % 7}
}}

ENTRY %main (x: f32[8]) -> f32[8] {{
  %x = f32[8]{{0}} parameter(0)
  %loop = (s32[], f32[8]{{0}}) while(%x), condition=%condition, body=%body
  ROOT %choice = f32[8]{{0}} conditional(%loop, %x), branch_computations={{%short, %long}}
}}
"""


def test_a_loop_counts_by_its_trips_and_a_conditional_by_its_longest_branch():
  parsed = program.parse(TEXT)
  executed = {instruction.name: times for instruction, times in parsed.executed()}
  assert executed == {
    "x": 1,
    "s": 12,
    "work": 12,
    "kernel": 12,
    "scatter": 12,
    "out": 12,
    "b": 1,
    "update": 1,
  }
  cycles = sum(instruction.cycles * times for instruction, times in parsed.executed())
  assert cycles == 12 * 100 + 7


def test_instructions_know_what_they_are():
  parsed = program.parse(TEXT)
  executed = {instruction.name: instruction for instruction, _ in parsed.executed()}
  work, kernel = executed["work"], executed["kernel"]
  assert [name for name, instruction in executed.items() if instruction.is_kernel] == ["kernel"]
  assert kernel.shape == "(f32[8]{0}, bf16[8,2]{1,0})" and kernel.operands == ["work"]
  assert work.source == "jit(f)/dot" and executed["x"].source == ""
  assert parsed.collective(executed["scatter"]).name == "ar" and parsed.collective(work) is None
  assert parsed.users["work"] == [(kernel, 0), (executed["scatter"], 0)]
  assert parsed.parameters["condition"] == {0: "s.1"}


def test_sizes():
  assert (
    program.size("(f32[8,4]{1,0:T(8,128)}, bf16[2]{0}, s32[], pred[3], token[])") == 128 + 4 + 4 + 3
  )
  shape = "(f32[8,4]{1,0:S(1)}, bf16[2]{0})"
  assert list(program.arrays(shape)) == [(128, False), (4, True)], "S(1) is on the chip"


def test_memory_is_in_tiles_of_the_minor_axes():
  """A head of 64 is minor in a cache and takes 128 lanes, as the compiler's own analysis says."""
  cache = "bf16[8,16,4096,64]{3,1,0,2:T(8,128)(2,1)}"
  assert program.stored_size(cache) == 2 * program.size(cache) == 2 * 2 * 8 * 16 * 4096 * 64
  # The minor axis is the first that the layout names: here it is that of 1024.
  assert list(program.arrays("f32[4,8,1024,1]{2,1,3,0:T(8,128)S(1)}")) == [(4 * 4 * 8192, False)]
  assert program.stored_size("f32[3,200]{1,0:T(4,128)}") == 4 * 4 * 256
  assert program.stored_size("s32[]{:T(128)}") == 4
  assert program.stored_size("f32[4800]{0:T(1024)}") == 4 * 5120


@pytest.mark.parametrize(
  "text, expected",
  [
    ("replica_groups={{0,1},{2,3}}, x", [[0, 1], [2, 3]]),
    ("replica_groups=[2,4]<=[8], x", [[0, 1, 2, 3], [4, 5, 6, 7]]),
    ("replica_groups=[4,2]<=[2,4]T(1,0)", [[0, 4], [1, 5], [2, 6], [3, 7]]),
    ("replica_groups=mesh['a'=2,'b'=3] {'b'}, use", [[0, 1, 2], [3, 4, 5]]),
    ("replica_groups=mesh['a'=2,'b'=3] {'a'}", [[0, 3], [1, 4], [2, 5]]),
    ("replica_groups=mesh['a'=1,'b'=2,'c'=2], device_ids=([2,2]T(1,0)) {'b'}", [[0, 1], [2, 3]]),
    ("source_target_pairs={{0,1},{1,2}}", [[0, 1], [1, 2]]),
  ],
)
def test_groups_in_every_way_of_writing(text, expected):
  assert sorted(program.replica_groups(text).tolist()) == sorted(expected)


def test_what_is_no_program_is_refused():
  with pytest.raises(ValueError, match="is not a scheduled program"):
    program.parse(TEXT.replace("is_scheduled=true, ", ""))
  with pytest.raises(ValueError, match="no groups of devices"):
    program.replica_groups("replica_groups=everyone")
  endless = program.parse(TEXT.replace("constant(12)", "constant({1,2})"))
  with pytest.raises(ValueError, match=r"condition compares with \[\]"):
    list(endless.executed())
