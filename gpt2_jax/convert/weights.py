# SPDX-License-Identifier: Apache-2.0
"""A GPT-2's weights in canonical form, read when they are asked for; to a model on any mesh, and back."""

import dataclasses
import functools
import hashlib
from collections.abc import Callable

import jax
import ml_dtypes
import numpy as np
import tqdm

from gpt2_jax.convert import names
from gpt2_jax.model import GPT2, ModelConfig, check_mesh, name_of
from gpt2_jax.sharding import concrete
from gpt2_jax.tokenizer import Tokenizer

DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}


@dataclasses.dataclass(frozen=True)
class Weights:
  """The tensors of `names.shapes(config)`: `read(name)` gives one as NumPy, canonical in name and layout."""

  config: ModelConfig
  read: Callable[[str], np.ndarray]
  tokenizer: Tokenizer | None
  source: str  # the path and format, for messages


def digest(weights: Weights) -> str:
  """SHA-256 of names, shapes and float32 values in sorted order: the same for the same model in every format.

  A bias of zeros counts as none, for some formats cannot leave it out.
  """
  sha = hashlib.sha256()
  for name, shape in progress(sorted(names.shapes(weights.config).items()), "hashing"):
    tensor = np.ascontiguousarray(weights.read(name), "<f4")
    if tensor.any() or not name.endswith(".b"):
      sha.update(f"{name} {list(shape)}\n".encode())
      sha.update(tensor.data)
  return sha.hexdigest()


def rounded(weights: Weights, dtype: str) -> Weights:
  """The same with its tensors rounded to `dtype`; reading raises ValueError where a number is too large for it."""

  def read(name):
    tensor = weights.read(name)
    with np.errstate(over="ignore"):
      found = tensor.astype(DTYPES[dtype])
    if np.isinf(found).sum() > np.isinf(tensor).sum():
      raise ValueError(f"{name} of {weights.source} has numbers too large for {dtype}; take bfloat16 or float32")
    return found

  return dataclasses.replace(weights, read=read)


def progress(items, what: str):
  """A bar on stderr, where that is a terminal."""
  return tqdm.tqdm(items, desc=what, disable=None, leave=False)


def to_model(weights: Weights, mesh: jax.sharding.Mesh, dtype: str) -> GPT2:
  """The model on `mesh`, computing in `dtype`, with float32 parameters, each tensor read once and put where it lives.

  The host holds one parameter (all layers of it) beside what the devices hold; the largest come first, so that the
  peak stays near the model's own size where host and device share their memory.
  """
  config = dataclasses.replace(weights.config, dtype=dtype, pad_heads=True)
  with jax.set_mesh(mesh):
    check_mesh(config)
    target = concrete(jax.eval_shape(functools.partial(GPT2, config), jax.random.key(0)), mesh)
  leaves = {name_of(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(target)}
  arrays = {}
  for name in progress(sorted(leaves, key=lambda name: -leaves[name].size), "loading"):
    arrays[name] = _put(weights, name, leaves[name])
  return jax.tree.unflatten(jax.tree.structure(target), [arrays[name] for name in leaves])


def _put(weights: Weights, name: str, target: jax.ShapeDtypeStruct) -> jax.Array:
  """One parameter, zeros where `target` is larger than the tensors."""
  device_to_index = target.sharding.addressable_devices_indices_map(target.shape)
  bounds = {
    device: tuple(s.indices(n)[:2] for s, n in zip(index, target.shape, strict=True))
    for device, index in device_to_index.items()
  }
  parts = {at: np.zeros([stop - start for start, stop in at], np.float32) for at in set(bounds.values())}
  stacked = name.startswith("h.")
  for layer in range(target.shape[0]) if stacked else (None,):
    tensor = weights.read(name.replace("h.", f"h.{layer}.", 1) if stacked else name)
    if ".c_attn." in name:
      tensor = names.head_by_head(tensor, weights.config.n_head)
    for at, part in parts.items():
      here = tensor[tuple(slice(*bound) for bound in (at[1:] if stacked else at))]
      (part[layer] if stacked else part)[tuple(slice(n) for n in here.shape)] = here
  shards = []
  for device, at in bounds.items():
    shards.append(jax.device_put(parts[at], device))
  return jax.block_until_ready(jax.make_array_from_single_device_arrays(target.shape, target.sharding, shards))


def from_model(model: GPT2, tokenizer: Tokenizer | None, source: str = "a model") -> Weights:
  """The weights of a model, brought to the host a tensor at a time, without padding."""
  if not isinstance(model, GPT2):
    raise ValueError(f"a {type(model).__name__} is not written; give the model that it was made from")
  leaves = {name_of(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(model)}
  shapes = names.shapes(model.config)
  if "wte" not in leaves:
    raise ValueError("an int8 model is not written; load it without quantize, and write that")

  def read(name: str) -> np.ndarray:
    layer = name.split(".")[1] if name.startswith("h.") else None
    leaf = leaves[name if layer is None else name.replace(f"h.{layer}.", "h.", 1)]
    if layer is not None:
      with jax.set_mesh(model.mesh):  # whichever is in force
        leaf = leaf[int(layer)]
    found = np.empty(leaf.shape, leaf.dtype)
    for shard in leaf.addressable_shards:
      if shard.replica_id == 0:
        found[shard.index] = shard.data
    found = found[tuple(slice(n) for n in shapes[name])]
    return names.all_queries_first(found, model.config.n_head) if ".c_attn." in name else found

  return Weights(model.config, read, tokenizer, source)
