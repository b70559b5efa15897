# SPDX-License-Identifier: Apache-2.0
"""Compiles the project's own training step for a TPU that is not here, with libtpu's compile-only client.

No TPU and no cloud account: the compiler needs the name of a topology. libtpu reads its settings from the environment
when it is first loaded, so `open_topology` must come before anything else in the process wakes it.
"""

import contextlib
import dataclasses
import functools
import importlib.util
import math
import os
import pathlib
import re
import tempfile
import time

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict

from gpt2_jax import train
from gpt2_jax.chips import Topology
from gpt2_jax.model import ModelConfig, check_mesh
from gpt2_jax.plan import program
from gpt2_jax.sharding import BATCH, concrete, make_mesh

SETTINGS = {  # a machine without TPUs: no metadata server to ask, no logs, several processes at once
  "TPU_SKIP_MDS_QUERY": "1",
  "TPU_WORKER_HOSTNAMES": "localhost",
  "TPU_ACCELERATOR_TYPE": "v5litepod-8",
  "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
  "TPU_LOG_DIR": "disabled",
  "TPU_STDERR_LOG_LEVEL": "3",
  "TPU_MIN_LOG_LEVEL": "3",
}
# The instructions of each kernel, which nothing else counts.
DUMP = "--xla_jf_dump_to={} --xla_jf_dump_llo_text=true --xla_jf_dump_llo_pass_label_regex=.*final_bundles.*"


class DoesNotFit(ValueError):
  """The compiler ran out of HBM. The message says how much is wanted and how much there is."""


@functools.cache
def _dump() -> tempfile.TemporaryDirectory:
  """The folder of the compiler's dumps, one a process; sets what libtpu reads when it is loaded."""
  folder = tempfile.TemporaryDirectory(prefix="gpt2_jax_plan_")
  os.environ.update(SETTINGS)
  os.environ["LIBTPU_INIT_ARGS"] = f"{os.environ.get('LIBTPU_INIT_ARGS', '')} {DUMP.format(folder.name)}".strip()
  return folder


def check_installed() -> None:
  """Raises ImportError without libtpu."""
  if importlib.util.find_spec("libtpu") is None:
    raise ImportError("libtpu, the TPU compiler, is not installed: pip install '.[plan]'")


def open_topology(topology: Topology) -> list:
  """Its devices, of all slices. Raises ImportError without libtpu, ValueError where libtpu knows no such topology."""
  check_installed()
  _dump()
  bounds = (2, 2, 1)
  if topology.chip.dimensions == 2 and topology.shape[0] == 1:
    bounds = (1, min(2, topology.shape[1]), 1)
  try:
    return topologies.get_topology_desc(
      platform="tpu",
      topology_name=topology.name,
      chip_config_name=topology.chip.config,
      chips_per_host_bounds=bounds,
      num_slices=topology.slices,
    ).devices
  except (RuntimeError, ValueError) as error:
    raise ValueError(f"libtpu does not know {topology.name}: {str(error).splitlines()[0][:200]}") from error


@dataclasses.dataclass(frozen=True)
class Compiled:
  """A training step as the compiler left it; bytes are a chip's."""

  topology: Topology
  mesh: dict[str, int]
  places: np.ndarray  # of each device of the mesh, its slice and coordinates, [devices, 4]
  model: ModelConfig
  batch_size: int
  microbatches: int
  program: program.Program
  kernels: dict[str, int]  # cycles of each Pallas kernel, by the name of its instruction
  hbm: dict[str, float]  # bytes by class
  seconds: float  # that compiling took

  @property
  def hbm_needed(self) -> float:
    return sum(self.hbm.values())


def compile_step(config: ConfigDict, topology: Topology) -> Compiled:
  """Compiles the update that `launch/train.py` with this config would run on that topology; one of them a call.

  Raises DoesNotFit with the numbers, and ValueError on a mesh, batch or model that cannot be.
  """
  devices = open_topology(topology)
  mesh, model_config = make_mesh(**config.mesh, devices=devices), ModelConfig(**config.model)
  config = config.copy_and_resolve_references()
  config.steps_per_call = 1
  init, call = train.build(config, model_config, platform="tpu")
  with jax.set_mesh(mesh):
    train.check_knobs(config)
    check_mesh(model_config)
    state = concrete(jax.eval_shape(lambda: init(jax.random.key(0))), mesh)
    shape = (1, config.batch_size, model_config.n_ctx + 1)
    tokens_SBT = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=NamedSharding(mesh, P(None, *BATCH)))
    signals = jax.ShapeDtypeStruct((mesh.size,), jnp.int32, sharding=NamedSharding(mesh, P(mesh.axis_names)))
    kept = _kept_for_backward(state.model, config, mesh)
    start = time.perf_counter()
    with _fitting(topology):
      compiled = call.lower(state, tokens_SBT, signals).compile()
  return Compiled(
    topology=topology,
    mesh=dict(mesh.shape),
    places=np.array([(getattr(d, "slice_index", 0), *d.coords) for d in mesh.devices.flat]),
    model=model_config,
    batch_size=config.batch_size,
    microbatches=config.microbatches,
    program=(parsed := program.parse(compiled.as_text())),
    kernels=_kernels(parsed),
    hbm=_classes(compiled.memory_analysis(), state, kept),
    seconds=time.perf_counter() - start,
  )


def _kernels(parsed: program.Program) -> dict[str, int]:
  """Cycles by instruction of the kernels in the program, from the dump, which is emptied."""
  folder = pathlib.Path(_dump().name)
  counted = program.kernel_cycles(folder)
  for path in folder.iterdir():
    path.unlink()
  found = {}
  for one in {one.name: one for one, _ in parsed.executed() if one.is_kernel}.values():
    # The compiler emits equal kernels once, under the name of one of them.
    same = [name for name in counted if name.partition(".")[0] == one.name.partition(".")[0]]
    if not same:
      raise ValueError(f"the compiler told no instructions of {one.name}: was libtpu loaded before open_topology?")
    found[one.name] = counted.get(one.name, max(counted[name] for name in same))
  return found


def _local_bytes(tree, mesh: Mesh) -> float:
  """Bytes a chip holds of a tree of shapes."""
  total = 0
  for leaf in jax.tree.leaves(tree):
    spec = leaf.sharding.spec if leaf.sharding else P()
    shape = NamedSharding(mesh, spec).shard_shape(leaf.shape)
    total += leaf.dtype.itemsize * math.prod(shape)
  return total


def _kept_for_backward(model, config: ConfigDict, mesh: Mesh) -> float:
  """Bytes that a chip keeps from the forward pass of one microbatch for the backward pass, as JAX asks for it.

  What is no parameter among the residuals; the compiler may keep less.
  """
  tokens_BT = jax.ShapeDtypeStruct(
    (config.batch_size // config.microbatches, config.model.n_ctx + 1), jnp.int32, sharding=NamedSharding(mesh, BATCH)
  )
  parameters = [(x.shape, x.dtype) for x in jax.tree.leaves(model)]
  _, pull = jax.eval_shape(lambda m, t: jax.vjp(lambda m: train.mean_nats(m, t), m), model, tokens_BT)
  kept = [x for x in jax.tree.leaves(pull) if (x.shape, x.dtype) not in parameters]
  return _local_bytes(kept, mesh)


def _classes(memory, state, kept: float) -> dict[str, float]:
  """The compiler's bytes a chip by what they hold. Gradients and activations are temporaries of its own bookkeeping."""
  mesh = jax.tree.leaves(state)[0].sharding.mesh
  parameters, optimizer = _local_bytes(state.model, mesh), _local_bytes(state.opt_state, mesh)
  activations = min(kept, memory.temp_size_in_bytes)
  return {
    "parameters": parameters,
    "optimizer state": optimizer,
    "kept for backward, at most": activations,
    "temporaries": memory.temp_size_in_bytes - activations,
    "batch, program, rest": memory.argument_size_in_bytes
    + memory.output_size_in_bytes
    - memory.alias_size_in_bytes
    + memory.generated_code_size_in_bytes
    - parameters
    - optimizer,
  }


@contextlib.contextmanager
def _fitting(topology: Topology):
  """The compiler's way of saying that it is too much, as one line."""
  try:
    yield
  except jax.errors.JaxRuntimeError as error:
    found = re.search(r"\(([\d.]+[KMGT]?)\) exceeds available hbm \(([\d.]+[KMGT]?)\)", str(error), re.IGNORECASE)
    if found is None:  # other memories run out too, but of what the compiler or a kernel chose
      raise ValueError(f"the TPU compiler gave up on {topology}: {str(error).splitlines()[0][:300]}") from error
    raise DoesNotFit(
      f"it does not fit {topology}: it needs {found[1]} a chip, {found[2]} are there; "
      f"raise --config.microbatches, split more with --config.mesh.data or .model, or set --config.model.remat=full"
    ) from error
