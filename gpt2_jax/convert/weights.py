# SPDX-License-Identifier: Apache-2.0
"""Weights of a GPT-2 checkpoint, read lazily in canonical form; loaded onto any mesh, and back."""

import dataclasses
import hashlib
import re
from collections.abc import Callable

import jax
import ml_dtypes
import numpy as np
from jax.sharding import PartitionSpec as P

from gpt2_jax.convert import names
from gpt2_jax.files import progress, summarize
from gpt2_jax.gpt1 import new_model
from gpt2_jax.kernels.int8 import TINY
from gpt2_jax.linear import Dense
from gpt2_jax.model import GPT2, ModelConfig, check_mesh, name_of
from gpt2_jax.quantization import Int8, int8, quantize_on_mesh
from gpt2_jax.sharding import concrete, make_mesh
from gpt2_jax.tokenizer import Tokenizer

DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}


@dataclasses.dataclass(frozen=True)
class Weights:
  """Lazily read weights of a checkpoint: `read(name)` loads one tensor of `names.shapes(config)`.

  It comes as NumPy, canonical in name and layout.
  """

  config: ModelConfig
  read: Callable[[str], np.ndarray]
  tokenizer: Tokenizer | None
  source: str  # the path and format, for messages


def weights_sha256(weights: Weights) -> str:
  """SHA-256 of a model's weights: names, shapes and float32 values in sorted order.

  It is the same for the same model in every format. A bias of zeros counts as absent, since some
  formats cannot leave it out.
  """
  sha256 = hashlib.sha256()
  for name, shape in progress(sorted(names.shapes(weights.config).items()), "hashing"):
    # Always little-endian, so that every machine computes the same hash. A NaN of the kind that
    # signals would be a warning.
    with np.errstate(invalid="ignore"):
      tensor = np.ascontiguousarray(weights.read(name), "<f4")
      is_zero = not tensor.any()
    if not is_zero or not name.endswith(".b"):
      sha256.update(f"{name} {list(shape)}\n".encode())
      sha256.update(tensor.data)
  return sha256.hexdigest()


def cast_weights(weights: Weights, dtype: str) -> Weights:
  """Casts weights to `dtype` as they are read.

  Reading raises ValueError if a number is too large for `dtype`.
  """

  def read(name):
    tensor = weights.read(name)
    with np.errstate(over="ignore", invalid="ignore"):
      cast = tensor.astype(DTYPES[dtype])

    # Infinities that the checkpoint has itself are kept.
    if np.isinf(cast).sum() > np.isinf(tensor).sum():
      raise ValueError(
        f"{name} of {weights.source} has numbers too large for {dtype}; take bfloat16 or float32"
      )
    return cast

  return dataclasses.replace(weights, read=read)


def count_nonfinite(weights: Weights) -> tuple[Weights, dict[str, int]]:
  """Weights that count NaN and infinities as they are read, and the counts, by name of the tensor.

  A tensor without any is not in the dictionary.
  """
  counts = {}

  def read(name):
    tensor = weights.read(name)
    if n := tensor.size - np.count_nonzero(np.isfinite(tensor)):
      counts[name] = n
    return tensor

  return dataclasses.replace(weights, read=read), counts


def add_zero_biases(weights: Weights) -> Weights:
  """Adds biases of zero to a model without biases, for formats that cannot leave them out."""
  stored = names.shapes(weights.config)
  config = dataclasses.replace(weights.config, use_bias=True)
  shapes = names.shapes(config)

  def read(name):
    return weights.read(name) if name in stored else np.zeros(shapes[name], np.float32)

  return dataclasses.replace(weights, config=config, read=read)


def to_model(weights: Weights, mesh: jax.sharding.Mesh, dtype: str, quantize: bool = False) -> GPT2:
  """Loads weights into a sharded model on `mesh`, with float32 parameters, computing in `dtype`.

  Each tensor is read once. The host holds one parameter at a time (all its layers), in addition to
  what the devices hold. With `quantize` it is the model of `quantization.quantize`: each matrix
  becomes int8 as it is read, and of float32 there is one layer at a time.
  """
  # 1. The target: every parameter's shape and sharding on this mesh, without any memory.
  config = dataclasses.replace(weights.config, dtype=dtype, pad_heads=True)

  def make() -> GPT2:
    model = new_model(config, jax.random.key(0))
    return quantize_on_mesh(model) if quantize else model

  with jax.set_mesh(mesh):
    check_mesh(config)
    target = concrete(jax.eval_shape(make), mesh)
  paths, structure = jax.tree_util.tree_flatten_with_path(target, _is_int8)
  leaves = {name_of(path): leaf for path, leaf in paths}

  # 2. The largest parameters first, so that the peak stays near the model's own size where host
  #    and device share their memory.
  sizes = {name: max(x.size for x in jax.tree.leaves(leaf)) for name, leaf in leaves.items()}
  arrays = {}
  for name in progress(sorted(leaves, key=lambda name: -sizes[name]), "loading"):
    arrays[name] = _load_parameter(weights, name, leaves[name])
  return jax.tree.unflatten(structure, list(map(arrays.get, leaves)))


def _is_int8(node) -> bool:
  return isinstance(node, Int8)


def _load_parameter(weights: Weights, name: str, target: jax.ShapeDtypeStruct | Int8):
  """Loads one parameter, all layers of it, into its shards; zeros where `target` is padded."""
  # 1. A buffer for each distinct shard. A scale of padding is that of zeros.
  if _is_int8(target):
    parts = Int8(_Shards(target.q_OI), _Shards(target.scale_O, TINY))
  else:
    parts = _Shards(target)

  # 2. Read each tensor once, and copy to every shard the part that it holds. The layers axis of
  #    stacked parameters is not sharded, so a shard has every layer.
  stacked = name.startswith("h.")
  n_layer = weights.config.n_layer
  for layer in range(n_layer) if stacked else (None,):
    tensor = weights.read(name if layer is None else _name_in_layer(name, layer))
    if ".c_attn." in name:
      tensor = names.group_by_head(tensor, weights.config.n_head)
    if _is_int8(target):
      tensor = _quantize_tensor(tensor, outputs_are_rows=name == "wte")
    jax.tree.map(lambda shards, part, layer=layer: shards.fill(part, layer), parts, tensor)

  # 3. Wait for the copies, so that the buffers are freed before the next parameter is read.
  return jax.block_until_ready(jax.tree.map(_Shards.to_device, parts))


class _Shards:
  """Buffers on the host for the shards of an array, by their bounds [start, stop) on each axis.

  Devices that hold a replica share one.
  """

  def __init__(self, target: jax.ShapeDtypeStruct, padding: float = 0):
    self.target = target
    self.device_to_bounds = {}
    self.buffers = {}
    device_to_index = target.sharding.addressable_devices_indices_map(target.shape)
    for device, index in device_to_index.items():
      bounds = tuple(s.indices(n)[:2] for s, n in zip(index, target.shape, strict=True))
      self.device_to_bounds[device] = bounds
      if bounds not in self.buffers:
        shape = [stop - start for start, stop in bounds]
        # Zeros take no memory until they are written.
        empty = np.full(shape, padding, target.dtype) if padding else np.zeros(shape, target.dtype)
        self.buffers[bounds] = empty

  def fill(self, tensor: np.ndarray, layer: int | None) -> None:
    """Copies a tensor, or one layer of it, to every shard the part that it holds."""
    for bounds, buffer in self.buffers.items():
      within = bounds if layer is None else bounds[1:]
      part = tensor[tuple(slice(*bound) for bound in within)]
      # Padding is at the end of an axis: the part is cut there, and the rest stays.
      unpadded = tuple(map(slice, part.shape))
      (buffer if layer is None else buffer[layer])[unpadded] = part

  def to_device(self) -> jax.Array:
    """The sharded array, on its way to the devices."""
    arrays = []
    for device, bounds in self.device_to_bounds.items():
      arrays.append(jax.device_put(self.buffers[bounds], device))
    return jax.make_array_from_single_device_arrays(self.target.shape, self.target.sharding, arrays)


def _quantize_tensor(tensor: np.ndarray, outputs_are_rows: bool) -> Int8:
  """Quantizes one matrix, on one of this process's devices."""
  mesh = make_mesh(1, 1, 1, jax.local_devices()[:1])
  with jax.set_mesh(mesh):
    weight = jax.jit(int8)(Dense(np.asarray(tensor, np.float32), outputs_are_rows))
  return jax.tree.map(np.asarray, weight)


def _name_in_layer(stacked_name: str, layer: int) -> str:
  """The canonical name of one layer of a stacked parameter: h.3.ln_1.g of h.ln_1.g."""
  return stacked_name.replace("h.", f"h.{layer}.", 1)


@jax.jit
def _all_gather(x):
  return jax.sharding.reshard(x, P(*(None,) * x.ndim))


def _check_plain(leaves: dict, shapes: dict) -> None:
  """Raises ValueError for parameters that a GPT-2 has not: none is dropped without a word."""
  plain = {re.sub(r"^h\.\d+\.", "h.", name) for name in shapes}
  others = [name for name in leaves if name not in plain]
  if any(".lora_" in name for name in others):
    raise ValueError(
      "the model has a LoRA adapter, which a whole model's formats have no place for; merge it "
      "(merge_lora, or gpt2-jax convert --merge), or write it alone (write_adapter, --format=peft)"
    )
  if others:
    raise ValueError(
      f"the model has parameters that GPT-2's formats have no place for, and nothing is dropped: "
      f"{summarize(others, 4)}"
    )


def from_model(model: GPT2, tokenizer: Tokenizer | None, source: str = "a model") -> Weights:
  """Weights of a sharded model, gathered to the host a tensor at a time, without padding."""
  if not isinstance(model, GPT2):
    raise ValueError(
      f"a {type(model).__name__} is not written; give the model that it was made from"
    )
  leaves = {name_of(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(model)}
  shapes = names.shapes(model.config)

  # Int8 holds two leaves for each matrix, under other names.
  if "wte" not in leaves:
    raise ValueError("an int8 model is not written; load it without quantize, and write that")
  _check_plain(leaves, shapes)

  def read(name: str) -> np.ndarray:
    # 1. The leaf, or the slice of a stacked one, under the model's own mesh: another may be in
    #    force.
    if name.startswith("h."):
      layer = name.split(".")[1]
      stacked = leaves[name.replace(f"h.{layer}.", "h.", 1)]
      with jax.set_mesh(model.mesh):
        leaf = stacked[int(layer)]
    else:
      leaf = leaves[name]

    # 2. Gather one replica of each shard, then cut the padding off. Where other processes hold some
    #    of them, all take part in an all-gather first.
    if not leaf.is_fully_addressable:
      with jax.set_mesh(model.mesh):
        leaf = _all_gather(leaf).addressable_data(0)
    tensor = np.empty(leaf.shape, leaf.dtype)
    for shard in leaf.addressable_shards:
      if shard.replica_id == 0:
        tensor[shard.index] = shard.data
    tensor = tensor[tuple(map(slice, shapes[name]))]
    return names.group_by_qkv(tensor, model.config.n_head) if ".c_attn." in name else tensor

  return Weights(model.config, read, tokenizer, source)
