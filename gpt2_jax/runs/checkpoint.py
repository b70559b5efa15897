# SPDX-License-Identifier: Apache-2.0
"""Checkpoint and resume: asynchronous, whole or absent, restored on any mesh and in any dtype.

An array is saved under its name on disk (`model.h.attn.c_attn.w`), so a checkpoint depends on no
Python class. The names are a format with a version. A damaged (corrupt) checkpoint is quarantined,
and the one before it is taken. Zero padding of heads and vocabulary lies at
the end of an axis: a restore onto another mesh cuts it off or adds it.
"""

import contextlib
import dataclasses
import functools
import itertools
import json
import math
import os
import re
import shutil
import sys

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint.checkpoint_managers import preservation_policy as keep

import gpt2_jax.distributed as distributed
from gpt2_jax.files import first_line
from gpt2_jax.model import GPT2, ModelConfig, check_mesh, name_of
from gpt2_jax.runs import knobs
from gpt2_jax.runs.workdir import as_path, cloud_errors, exists, is_remote
from gpt2_jax.sharding import concrete
from gpt2_jax.tokenizer import from_json

# What a damaged checkpoint raises, at any depth of Orbax.
UNREADABLE = (ValueError, OSError, KeyError)

# The version of the names on disk, and how each differs from the attributes of TrainState: a prefix
# of the attribute's path, and what stands for it on disk. Version 0 wrote no version.
FORMAT = 1
NAMES = {
  0: {
    "skipped_total": "skipped",
    "skipped_in_a_row": "skips",
    "opt_state.adam.": "opt_state.1.0.",
    "opt_state.learning_rate.": "opt_state.1.2.",
  },
  1: {
    "opt_state.adam.": "adam.",
    "opt_state.learning_rate.": "learning_rate.",
  },
}


def name_on_disk(name: str, version: int = FORMAT) -> str:
  """The name of a leaf in a checkpoint of that version, from its attribute's path."""
  for prefix, on_disk in NAMES[version].items():
    if name.startswith(prefix):
      return on_disk + name.removeprefix(prefix)
  return name


def by_name(tree, prefix: str = "", version: int = FORMAT) -> dict:
  """Leaves by their names on disk; `prefix` is the path to `tree` in the state."""
  leaves = {}
  for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
    name = name_on_disk(prefix + name_of(path), version)
    if name in leaves:
      raise ValueError(f"two arrays of a checkpoint would be called {name}")
    leaves[name] = leaf
  return leaves


def format_of(metadata: dict) -> int:
  """The version of a checkpoint's names. Raises ValueError for one that is not known here."""
  version = metadata.get("format", 0)
  if version not in NAMES:
    raise ValueError(
      f"its format is {version}, and this code reads up to {FORMAT}; update gpt2_jax"
    )
  return version


def check_same_run(metadata: dict, saved: dict, workdir: str):
  """Raises ValueError with the differences if `metadata` would not resume the run that was
  `saved`."""
  if saved["config"].keys() == {"model"}:
    raise ValueError(
      f"{workdir} holds converted weights, and no run that could resume; take another --workdir"
    )
  differing = knobs.differences(saved["config"], metadata["config"])

  # Of the data and the tokenizer their content counts: where the data lay and when it was made may
  # differ.
  def content(metadata):
    facts = {"tokenizer": metadata.get("tokenizer"), "data": metadata.get("data", {})}
    facts = knobs.flatten(json.loads(json.dumps(facts)))
    return {
      name: value
      for name, value in facts.items()
      if not name.startswith("data.") or name.endswith("sha256")
    }

  new, old = content(metadata), content(saved)
  for name in sorted(new.keys() | old.keys()):
    if new.get(name) != old.get(name):
      differing.append(f"{name}: {str(old.get(name))[:80]} -> {str(new.get(name))[:80]}")
  if differing:
    shown = differing[:8]
    if len(differing) > len(shown):
      shown.append(f"and {len(differing) - len(shown)} more")
    raise ValueError(
      f"{workdir} holds a run with another config ({'; '.join(shown)}); "
      f"set these back, or take another --workdir"
    )


@jax.jit
def bit_sums(arrays: dict) -> dict:
  """Checksums: the sum of each array's bits as integers, modulo 2^32.

  It sees a flipped bit, and not zero padding.
  """
  return {name: _bits(x).astype(jnp.uint32).sum(dtype=jnp.uint32) for name, x in arrays.items()}


def _bits(x):
  return jax.lax.bitcast_convert_type(x, jnp.uint32 if x.dtype.itemsize == 4 else jnp.uint16)


class Checkpoints:
  """The checkpoints under `workdir`/checkpoints: the last `last`, and the one with the least
  `val_loss`.

  A checkpoint is three items on disk: `state`, the arrays; `about`, the run's metadata (config,
  tokenizer, data manifests, format version); and `sums`, the checksums of the arrays.
  """

  def __init__(self, workdir: str, last: int = 1, create: bool = True):
    place = as_path(workdir) if is_remote(workdir) else os.path.abspath(workdir)
    self.path = os.path.join(place, "checkpoints")
    best = keep.BestN(get_metric_fn=lambda metrics: metrics["val_loss"], reverse=True, n=1)
    with cloud_errors(self.path):
      self.manager = ocp.CheckpointManager(
        self.path,
        options=ocp.CheckpointManagerOptions(
          preservation_policy=keep.AnyPreservationPolicy([keep.LatestN(last), best]),
          best_fn=lambda metrics: metrics["val_loss"],
          best_mode="min",
          create=create,
          cleanup_tmp_directories=create,
        ),
      )
    self.best = distributed.broadcast("the best checkpoint", self._least_val_loss())

  def steps(self) -> list[int]:
    """Steps of the whole checkpoints, newest first."""
    return sorted(self.manager.all_steps(), reverse=True)

  def save(self, step: int, state, metadata: dict, val_loss: float = float("inf")):
    """Starts to write `state`; returns once its arrays are copied and may be donated.

    Raises OSError for want of room.
    """
    needed = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    free = math.inf if is_remote(self.path) else shutil.disk_usage(self.path).free
    free = distributed.broadcast("the free space", free)
    if free < needed:
      raise self._no_room(f"it takes {needed / 2**20:,.0f} MiB and {free / 2**20:,.0f} are free")

    arrays = by_name(state)
    sums = {}
    for name, total in jax.device_get(bit_sums(arrays)).items():
      sums[name] = [str(arrays[name].dtype), int(total)]
    items = ocp.args.Composite(
      state=ocp.args.PyTreeSave(arrays),
      about=ocp.args.JsonSave(metadata | {"format": FORMAT}),
      sums=ocp.args.JsonSave(sums),
    )

    # Orbax ranks by a number: without an evaluation a checkpoint is never the best.
    ranked = val_loss if math.isfinite(val_loss) else 1e30
    with self._writing():
      self.manager.save(step, args=items, metrics={"val_loss": ranked}, force=True)
    self.best = min(self.best, val_loss)

  def metadata(self, step: int) -> dict:
    """The config, tokenizer, data manifests and format saved with `step`."""
    metadata = self._read(step, about=ocp.args.JsonRestore())["about"]
    if not isinstance(metadata, dict) or not isinstance(metadata.get("config"), dict):
      raise ValueError("its metadata has no config")
    return metadata

  def sums(self, step: int) -> dict:
    """The checksums saved with `step`, by name on disk."""
    with _readable(self, step):
      return self._read(step, sums=ocp.args.JsonRestore())["sums"]

  def _read(self, step: int, **items):
    """What this process needs of the items.

    It waits for no other process, so one that fails leaves none waiting.
    """
    rank = jax.process_index()
    alone = ocp.options.MultiprocessingOptions(
      primary_host=rank, active_processes={rank}, barrier_sync_key_prefix=f"{rank}"
    )
    handler = ocp.CompositeCheckpointHandler(
      composite_options=ocp.CompositeOptions(multiprocessing_options=alone)
    )
    try:
      with ocp.Checkpointer(handler, multiprocessing_options=alone) as reader:
        return reader.restore(epath.Path(self.path) / str(step), args=ocp.args.Composite(**items))
    except Exception as error:
      # A plain Exception is Orbax's for what TensorStore could not read; lack of memory is another.
      if type(error) is not Exception:
        raise
      raise ValueError(first_line(error.__cause__ or error)) from error

  def restore(self, step: int, abstract_state, prefix: str = ""):
    """Restores `step` in the shapes, dtypes and shardings of `abstract_state`, on any mesh: the one
    in force.

    `prefix` is "model." where `abstract_state` is the model alone. Raises ValueError where an array
    is not the one that was saved; where the dtype is another, that is not checked.
    """
    # 1. The names of this checkpoint's format, and what each array is to become.
    targets = concrete(abstract_state, jax.sharding.get_mesh())
    with everywhere(f"the format of checkpoint {step}"):
      version = format_of(self.metadata(step))
    leaves = by_name(targets, prefix, version)
    restore_args = {}
    for name, leaf in leaves.items():
      restore_args[name] = ocp.ArrayRestoreArgs(
        dtype=leaf.dtype, sharding=leaf.sharding, global_shape=leaf.shape, strict=False
      )

    # 2. Each process reads its shards.
    state = ocp.args.PyTreeRestore(item=leaves, restore_args=restore_args, partial_restore=True)
    with everywhere(f"the arrays of checkpoint {step}"):
      saved = self._read(step, state=state, sums=ocp.args.JsonRestore())
    arrays, sums = saved["state"], saved["sums"]

    # 3. Are they the arrays that were saved?
    for name, total in jax.device_get(bit_sums(arrays)).items():
      dtype, expected = sums[name]
      if dtype == str(arrays[name].dtype) and expected != int(total):
        raise ValueError(f"the checksum of {name} is wrong")
    return jax.tree.unflatten(jax.tree.structure(targets), [arrays[name] for name in leaves])

  def restore_latest(self, abstract_state, metadata: dict):
    """Resumes: the state and step of the newest whole checkpoint, or None if there is none at all.

    Damaged newer ones are moved aside, and named on stderr. Raises ValueError if there are
    checkpoints and none can be read, or if they are those of another run.
    """
    unreadable = {}
    for step in distributed.broadcast("the checkpoints", self.steps()):
      try:
        with everywhere(f"the config of checkpoint {step}"):
          saved = self.metadata(step)
      except UNREADABLE as error:
        unreadable[step] = error
        continue

      # Of another run, or of newer code: that is no damage, and nothing is moved.
      format_of(saved)
      check_same_run(metadata, saved, self.path)
      try:
        state = self.restore(step, abstract_state)
      except UNREADABLE as error:
        unreadable[step] = error
        continue
      for damaged, error in unreadable.items():
        self.quarantine(damaged, error)
      return state, step
    if unreadable:
      newest = first_line(unreadable[max(unreadable)])
      raise ValueError(
        f"none of the checkpoints {list(unreadable)} in {self.path} can be read ({newest}); "
        f"move that folder away to begin anew"
      )
    return None

  def quarantine(self, step: int, error: Exception):
    """Moves a damaged checkpoint out of the way, beside the others' folder; nothing is deleted."""
    if distributed.is_primary():
      folder = epath.Path(self.path)
      for attempt in itertools.count():
        aside = folder.parent / f"damaged-{step}{'-again' * attempt}"
        if not aside.exists():
          break
      (folder / str(step)).rename(aside)
      print(
        f"checkpoint {step} cannot be read ({first_line(error)}); moved to {aside}", file=sys.stderr
      )
    distributed.barrier(f"moving checkpoint {step} aside")
    self.manager.reload()
    self.best = distributed.broadcast("the best checkpoint", self._least_val_loss())

  def _least_val_loss(self) -> float:
    """The best checkpoint's; infinite if there is none."""
    step = self.manager.best_step()
    if step is None:
      return math.inf
    return (self.manager.metrics(step) or {}).get("val_loss", math.inf)

  def close(self):
    """Waits for the save under way."""
    with self._writing():
      self.manager.close()

  @contextlib.contextmanager
  def _writing(self):
    """A save under way may have failed since it began: one line, and what is whole stays."""
    try:
      with cloud_errors(self.path):
        yield
    except (ValueError, OSError) as error:
      known = "No space left on device|Permission denied|Read-only file system|Disk quota exceeded"
      reason = re.search(known, str(error))
      raise self._no_room(reason[0] if reason else first_line(error)) from error

  def _no_room(self, reason: str) -> OSError:
    return OSError(
      f"a checkpoint cannot be written to {self.path}: {reason}; "
      f"whole ones there: {self.steps() or 'none'}; "
      f"make room and start again, the run resumes from the newest"
    )


@contextlib.contextmanager
def everywhere(what: str):
  """A read that succeeds on every process, or raises ValueError on every one."""
  reason, damage = None, None
  try:
    yield
  except UNREADABLE as error:
    reason, damage = first_line(error), error
  reasons = distributed.all_gather_json(what, reason)
  if any(reasons):
    raise ValueError(next(filter(None, reasons))) from damage


def load(workdir: str, step: str = "latest", dtype: str | None = None):
  """Loads the model and tokenizer of a run, on the mesh in force.

  `step` is "latest", "best" or a number. `dtype` computes in another dtype than the run did. Raises
  FileNotFoundError if there is no such checkpoint.
  """
  # 1. Which step?
  if not exists(workdir):
    raise FileNotFoundError(f"{workdir} is not there; give the --workdir of a run")
  checkpoints = Checkpoints(workdir, create=False)
  steps = checkpoints.steps()
  if not steps:
    raise FileNotFoundError(
      f"{checkpoints.path} holds no checkpoint; is this the --workdir of a run?"
    )
  wanted = {"latest": steps[0], "best": checkpoints.manager.best_step()}.get(step, step)
  if str(wanted) not in map(str, steps):
    raise FileNotFoundError(
      f"no checkpoint of step {step} in {checkpoints.path}; there are {steps}, latest and best"
    )

  # 2. The model of its config, on any mesh and for any platform.
  with _readable(checkpoints, wanted):
    metadata = checkpoints.metadata(int(wanted))
  model_config = ModelConfig(**metadata["config"]["model"])
  model_config = dataclasses.replace(
    model_config, dtype=dtype or model_config.dtype, pad_heads=True, attention="auto"
  )
  check_mesh(model_config)
  abstract_model = jax.eval_shape(functools.partial(GPT2, model_config), jax.random.key(0))

  # 3. Its arrays.
  with _readable(checkpoints, wanted):
    model = checkpoints.restore(int(wanted), abstract_model, "model.")
    return model, metadata["tokenizer"] and from_json(metadata["tokenizer"])


@contextlib.contextmanager
def _readable(checkpoints: Checkpoints, step):
  """Makes what a damaged checkpoint raises one line, with the steps that there are."""
  try:
    yield
  except UNREADABLE as error:
    raise ValueError(
      f"checkpoint {step} in {checkpoints.path} cannot be read ({first_line(error)}); "
      f"take one of {checkpoints.steps()}"
    ) from error
