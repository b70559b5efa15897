# SPDX-License-Identifier: Apache-2.0
"""What can be known at the start of a run: batch and mesh, memory, room on the disk.

Estimates are lower bounds: what they refuse cannot run, and what they let pass may still run out.
"""

import contextlib
import math
import os
import pathlib
import shutil

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict

import gpt2_jax.distributed as distributed
from gpt2_jax.chips import GIB
from gpt2_jax.compat import get_mesh
from gpt2_jax.files import first_line
from gpt2_jax.kernels.choose import choose_attention
from gpt2_jax.model import ModelConfig
from gpt2_jax.runs.privacy import check_private
from gpt2_jax.runs.workdir import is_remote
from gpt2_jax.sharding import ROWS, axis_size, check_divides, concrete

# How a run comes to need less memory.
LESS_MEMORY = (
  "lower --config.batch_size or .steps_per_call, raise --config.microbatches, set "
  "--config.model.remat=full, or split more with --config.mesh.data or .model"
)
SMALLER_MODEL = (
  "lower --config.model.n_embd, .n_layer or .n_ctx, or split the parameters over more devices "
  "with --config.mesh.data or .model"
)


def check_kernel(model_config: ModelConfig) -> None:
  """Raises ValueError for an attention kernel that the devices of the mesh do not have."""
  K = model_config.n_embd // model_config.n_head
  choose_attention(model_config.attention, model_config.n_ctx, K, jnp.dtype(model_config.dtype))


def check_batch(config: ConfigDict) -> None:
  """Raises ValueError unless every microbatch splits evenly over the mesh in force."""
  if config.batch_size % config.microbatches:
    raise ValueError(
      f"batch_size of {config.batch_size} does not divide by microbatches of "
      f"{config.microbatches}; set --config.microbatches to a divisor"
    )
  check_divides(
    config.batch_size // config.microbatches,
    "a microbatch (batch_size / microbatches)",
    *ROWS,
    way_out="change --config.batch_size, --config.microbatches or --config.mesh",
  )
  check_private(config)


def local_bytes(tree, mesh: Mesh) -> int:
  """Bytes of a device's shards of a tree of shapes."""
  total = 0
  for leaf in jax.tree.leaves(tree):
    # A leaf without a sharding counts in full.
    spec = leaf.sharding.spec if leaf.sharding else P()
    shape = NamedSharding(mesh, spec).shard_shape(leaf.shape)
    total += leaf.dtype.itemsize * math.prod(shape)
  return total


def memory_needs(
  config: ConfigDict, model_config: ModelConfig, abstract_state, objective=None
) -> dict[str, int]:
  """Bytes that an update needs at least on each device, by what they hold; on the mesh in force."""
  mesh = get_mesh()
  state = concrete(abstract_state, mesh)
  item = jnp.dtype(model_config.dtype).itemsize

  # Of one microbatch the backward pass keeps each layer's input and the logits, whatever remat is.
  rows = config.batch_size // axis_size(*ROWS)
  tokens = rows // config.microbatches * model_config.n_ctx
  logits = tokens * model_config.padded_vocab // axis_size("model") * item
  layers = tokens * model_config.n_embd * model_config.n_layer * item

  steps = min(config.steps_per_call, config.steps)
  teacher = local_bytes(objective, mesh)
  return {
    **({"the teacher": teacher} if teacher else {}),
    "the state": local_bytes(state, mesh),
    # what is trained has two moments, and a gradient as large as one of them
    "gradients": local_bytes(state.opt_state, mesh) // 2,
    "activations": layers,
    "logits": logits,
    "batches": steps * rows * (model_config.n_ctx + 1) * 4,
  }


def device_memory() -> float:
  """Bytes of a device's memory, on the mesh in force; a CPU has its share of the machine's."""
  devices = get_mesh().local_devices
  device = devices[0]
  if device.platform != "cpu":
    return (device.memory_stats() or {}).get("bytes_limit", math.inf)

  total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
  # A container may have less than its machine; its limit is a number or "max".
  with contextlib.suppress(OSError, ValueError):
    total = min(total, int(pathlib.Path("/sys/fs/cgroup/memory.max").read_text()))
  return total / len(devices)


def check_update_fits(
  config: ConfigDict, model_config: ModelConfig, abstract_state, objective=None
) -> None:
  """Raises ValueError if an update cannot fit the devices' memory, with the numbers.

  The leaves of `objective` are a teacher's.
  """
  needs = memory_needs(config, model_config, abstract_state, objective)
  available = device_memory()
  if sum(needs.values()) > available:
    parts = [f"{name} {nbytes / GIB:,.2f}" for name, nbytes in needs.items()]
    # Parameters, their moments and gradients are there whatever the batch is.
    model = needs["the state"] + needs["gradients"] + needs.get("the teacher", 0)
    has_room_for_model = model <= available
    way_out = LESS_MEMORY if has_room_for_model else SMALLER_MODEL
    raise ValueError(
      f"out of memory: an update needs at least {sum(needs.values()) / GIB:,.2f} GiB on each "
      f"device ({', '.join(parts)}), and {available / GIB:,.2f} are there; {way_out}"
    )


@contextlib.contextmanager
def out_of_memory(config: ConfigDict, model_config: ModelConfig, abstract_state, objective=None):
  """Makes one line of a device or a host that runs out of memory: the numbers, and what to do.

  Raises ValueError.
  """
  try:
    yield
  except (jax.errors.JaxRuntimeError, MemoryError) as error:
    is_memory = isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error)
    if not is_memory:
      raise
    needs = sum(memory_needs(config, model_config, abstract_state, objective).values())
    raise ValueError(
      f"out of memory ({first_line(error, limit=200)}): batch_size {config.batch_size:,}, "
      f"microbatches {config.microbatches:,}, remat {model_config.remat}, at least "
      f"{needs / GIB:,.2f} GiB of {device_memory() / GIB:,.2f} a device; {LESS_MEMORY}"
    ) from error


def check_disk(workdir: str, abstract_state) -> None:
  """Raises OSError if a local workdir is no folder that can be written, or one checkpoint does not
  fit its disk."""
  free = math.inf
  if distributed.is_primary() and not is_remote(workdir):
    # The workdir itself may not be there yet.
    folder = pathlib.Path(workdir).absolute() / "checkpoints"
    while not folder.exists():
      folder = folder.parent
    if not folder.is_dir() or not os.access(folder, os.W_OK):
      raise OSError(
        f"{workdir} cannot be written: {folder} is no folder that this user may write; "
        f"take another --workdir"
      )
    free = shutil.disk_usage(folder).free

  needed = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(abstract_state))
  free = distributed.broadcast("the free space at the start", free)
  if free < needed:
    raise OSError(
      f"a checkpoint takes {needed / 2**20:,.1f} MiB, and {free / 2**20:,.1f} are free in "
      f"{workdir}; make room, or take another --workdir"
    )
