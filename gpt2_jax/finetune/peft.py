# SPDX-License-Identifier: Apache-2.0
"""Adapters of peft's beside a model, and a model's adapter for peft: see convert/peft_files.py."""

import dataclasses
import os
import re
from collections.abc import Sequence

import jax
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from gpt2_jax.convert import names
from gpt2_jax.convert.peft_files import (
  Adapter,
  LoraMatrices,
  check_adapter_target,
  read_adapter,
  write_folder,
)
from gpt2_jax.convert.weights import from_model, weights_sha256
from gpt2_jax.files import summarize
from gpt2_jax.finetune.classify import Classifier, add_head
from gpt2_jax.finetune.lora import LoRA, block_linears, copied, has_lora, matrix_layout
from gpt2_jax.finetune.prefix import PrefixTuned, PromptTuned, VirtualTokens, check_plain
from gpt2_jax.finetune.trainable import trainable_mask
from gpt2_jax.linear import Dense
from gpt2_jax.model import GPT2, ModelConfig, name_of


def check_base(adapter: Adapter, config: ModelConfig, base: str, base_sha256: str | None) -> None:
  """Raises ValueError unless the adapter is one of the base: by SHA-256, or else by shapes.

  `base_sha256` is of the base's weights (weights_sha256), `base` its name.
  """
  if adapter.base_sha256 and base_sha256 and adapter.base_sha256 != base_sha256:
    raise ValueError(
      f"{adapter.source} is an adapter of another base: its weights have SHA-256 "
      f"{adapter.base_sha256}, and those of {base} {base_sha256}"
    )

  shapes = names.shapes(config)
  faults = []
  for module, matrices in adapter.lora.items():
    fits = (matrices.a_IR.shape[0], matrices.b_RO.shape[1])
    if fits != shapes.get(f"{module}.w"):
      faults.append(f"{module} is for {list(fits)}, not {list(shapes.get(f'{module}.w', ()))}")
  if adapter.virtual is not None:
    width = config.n_embd * (2 * config.n_layer if adapter.kind == "prefix" else 1)
    if adapter.virtual.shape[1] != width:
      faults.append(f"virtual tokens of width {adapter.virtual.shape[1]}, not {width}")
  for name, tensor in adapter.saved.items():
    if tensor.shape != shapes.get(name):
      faults.append(f"{name} is {list(tensor.shape)}, not {list(shapes.get(name, ()))}")
  if faults:
    raise ValueError(
      f"{adapter.source} is an adapter of another base than {base}: {summarize(faults, 2)}"
    )


def attach(model: GPT2, adapter: Adapter) -> GPT2:
  """The model with the adapter beside it; `check_base` has held them together."""
  if adapter.kind != "lora":
    return _with_virtual_tokens(model, adapter)
  if has_lora(model):
    raise ValueError(
      f"the model has a LoRA adapter already; merge it, and then take {adapter.source}"
    )
  model = copied(model)
  for matrix, linear in block_linears(model.h).items():
    if any(module.endswith(f".{matrix}") for module in adapter.lora):
      linear.w = nnx.Param(_weight(model, matrix, linear.w[...], adapter))
  return model if adapter.head_DC is None else _with_head(model, adapter)


def _with_virtual_tokens(model: GPT2, adapter: Adapter) -> GPT2:
  """The model with the adapter's virtual tokens, and the context that they leave."""
  check_plain(model)
  if adapter.kind == "prompt":
    return PromptTuned(model, _put(model.mesh, adapter.virtual, P(None, "data")))

  # peft's rows are, layer by layer, the keys of all heads and then their values.
  config, tokens = model.config, len(adapter.virtual)
  shape = (tokens, config.n_layer, 2, config.n_head, config.head_size)
  prefix_LPHsK = np.reshape(adapter.virtual, shape).transpose(1, 0, 3, 2, 4)
  prefix_LPHK = np.reshape(prefix_LPHsK, (*prefix_LPHsK.shape[:3], -1))
  with jax.set_mesh(model.mesh):
    padding = config.padded_heads - config.n_head
  prefix_LPHK = np.pad(prefix_LPHK, ((0, 0), (0, 0), (0, padding), (0, 0)))
  return PrefixTuned(model, _put(model.mesh, prefix_LPHK, P(None, None, "model", None)))


def _virtual_tokens(model: VirtualTokens) -> Adapter:
  """The model's virtual tokens as peft has them: the inverse of `_with_virtual_tokens`."""
  if isinstance(model, PromptTuned):
    return Adapter("a model", "prompt", virtual=_on_host(model, model.prompt[...]))
  config = model.config
  prefix_LPHK = _on_host(model, model.prefix[...])[:, :, : config.n_head]
  layers, tokens, heads, _ = prefix_LPHK.shape
  prefix_LPHsK = np.reshape(prefix_LPHK, (layers, tokens, heads, 2, config.head_size))
  rows = np.reshape(prefix_LPHsK.transpose(1, 0, 3, 2, 4), (tokens, -1))
  return Adapter("a model", "prefix", virtual=rows)


def _with_head(model: GPT2, adapter: Adapter) -> GPT2:
  """The model with the adapter's classification head."""
  if adapter.head_DC.ndim != 2 or len(adapter.head_DC) != model.config.n_embd:
    raise ValueError(
      f"{adapter.source} has a head for {list(adapter.head_DC.shape)[:2]}, and the model is wide "
      f"{model.config.n_embd}"
    )
  with jax.set_mesh(model.mesh):
    model = add_head(model, adapter.head_DC.shape[1], jax.random.key(0))
  spec = jax.tree.leaves(model.classifier.w)[0].sharding.spec
  model.classifier.w = nnx.Param(Dense(_put(model.mesh, adapter.head_DC, spec)))
  return model


def _weight(model: GPT2, matrix: str, base, adapter: Adapter) -> LoRA:
  """A stacked weight with an adapter beside it."""
  a_LIR, b_LRO, scale_L, ranks = _host_arrays(model, matrix, base, adapter)
  _, (in_axis, out_axis) = matrix_layout(base)
  return LoRA(
    base,
    _put(model.mesh, a_LIR, P(None, in_axis, None)),
    _put(model.mesh, b_LRO, P(None, None, out_axis)),
    _put(model.mesh, scale_L, P(None)),
    adapter.dropout,
    ranks,
    adapter.rslora,
  )


def _host_arrays(model: GPT2, matrix: str, base, adapter: Adapter | None, rank: int = 0):
  """a, b and scale of all layers, padded as the mesh pads the base and to `rank`, and their ranks.

  Where a layer has no adapter, or one of a lower rank, there are zeros.
  """
  config = model.config
  lora = adapter.lora if adapter else {}
  layers = [lora.get(f"h.{layer}.{matrix}") for layer in range(config.n_layer)]
  ranks = tuple(layer.a_IR.shape[1] if layer else 0 for layer in layers)
  rank = rank or max(ranks)

  (I, O), _ = matrix_layout(base)  # noqa: E741
  a_LIR = np.zeros((config.n_layer, I, rank), np.float32)
  b_LRO = np.zeros((config.n_layer, rank, O), np.float32)
  scale_L = np.zeros(config.n_layer, np.float32)
  for index, layer in enumerate(layers):
    if layer:
      b_RO = layer.b_RO
      b_RO = names.group_by_head(b_RO, config.n_head) if matrix == "attn.c_attn" else b_RO
      a_LIR[index, : len(layer.a_IR), : ranks[index]] = layer.a_IR
      b_LRO[index, : ranks[index], : b_RO.shape[1]] = b_RO
      scale_L[index] = layer.scale
  return a_LIR, b_LRO, scale_L, ranks


def stack_adapters(model: GPT2, paths: Sequence[str | None]) -> GPT2:
  """The model with a bank of adapters, of which each row of a batch goes through its own.

  `paths` are folders of peft's; None is the model alone. Row r of a batch goes through
  `paths[context.adapter_B[r]]`. Ranks and targets may differ. Raises ValueError for an adapter of
  another base, or with whole parameters of its own, and on a model that has LoRA.
  """
  # 1. Read all, and hold each against the model.
  if has_lora(model):
    raise ValueError("the model has a LoRA adapter already; stack adapters over the model alone")
  adapters = [None if path is None else read_adapter(path) for path in paths]
  if not any(adapters):
    raise ValueError("a bank holds one adapter or more; give their folders")
  base_sha256 = _sha256_of(model, adapters)
  for adapter in filter(None, adapters):
    if adapter.kind != "lora":
      raise ValueError(f"{adapter.source} has virtual tokens, and a bank is of LoRA adapters")
    check_base(adapter, model.config, "this model", base_sha256)
    if adapter.saved or adapter.head_DC is not None:
      raise ValueError(
        f"{adapter.source} has whole parameters of its own (modules_to_save), and rows of a batch "
        f"share all but LoRA's matrices; load it alone"
      )

  # 2. An axis of adapters behind the layers, of the largest rank.
  rank = max(m.a_IR.shape[1] for a in filter(None, adapters) for m in a.lora.values())
  model = copied(model)
  for matrix, linear in block_linears(model.h).items():
    base = linear.w[...]
    if any(module.endswith(f".{matrix}") for a in filter(None, adapters) for module in a.lora):
      arrays = [_host_arrays(model, matrix, base, adapter, rank)[:3] for adapter in adapters]
      a_LNIR, b_LNRO, scale_LN = (np.stack(column, 1) for column in zip(*arrays, strict=True))
      _, (in_axis, out_axis) = matrix_layout(base)
      linear.w = nnx.Param(
        LoRA(
          base,
          _put(model.mesh, a_LNIR, P(None, None, in_axis, None)),
          _put(model.mesh, b_LNRO, P(None, None, None, out_axis)),
          _put(model.mesh, scale_LN, P(None, None)),
        )
      )
  return model


def _sha256_of(model: GPT2, adapters) -> str | None:
  """The SHA-256 of the model's weights, if an adapter says its base's and they are not int8."""
  is_float = any(name_of(path) == "wte" for path, _ in jax.tree_util.tree_leaves_with_path(model))
  says = any(adapter and adapter.base_sha256 for adapter in adapters)
  return weights_sha256(from_model(model, None)) if says and is_float else None


def _put(mesh: jax.sharding.Mesh, array: np.ndarray, spec: P) -> jax.Array:
  """An array that every host has, in its shards."""
  return jax.make_array_from_callback(array.shape, NamedSharding(mesh, spec), lambda i: array[i])


def write_adapter(
  model: GPT2,
  path: str | os.PathLike,
  base: str,
  base_sha256: str | None = None,
  trained: tuple[str, ...] = (),
) -> None:
  """Writes a model's adapter as a folder that peft and `read_adapter` load.

  `base` is the name or path of the model it belongs to, `base_sha256` of its weights. A
  classifier's head, and what else `trained` names, are written whole (modules_to_save). Raises
  FileExistsError if `path` is there, ValueError for a model without an adapter, or with a bank.
  """
  path, config = check_adapter_target(path), model.config
  # Every process holds a part of the arrays; one of them writes.
  is_virtual = isinstance(model, VirtualTokens)
  adapter = _virtual_tokens(model) if is_virtual else _lora_of(model, trained)
  adapter = dataclasses.replace(adapter, base_sha256=base_sha256)
  if jax.process_index() == 0:
    write_folder(adapter, path, base, config.n_layer, config.n_head)


def _lora_of(model: GPT2, trained: tuple[str, ...]) -> Adapter:
  """The model's LoRA adapter, its head, and what `trained` names besides."""
  weights = {}
  for matrix, linear in block_linears(model.h).items():
    if isinstance(linear.w[...], LoRA):
      weights[matrix] = linear.w[...]
  if not weights:
    raise ValueError("the model has no adapter to write; save it as a whole model")
  if any(not weight.ranks for weight in weights.values()):
    raise ValueError("a bank of adapters is not written; write each where it is alone")

  lora = {}
  for matrix, weight in weights.items():
    lora |= _matrices_by_layer(model, matrix, weight)
  first = next(iter(weights.values()))
  head = model.classifier.w[...].array if isinstance(model, Classifier) else None
  return Adapter(
    "a model",
    "lora",
    lora,
    saved=_whole_parameters(model, trained),
    head_DC=None if head is None else _on_host(model, head),
    dropout=first.dropout,
    rslora=first.rslora,
  )


def _on_host(model: GPT2, array: jax.Array) -> np.ndarray:
  """An array of the model, whole, on every process."""
  return np.asarray(jax.device_put(array, NamedSharding(model.mesh, P())))


def _matrices_by_layer(model: GPT2, matrix: str, weight: LoRA) -> dict[str, LoraMatrices]:
  """A stacked weight's adapter by module, canonical and without padding."""
  config = model.config
  I, O = names.shapes(config)[f"h.0.{matrix}.w"]  # noqa: E741
  a_LIR, b_LRO = _on_host(model, weight.lora_a), _on_host(model, weight.lora_b)
  scale_L = np.asarray(weight.scale)

  modules = {}
  for layer, rank in enumerate(weight.ranks):
    if rank:
      b_RO = b_LRO[layer, :rank, :O]
      b_RO = names.group_by_qkv(b_RO, config.n_head) if matrix == "attn.c_attn" else b_RO
      a_IR = a_LIR[layer, :I, :rank]
      modules[f"h.{layer}.{matrix}"] = LoraMatrices(a_IR, b_RO, float(scale_L[layer]))
  return modules


def _whole_parameters(model: GPT2, trained: tuple[str, ...]) -> dict[str, np.ndarray]:
  """What `trained` names beside adapter and head, by canonical name: modules as peft saves them.

  Raises ValueError for the embedding, and for a module that has an adapter.
  """
  # 1. The modules: a norm's gain with its bias.
  leaves = {name_of(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(model)}
  mask = jax.tree.leaves(trainable_mask(model, trained)) if trained else [False] * len(leaves)
  own = (".lora_", "classifier.")
  modules = set()
  for name, is_trained in zip(leaves, mask, strict=True):
    if is_trained and not any(part in name for part in own):
      modules.add(name.rpartition(".")[0] or name)
  adapted = {
    f"h.{name}" for name, x in block_linears(model.h).items() if isinstance(x.w[...], LoRA)
  }
  refused = modules & (adapted | {"wte"})
  if refused:
    raise ValueError(
      f"{summarize(sorted(refused))} is trained beside the adapter, and peft's format has no place "
      f"for both; merge the adapter and save a whole model"
    )

  # 2. Their parameters, layer by layer.
  whole, shapes = {}, names.shapes(model.config)
  for name, shape in shapes.items():
    stacked = re.sub(r"^h\.\d+\.", "h.", name)
    if stacked in leaves and (stacked.rpartition(".")[0] or stacked) in modules:
      tensor = _on_host(model, leaves[stacked])
      tensor = tensor[int(name.split(".")[1])] if stacked != name else tensor
      tensor = tensor[tuple(map(slice, shape))]
      is_qkv = ".c_attn." in name
      whole[name] = names.group_by_qkv(tensor, model.config.n_head) if is_qkv else tensor
  return whole
