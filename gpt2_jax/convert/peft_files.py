# SPDX-License-Identifier: Apache-2.0
"""Adapters in peft's format: adapter_config.json and adapter_model.safetensors, both ways.

peft is Hugging Face's library; it is not needed here. LoRA, prompt tuning and prefix tuning are
read and written; what else its config may ask for is refused. The SHA-256 of the base's weights is
in the metadata of the safetensors file, which every version of peft reads over.
"""

import dataclasses
import json
import math
import os
import pathlib
import re
import shutil
import statistics
from collections.abc import Mapping

import numpy as np

from gpt2_jax.convert import hf, hub, names
from gpt2_jax.convert.match import check_floats
from gpt2_jax.convert.safe_load import StoredTensor, read_json
from gpt2_jax.convert.weights import Weights
from gpt2_jax.files import atomic_write, check_writable, local_path, remove_stale, summarize
from gpt2_jax.finetune.lora import MATRICES, scale_of

CONFIG, TENSORS, PICKLED = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
BASE_SHA256 = "gpt2_jax.base_sha256"  # a key of the safetensors file's metadata
HEAD = "score.weight"  # of transformers' GPT2ForSequenceClassification
PREFIX = "base_model.model."  # before the names of LoRA's tensors
VIRTUAL = "prompt_embeddings"  # the one tensor of prompt and prefix tuning
KINDS = {"LORA": "lora", "PROMPT_TUNING": "prompt", "PREFIX_TUNING": "prefix"}

# Of each kind, what is read here; and what says nothing of the result, or what the tensors say
# themselves. What else a config asks for would compute something else: it has to be off.
READ = {"alpha_pattern", "fan_in_fan_out", "lora_alpha", "lora_dropout", "modules_to_save", "r"}
READ |= {"base_model_name_or_path", "init_lora_weights", "peft_type", "rank_pattern", "use_rslora"}
IGNORED = {"auto_mapping", "corda_config", "eva_config", "exclude_modules", "inference_mode"}
IGNORED |= {"layers_pattern", "layers_to_transform", "lora_ga_config", "megatron_core", "revision"}
IGNORED |= {"ensure_weight_tying", "peft_version", "qalora_group_size", "target_modules"}
IGNORED |= {"encoder_hidden_size", "init_weights", "num_attention_heads", "num_layers"}
IGNORED |= {"num_transformer_submodules", "num_virtual_tokens", "prefix_projection", "task_type"}
IGNORED |= {"prompt_tuning_init", "prompt_tuning_init_text", "token_dim", "tokenizer_kwargs"}
IGNORED |= {"tokenizer_name_or_path"}
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
  """An adapter as a file holds it, whole in memory: it is small."""

  source: str
  kind: str  # "lora", "prompt" or "prefix"
  lora: dict[str, LoraMatrices] = dataclasses.field(default_factory=dict)  # by h.0.attn.c_attn ...
  virtual: np.ndarray | None = None  # of prompt [P, D]; of prefix [P, 2 L D], as peft has it
  saved: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)  # in place of the base's
  head_DC: np.ndarray | None = None  # a classification head
  dropout: float = 0.0
  rslora: bool = False
  base_sha256: str | None = None

  def replace_saved(self, weights: Weights) -> Weights:
    """The base's weights with the adapter's whole parameters in their place."""

    def read(name):
      return self.saved[name] if name in self.saved else weights.read(name)

    return dataclasses.replace(weights, read=read)

  def merge_into(self, weights: Weights) -> Weights:
    """The base's weights with the adapter merged: w + scale * a @ b, in float32.

    Raises ValueError for what no weights can hold: a classification head, and virtual tokens.
    """
    if self.head_DC is not None or self.virtual is not None:
      what = "virtual tokens" if self.head_DC is None else "a classification head"
      raise ValueError(
        f"{self.source} has {what}, for which a language model's formats have no place; "
        f"load it with load_pretrained(..., adapter=...)"
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
  """Reads an adapter in peft's format: LoRA, prompt tuning or prefix tuning.

  `path` is a folder, or a repository of the Hub. Raises OSError or ValueError, in one line, for
  what is none, or asks for what is not built.
  """
  # 1. The config.
  path = find_adapter(path)
  if (path / "checkpoints").is_dir() and not (path / CONFIG).is_file():
    raise ValueError(f"{path} is a run's workdir, and holds its adapter; give it as the model")
  if not (path / CONFIG).is_file():
    raise FileNotFoundError(f"{path} is no adapter of peft's: it has no {CONFIG}")
  config = read_json(path / CONFIG)
  _check_config(config, path)
  tensors = _open_tensors(path)
  kind = KINDS[config["peft_type"]]
  if kind != "lora":
    return Adapter(str(path), kind, virtual=_virtual(tensors, path), base_sha256=_base_sha256(path))

  # 2. LoRA's tensors by name, without what peft and transformers write in front of it.
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
    kind,
    matrices,
    saved=_saved_parameters(saved, path),
    head_DC=head,
    dropout=float(config.get("lora_dropout", 0.0)),
    rslora=config.get("use_rslora", False),
    base_sha256=_base_sha256(path),
  )


def find_adapter(name_or_path: str | os.PathLike) -> pathlib.Path:
  """The folder of an adapter; OWNER/NAME that is no path here is downloaded from the Hub."""
  path = local_path(os.fspath(name_or_path))
  if not path.exists() and hub.is_repository(os.fspath(name_or_path)):
    return hub.fetch_adapter(os.fspath(name_or_path))
  return path


def _virtual(tensors: Mapping[str, StoredTensor], path: pathlib.Path) -> np.ndarray:
  """The virtual tokens of prompt and prefix tuning."""
  if set(tensors) != {VIRTUAL} or len(tensors[VIRTUAL].shape) != 2:
    held = summarize(map(repr, tensors), 4) or "nothing"
    raise ValueError(f"{path} holds {held}, and virtual tokens are one matrix, {VIRTUAL}")
  return tensors[VIRTUAL].read().astype(np.float32)


def _check_config(config: dict, path: pathlib.Path) -> None:
  """Raises ValueError for an adapter of another kind, and for values that cannot be."""
  # 1. What would compute something else.
  kind = config.get("peft_type")
  if not isinstance(kind, str) or kind not in KINDS:
    raise ValueError(
      f"{path} is an adapter of peft's kind {str(kind)[:40]!r}; what is read is {', '.join(KINDS)}"
    )
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


def _open_tensors(path: pathlib.Path) -> dict[str, StoredTensor]:
  """The tensors of an adapter's file by name, without its prefixes."""
  if (path / TENSORS).is_file():
    stored = hf.open_safetensors(path / TENSORS)
  elif (path / PICKLED).is_file():
    stored = hf.open_torch(path / PICKLED)
  else:
    raise FileNotFoundError(f"{path} has no {TENSORS}; the adapter is not complete without it")

  check_floats(stored, str(path))
  tensors = {}
  for name, tensor in stored.items():
    name = name.removeprefix(PREFIX).removeprefix("transformer.")
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


def _saved_parameters(saved: Mapping[str, StoredTensor], path: pathlib.Path) -> dict:
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


def check_adapter_target(path: str | os.PathLike) -> pathlib.Path:
  """The path, ~ expanded, of a folder that can be written. Raises OSError if it cannot."""
  path = local_path(os.fspath(path))
  if os.path.lexists(path):
    remove_stale(path)
    raise FileExistsError(f"{path} is there already; take another name, or move it away")
  check_writable(path)
  return path


def write_folder(
  adapter: Adapter, path: pathlib.Path, base: str, n_layer: int, n_head: int
) -> None:
  """Writes an adapter as a folder that peft and `read_adapter` load; `base` is its model's name."""
  # Imported here: `import gpt2_jax` should not load what only this format needs.
  from safetensors.numpy import save_file

  if adapter.kind == "lora":
    config, tensors = _lora_config(adapter, n_layer), _lora_tensors(adapter)
  else:
    tensors = {VIRTUAL: adapter.virtual}
    config = _virtual_config(adapter, n_layer, n_head)
  config |= {"base_model_name_or_path": base, "inference_mode": True}
  metadata = {"format": "pt"}
  if adapter.base_sha256:
    metadata[BASE_SHA256] = adapter.base_sha256

  with atomic_write(path) as folder:
    folder.mkdir()
    (folder / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    tensors = {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}
    save_file(tensors, folder / TENSORS, metadata=metadata)
    # safetensors makes its files readable for their owner alone.
    shutil.copymode(folder / CONFIG, folder / TENSORS)


def _lora_tensors(adapter: Adapter) -> dict[str, np.ndarray]:
  """LoRA's matrices and the parameters saved whole, by peft's names."""
  tensors = {}
  for module, matrices in adapter.lora.items():
    tensors[f"{PREFIX}transformer.{module}.lora_A.weight"] = matrices.a_IR.T
    tensors[f"{PREFIX}transformer.{module}.lora_B.weight"] = matrices.b_RO.T
  for name, tensor in adapter.saved.items():
    tensors[f"{PREFIX}transformer.{names.translate_name(name, names.TORCH)}"] = tensor
  if adapter.head_DC is not None:
    tensors[f"{PREFIX}{HEAD}"] = adapter.head_DC.T
  return tensors


def _pattern(module: str) -> str:
  """A module's regular expression, which fits it with or without `transformer.` before it."""
  return re.escape(module)


def _alpha(matrices: LoraMatrices, rslora: bool) -> float:
  """The alpha of a scale: the shortest number that gives the same one in float32."""
  rank = matrices.a_IR.shape[1]
  alpha = matrices.scale / scale_of(rank, 1.0, rslora)
  for digits in range(1, 17):
    shortest = float(f"{alpha:.{digits}g}")
    if np.float32(scale_of(rank, shortest, rslora)) == np.float32(matrices.scale):
      return int(shortest) if shortest.is_integer() else shortest
  return alpha


def _lora_config(adapter: Adapter, n_layer: int) -> dict:
  """adapter_config.json of LoRA: the commonest rank and alpha, and patterns for the rest."""
  ranks = {module: m.a_IR.shape[1] for module, m in adapter.lora.items()}
  alphas = {module: _alpha(m, adapter.rslora) for module, m in adapter.lora.items()}
  rank, alpha = statistics.mode(ranks.values()), statistics.mode(alphas.values())

  # A kind of matrix that every layer has is one target; otherwise each module is its own.
  targets = []
  for matrix in MATRICES:
    adapted = [module for module in ranks if module.endswith(f".{matrix}")]
    targets += [matrix] if len(adapted) == n_layer else adapted
  whole = {name.rpartition(".")[0] or name for name in adapter.saved}
  whole |= {"score"} if adapter.head_DC is not None else set()
  return {
    "alpha_pattern": {_pattern(m): a for m, a in alphas.items() if a != alpha},
    "bias": "none",
    "fan_in_fan_out": True,  # GPT-2's Conv1D holds [in, out]
    "init_lora_weights": True,
    "lora_alpha": alpha,
    "lora_dropout": adapter.dropout,
    "modules_to_save": sorted(whole) or None,
    "peft_type": "LORA",
    "r": rank,
    "rank_pattern": {_pattern(m): r for m, r in ranks.items() if r != rank},
    "target_modules": targets,
    "task_type": "CAUSAL_LM" if adapter.head_DC is None else "SEQ_CLS",
    "use_rslora": adapter.rslora,
  }


def _virtual_config(adapter: Adapter, n_layer: int, n_head: int) -> dict:
  """adapter_config.json of prompt and prefix tuning."""
  tokens, width = adapter.virtual.shape
  width = width if adapter.kind == "prompt" else width // (2 * n_layer)
  config = {
    "num_attention_heads": n_head,
    "num_layers": n_layer,
    "num_transformer_submodules": 1,
    "num_virtual_tokens": tokens,
    "task_type": "CAUSAL_LM",
    "token_dim": width,
  }
  if adapter.kind == "prompt":
    return config | {"peft_type": "PROMPT_TUNING", "prompt_tuning_init": "RANDOM"}
  return config | {"peft_type": "PREFIX_TUNING", "prefix_projection": False}
