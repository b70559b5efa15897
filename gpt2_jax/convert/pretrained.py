# SPDX-License-Identifier: Apache-2.0
"""Loads a pretrained checkpoint of any format into a model, and saves a model in any format."""

import dataclasses
import os
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np

import gpt2_jax.quantization as quantization
from gpt2_jax.compat import get_mesh
from gpt2_jax.convert import gpt1_files, hf, hub, llmc, nanogpt, openai
from gpt2_jax.convert.safe_load import import_torch
from gpt2_jax.convert.vocabulary import check_pair
from gpt2_jax.convert.weights import (
  DTYPES,
  Weights,
  cast_weights,
  count_nonfinite,
  from_model,
  to_model,
  weights_sha256,
)
from gpt2_jax.files import (
  announce,
  atomic_write,
  check_writable,
  first_line,
  local_path,
  remove_stale,
  summarize,
  user_path,
)
from gpt2_jax.model import GPT2, ModelConfig
from gpt2_jax.runs.workdir import as_path, exists, is_remote
from gpt2_jax.sharding import make_mesh
from gpt2_jax.tokenizer import Gpt2Bpe, Tokenizer

RUN_CONFIG = "train_config.json"  # which a run writes into its workdir
WRITABLE = ("hf", "orbax", "nanogpt", "llmc", "gpt1")


def load_pretrained(
  name_or_path: str,
  mesh: jax.sharding.Mesh | None = None,
  dtype: str = "float32",
  quantize: str | None = None,
  revision: str | None = None,
  step: str = "latest",
  adapter: str | None = None,
  gelu: str | None = None,
) -> tuple[GPT2, Tokenizer | None]:
  """Loads the model and tokenizer of a checkpoint of any format onto a mesh.

  The tokenizer is None if the checkpoint has none and its vocabulary is not of GPT-2's size.

  `name_or_path` is a published name (gpt2, gpt2-medium, gpt2-large, gpt2-xl, distilgpt2), a
  repository of the Hub with a GPT-2 in it, at `revision`; or a path: Hugging Face's folder,
  OpenAI's (of a GPT-1, too), nanoGPT's ckpt.pt, llm.c's file, or the workdir of a run, at `step`
  ("latest", "best", or a number). Its content decides which.

  `mesh` is by default the one in force, or one over all devices. `dtype` is that of activations
  and matmul operands; parameters are float32, unless `quantize="int8"` makes the matrices int8.

  `adapter` is one of this base in peft's format, a folder or a repository of the Hub. `gelu` is
  "tanh" or "erf" for a checkpoint of nanoGPT's that does not say which it was trained with.

  Raises ValueError, OSError or ImportError, in one line, for what is no whole GPT-2.
  """
  if quantize not in (None, "int8"):
    raise ValueError(f"quantize is {quantize!r}; it is None or 'int8'")
  check_gelu(gelu)
  dtype = dtype if isinstance(dtype, str) else jnp.dtype(dtype).name
  mesh = mesh or _default_mesh()

  # The adapter is read first: what is wrong with it is told before anything is loaded.
  adapter = None if adapter is None else _read_adapter(adapter)
  path = resolve_checkpoint(name_or_path, revision)
  with announce(f"loading {path}, seconds to a minute"):
    if is_workdir(path):
      _check_states_no_gelu(path, gelu)
      model, tokenizer = _load_run(path, mesh, dtype, step, adapter)
      model = quantization.quantize(model) if quantize else model
    elif step != "latest":
      raise ValueError(f"{path} is no workdir of a run, and has no step {step!r}")
    else:
      weights = _with_saved(_read_weights(path, bool(adapter), gelu), adapter)
      model = to_model(weights, mesh, dtype, quantize == "int8")
      tokenizer = weights.tokenizer
    if adapter:
      model = _attach(model, adapter)
  return model, tokenizer


def _load_run(path: pathlib.Path, mesh, dtype: str, step: str, adapter):
  """The model and tokenizer of a run's workdir, as the base of an adapter (None: there is none)."""
  with jax.set_mesh(mesh):
    model, tokenizer = _load_workdir(path, dtype, step)
  if adapter:
    weights = _with_saved(from_model(model, tokenizer, f"{path} (Orbax)"), adapter)
    model = to_model(weights, mesh, dtype) if adapter.saved else model
  return model, tokenizer


def check_gelu(gelu: str | None) -> None:
  """Raises ValueError for a GELU that is none."""
  if gelu not in (None, "tanh", "erf"):
    raise ValueError(f"gelu is {str(gelu)[:40]!r}; it is 'tanh', 'erf', or None")


def _check_states_no_gelu(path: pathlib.Path, gelu: str | None) -> None:
  if gelu is not None:
    raise ValueError(f"{path} states its GELU; gelu={gelu!r} is for a checkpoint of nanoGPT's")


def _read_weights(path: pathlib.Path, has_adapter: bool, gelu: str | None) -> Weights:
  """The weights of a checkpoint that is no workdir, with the `gelu` that only nanoGPT's leaves
  open."""
  module = detect_format(path, has_adapter)
  if module is nanogpt:
    return nanogpt.read(path, gelu)
  _check_states_no_gelu(path, gelu)
  return module.read(path)


def _read_adapter(path: str):
  # Imported here: fine-tuning is not needed to load a model.
  from gpt2_jax.convert.peft_files import read_adapter

  return read_adapter(path)


def _with_saved(weights: Weights, adapter) -> Weights:
  """Weights as the base of an adapter, which has to be one of them, with what it saved in whole.

  Without an adapter (None) they are as they were.
  """
  if adapter is None:
    return weights
  _check_base(weights, adapter)
  return adapter.replace_saved(weights) if adapter.saved else weights


def _check_base(weights: Weights, adapter) -> None:
  """Raises ValueError unless the adapter belongs to these weights."""
  from gpt2_jax.finetune.peft import check_base

  # All weights are read for their SHA-256: only where the adapter says whose it is.
  base_sha256 = weights_sha256(weights) if adapter.base_sha256 else None
  check_base(adapter, weights.config, weights.source, base_sha256)


def _attach(model: GPT2, adapter) -> GPT2:
  """The model with the adapter, and with the adapter's classification head if it has one."""
  from gpt2_jax.finetune.peft import attach

  return attach(model, adapter)


def _default_mesh() -> jax.sharding.Mesh:
  """The mesh in force, or one over all devices."""
  mesh = get_mesh()
  return make_mesh() if mesh.empty else mesh


def resolve_checkpoint(name_or_path: str, revision: str | None = None) -> pathlib.Path:
  """Resolves a name or path to a local path: a name's repository is downloaded from the Hub.

  On gs:// it takes the workdir of a run only. Raises ValueError or OSError for what is neither.
  """
  name_or_path = os.fspath(name_or_path)
  if is_remote(name_or_path):
    if not exists(f"{name_or_path}/checkpoints"):
      raise FileNotFoundError(
        f"{name_or_path} is no workdir of a run (checkpoints/), "
        f"and others are read from local paths only"
      )
    return as_path(name_or_path)

  # The Hub is never asked for a path that exists, nor for a string that looks like a path.
  path = pathlib.Path(user_path(name_or_path))
  if path.exists():
    if name_or_path in hub.PUBLISHED:
      raise ValueError(
        f"{name_or_path} is a published name, and here it is a path, too; "
        f"give ./{name_or_path} for the path, or {hub.PUBLISHED[name_or_path]} for the Hub's"
      )
    if revision:
      raise ValueError(f"{path} is a path, which has no revision {revision!r}")
    return path

  if path.is_absolute() or name_or_path.startswith(".") or name_or_path.count("/") > 1:
    raise FileNotFoundError(
      f"{path} is not there; give a checkpoint's folder or file, or a name such as gpt2"
    )
  return hub.fetch(name_or_path, revision)


def is_workdir(path: pathlib.Path) -> bool:
  """Whether the folder is the workdir of a run, by what lies in its checkpoints/.

  Others call a folder so, too: of a run it has the steps, or is empty while there is none.
  """
  folder = path / "checkpoints"
  if not folder.is_dir() or is_remote(os.fspath(path)):
    return folder.is_dir()

  entries = list(folder.iterdir())
  for entry in entries:
    # A step is a folder, but not with a checkpoint of Hugging Face's in it.
    if entry.name.isdecimal() and entry.is_dir() and not (entry / "config.json").is_file():
      return True
  # A run killed in its first save leaves Orbax's unfinished step there.
  is_run = not entries or (path / RUN_CONFIG).is_file()
  return is_run and _format(path) is None


def _load_workdir(
  path: pathlib.Path, dtype: str, step: str = "latest"
) -> tuple[GPT2, Tokenizer | None]:
  """Loads a checkpoint of a run onto the mesh in force; of a run with an adapter also its base."""
  # Imported here: `import gpt2_jax` should not load Orbax, which only a workdir needs.
  from gpt2_jax.runs.checkpoint import open_saved

  saved = open_saved(str(path), step)
  base = _recorded_base(saved, path, dtype) if saved.base else None
  return saved.load(dtype, base), saved.tokenizer


def _recorded_base(saved, path: pathlib.Path, dtype: str) -> GPT2:
  """The model beside which a run trained its adapter. Raises ValueError if it is not there, or has
  other weights now."""
  name, sha256 = saved.base["name"], saved.base["sha256"]
  place, step = split_step(name)
  try:
    base, _ = load_pretrained(place, get_mesh(), dtype, step=step or "latest")
  except (ValueError, OSError) as error:
    raise ValueError(
      f"{path} holds an adapter for {name}, which cannot be loaded ({first_line(error, 160)}); "
      f"put it there, or resume the run with --config.init_from=PLACE"
    ) from error

  found = weights_sha256(from_model(base, None))
  if found != sha256:
    raise ValueError(
      f"{path} holds an adapter for {name} with sha256 {sha256[:12]}, and its weights have "
      f"{found[:12]} now; put the old ones there, or resume the run with --config.init_from=PLACE"
    )
  return base


def split_step(name: str) -> tuple[str, str]:
  """(place, step) of `workdir@step`; the step is empty where there is none."""
  place, at, step = name.rpartition("@")
  # An @ may also be part of a path.
  if not at or (not is_remote(name) and os.path.exists(user_path(name))):
    return name, ""
  return place, step


def detect_format(path: pathlib.Path, has_adapter: bool = False):
  """Detects a checkpoint's format by its content; returns the module that reads it.

  Raises ValueError if it is none of the four, or if an adapter lies there that would be dropped:
  with `has_adapter`, one was given.
  """
  if (path / "adapter_config.json").is_file() and not has_adapter:
    raise ValueError(
      f"{path} holds an adapter of peft's (adapter_config.json); give its base as the model, and "
      f"it as the adapter: --adapter={path}"
    )
  if module := _format(path):
    return module
  raise ValueError(
    f"{path} is no GPT-2 checkpoint: neither Hugging Face's folder (config.json), "
    f"OpenAI's (hparams.json; of GPT-1 {gpt1_files.SHAPES}), nanoGPT's ckpt.pt, llm.c's file, "
    f"nor the workdir of a run (checkpoints/){hf.other_weights(path)}"
  )


def _format(path: pathlib.Path):
  """The module that reads a checkpoint which is no workdir; None if there is none."""
  if (path / "config.json").is_file():
    return hf
  if (path / "hparams.json").is_file() or any(path.glob("*.index")):
    return openai
  if (path / "ckpt.pt").is_file():
    return nanogpt
  if (path / gpt1_files.SHAPES).is_file():
    return gpt1_files

  if path.is_file():
    with open(path, "rb") as file:
      head = file.read(4)
    # torch.save writes a zip, and before 1.6 it wrote a bare pickle.
    if head.startswith((b"PK", b"\x80\x02")):
      return nanogpt
    if head == np.int32(llmc.MAGIC).tobytes():
      return llmc
  return None


def open_weights(
  name_or_path: str,
  revision: str | None = None,
  adapter: str | None = None,
  merge: bool = False,
  gelu: str | None = None,
) -> Weights:
  """Opens the weights of a checkpoint of any format in canonical form, without a model.

  Those of a run are loaded onto one device first; `merge` merges an adapter that the run trained.
  `adapter` is a folder of peft's, and is merged. Without them a model with an adapter is refused.
  `gelu` is that of `load_pretrained`.
  """
  # 1. The weights.
  check_gelu(gelu)
  adapter = None if adapter is None else _read_adapter(adapter)
  path = resolve_checkpoint(name_or_path, revision)
  if is_workdir(path):
    _check_states_no_gelu(path, gelu)
    with jax.set_mesh(_one_device()):
      model, tokenizer = _load_workdir(path, "float32")
    weights = from_model(_merged(model) if merge else model, tokenizer, f"{path} (Orbax)")
  else:
    weights = _read_weights(path, bool(adapter), gelu)

  # 2. The adapter, merged as they are read.
  if adapter:
    _check_base(weights, adapter)
    weights = adapter.merge_into(weights)
  return weights


def _merged(model: GPT2) -> GPT2:
  from gpt2_jax.finetune.lora import merge_lora

  return merge_lora(model)


def _one_device() -> jax.sharding.Mesh:
  return make_mesh(1, 1, 1, jax.devices()[:1])


def save_pretrained(
  model: GPT2,
  tokenizer: Tokenizer | None,
  path: str,
  form: str = "hf",
  dtype: str = "float32",
  other_gelu: bool = False,
) -> None:
  """Saves a model and its tokenizer as a checkpoint that others load.

  `form` is Hugging Face's folder ("hf"), a workdir ("orbax"), nanoGPT's folder ("nanogpt"),
  llm.c's file ("llmc"), or OpenAI's folder of a GPT-1 ("gpt1"). A workdir may be on gs://. Raises
  FileExistsError if `path` is there, ValueError for what the format cannot say, OSError for want of
  room. NaN and infinities are written as they are, and told on stderr.
  """
  write(from_model(model, tokenizer), path, form, dtype, other_gelu)


def save_adapter(workdir: str, path: str) -> dict:
  """Saves the adapter that a run trained as a folder of peft's; returns name and SHA-256 of the
  base.

  Raises ValueError for a checkpoint without an adapter, FileExistsError if `path` is there.
  """
  # Imported here: Orbax takes seconds, and `import gpt2_jax` should not load it.
  from gpt2_jax.convert.peft_files import check_adapter_target
  from gpt2_jax.finetune.peft import write_adapter
  from gpt2_jax.finetune.start import trained_names
  from gpt2_jax.runs.checkpoint import open_saved

  check_adapter_target(path)
  folder = resolve_checkpoint(workdir)
  saved = open_saved(str(folder)) if is_workdir(folder) else None
  if saved is None or not saved.base:
    raise ValueError(f"{folder} is no run that trained an adapter; there is none to write")

  with jax.set_mesh(_one_device()):
    model, _ = _load_workdir(folder, "float32")
  # peft asks the Hub, where a size has one name.
  name = hub.PUBLISHED.get(saved.base["name"], saved.base["name"])
  write_adapter(model, path, name, saved.base["sha256"], trained_names(saved.finetuning))
  return saved.base


def write(
  weights: Weights, path: str, form: str, dtype: str = "float32", other_gelu: bool = False
) -> None:
  """Saves weights of any source: see `save_pretrained`."""
  # 1. Refuse what can be told before anything is read.
  path = check_target(path, form, dtype)
  _check_family(weights.config, form)
  # nanoGPT and llm.c take GPT-2's tokenizer for granted, and get no file of it.
  is_written = form in ("hf", "orbax") or not isinstance(weights.tokenizer, Gpt2Bpe)
  if weights.tokenizer is not None and is_written:
    check_pair(weights.tokenizer, weights.config.n_vocab)
  if not is_remote(path):
    check_writable(pathlib.Path(path), weights.config.n_params * np.dtype(DTYPES[dtype]).itemsize)

  # 2. Write.
  weights, nonfinite = count_nonfinite(weights)
  weights = cast_weights(weights, dtype)
  if form == "hf":
    hf.write(weights, pathlib.Path(path), dtype)
  elif form == "nanogpt":
    nanogpt.write(weights, pathlib.Path(path), dtype, other_gelu)
  elif form == "llmc":
    llmc.write(weights, pathlib.Path(path), dtype)
  elif form == "gpt1":
    gpt1_files.write(weights, pathlib.Path(path), dtype)
  else:
    _write_workdir(weights, path)

  # 3. Broken weights are somebody's to look at, so they are no error.
  if nonfinite:
    print(
      f"warning: {sum(nonfinite.values()):,} weights of {weights.source} are NaN or infinite, and "
      f"written as they are: {summarize(nonfinite, 4)}",
      file=sys.stderr,
    )


def _check_family(config: ModelConfig, form: str) -> None:
  """Raises ValueError for a format that has no place for a model of this family."""
  if form == "gpt1":
    gpt1_files.check_writable_config(config)
  if config.family == "gpt1" and form in ("nanogpt", "llmc"):
    raise ValueError(
      f"{form} computes a GPT-2, and this is a GPT-1, whose norms stand elsewhere; take hf, gpt1 "
      f"or orbax"
    )


def check_target(path: str, form: str, dtype: str = "float32") -> str:
  """The path, ~ expanded, at which `write` would write. Raises ValueError or OSError if it cannot.

  It reads no weights, so that what is wrong with a command is told before they are loaded.
  """
  # 1. The format.
  if form not in WRITABLE:
    raise ValueError(f"format {form!r} cannot be written; take one of {', '.join(WRITABLE)}")
  if form == "orbax" and dtype != "float32":
    raise ValueError(f"a run's parameters are float32, not {dtype}; leave the dtype out")
  if form == "llmc":
    llmc.check_dtype(dtype)
  if form == "gpt1":
    gpt1_files.check_writable_dtype(dtype)

  # 2. The place, where nothing may be.
  path = os.fspath(path)
  if is_remote(path) and form != "orbax":
    raise ValueError(
      f"{path[:200]} is a URL, and of what can be written only a workdir (orbax) may be on gs://; "
      f"give a local path, and copy it there"
    )
  path = user_path(path) if is_remote(path) else str(local_path(path))
  # A link to nowhere is something, too.
  is_taken = exists(path) if is_remote(path) else os.path.lexists(path)
  if not is_remote(path):
    remove_stale(pathlib.Path(path))
  if is_taken:
    raise FileExistsError(f"{path} is there already; take another name, or move it away")
  if form == "llmc":
    llmc.check_absent(pathlib.Path(path))
  if form == "nanogpt":
    import_torch(pathlib.Path(path))
  return path


def _write_workdir(weights: Weights, path: str) -> None:
  """Writes a workdir as a run would have left it at step 0, which resumes and loads like any.

  On gs:// nothing can be renamed: what an error leaves there is a workdir without a checkpoint.
  """
  if is_remote(path):
    _save_first_step(weights, path)
    return
  with atomic_write(pathlib.Path(path)) as folder:
    folder.mkdir()
    _save_first_step(weights, str(folder))


def _save_first_step(weights: Weights, workdir: str) -> None:
  """Saves weights as the checkpoint of step 0."""
  # Imported here: `import gpt2_jax` should not load Orbax, which only a workdir needs.
  from gpt2_jax.runs.checkpoint import Checkpoints

  metadata = {
    "config": {"model": dataclasses.asdict(weights.config)},
    "source": weights.source,
    "tokenizer": weights.tokenizer and weights.tokenizer.to_json(),
  }
  mesh = _one_device()
  with jax.set_mesh(mesh):
    checkpoints = Checkpoints(workdir)
    checkpoints.save(0, {"model": to_model(weights, mesh, "float32")}, metadata)
    checkpoints.close()
