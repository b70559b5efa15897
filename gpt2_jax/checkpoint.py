# SPDX-License-Identifier: Apache-2.0
"""Checkpoints: asynchronous, whole or absent, restored on any mesh, device count or dtype.

An array is saved under its name (`model.h.attn.c_attn.w`), so a checkpoint depends on no Python class. Zero padding
of heads and vocabulary lies at the end of an axis: a restore onto another mesh cuts it off or adds it.
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

import gpt2_jax.hosts as hosts
from gpt2_jax.model import GPT2, ModelConfig, check_mesh, name_of
from gpt2_jax.sharding import concrete
from gpt2_jax.tokenizer import from_json
from gpt2_jax.workdir import at, is_remote, is_there, reached


def named(tree) -> dict:
  """Leaves by name."""
  return {name_of(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


UNREADABLE = (ValueError, OSError, KeyError)  # what a damaged checkpoint raises, at any depth of Orbax

# Knobs that may change when a run goes on: they say where and how it computes, not what.
FREE = ("mesh", "microbatches", "steps_per_call", "log_every", "eval_every", "save_every", "keep")
FREE += ("max_skips", "profile_steps", "data", "model.dtype", "model.remat", "model.unroll", "model.pad_heads")
FREE += ("model.attention",)


def flat(config: dict, prefix: str = "") -> dict:
  """Knobs by their dotted names."""
  items = {}
  for name, value in config.items():
    items |= flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
  return items


def check_same_run(about: dict, saved: dict, workdir: str):
  """Raises ValueError with the difference if `about` would not continue the run that was `saved`."""
  new, old = flat(json.loads(json.dumps(about))), flat(saved)
  free = tuple(f"config.{name}." for name in FREE)

  def is_content(name):  # where the data lay and when it was made may differ, what it is may not
    return not name.startswith("data.") or name.endswith("sha256")

  differing = [
    f"{name.removeprefix('config.')}: {str(old.get(name))[:80]} -> {str(new.get(name))[:80]}"
    for name in sorted(new.keys() | old.keys())
    if new.get(name) != old.get(name) and not (name + ".").startswith(free) and is_content(name)
  ]
  if differing:
    raise ValueError(
      f"{workdir} holds a run with another config ({'; '.join(differing)}); set these back, or take another --workdir"
    )


@jax.jit
def bit_sums(arrays: dict) -> dict:
  """The sum of each array's bits as integers, modulo 2^32: it sees a flipped bit, and not zero padding."""
  return {name: _bits(x).astype(jnp.uint32).sum(dtype=jnp.uint32) for name, x in arrays.items()}


def _bits(x):
  return jax.lax.bitcast_convert_type(x, jnp.uint32 if x.dtype.itemsize == 4 else jnp.uint16)


class Checkpoints:
  """The checkpoints under `workdir`/checkpoints: the last `last` of them and the one with the least `val_loss`.

  Beside each state lie `about`, the config, the tokenizer and the data manifest of the run, and `sums`, its checksums.
  """

  def __init__(self, workdir: str, last: int = 1, create: bool = True):
    self.path = os.path.join(at(workdir) if is_remote(workdir) else os.path.abspath(workdir), "checkpoints")
    best = keep.BestN(get_metric_fn=lambda metrics: metrics["val_loss"], reverse=True, n=1)
    with reached(self.path):
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
    self.best = hosts.from_first("the best checkpoint", self._least_val_loss())

  def steps(self) -> list[int]:
    """Steps of the whole checkpoints, newest first."""
    return sorted(self.manager.all_steps(), reverse=True)

  def save(self, step: int, state, about: dict, val_loss: float = float("inf")):
    """Starts to write `state`; returns once its arrays are copied and may be donated. OSError for want of room."""
    needed = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    free = math.inf if is_remote(self.path) else shutil.disk_usage(self.path).free
    if (free := hosts.from_first("the free space", free)) < needed:
      raise self._no_room(f"it takes {needed / 2**20:,.0f} MiB and {free / 2**20:,.0f} are free")
    arrays = named(state)
    sums = {name: [str(arrays[name].dtype), int(n)] for name, n in jax.device_get(bit_sums(arrays)).items()}
    items = ocp.args.Composite(
      state=ocp.args.PyTreeSave(arrays), about=ocp.args.JsonSave(about), sums=ocp.args.JsonSave(sums)
    )
    with self._writing():
      self.manager.save(
        step, args=items, metrics={"val_loss": val_loss if math.isfinite(val_loss) else 1e30}, force=True
      )
    self.best = min(self.best, val_loss)

  def about(self, step: int) -> dict:
    """The config, tokenizer and manifest saved with `step`."""
    return self._read(step, about=ocp.args.JsonRestore())["about"]

  def sums(self, step: int) -> dict:
    """The checksums saved with `step`, by name."""
    with _readable(self, step):
      return self._read(step, sums=ocp.args.JsonRestore())["sums"]

  def _read(self, step: int, **items):
    """What this process needs of the items; it waits for no other process, so one that fails leaves none waiting."""
    me = jax.process_index()
    alone = ocp.options.MultiprocessingOptions(primary_host=me, active_processes={me}, barrier_sync_key_prefix=f"{me}")
    handler = ocp.CompositeCheckpointHandler(composite_options=ocp.CompositeOptions(multiprocessing_options=alone))
    try:
      with ocp.Checkpointer(handler, multiprocessing_options=alone) as reader:
        return reader.restore(epath.Path(self.path) / str(step), args=ocp.args.Composite(**items))
    except Exception as error:
      if type(error) is not Exception:  # Orbax's for what TensorStore could not read; a lack of memory is another
        raise
      raise ValueError(_reason(error.__cause__ or error)) from error

  def restore(self, step: int, abstract_state, prefix: str = ""):
    """The state of `step` in the shapes, dtypes and shardings of `abstract_state`, on the mesh in force.

    `prefix` is "model." where `abstract_state` is the model alone. Raises ValueError where an array is not the one that
    was saved; where the dtype is another, that is not checked.
    """
    targets = concrete(abstract_state, jax.sharding.get_mesh())
    names = {prefix + name: leaf for name, leaf in named(targets).items()}
    how = {
      name: ocp.ArrayRestoreArgs(dtype=leaf.dtype, sharding=leaf.sharding, global_shape=leaf.shape, strict=False)
      for name, leaf in names.items()
    }
    state = ocp.args.PyTreeRestore(item=names, restore_args=how, partial_restore=True)
    with everywhere(f"the arrays of checkpoint {step}"):
      saved = self._read(step, state=state, sums=ocp.args.JsonRestore())
    arrays, sums = saved["state"], saved["sums"]
    for name, n in jax.device_get(bit_sums(arrays)).items():
      if sums[name][0] == str(arrays[name].dtype) and sums[name][1] != int(n):
        raise ValueError(f"the checksum of {name} is wrong")
    return jax.tree.unflatten(jax.tree.structure(targets), [arrays[name] for name in names])

  def newest(self, abstract_state, about: dict):
    """The state and step of the newest whole checkpoint, or None if there is none at all.

    Damaged newer ones are moved aside, and named on stderr. Raises ValueError if there are checkpoints and none can be
    read, or if they are those of another run.
    """
    unreadable = {}
    for step in hosts.from_first("the checkpoints", self.steps()):
      try:
        with everywhere(f"the config of checkpoint {step}"):
          saved = self.about(step)
      except UNREADABLE as error:
        unreadable[step] = error
        continue
      check_same_run(about, saved, self.path)
      try:
        state = self.restore(step, abstract_state)
      except UNREADABLE as error:
        unreadable[step] = error
        continue
      for damaged, error in unreadable.items():
        self._set_aside(damaged, error)
      return state, step
    if unreadable:
      newest = _reason(unreadable[max(unreadable)])
      raise ValueError(
        f"none of the checkpoints {list(unreadable)} in {self.path} can be read ({newest}); "
        f"move that folder away to begin anew"
      )
    return None

  def _set_aside(self, step: int, error: Exception):
    if hosts.is_first():
      names = (f"damaged-{step}{'-again' * n}" for n in itertools.count())
      aside = next(path for name in names if not (path := epath.Path(self.path).parent / name).exists())
      (epath.Path(self.path) / str(step)).rename(aside)
      print(f"checkpoint {step} cannot be read ({_reason(error)}); moved to {aside}", file=sys.stderr)
    hosts.barrier(f"moving checkpoint {step} aside")
    self.manager.reload()
    self.best = hosts.from_first("the best checkpoint", self._least_val_loss())

  def _least_val_loss(self) -> float:
    """Among the checkpoints; infinite if there is none."""
    step = self.manager.best_step()
    return math.inf if step is None else (self.manager.metrics(step) or {}).get("val_loss", math.inf)

  def close(self):
    """Waits for the save under way."""
    with self._writing():
      self.manager.close()

  @contextlib.contextmanager
  def _writing(self):
    """A save under way may have failed since it began: one line, and what is whole stays."""
    try:
      with reached(self.path):
        yield
    except (ValueError, OSError) as error:
      reason = re.search(
        r"No space left on device|Permission denied|Read-only file system|Disk quota exceeded", str(error)
      )
      raise self._no_room(reason[0] if reason else _reason(error)) from error

  def _no_room(self, reason: str) -> OSError:
    return OSError(
      f"a checkpoint cannot be written to {self.path}: {reason}; whole ones there: {self.steps() or 'none'}; "
      f"make room and start again, the run goes on from the newest"
    )


@contextlib.contextmanager
def everywhere(what: str):
  """A read that succeeds on every process or raises ValueError on every one: they go the same way."""
  reason, damage = None, None
  try:
    yield
  except UNREADABLE as error:
    reason, damage = _reason(error), error
  reasons = hosts.gather(what, reason)
  if any(reasons):
    raise ValueError(next(filter(None, reasons))) from damage


def _reason(error: Exception) -> str:
  return (str(error).splitlines() or [type(error).__name__])[0][:200]


def load(workdir: str, step: str = "latest", dtype: str | None = None):
  """The model and tokenizer of a run, on the mesh in force; `step` is "latest", "best" or a number.

  `dtype` computes in another dtype than the run did. Raises FileNotFoundError if there is no such checkpoint.
  """
  if not is_there(workdir):
    raise FileNotFoundError(f"{workdir} is not there; give the --workdir of a run")
  checkpoints = Checkpoints(workdir, create=False)
  steps = checkpoints.steps()
  if not steps:
    raise FileNotFoundError(f"{checkpoints.path} holds no checkpoint; is this the --workdir of a run?")
  wanted = {"latest": steps[0], "best": checkpoints.manager.best_step()}.get(step, step)
  if str(wanted) not in map(str, steps):
    raise FileNotFoundError(f"no checkpoint of step {step} in {checkpoints.path}; there are {steps}, latest and best")
  with _readable(checkpoints, wanted):
    about = checkpoints.about(int(wanted))
  model_config = ModelConfig(**about["config"]["model"])
  model_config = dataclasses.replace(model_config, dtype=dtype or model_config.dtype, pad_heads=True, attention="auto")
  check_mesh(model_config)
  model = jax.eval_shape(functools.partial(GPT2, model_config), jax.random.key(0))
  with _readable(checkpoints, wanted):
    return checkpoints.restore(int(wanted), model, "model."), about["tokenizer"] and from_json(about["tokenizer"])


@contextlib.contextmanager
def _readable(checkpoints: Checkpoints, step):
  try:
    yield
  except UNREADABLE as error:
    raise ValueError(
      f"checkpoint {step} in {checkpoints.path} cannot be read ({_reason(error)}); take one of {checkpoints.steps()}"
    ) from error
