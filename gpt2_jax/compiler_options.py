# SPDX-License-Identifier: Apache-2.0
"""Options of the XLA compiler for the train step, by platform and TPU generation.

`train` and `plan` compile with the same ones. The knob `compiler_options` adds to them, changes
them or switches them off:

  auto                      the options below for this chip
  none                      the compiler's own defaults
  auto,NAME=VALUE,...       those of `auto`, with these added or in place of theirs
  NAME=VALUE,...            only these

Names are XLA's (docs.jax.dev/en/latest/xla_flags.html), as in LIBTPU_INIT_ARGS without dashes. The
groups are those that MaxText publishes in benchmarks/xla_flags_library.py.
"""

import re
import warnings

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from gpt2_jax.chips import TPUS
from gpt2_jax.files import first_line, note

Options = dict[str, bool | int | str]

# Matmuls that wait for a gathered weight step by step around a ring ("windowed einsums") are slower
# than an all-gather beside the matmul before, by the compiler's own estimate.
NO_WINDOWED_EINSUM: Options = {"xla_jf_spmd_threshold_for_windowed_einsum_mib": 1_000_000}

# A reduce-scatter takes its operand in the layout that it has, without permutes between neighbours:
# of 1.5B on v5e:8x8, 5 of 900 ms.
MINOR_SHARDING: Options = {"xla_tpu_use_minor_sharding_for_major_trivial_input": True}
SCATTER_LAYOUT: Options = MINOR_SHARDING | {
  "xla_tpu_relayout_group_size_threshold_for_reduce_scatter": 1,
  "xla_tpu_assign_all_reduce_scatter_layout": True,
}
# But where a chip's part of n_embd fills no whole tile of 8 rows, the compiler makes all-reduces
# of the reduce-scatters then: of 1.5B on v5e:16x16, whose parts have 100 rows, 117 ms for 70.
TILE_ROWS = 8

# The SparseCores of v6e run collectives while the TensorCore computes. Without them collectives
# block: of 1.5B on v6e:8x8, 135 of 137 ms are exposed, and with them 69 of 130. Matmuls lose 10 ms
# of 148. MaxText sets three options more, which libtpu takes in LIBTPU_INIT_ARGS only:
# --xla_sc_enable_instruction_fusion=false --xla_sc_disjoint_spmem=false
# --xla_sc_disable_megacore_partitioning=true. Nobody has run this on a TPU with this code yet.
SPARSECORE_COLLECTIVES: Options = {
  "xla_tpu_enable_sparse_core_collective_offload_all_gather": True,
  "xla_tpu_enable_sparse_core_collective_offload_reduce_scatter": True,
  "xla_tpu_enable_sparse_core_collective_offload_all_reduce": True,
  "xla_tpu_enable_async_collective_fusion_fuse_all_gather": False,
  "xla_tpu_enable_async_collective_fusion_fuse_all_reduce": False,
  "xla_tpu_enable_async_collective_fusion_fuse_reduce_scatter": False,
  "xla_tpu_use_tc_device_shape_on_sc": True,
}

# Tried with 1.5B on v5e:8x8, and left out. The options of asynchronous collective fusion are the
# default by now. Pipelined all-gathers (xla_tpu_enable_ici_ag_pipelining and the two that belong to
# it) expose 12 ms more, and on v6e save 2. With reduce-scatters fused, too, VMEM runs out.
BY_GENERATION: dict[str, Options] = {
  "v5e": SCATTER_LAYOUT,
  "v6e": SCATTER_LAYOUT | SPARSECORE_COLLECTIVES,
}


def for_mesh(mesh: Mesh, knob: str = "auto", n_embd: int = 0) -> Options:
  """The options with which a step of a model with `n_embd` is compiled for this mesh.

  An option of `auto` that the compiler at hand does not know is left out with a note. Raises
  ValueError on one of the user's that it does not take.
  """
  default, own = parse_options(knob)
  options = _automatic(mesh, n_embd) if default else {}
  return _known_to_compiler(options | own, own, mesh)


def parse_options(knob: str) -> tuple[bool, Options]:
  """Whether a knob's text begins with `auto`, and the options that it names. Raises ValueError."""
  words = [word.strip() for word in knob.split(",")]
  if words in (["auto"], ["none"]):
    return words == ["auto"], {}

  is_auto = words[0] == "auto"
  options = {}
  for word in words[is_auto:]:
    match = re.fullmatch(r"-{0,2}(\w+)=([\w.\-:/]+)", word, re.ASCII)
    if match is None:
      raise ValueError(
        f"compiler_options has {word[:80]!r}, which is no NAME=VALUE; set "
        f"--config.compiler_options to auto, none, or auto,NAME=VALUE,..."
      )
    options[match[1]] = _value(match[2])
  return is_auto, options


def _value(text: str) -> bool | int | str:
  if text in ("true", "false"):
    return text == "true"
  return int(text) if re.fullmatch(r"-?[0-9]{1,18}", text) else text


def _automatic(mesh: Mesh, n_embd: int) -> Options:
  """The options of `auto` for the chips of a mesh; none for other platforms than TPU."""
  device = mesh.devices.flat[0]
  if device.platform != "tpu":
    return {}

  options = dict(NO_WINDOWED_EINSUM)
  for generation, tpu in TPUS.items():
    if device.device_kind in tpu.device_kinds and mesh.size > 1:
      options |= BY_GENERATION.get(generation, {})

  if n_embd // mesh.shape["data"] % TILE_ROWS:
    options = {name: value for name, value in options.items() if name not in MINOR_SHARDING}
  return options


def _known_to_compiler(options: Options, own: Options, mesh: Mesh) -> Options:
  """The options that the compiler of the mesh's devices takes, by compiling a tiny program."""
  known = dict(options)
  scalar = jax.ShapeDtypeStruct((), jnp.float32, sharding=NamedSharding(mesh, P()))

  # It names one option that it does not take; then the next is found without it.
  while known:
    try:
      _compile_quietly(jax.jit(jnp.negative).lower(scalar), known)
      break
    except jax.errors.JaxRuntimeError as error:
      message = first_line(error, limit=200)
      name = next((name for name in known if re.search(rf"\b{name}\b", message)), None)
      if name is None:
        raise
      if name in own:
        raise ValueError(
          f"the compiler does not take {name}={own[name]}: {message}; "
          f"change --config.compiler_options"
        ) from error
      note(f"this compiler does not know the option {name}: it is left out")
      del known[name]
  return known


def _compile_quietly(lowered: jax.stages.Lowered, options: Options) -> None:
  """Compiles. A compiler without devices cannot read JAX's persistent cache back; that is nothing
  to warn of."""
  with warnings.catch_warnings():
    warnings.filterwarnings("ignore", "Error reading persistent compilation cache")
    lowered.compile(compiler_options=options)
