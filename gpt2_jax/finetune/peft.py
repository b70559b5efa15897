# SPDX-License-Identifier: Apache-2.0
"""Adapters in peft's format: adapter_config.json and adapter_model.safetensors, both ways.

peft is Hugging Face's library; it is not needed here. The SHA-256 of the base's weights is written
into the metadata of the safetensors file, which every version of peft reads over.
"""

import dataclasses
import json
import math
import os
import pathlib
import re
import shutil
import statistics
from collections.abc import Mapping, Sequence

import jax
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from gpt2_jax.convert import hf, names
from gpt2_jax.convert.safe_load import read_json
from gpt2_jax.convert.weights import Weights, from_model, weights_sha256
from gpt2_jax.files import atomic_write, local_path, remove_stale, summarize
from gpt2_jax.finetune.lora import (
  MATRICES,
  LoRA,
  block_linears,
  copied,
  has_lora,
  matrix_layout,
  scale_of,
)
from gpt2_jax.finetune.trainable import trainable_mask
from gpt2_jax.linear import Linear
from gpt2_jax.model import GPT2, ModelConfig, name_of

CONFIG, TENSORS, PICKLED = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
BASE_SHA256 = "gpt2_jax.base_sha256"  # a key of the safetensors file's metadata
HEAD = "score.weight"  # of transformers' GPT2ForSequenceClassification

# What says nothing of the result, or what the tensors themselves say. What else a LoRA's config
# asks for would compute something else: it has to be off.
READ = {"alpha_pattern", "fan_in_fan_out", "lora_alpha", "lora_dropout", "modules_to_save", "r"}
READ |= {"base_model_name_or_path", "init_lora_weights", "peft_type", "rank_pattern", "use_rslora"}
IGNORED = {"auto_mapping", "corda_config", "eva_config", "exclude_modules", "inference_mode"}
IGNORED |= {"layers_pattern", "layers_to_transform", "lora_ga_config", "megatron_core", "revision"}
IGNORED |= {
  "peft_version",
  "qalora_group_size",
  "target_modules",
  "task_type",
  "ensure_weight_tying",
}
PLAIN_INITS = (True, False, "gaussian", "eva", "orthogonal")  # others change the base's weights

LORA_TENSOR = re.compile(r"h\.(\d{1,5})\.(attn\.c_attn|attn\.c_proj|mlp\.c_fc|mlp\.c_proj)\.lora_")


@dataclasses.dataclass(frozen=True)
class LoraMatrices:
  """One layer's a and b in canonical layout, and their scale."""

  a_IR: np.ndarray
  b_RO: np.ndarray
  scale: float


@dataclasses.dataclass(frozen=True)
class Adapter:
  """An adapter as a file holds it, read whole: it is small."""

  source: str
  lora: dict[str, LoraMatrices]  # by canonical name without .w, such as h.0.attn.c_attn
  saved: dict[str, np.ndarray]  # whole parameters in place of the base's, by canonical name
  head_DC: np.ndarray | None  # a classification head
  dropout: float
  rslora: bool
  base_sha256: str | None

  def replace_saved(self, weights: Weights) -> Weights:
    """The base's weights with the adapter's whole parameters in their place."""

    def read(name):
      return self.saved[name] if name in self.saved else weights.read(name)

    return dataclasses.replace(weights, read=read)

  def merge_into(self, weights: Weights) -> Weights:
    """The base's weights with the adapter merged: w + scale * a @ b, in float32.

    Raises ValueError for an adapter with a classification head, which would be lost.
    """
    if self.head_DC is not None:
      raise ValueError(
        f"{self.source} has a classification head, for which a language model's formats have no "
        f"place; load it with load_pretrained(..., adapter=...)"
      )
    weights = self.replace_saved(weights)

    def read(name):
      tensor = weights.read(name)
      matrices = self.lora.get(name.removesuffix(".w"))
      if matrices is None:
        return tensor
      return tensor.astype(np.float32) + matrices.scale * (matrices.a_IR @ matrices.b_RO)

    return dataclasses.replace(weights, read=read, source=f"{weights.source} with {self.source}")


def read_adapter(path: str | os.PathLike) -> Adapter:
  """Reads a LoRA adapter in peft's format, a folder.

  Raises OSError or ValueError, in one line, for what is none, or asks for what is not built.
  """
  # 1. The config.
  path = local_path(os.fspath(path))
  if (path / "checkpoints").is_dir():
    raise ValueError(f"{path} is a run's workdir, and holds its adapter; give it as the model")
  if not (path / CONFIG).is_file():
    raise FileNotFoundError(f"{path} is no adapter of peft's: it has no {CONFIG}")
  config = read_json(path / CONFIG)
  _check_config(config, path)

  # 2. The tensors by name, without what peft and transformers write in front of it.
  tensors = _open_tensors(path)
  lora, saved, head = {}, {}, None
  for name, tensor in tensors.items():
    if match := LORA_TENSOR.match(name):
      lora.setdefault(f"h.{match[1]}.{match[2]}", {})[name[match.end() :]] = tensor
    elif name == HEAD:
      head = tensor.read().astype(np.float32).T
    else:
      saved[name] = tensor

  # 3. The rank is that of the matrices; a pattern may give a module its own, and its own alpha.
  matrices = {}
  for module, pair in lora.items():
    matrices[module] = _matrices(config, module, pair, path)
  if not matrices:
    raise ValueError(f"{path} holds no LoRA matrices; is {TENSORS} whole?")
  return Adapter(
    str(path),
    matrices,
    _saved_parameters(saved, path),
    head,
    float(config.get("lora_dropout", 0.0)),
    config.get("use_rslora", False),
    _base_sha256(path),
  )


def _check_config(config: dict, path: pathlib.Path) -> None:
  """Raises ValueError for an adapter of another kind, and for values that cannot be."""
  # 1. What would compute something else.
  kind = config.get("peft_type")
  if kind != "LORA":
    raise ValueError(f"{path} is an adapter of peft's kind {str(kind)[:40]!r}; LORA is read")
  unknown = []
  for name, value in config.items():
    is_off = value in (None, False, "none", 0) or value in ([], {}, "")
    if name not in READ | IGNORED and not is_off:
      unknown.append(f"{name!r}: {value!r}")
  if (init := config.get("init_lora_weights", True)) not in PLAIN_INITS:
    unknown.append(f"'init_lora_weights': {init!r}, which changes the base")
  if unknown:
    raise ValueError(f"{path} asks for what is not built: {summarize(unknown, 4, each=60)}")

  # 2. Types and ranges: somebody's file may hold anything.
  faults = []
  for name, default in (("r", 8), ("lora_alpha", 8), ("lora_dropout", 0.0)):
    value = config.get(name, default)
    is_number = type(value) in (int, float) and math.isfinite(value)
    if not is_number or not 0 <= value < 2**31 or (name == "lora_dropout" and value >= 1):
      faults.append(f"{name}={value!r}")
  for name in ("rank_pattern", "alpha_pattern"):
    for pattern, value in _patterns(config, name).items():
      if type(value) not in (int, float) or not 0 < value < 2**31 or not _is_harmless(pattern):
        faults.append(f"{name} {pattern!r}: {value!r}")
  if type(config.get("use_rslora", False)) is not bool:
    faults.append(f"use_rslora={config['use_rslora']!r}")
  if faults:
    raise ValueError(f"{path / CONFIG} has values that cannot be: {summarize(faults, 4, each=60)}")


def _patterns(config: dict, name: str) -> dict:
  """rank_pattern or alpha_pattern; what is no object has a pattern that cannot be."""
  patterns = config.get(name) or {}
  return patterns if isinstance(patterns, dict) else {"": patterns}


def _is_harmless(pattern: str) -> bool:
  """Whether a regular expression ends soon on any name: few repetitions, and none of a group."""
  is_short = len(pattern) < 200 and len(re.findall(r"[*+?{]", pattern)) <= 3
  if not pattern or not is_short or re.search(r"\)[*+?{]|\\\d|\(\?", pattern):
    return False
  try:
    re.compile(pattern)
  except re.error:
    return False
  return True


def _pattern_value(config: dict, name: str, module: str, default: float) -> float:
  """A module's own value in a pattern, as peft looks it up: the first that matches its end."""
  for pattern, value in _patterns(config, name).items():
    if re.match(rf"(.*\.)?({pattern})$", f"transformer.{module}"):
      return value
  return default


def _open_tensors(path: pathlib.Path) -> dict[str, hf.StoredTensor]:
  """The tensors of an adapter's file by name, without its prefixes."""
  if (path / TENSORS).is_file():
    stored = hf.open_safetensors(path / TENSORS)
  elif (path / PICKLED).is_file():
    stored = hf.open_torch(path / PICKLED)
  else:
    raise FileNotFoundError(f"{path} has no {TENSORS}; the adapter is not complete without it")

  tensors = {}
  for name, tensor in stored.items():
    name = name.removeprefix("base_model.model.").removeprefix("transformer.")
    tensors[name.replace(".modules_to_save.", ".")] = tensor
  return tensors


def _matrices(config: dict, module: str, pair: dict, path: pathlib.Path) -> LoraMatrices:
  """One module's matrices and scale.

  Raises ValueError unless they fit each other and the config.
  """
  if set(pair) != {"A.weight", "B.weight"}:
    raise ValueError(
      f"{path} holds {summarize(map(repr, pair), 4)} of {module}, not lora_A and lora_B"
    )
  (a_RI, b_OR) = (pair["A.weight"], pair["B.weight"])
  rank = _pattern_value(config, "rank_pattern", module, config.get("r", 8))
  if len(a_RI.shape) != 2 or len(b_OR.shape) != 2 or not a_RI.shape[0] == b_OR.shape[1] == rank:
    raise ValueError(
      f"{module} in {path} has matrices {list(a_RI.shape)} and {list(b_OR.shape)}, and its config "
      f"says rank {rank}; are they of one adapter?"
    )
  if rank < 1:
    raise ValueError(f"{path} is of rank {rank}, which is no adapter; it is 1 or more")

  alpha = _pattern_value(config, "alpha_pattern", module, config.get("lora_alpha", 8))
  scale = scale_of(rank, alpha, config.get("use_rslora", False))
  return LoraMatrices(a_RI.read().astype(np.float32).T, b_OR.read().astype(np.float32).T, scale)


def _saved_parameters(saved: Mapping[str, hf.StoredTensor], path: pathlib.Path) -> dict:
  """Whole parameters (modules_to_save) by canonical name, which are to take the base's place.

  Raises ValueError for tensors that are no parameters, and for the embedding.
  """
  canonical = {torch: name for name, torch in names.TORCH.items()}
  parameters, unknown = {}, []
  for name, tensor in saved.items():
    layer = re.match(r"h\.(\d{1,5})\.", name)
    template = canonical.get(re.sub(r"^h\.\d{1,5}\.", "h.{}.", name))
    # The head is tied to wte, and peft trains a copy of one of them.
    if template in (None, "wte"):
      unknown.append(repr(name))
    else:
      parameters[template.format(layer[1] if layer else "")] = tensor.read().astype(np.float32)
  if unknown:
    raise ValueError(
      f"{path} holds what is not built into this model: {summarize(unknown, 4)}; LoRA's matrices "
      f"are of {', '.join(MATRICES)}, and whole modules are any but the embedding"
    )
  return parameters


def _base_sha256(path: pathlib.Path) -> str | None:
  """The SHA-256 of the base's weights, if the file says it; peft's own do not."""
  if not (path / TENSORS).is_file():
    return None
  from safetensors import safe_open

  with safe_open(path / TENSORS, "np") as file:
    base_sha256 = (file.metadata() or {}).get(BASE_SHA256)
  if base_sha256 and not re.fullmatch("[0-9a-f]{64}", base_sha256):
    raise ValueError(f"{path / TENSORS} says of its base {base_sha256[:80]!r}, which is no SHA-256")
  return base_sha256


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
  for name, tensor in adapter.saved.items():
    if tensor.shape != shapes.get(name):
      faults.append(f"{name} is {list(tensor.shape)}, not {list(shapes.get(name, ()))}")
  if faults:
    raise ValueError(
      f"{adapter.source} is an adapter of another base than {base}: {summarize(faults, 2)}"
    )


def attach(model: GPT2, adapter: Adapter) -> GPT2:
  """The model with the adapter's matrices beside its own; `check_base` has held them together."""
  if has_lora(model):
    raise ValueError(
      f"the model has a LoRA adapter already; merge it, and then take {adapter.source}"
    )
  model = copied(model)
  for matrix, linear in block_linears(model.h).items():
    if any(module.endswith(f".{matrix}") for module in adapter.lora):
      linear.w = nnx.Param(_weight(model, matrix, linear.w[...], adapter))
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
  """Writes a model's LoRA adapter as a folder that peft and `read_adapter` load.

  `base` is the name or path of the model it belongs to, `base_sha256` of its weights. A
  classifier's head, and what else `trained` names, are written whole (modules_to_save). Raises
  FileExistsError if `path` is there, ValueError for a model without an adapter, or with a bank.
  """
  # 1. Refuse what cannot be written before anything is.
  path = local_path(os.fspath(path))
  if os.path.lexists(path):
    remove_stale(path)
    raise FileExistsError(f"{path} is there already; take another name, or move it away")
  weights = {}
  for matrix, linear in block_linears(model.h).items():
    if _is_adapted(linear):
      weights[matrix] = linear.w[...]
  if not weights:
    raise ValueError("the model has no LoRA adapter to write; save it as a whole model")
  if any(not weight.ranks for weight in weights.values()):
    raise ValueError("a bank of adapters is not written; write each where it is alone")

  # 2. The tensors, on every process, since each holds a part of them.
  tensors, modules = {}, {}
  for matrix, weight in weights.items():
    for layer, a_IR, b_RO in _adapted_layers(model, matrix, weight):
      name = f"transformer.h.{layer}.{matrix}"
      tensors[f"base_model.model.{name}.lora_A.weight"] = np.ascontiguousarray(a_IR.T)
      tensors[f"base_model.model.{name}.lora_B.weight"] = np.ascontiguousarray(b_RO.T)
      modules[name] = _rank_and_alpha(weight, layer)
  whole = _whole_parameters(model, trained)
  tensors |= {f"base_model.model.{name}": tensor for name, tensor in whole.items()}

  # 3. The folder, by one of them.
  config = _config_json(next(iter(weights.values())), modules, sorted(whole), base)
  metadata = {"format": "pt"} | ({BASE_SHA256: base_sha256} if base_sha256 else {})
  if jax.process_index() == 0:
    _write_folder(path, config, tensors, metadata)


def _is_adapted(linear: Linear) -> bool:
  return isinstance(linear.w[...], LoRA)


def _write_folder(path: pathlib.Path, config: dict, tensors: dict, metadata: dict) -> None:
  # Imported here: `import gpt2_jax` should not load what only this format needs.
  from safetensors.numpy import save_file

  with atomic_write(path) as folder:
    folder.mkdir()
    (folder / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    save_file(tensors, folder / TENSORS, metadata=metadata)
    # safetensors makes its files readable for their owner alone.
    shutil.copymode(folder / CONFIG, folder / TENSORS)


def _on_host(array: jax.Array, mesh: jax.sharding.Mesh) -> np.ndarray:
  """An array of the mesh, whole, on every process."""
  return np.asarray(jax.device_put(array, NamedSharding(mesh, P())))


def _adapted_layers(model: GPT2, matrix: str, weight: LoRA):
  """The layers that a weight's adapter is in: (layer, a, b), canonical and without padding."""
  config = model.config
  I, O = names.shapes(config)[f"h.0.{matrix}.w"]  # noqa: E741
  a_LIR = _on_host(weight.lora_a, model.mesh)
  b_LRO = _on_host(weight.lora_b, model.mesh)
  for layer, rank in enumerate(weight.ranks):
    if rank:
      b_RO = b_LRO[layer, :rank, :O]
      b_RO = names.group_by_qkv(b_RO, config.n_head) if matrix == "attn.c_attn" else b_RO
      yield layer, a_LIR[layer, :I, :rank], b_RO


def _rank_and_alpha(weight: LoRA, layer: int) -> tuple[int, float]:
  """A layer's rank, and its alpha: the shortest number that gives the same scale."""
  rank, scale = weight.ranks[layer], np.asarray(weight.scale)[layer]
  alpha = float(scale) / scale_of(rank, 1.0, weight.rslora)
  for digits in range(1, 17):
    shortest = float(f"{alpha:.{digits}g}")
    if np.float32(scale_of(rank, shortest, weight.rslora)) == scale:
      return rank, int(shortest) if shortest.is_integer() else shortest
  return rank, alpha


def _whole_parameters(model: GPT2, trained: tuple[str, ...]) -> dict[str, np.ndarray]:
  """The head and what `trained` names beside the adapter, by transformers' names.

  Raises ValueError for the embedding, and for a bias of an adapted module: peft saves modules.
  """
  leaves = {name_of(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(model)}
  mask = jax.tree.leaves(trainable_mask(model, trained)) if trained else [False] * len(leaves)
  chosen = [name for name, is_chosen in zip(leaves, mask, strict=True) if is_chosen]

  # A module is saved whole: a norm's gain with its bias.
  modules = {name.rpartition(".")[0] or name for name in chosen if ".w.lora_" not in name}
  adapted = {f"h.{m}" for m, linear in block_linears(model.h).items() if _is_adapted(linear)}
  if modules & adapted:
    raise ValueError(
      f"{summarize(sorted(modules & adapted))} is trained beside its adapter, and peft saves one "
      f"or the other; merge the adapter and save a whole model"
    )
  whole = {}
  for name, leaf in leaves.items():
    if name == "classifier.w":
      whole[HEAD] = np.ascontiguousarray(_on_host(leaf, model.mesh).T)
    elif (name.rpartition(".")[0] or name) in modules and not name.startswith("classifier"):
      whole |= _torch_tensors(model, name, leaf)
  return whole


def _torch_tensors(model: GPT2, name: str, leaf: jax.Array) -> dict[str, np.ndarray]:
  """One parameter, all layers of it, by transformers' names."""
  config = model.config
  shapes = names.shapes(config)
  layered = name.startswith("h.")
  canonical = [name.replace("h.", f"h.{i}.", 1) for i in range(config.n_layer if layered else 1)]
  canonical = canonical if layered else [name]
  if canonical[0] not in shapes or name == "wte" or ".w.lora_" in name:
    raise ValueError(
      f"{name} is trained beside the adapter, and peft's format has no place for it; train other "
      f"parameters, or merge the adapter and save a whole model"
    )

  tensors, array = {}, _on_host(leaf, model.mesh)
  for layer, each in enumerate(canonical):
    tensor = (array[layer] if layered else array)[tuple(map(slice, shapes[each]))]
    tensor = names.group_by_qkv(tensor, config.n_head) if ".c_attn." in each else tensor
    tensors[f"transformer.{names.translate_name(each, names.TORCH)}"] = np.ascontiguousarray(tensor)
  return tensors


def _pattern(module: str) -> str:
  """A module's regular expression, which also fits it where no `transformer.` is before it."""
  return re.escape(module.removeprefix("transformer."))


def _config_json(weight: LoRA, modules: dict, whole: list[str], base: str) -> dict:
  """The content of adapter_config.json: the commonest rank and alpha, and patterns for the rest."""
  ranks = {module: rank for module, (rank, _) in modules.items()}
  alphas = {module: alpha for module, (_, alpha) in modules.items()}
  rank, alpha = statistics.mode(ranks.values()), statistics.mode(alphas.values())

  # A kind of matrix that every layer has is one target; otherwise each module is its own.
  targets = []
  for matrix in MATRICES:
    adapted = [module for module in modules if module.endswith(f".{matrix}")]
    targets += [matrix] if len(adapted) == len(weight.ranks) else adapted
  saved = sorted({name.rpartition(".")[0].removeprefix("transformer.") for name in whole})
  return {
    "alpha_pattern": {_pattern(m): a for m, a in alphas.items() if a != alpha},
    "base_model_name_or_path": base,
    "bias": "none",
    "fan_in_fan_out": True,  # GPT-2's Conv1D holds [in, out]
    "inference_mode": True,
    "init_lora_weights": True,
    "lora_alpha": alpha,
    "lora_dropout": weight.dropout,
    "modules_to_save": saved or None,
    "peft_type": "LORA",
    "r": rank,
    "rank_pattern": {_pattern(m): r for m, r in ranks.items() if r != rank},
    "target_modules": targets,
    "task_type": "SEQ_CLS" if HEAD in whole else "CAUSAL_LM",
    "use_rslora": weight.rslora,
  }
