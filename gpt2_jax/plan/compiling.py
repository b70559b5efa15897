# SPDX-License-Identifier: Apache-2.0
"""Compiles the training step ahead of time (AOT) for a TPU topology, on a machine without a TPU.

libtpu has a compile-only client: it needs the name of a topology, no TPU and no cloud account. It
reads its settings from the environment when it is first loaded, so `open_topology` has to come
before anything else in the process that loads it.
"""

import contextlib
import dataclasses
import functools
import importlib.util
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

import gpt2_jax.compat as compat
from gpt2_jax import compiler_options, train
from gpt2_jax.batch import Batch
from gpt2_jax.chips import Topology
from gpt2_jax.files import announce, first_line
from gpt2_jax.finetune.start import trained_names
from gpt2_jax.finetune.trainable import merge, partition, trainable_mask
from gpt2_jax.loss import NextToken, mean_loss
from gpt2_jax.model import ModelConfig, check_mesh, name_of
from gpt2_jax.plan import cost, program
from gpt2_jax.runs import knobs
from gpt2_jax.runs.limits import check_batch, local_bytes
from gpt2_jax.runs.teacher import abstract_objective
from gpt2_jax.sharding import BATCH, concrete, make_mesh

# A machine without TPUs: no metadata server to ask, no logs, several processes at once.
LIBTPU_SETTINGS = {
  "TPU_SKIP_MDS_QUERY": "1",
  "TPU_WORKER_HOSTNAMES": "localhost",
  "TPU_ACCELERATOR_TYPE": "v5litepod-8",
  "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
  "TPU_LOG_DIR": "disabled",
  "TPU_STDERR_LOG_LEVEL": "3",
  "TPU_MIN_LOG_LEVEL": "3",
}
# Dumps the instructions of each operation, the only place from which its cycles can be counted.
DUMP_FLAGS = (
  "--xla_jf_dump_to={} --xla_jf_dump_llo_text=true "
  "--xla_jf_dump_llo_pass_label_regex=.*final_bundles.*"
)


class DoesNotFit(ValueError):
  """The compiler ran out of HBM. The message says how much is needed and how much there is."""


@functools.cache
def _dump_folder() -> tempfile.TemporaryDirectory:
  """The folder of the compiler's dumps, one a process; sets what libtpu reads when it is loaded."""
  folder = tempfile.TemporaryDirectory(prefix="gpt2_jax_plan_")
  # The user's own flags stay.
  flags = f"{os.environ.get('LIBTPU_INIT_ARGS', '')} {DUMP_FLAGS.format(folder.name)}"
  os.environ.update(LIBTPU_SETTINGS, LIBTPU_INIT_ARGS=flags.strip())
  return folder


def check_installed() -> None:
  """Raises ImportError without libtpu, and ValueError with a JAX that is too old for it."""
  compat.check_compiles_ahead()
  if importlib.util.find_spec("libtpu") is None:
    raise ImportError("libtpu, the TPU compiler, is not installed: pip install 'gpt2_jax[plan]'")


def open_topology(topology: Topology) -> list:
  """The topology's devices, of all slices, as JAX shows them.

  Raises ImportError without libtpu; ValueError if libtpu does not know the topology, or JAX is old.
  """
  check_installed()
  _dump_folder()

  try:
    return topologies.get_topology_desc(
      platform="tpu",
      topology_name=topology.name,
      chip_config_name=topology.chip.libtpu_config,
      chips_per_host_bounds=topology.host_bounds,
      num_slices=topology.slices,
    ).devices
  except (RuntimeError, ValueError) as error:
    reason = first_line(error, limit=200)
    raise ValueError(f"libtpu does not know {topology.name}: {reason}") from error


@dataclasses.dataclass(frozen=True)
class Scheduled:
  """A program as the compiler scheduled it for a mesh of a topology's chips."""

  topology: Topology
  mesh: dict[str, int]
  places: np.ndarray  # of each device of the mesh, its slice and coordinates, [devices, 4]
  program: program.Program
  bundles: dict[str, cost.Bundles]  # of each operation with code, by the name of its instruction
  seconds: float  # of compiling

  @functools.cached_property
  def costs(self) -> cost.CostModel:
    return cost.CostModel(self.program, self.bundles, self.topology.chip)


@dataclasses.dataclass(frozen=True)
class Compiled(Scheduled):
  """A training step as the compiler scheduled it; bytes are those of one chip."""

  model: ModelConfig
  batch_size: int
  microbatches: int
  hbm: dict[str, float]  # bytes, by what they hold
  options: dict = dataclasses.field(default_factory=dict)  # of the compiler
  frozen_weights: int = 0  # of matmuls, in the whole model: those without a gradient
  teacher: ModelConfig | None = None  # of a distillation

  @property
  def hbm_needed(self) -> float:
    return sum(self.hbm.values())


def compile_lowered(lowered: jax.stages.Lowered, topology: Topology, mesh: Mesh):
  """Compiles a lowered function; returns it as Scheduled, and the compiler's memory analysis.

  Raises DoesNotFit with the numbers.
  """
  start = time.perf_counter()
  wait = announce(f"compiling for {topology}, about a minute")
  with wait, _out_of_memory_as_does_not_fit(topology):
    compiled = lowered.compile()

  parsed = program.parse(compiled.as_text())
  places = [(getattr(device, "slice_index", 0), *device.coords) for device in mesh.devices.flat]
  scheduled = Scheduled(
    topology=topology,
    mesh=dict(mesh.shape),
    places=np.array(places),
    program=parsed,
    bundles=_dumped_bundles(),
    seconds=time.perf_counter() - start,
  )
  return scheduled, compiled.memory_analysis()


def compile_step(config: ConfigDict, topology: Topology) -> Compiled:
  """Compiles the training step that `gpt2-jax train` runs with this config on that topology.

  It is one step, whatever `steps_per_call` says. Raises DoesNotFit with the numbers, and ValueError
  on a mesh, batch or model that cannot be.
  """
  # 1. The same mesh and the same function as in training.
  knobs.check(config)
  devices = open_topology(topology)
  mesh = make_mesh(**config.mesh, devices=devices)
  model_config = ModelConfig(**config.model)
  config = config.copy_and_resolve_references()
  config.steps_per_call = 1
  options = compiler_options.for_mesh(mesh, config.compiler_options, config.model.n_embd)
  init, call = train.make_step(config, model_config, options)

  with jax.set_mesh(mesh):
    check_batch(config)
    check_mesh(model_config)

    # 2. Shapes with shardings in place of arrays: nothing is allocated.
    state = concrete(jax.eval_shape(lambda: init(jax.random.key(0))), mesh)
    shape = (1, config.batch_size, model_config.n_ctx + 1)
    tokens_SBT = jax.ShapeDtypeStruct(
      shape, jnp.int32, sharding=NamedSharding(mesh, P(None, *BATCH))
    )
    every_device = NamedSharding(mesh, P(mesh.axis_names))
    signals = jax.ShapeDtypeStruct((mesh.size,), jnp.int32, sharding=every_device)
    objective = NextToken()
    if config.distill.teacher:
      objective = abstract_objective(config, model_config)
    kept = _kept_for_backward(state.model, config, mesh, objective)

    # 3. Compile.
    lowered = call.lower(state, Batch(tokens_SBT), objective, signals)
    scheduled, memory = compile_lowered(lowered, topology, mesh)

  return Compiled(
    **vars(scheduled),
    model=model_config,
    batch_size=config.batch_size,
    microbatches=config.microbatches,
    hbm=_hbm_by_class(memory, state, kept, objective),
    options=options,
    frozen_weights=_frozen_weights(state.model, config),
    teacher=objective.teacher.config if config.distill.teacher else None,
  )


def _dumped_bundles() -> dict[str, cost.Bundles]:
  """The bundles in the dump, which is emptied: the next plan of this process must not find them."""
  folder = pathlib.Path(_dump_folder().name)
  bundles = cost.read_bundles(folder)
  for path in folder.iterdir():
    path.unlink()
  return bundles


def _kept_for_backward(model, config: ConfigDict, mesh: Mesh, objective) -> float:
  """Bytes of activations that a chip keeps for the backward pass of one microbatch.

  They are the residuals of `jax.vjp` that are not parameters, so what JAX asks for. The compiler
  may keep less.
  """
  tokens_BT = jax.ShapeDtypeStruct(
    (config.batch_size // config.microbatches, config.model.n_ctx + 1),
    jnp.int32,
    sharding=NamedSharding(mesh, BATCH),
  )

  trained, frozen = partition(model, trainable_mask(model, trained_names(config)))

  def loss_and_pullback(trained, frozen, tokens_BT, objective):
    def loss(trained):
      return mean_loss(objective, merge(trained, frozen), Batch(tokens_BT))[0]

    return jax.vjp(loss, trained)

  _, pullback = jax.eval_shape(loss_and_pullback, trained, frozen, tokens_BT, objective)

  # A residual has no name: one that has the shape and type of a parameter is taken for it.
  parameters = [(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves((trained, frozen))]
  activations = []
  for residual in jax.tree.leaves(pullback):
    if (residual.shape, residual.dtype) not in parameters:
      activations.append(residual)
  return local_bytes(activations, mesh)


def _frozen_weights(model, config: ConfigDict) -> int:
  """Weights of matmuls that are not trained: those of the layers, and wte, which is the head."""
  _, frozen = partition(model, trainable_mask(model, trained_names(config)))
  total = 0
  for path, leaf in jax.tree_util.tree_leaves_with_path(frozen):
    # The layers are stacked: [L, I, O] is a weight and [L, O] a bias.
    name = name_of(path)
    is_weight = leaf.ndim == 3 if name.startswith("h.") else name.startswith("wte")
    total += leaf.size if is_weight and leaf.ndim > 1 else 0
  return total


def _hbm_by_class(memory, state, kept: float, objective) -> dict[str, float]:
  """HBM of a chip by what it holds, bytes, from the compiler's memory analysis.

  The compiler reports gradients and activations together, as temporaries.
  """
  mesh = jax.tree.leaves(state)[0].sharding.mesh
  parameters = local_bytes(state.model, mesh)
  optimizer = local_bytes(state.opt_state, mesh)
  teacher = local_bytes(objective, mesh)

  # What JAX asks to keep is a bound: the compiler may compute some of it again.
  activations = min(kept, memory.temp_size_in_bytes)

  # Outputs that reuse an input's memory (donated buffers) are counted once.
  arguments_and_outputs = (
    memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
  )
  known_bytes = parameters + optimizer + teacher
  return {
    "parameters": parameters,
    "optimizer state": optimizer,
    **({"teacher": teacher} if teacher else {}),
    "kept for backward, at most": activations,
    "temporaries": memory.temp_size_in_bytes - activations,
    "batch, program, rest": arguments_and_outputs
    + memory.generated_code_size_in_bytes
    - known_bytes,
  }


@contextlib.contextmanager
def _out_of_memory_as_does_not_fit(topology: Topology):
  """Turns the compiler's error of running out of HBM into DoesNotFit, one line with the numbers."""
  try:
    yield
  except jax.errors.JaxRuntimeError as error:
    exceeded = re.search(
      r"\(([\d.]+[KMGT]?)\) exceeds available hbm \(([\d.]+[KMGT]?)\)", str(error), re.IGNORECASE
    )
    # Other memories run out, too: those that the compiler or a kernel fills by its own choice.
    if exceeded is None:
      raise ValueError(f"the TPU compiler gave up on {topology}: {first_line(error)}") from error

    raise DoesNotFit(
      f"it does not fit {topology}: it needs {exceeded[1]} a chip, {exceeded[2]} are there; "
      f"raise --config.microbatches, split more with --config.mesh.data or .model, "
      f"or set --config.model.remat=full"
    ) from error
