# SPDX-License-Identifier: Apache-2.0
"""Any GPT-2 checkpoint to a model and its tokenizer, and a model to any format that can be written."""

import dataclasses
import os
import pathlib

import jax
import jax.numpy as jnp

from gpt2_jax.checkpoint import Checkpoints, load
from gpt2_jax.convert import hf, hub, llmc, nanogpt, openai
from gpt2_jax.convert.files import whole
from gpt2_jax.convert.weights import Weights, from_model, rounded, to_model
from gpt2_jax.model import GPT2
from gpt2_jax.quantization import quantize as quantized
from gpt2_jax.sharding import make_mesh
from gpt2_jax.tokenizer import Tokenizer
from gpt2_jax.workdir import at, is_remote, is_there

FORMATS = {"hf": hf, "openai": openai, "nanogpt": nanogpt, "llmc": llmc}  # in the order in which they are asked
WRITABLE = ("hf", "orbax", "nanogpt", "llmc")


def load_pretrained(
  name_or_path: str,
  mesh: jax.sharding.Mesh | None = None,
  dtype: str = "float32",
  quantize: str | None = None,
  revision: str | None = None,
  step: str = "latest",
) -> tuple[GPT2, Tokenizer | None]:
  """The model and tokenizer of a checkpoint; the tokenizer is None if the checkpoint has none and is not GPT-2's size.

  `name_or_path` is a published name (gpt2, gpt2-medium, gpt2-large, gpt2-xl, distilgpt2), a repository of the Hub with
  a GPT-2 in it, at `revision`; or a path: Hugging Face's folder, OpenAI's, nanoGPT's ckpt.pt, llm.c's file, or the
  workdir of a run, at `step` ("latest", "best", or a number). Its content decides which. `mesh` is by default the one
  in force, or one over all devices. `dtype` is that of activations and products; parameters are float32, unless
  `quantize="int8"` makes the matrices int8.

  Raises ValueError, OSError or ImportError, in one line, for what is no whole GPT-2.
  """
  dtype = dtype if isinstance(dtype, str) else jnp.dtype(dtype).name
  if quantize not in (None, "int8"):
    raise ValueError(f"quantize is {quantize!r}; it is None or 'int8'")
  mesh = mesh or _mesh_in_force()
  path = find(name_or_path, revision)
  if is_workdir(path):
    with jax.set_mesh(mesh):
      model, tokenizer = load(str(path), step, dtype)
  elif step != "latest":
    raise ValueError(f"{path} is no workdir of a run, and has no step {step!r}")
  else:
    weights = _read(path)
    model, tokenizer = to_model(weights, mesh, dtype), weights.tokenizer
  return (quantized(model) if quantize else model), tokenizer


def _mesh_in_force() -> jax.sharding.Mesh:
  mesh = jax.sharding.get_mesh()
  return make_mesh() if mesh.empty else mesh


def find(name_or_path: str, revision: str | None = None) -> pathlib.Path:
  """The path itself, or where the Hub's repository of that name lies once it is fetched; on gs:// a workdir only."""
  name_or_path = os.fspath(name_or_path)
  if is_remote(name_or_path):
    if not is_there(f"{name_or_path}/checkpoints"):
      raise FileNotFoundError(
        f"{name_or_path} is no workdir of a run (checkpoints/), and others are read from local paths only"
      )
    return at(name_or_path)
  path = pathlib.Path(name_or_path).expanduser()
  looks_local = path.is_absolute() or name_or_path.startswith(".") or name_or_path.count("/") > 1
  if path.exists() and name_or_path in hub.PUBLISHED:
    raise ValueError(
      f"{name_or_path} is a published name, and here it is a path, too; give ./{name_or_path} for the path, or "
      f"{hub.PUBLISHED[name_or_path]} for the Hub's"
    )
  if path.exists():
    if revision:
      raise ValueError(f"{path} is a path, which has no revision {revision!r}")
    return path
  if looks_local:
    raise FileNotFoundError(f"{path} is not there; give a checkpoint's folder or file, or a name such as gpt2")
  return hub.fetch(name_or_path, revision)


def is_workdir(path: pathlib.Path) -> bool:
  return (path / "checkpoints").is_dir()


def _read(path: pathlib.Path) -> Weights:
  for form in FORMATS.values():
    if form.recognizes(path):
      return form.read(path)
  raise ValueError(
    f"{path} is no GPT-2 checkpoint: neither Hugging Face's folder (config.json), OpenAI's (hparams.json), nanoGPT's "
    f"ckpt.pt, llm.c's file, nor the workdir of a run (checkpoints/)"
  )


def open_weights(name_or_path: str, revision: str | None = None) -> Weights:
  """The weights of any checkpoint in canonical form; those of a run are loaded onto one device first."""
  path = find(name_or_path, revision)
  if not is_workdir(path):
    return _read(path)
  with jax.set_mesh(make_mesh(1, 1, 1, jax.devices()[:1])):
    model, tokenizer = load(str(path), dtype="float32")
  return from_model(model, tokenizer, f"{path} (Orbax)")


def save_pretrained(
  model: GPT2,
  tokenizer: Tokenizer | None,
  path: str,
  form: str = "hf",
  dtype: str = "float32",
  other_gelu: bool = False,
) -> None:
  """Writes a model as Hugging Face's folder ("hf"), a workdir ("orbax"), nanoGPT's folder, or llm.c's file.

  Raises FileExistsError if `path` is there, ValueError for what the format cannot say.
  """
  write(from_model(model, tokenizer), path, form, dtype, other_gelu)


def write(weights: Weights, path: str, form: str, dtype: str = "float32", other_gelu: bool = False) -> None:
  """`save_pretrained` for weights of any source."""
  if form not in WRITABLE:
    raise ValueError(f"format {form!r} cannot be written; take one of {', '.join(WRITABLE)}")
  path, weights = pathlib.Path(path).expanduser(), rounded(weights, dtype)
  if form == "orbax":
    if dtype != "float32":
      raise ValueError(f"a run's parameters are float32, not {dtype}; leave the dtype out")
    return _write_workdir(weights, path)
  if form == "nanogpt":
    return nanogpt.write(weights, path, dtype, other_gelu)
  return FORMATS[form].write(weights, path, dtype)


def _write_workdir(weights: Weights, path: pathlib.Path) -> None:
  """As a run would have left it at step 0: `checkpoint.load` and `load_pretrained` take it."""
  about = {"config": {"model": dataclasses.asdict(weights.config)}, "source": weights.source}
  about["tokenizer"] = weights.tokenizer and weights.tokenizer.to_json()
  mesh = make_mesh(1, 1, 1, jax.devices()[:1])
  with whole(path) as folder, jax.set_mesh(mesh):
    os.mkdir(folder)
    checkpoints = Checkpoints(str(folder))
    checkpoints.save(0, {"model": to_model(weights, mesh, "float32")}, about)
    checkpoints.close()
