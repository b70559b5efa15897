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
import logging
import math
import os
import re
import shutil
import sys
import warnings
from collections.abc import Collection

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from etils import epath
from ml_collections import ConfigDict

import gpt2_jax.distributed as distributed
from gpt2_jax.compat import get_mesh
from gpt2_jax.convert import names
from gpt2_jax.data.zarr_files import tensorstore_reason
from gpt2_jax.files import first_line, json_sha256, parse_json_object, summarize
from gpt2_jax.finetune.start import build_on, initial_model, trained_names
from gpt2_jax.finetune.trainable import merge, partition, trainable_mask
from gpt2_jax.model import ModelConfig, check_mesh, name_of
from gpt2_jax.runs.metadata import (
  check_metadata,
  check_same_run,
  check_step,
  saved_finetuning,
  saved_model_config,
  saved_tokenizer,
)
from gpt2_jax.runs.workdir import as_path, cloud_errors, exists, is_remote
from gpt2_jax.sharding import concrete
from gpt2_jax.tokenizer import Tokenizer

# What a damaged checkpoint raises: `_damage_as_value_error` makes these of anything else.
UNREADABLE = (ValueError, OSError)

# What ranks a checkpoint that was saved without an evaluation: it is never the best. (A number,
# since JSON has no infinity.)
NOT_EVALUATED = 1e30

# The entry of `sums` that is no array's: the checksum of the other entries and of `about`.
SEAL = "seal"

# The axis on which a mesh pads a parameter with zeros: the vocabulary, and the heads.
PADDED_AXIS = {"wte": -2, "h.attn.c_attn.w": -1, "h.attn.c_attn.b": -1, "h.attn.c_proj.w": -2}

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
    "opt_state.adam.inner_state.": "adam.",  # beside Muon, of what AdamW trains
    "opt_state.muon.inner_state.": "muon.",
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


@jax.jit
def bit_sums(arrays: dict) -> dict:
  """Checksums: the sum of each array's bits as integers, modulo 2^32.

  It sees a flipped bit, and not zero padding.
  """
  return {name: _bits(x).astype(jnp.uint32).sum(dtype=jnp.uint32) for name, x in arrays.items()}


def _bits(x):
  return jax.lax.bitcast_convert_type(x, jnp.uint32 if x.dtype.itemsize == 4 else jnp.uint16)


@jax.jit
def _are_finite(arrays: dict) -> dict:
  """Whether each array of floating point holds neither NaN nor infinity."""
  return {
    name: jnp.isfinite(x).all()
    for name, x in arrays.items()
    if jnp.issubdtype(x.dtype, jnp.floating)
  }


class Checkpoints:
  """The checkpoints under `workdir`/checkpoints: the last `last`, and the one with the least
  `val_loss`.

  A checkpoint is four items on disk: `state`, the arrays; `about`, the run's metadata (config,
  tokenizer, data manifests, format version, step); `sums`, the checksums of the arrays and of
  `about`; and `metrics`, the validation loss with a checksum of its own.
  """

  def __init__(self, workdir: str, last: int = 1, create: bool = True):
    place = as_path(workdir) if is_remote(workdir) else os.path.abspath(workdir)
    self.path = os.path.join(place, "checkpoints")
    self.last, self.create = last, create
    self.without_loss = set()  # steps whose metrics cannot be read, and of which that is said
    if create and not is_remote(self.path) and os.path.isfile(self.path):
      raise NotADirectoryError(f"{self.path} is a file; move it away, or take another --workdir")
    self._open()

  def _open(self):
    """Lists the checkpoints, and reads their validation losses."""
    # `lightweight_initialize`: Orbax would read the metrics of all checkpoints here, and one
    # that is damaged would end every use of the others.
    with cloud_errors(self.path):
      self.manager = ocp.CheckpointManager(
        self.path,
        options=ocp.CheckpointManagerOptions(
          preservation_policy=self,
          best_fn=lambda metrics: metrics["val_loss"],  # without it no metrics are written
          best_mode="min",
          create=self.create,
          cleanup_tmp_directories=self.create,
          lightweight_initialize=True,
        ),
      )
    known = self._read_val_losses() if distributed.is_primary() else None
    self.val_losses = dict(distributed.broadcast("the validation losses", known))

  def _read_val_losses(self) -> list[tuple[int, float]]:
    """Step and validation loss of the checkpoints; one line on stderr names those without."""
    known, unknown = [], {}
    for step in self.steps():
      try:
        val_loss = self._read_val_loss(step)
        if val_loss is not None:
          known.append((step, val_loss))
      except UNREADABLE as error:
        unknown[step] = first_line(error, 120)

    new = sorted(unknown.keys() - self.without_loss)
    if new:
      self.without_loss.update(new)
      print(
        f"the validation loss of checkpoint {summarize(new)} in {self.path} cannot be read "
        f"({unknown[new[0]]}): kept, and never taken for the best",
        file=sys.stderr,
      )
    return known

  def _read_val_loss(self, step: int) -> float | None:
    """The loss saved with `step`; None for a renamed folder, as whoever reads it will be told."""
    metrics = self._read_json(step, "metrics/metrics")
    checksum = metrics.pop("sha256", None)
    if checksum is not None and json_sha256(metrics) != checksum:
      raise ValueError("the checksum of metrics/metrics is wrong")
    if metrics.get("step", step) != step:
      return None
    val_loss = metrics.get("val_loss")
    if not isinstance(val_loss, int | float) or not math.isfinite(val_loss):
      raise ValueError(f"metrics/metrics has a val_loss of {str(val_loss)[:40]}")
    return float(val_loss)

  def should_preserve(self, checkpoints, *, context) -> list[bool]:
    """Orbax's question which checkpoints stay: the last, the best, and those of unknown loss."""
    steps = [info.step for info in checkpoints]
    preserved = {*steps[-self.last :], self.best_step()}
    return [step in preserved or step not in self.val_losses for step in steps]

  def best_step(self) -> int | None:
    """The step of least validation loss, the newest of equals; None if none has one."""
    return min(self.val_losses, key=lambda step: (self.val_losses[step], -step), default=None)

  @property
  def best(self) -> float:
    """The least validation loss; infinite if there is none."""
    return min(self.val_losses.values(), default=math.inf)

  def steps(self) -> list[int]:
    """Steps of the whole checkpoints, newest first."""
    return sorted(self.manager.all_steps(), reverse=True)

  def save(self, step: int, state, metadata: dict, val_loss: float = float("inf")):
    """Starts to write `state`; returns once its arrays are copied and may be donated.

    Raises OSError for want of room, FloatingPointError for a state of a run that is not finite:
    it must replace no other. Converted weights are written as they are.
    """
    needed = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    free = math.inf if is_remote(self.path) else shutil.disk_usage(self.path).free
    free = distributed.broadcast("the free space", free)
    if free < needed:
      raise self._no_room(f"it takes {needed / 2**20:,.0f} MiB and {free / 2**20:,.0f} are free")

    arrays = by_name(state)
    if metadata.get("config", {}).keys() != {"model"}:
      self._check_finite(step, arrays)

    # The checksums: of each array, and one of all these and the metadata.
    about = metadata | {"format": FORMAT, "step": step}
    sums = {}
    for name, total in jax.device_get(bit_sums(arrays)).items():
      sums[name] = [str(arrays[name].dtype), int(total)]
    sums[SEAL] = ["sha256", json_sha256([about, sums])]
    items = ocp.args.Composite(
      state=ocp.args.PyTreeSave(arrays),
      about=ocp.args.JsonSave(about),
      sums=ocp.args.JsonSave(sums),
    )

    ranked = float(val_loss) if math.isfinite(val_loss) else NOT_EVALUATED
    metrics = {"val_loss": ranked, "step": step}
    metrics["sha256"] = json_sha256(metrics)

    # The new loss first: Orbax asks at once which checkpoints this one replaces.
    with self._writing():
      self.val_losses[step] = ranked
      self.manager.save(step, args=items, metrics=metrics, force=True)

  def _check_finite(self, step: int, arrays: dict):
    """Raises FloatingPointError with the arrays that hold NaN or infinity."""
    finite = jax.device_get(_are_finite(arrays))
    bad = [name for name, is_finite in finite.items() if not is_finite]
    if bad:
      newest = self.steps()[:1]
      raise FloatingPointError(
        f"step {step} is not saved: NaN or infinity in {summarize(bad, 3)}; "
        f"the newest checkpoint in {self.path} is of step {newest[0] if newest else 'none'}"
      )

  def metadata(self, step: int) -> dict:
    """The config, tokenizer, data manifests, format and step saved with `step`.

    Raises ValueError if they are not what was saved.
    """
    return self._read_header(step)[0]

  def _read_header(self, step: int) -> tuple[dict, dict, bool]:
    """The metadata, the checksums of the arrays, and whether a checksum vouches for both.

    Checkpoints from before there was one have none.
    """
    about = self._read_json(step, "about/metadata")
    sums = _check_sums(self._read_json(step, "sums/metadata"))
    _, seal = sums.pop(SEAL, (None, None))
    if seal is not None and seal != json_sha256([about, sums]):
      raise ValueError("the checksum of its metadata (about/metadata, sums/metadata) is wrong")
    check_metadata(about, step)
    return about, sums, seal is not None

  def sums(self, step: int) -> dict:
    """The checksums of the arrays saved with `step`, by name on disk."""
    with _readable(self, step):
      sums = _check_sums(self._read_json(step, "sums/metadata"))
      return {name: total for name, total in sums.items() if name != SEAL}

  def _read_json(self, step: int, name: str) -> dict:
    """An item that Orbax wrote as JSON. Raises ValueError with its name if it is none."""
    with cloud_errors(self.path):
      content = (epath.Path(self.path) / str(step) / name).read_bytes()
    return parse_json_object(content, name)

  def _read_arrays(self, step: int, state) -> dict[str, jax.Array]:
    """This process's shards. Raises ValueError or OSError for what is damaged.

    It waits for no other process, so one that fails leaves none waiting.
    """
    handler = ocp.CompositeCheckpointHandler(
      composite_options=ocp.CompositeOptions(multiprocessing_options=_alone())
    )
    with (
      _damage_as_value_error(),
      ocp.Checkpointer(handler, multiprocessing_options=_alone()) as reader,
    ):
      items = ocp.args.Composite(state=state)
      arrays = reader.restore(epath.Path(self.path) / str(step), args=items)["state"]

    # Damaged metadata may tell Orbax to leave an array out: then the target itself comes back.
    left_out = [name for name, x in arrays.items() if not isinstance(x, jax.Array)]
    if left_out:
      raise ValueError(f"its metadata leave out {summarize(left_out, 2)}")
    return arrays

  def _saved_arrays(self, step: int) -> dict[str, tuple]:
    """Shape and dtype of each array on disk, by name there; no array is read."""
    handler = ocp.PyTreeCheckpointHandler(multiprocessing_options=_alone())
    with _damage_as_value_error():
      arrays = handler.metadata(epath.Path(self.path) / str(step) / "state")
      return {name: (tuple(x.shape), str(x.dtype)) for name, x in arrays.items()}

  def restore(self, step: int, abstract_state, prefix: str = ""):
    """Restores `step` in the shapes, dtypes and shardings of `abstract_state`, on any mesh: the one
    in force.

    `prefix` is "model." where `abstract_state` is the model alone. Raises ValueError where an array
    is not the one that was saved; where the dtype is another, that is not checked.
    """
    # 1. The names of this checkpoint's format, and what each array is to become.
    mesh = get_mesh()
    targets = concrete(abstract_state, mesh)
    with everywhere(f"the format of checkpoint {step}"):
      metadata, sums, is_sealed = self._read_header(step)
      leaves = by_name(targets, prefix, format_of(metadata))

      # 2. Are they the arrays of its config? Orbax would fill up with zeros what is too small. The
      #    step that a run counted is read along: a folder may have been renamed.
      wanted = dict(leaves)
      if "step" in sums:
        wanted.setdefault("step", concrete(jax.ShapeDtypeStruct((), jnp.int32), mesh))
      check_names({name for name in sums if name.startswith(prefix) or name in wanted}, wanted)
      if not is_sealed:
        check_arrays(self._saved_arrays(step), wanted, sums, saved_model_config(metadata))

    restore_args = {}
    for name, leaf in wanted.items():
      restore_args[name] = ocp.ArrayRestoreArgs(
        dtype=leaf.dtype, sharding=leaf.sharding, global_shape=leaf.shape, strict=False
      )

    # 3. Each process reads its shards.
    state = ocp.args.PyTreeRestore(item=wanted, restore_args=restore_args, partial_restore=True)
    with everywhere(f"the arrays of checkpoint {step}"):
      arrays = self._read_arrays(step, state)

    # 4. Are they the arrays that were saved? Where the dtype is another, that cannot be told.
    for name, total in jax.device_get(bit_sums(arrays)).items():
      dtype, expected = sums[name]
      if dtype == str(arrays[name].dtype) and expected != int(total):
        raise ValueError(f"the checksum of {name} is wrong")
    if "step" in arrays:
      check_step(int(jax.device_get(arrays["step"])), step)
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
        f"none of the checkpoints [{summarize(unreadable)}] in {self.path} can be read ({newest}); "
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
    self.manager.close()
    self._open()

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
      f"whole ones there: {summarize(self.steps()) or 'none'}; "
      f"make room and start again, the run resumes from the newest"
    )


def _alone() -> ocp.options.MultiprocessingOptions:
  """This process reads by itself, and waits for no other."""
  rank = jax.process_index()
  return ocp.options.MultiprocessingOptions(
    primary_host=rank, active_processes={rank}, barrier_sync_key_prefix=f"{rank}"
  )


@contextlib.contextmanager
def _damage_as_value_error():
  """Makes a ValueError of whatever Orbax and TensorStore raise for a damaged file.

  Lack of memory is no damage, and stays what it is.
  """
  _drop_stragglers()
  try:
    yield
  except (OSError, MemoryError, jax.errors.JaxRuntimeError):
    raise
  except ValueError as error:
    raise ValueError(tensorstore_reason(error)) from error
  except Exception as error:
    # Any kind: a damaged JSON is a list where they look for a dict, or nested too deep.
    if type(error) is Exception:
      # Orbax's for what TensorStore could not read.
      raise ValueError(tensorstore_reason(error.__cause__ or error)) from error
    kind = type(error).__name__
    raise ValueError(f"a file of it is damaged: {kind}, {first_line(error, 120)}") from error


@functools.cache
def _drop_stragglers():
  """Lets a read that fails tell it once.

  Orbax reads all arrays side by side. When one fails it drops the others, and asyncio and
  TensorStore print a traceback for each of them, later and from other threads.
  """
  excepthook, unraisablehook = sys.excepthook, sys.unraisablehook

  def is_closed_loop(error) -> bool:
    return isinstance(error, RuntimeError) and str(error) == "Event loop is closed"

  def except_closed_loop(kind, error, traceback):
    if not is_closed_loop(error):
      excepthook(kind, error, traceback)

  def except_dropped_reads(unraisable):
    code = getattr(unraisable.object, "cr_code", None)  # of a coroutine
    is_of_orbax = code is not None and "orbax" in code.co_filename
    if not (is_of_orbax or is_closed_loop(unraisable.exc_value)):
      unraisablehook(unraisable)

  def is_told_elsewhere(record) -> bool:
    text = record.getMessage()
    is_read = any(word in text for word in ("orbax", "tensorstore", "OCDBT"))
    return "exception was never retrieved" in text and is_read

  sys.excepthook, sys.unraisablehook = except_closed_loop, except_dropped_reads
  warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)
  logging.getLogger("asyncio").addFilter(lambda record: not is_told_elsewhere(record))


def _check_sums(sums: dict) -> dict:
  """The checksums as read. Raises ValueError unless each is a kind and a value."""
  for name, entry in sums.items():
    if not (isinstance(entry, list) and len(entry) == 2 and isinstance(entry[0], str)):
      raise ValueError(f"its checksum of {name[:80]} is {str(entry)[:40]}")
  return sums


def check_names(saved: Collection[str], expected: Collection[str]):
  """Raises ValueError with the first arrays that are not saved, or not expected."""
  missing, extra = sorted(set(expected) - set(saved)), sorted(set(saved) - set(expected))
  if missing or extra:
    raise ValueError(
      f"its arrays are not those of its config: {summarize(missing, 2) or 'none'} missing, "
      f"{summarize(extra, 2) or 'none'} too many"
    )


def check_arrays(saved: dict[str, tuple], leaves: dict, sums: dict, config: ModelConfig):
  """Raises ValueError unless the arrays on disk, {name: (shape, dtype)}, have the shapes of the
  config and the dtypes of their checksums.

  Padding aside: of the vocabulary and the heads a mesh may have saved more.
  """
  # Shapes without padding, by the ends of names: an optimizer's state has its parameter's.
  unpadded = {}
  for name, shape in names.shapes(dataclasses.replace(config, n_layer=1)).items():
    stacked = name.startswith("h.")
    unpadded[name.replace("h.0.", "h.")] = (config.n_layer, *shape) if stacked else shape

  check_names(saved, sums)
  for name, leaf in leaves.items():
    parameter = next((p for p in unpadded if f".{name}".endswith(f".{p}")), None)
    expected = unpadded.get(parameter, leaf.shape)
    shape, dtype = saved[name]
    compared = list(shape)
    axis = PADDED_AXIS.get(parameter)
    if axis is not None and len(shape) == len(expected):
      compared[axis] = min(shape[axis], expected[axis])
    if tuple(compared) != tuple(expected):
      raise ValueError(f"{name} is {list(shape)}, and by its config {list(expected)}")
    if dtype != sums[name][0]:
      raise ValueError(f"{name} is {dtype}, and its checksum is of {sums[name][0]}")


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


@dataclasses.dataclass(frozen=True)
class SavedModel:
  """A model in a run's checkpoint: its config and tokenizer are read, its arrays are not."""

  checkpoints: Checkpoints
  step: int
  metadata: dict
  config: ModelConfig
  tokenizer: Tokenizer | None
  finetuning: (
    ConfigDict  # its knobs of fine-tuning: `adapter`, `classify`, `init_from`, `trainable`
  )

  @property
  def is_adapted(self) -> bool:
    """Whether it has more than a GPT-2's own parameters."""
    return bool(self.finetuning.adapter.kind or self.finetuning.classify.classes)

  @property
  def base(self) -> dict | None:
    """Name and SHA-256 of the model beside which an adapter was trained; None without an adapter:
    then the checkpoint has all arrays."""
    return self.metadata["init_from"] if self.finetuning.adapter.kind else None

  def restore(self, abstract_state):
    """Restores what a run saved, all of its state. Raises ValueError for a damaged checkpoint."""
    with _readable(self.checkpoints, self.step):
      return self.checkpoints.restore(self.step, abstract_state)

  def load(self, dtype: str | None = None, base=None):
    """Loads the model onto the mesh in force; `dtype` computes in another dtype than the run did.

    `base` is the model that `self.base` names, whose arrays are taken. Raises ValueError for a
    checkpoint that is damaged.
    """
    # 1. The model of its config, on any mesh and for any platform.
    dtype = dtype or self.config.dtype
    config = dataclasses.replace(self.config, dtype=dtype, pad_heads=True, attention="auto")
    check_mesh(config)
    key = jax.random.key(0)
    if base is None:
      build = functools.partial(initial_model, self.finetuning, config)
      model = jax.eval_shape(build, key)
    else:
      model = build_on(self.finetuning, config, key, base)

    # 2. Its arrays: all, or those of the adapter.
    with _readable(self.checkpoints, self.step):
      if base is None:
        return self.checkpoints.restore(self.step, model, "model.")
      trained, frozen = partition(model, trainable_mask(model, trained_names(self.finetuning)))
      abstract = jax.tree.map(jax.typeof, trained)
      return merge(self.checkpoints.restore(self.step, abstract, "model."), frozen)


def open_saved(workdir: str, step: str = "latest") -> SavedModel:
  """Opens the model of a run; `step` is "latest", "best" or a number.

  Raises FileNotFoundError if there is no such checkpoint.
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
  wanted = {"latest": steps[0], "best": checkpoints.best_step()}.get(step, step)
  if str(wanted) not in map(str, steps):
    raise FileNotFoundError(
      f"no checkpoint of step {str(step)[:40]} in {checkpoints.path}; "
      f"there are [{summarize(steps)}], latest and best"
    )

  # 2. What it says of its model.
  with _readable(checkpoints, wanted):
    metadata = checkpoints.metadata(int(wanted))
    config = saved_model_config(metadata)
    tokenizer = saved_tokenizer(metadata, config)
    finetuning = saved_finetuning(metadata)
  return SavedModel(checkpoints, int(wanted), metadata, config, tokenizer, finetuning)


def load(workdir: str, step: str = "latest", dtype: str | None = None):
  """Loads the model and tokenizer of a run whose checkpoints have all arrays, see `open_saved`, on
  the mesh in force."""
  saved = open_saved(workdir, step)
  return saved.load(dtype), saved.tokenizer


def newest_metadata(workdir: str) -> dict | None:
  """The metadata of the newest checkpoint of a workdir that can be read; None if there is none."""
  has_any = distributed.is_primary() and exists(os.path.join(workdir, "checkpoints"))
  if not distributed.broadcast("whether there are checkpoints", has_any):
    return None

  checkpoints = Checkpoints(workdir, create=False)
  for step in distributed.broadcast("the checkpoints to resume from", checkpoints.steps()):
    with contextlib.suppress(*UNREADABLE), everywhere(f"the metadata of checkpoint {step}"):
      return checkpoints.metadata(step)
  return None


@contextlib.contextmanager
def _readable(checkpoints: Checkpoints, step):
  """Makes what a damaged checkpoint raises one line, with the other steps that there are."""
  try:
    yield
  except UNREADABLE as error:
    others = [other for other in checkpoints.steps() if str(other) != str(step)]
    raise ValueError(
      f"checkpoint {step} in {checkpoints.path} cannot be read ({first_line(error)}); "
      f"others there: {summarize(others) or 'none'}"
    ) from error
