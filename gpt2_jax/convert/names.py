# SPDX-License-Identifier: Apache-2.0
"""The name table of checkpoint formats: the name and layout of each parameter in every format.

Parameters are renamed here, and transposed where a layout is another.
The canonical names and layouts are OpenAI's: names with dots, matrices as [in, out], c_attn's
columns as all queries, then all keys, then all values. Hugging Face keeps those matrices (Conv1D).
nanoGPT and llm.c hold the transpose, [out, in], as torch.nn.Linear does. llm.c has no names: its
file is this table from top to bottom, layers stacked.
"""

import re
from collections.abc import Iterable, Mapping

import numpy as np

from gpt2_jax.files import first_line, summarize
from gpt2_jax.model import ModelConfig

# Letters as in model.py, C columns of c_attn; {} is the layer.
# canonical, shape, Hugging Face and nanoGPT (after "transformer."), OpenAI's graph (after "model/")
TABLE = (
  ("wte", "VD", "wte.weight", "wte"),
  ("wpe", "TD", "wpe.weight", "wpe"),
  ("h.{}.ln_1.g", "D", "h.{}.ln_1.weight", "h{}/ln_1/g"),
  ("h.{}.ln_1.b", "D", "h.{}.ln_1.bias", "h{}/ln_1/b"),
  ("h.{}.attn.c_attn.w", "DC", "h.{}.attn.c_attn.weight", "h{}/attn/c_attn/w"),
  ("h.{}.attn.c_attn.b", "C", "h.{}.attn.c_attn.bias", "h{}/attn/c_attn/b"),
  ("h.{}.attn.c_proj.w", "DD", "h.{}.attn.c_proj.weight", "h{}/attn/c_proj/w"),
  ("h.{}.attn.c_proj.b", "D", "h.{}.attn.c_proj.bias", "h{}/attn/c_proj/b"),
  ("h.{}.ln_2.g", "D", "h.{}.ln_2.weight", "h{}/ln_2/g"),
  ("h.{}.ln_2.b", "D", "h.{}.ln_2.bias", "h{}/ln_2/b"),
  ("h.{}.mlp.c_fc.w", "DF", "h.{}.mlp.c_fc.weight", "h{}/mlp/c_fc/w"),
  ("h.{}.mlp.c_fc.b", "F", "h.{}.mlp.c_fc.bias", "h{}/mlp/c_fc/b"),
  ("h.{}.mlp.c_proj.w", "FD", "h.{}.mlp.c_proj.weight", "h{}/mlp/c_proj/w"),
  ("h.{}.mlp.c_proj.b", "D", "h.{}.mlp.c_proj.bias", "h{}/mlp/c_proj/b"),
  ("ln_f.g", "D", "ln_f.weight", "ln_f/g"),
  ("ln_f.b", "D", "ln_f.bias", "ln_f/b"),
)
# What Hugging Face calls the embeddings of a GPT-1, by the name in GPT-2.
GPT1_TORCH = {"wte.weight": "tokens_embed.weight", "wpe.weight": "positions_embed.weight"}
TORCH = {canonical: torch for canonical, _, torch, _ in TABLE}
OPENAI = {canonical: openai for canonical, _, _, openai in TABLE}

# The causal mask, which old files hold as a buffer; this model computes it.
CAUSAL_MASK = re.compile(r"h\.\d+\.attn\.(bias|masked_bias)$")
UNTIED = "{} has an lm_head that is not wte; in GPT-2 the head is tied to the embedding"
MAX_SIZES = {"n_vocab": 10**7, "n_ctx": 10**7, "n_embd": 10**6, "n_head": 10**6, "n_layer": 10**4}


def config_from_sizes(sizes: Mapping[str, object], what: str, **others) -> ModelConfig:
  """ModelConfig from the sizes that a checkpoint states, which are validated before any use.

  `what` names the file in errors, `others` are further fields. Raises ValueError.
  """
  invalid = []
  for name, size in sizes.items():
    # The type itself, since True is an int to isinstance.
    if type(size) is not int or not 0 < size <= MAX_SIZES[name]:
      invalid.append(f"{name} is {str(size)[:40]!r}")
  if invalid:
    raise ValueError(f"{what} states sizes that no GPT-2 has: {', '.join(invalid)}")

  try:
    return ModelConfig(**sizes, **others)
  except (ValueError, TypeError) as error:
    raise ValueError(f"{what} is of no GPT-2: {first_line(error, 200)}") from error


def shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
  """Canonical names and shapes of all parameters, in the table's order; biases if the model has."""
  D = config.n_embd
  size = {"V": config.n_vocab, "T": config.n_ctx, "D": D, "C": 3 * D, "F": 4 * D}

  # All layers of one parameter follow each other, as llm.c's file has them.
  by_name = {}
  for name, letters, _, _ in TABLE:
    if name.endswith(".b") and not config.use_bias:
      continue
    if name.startswith("ln_f") and config.family == "gpt1":
      continue
    shape = tuple(map(size.get, letters))
    for layer in range(config.n_layer if "{}" in name else 1):
      by_name[name.format(layer)] = shape
  return by_name


def translate_name(name: str, column: Mapping[str, str]) -> str:
  """A canonical name in another column of the table: TORCH or OPENAI."""
  layer = re.search(r"\.(\d+)\.", name)
  return column[re.sub(r"\.\d+\.", ".{}.", name)].format(layer[1] if layer else "")


def hugging_face_name(name: str, config: ModelConfig) -> str:
  """The name in Hugging Face's files, after their "transformer."."""
  torch_name = translate_name(name, TORCH)
  return GPT1_TORCH.get(torch_name, torch_name) if config.family == "gpt1" else torch_name


def without_gpt1_names(tensors: Mapping[str, object]) -> dict[str, object]:
  """The tensors of a GPT-1 of Hugging Face's by the names that GPT-2's embeddings have."""
  renamed = {}
  for name, tensor in tensors.items():
    for gpt2_name, gpt1_name in GPT1_TORCH.items():
      if f".{name}".endswith(f".{gpt1_name}"):
        name = name.removesuffix(gpt1_name) + gpt2_name
    renamed[name] = tensor
  return renamed


def is_matrix(name: str) -> bool:
  """Whether the parameter multiplies activations: its layout differs between formats."""
  return name.endswith(".w")


def linear_layout(name: str, tensor: np.ndarray) -> np.ndarray:
  """Transposes a matrix from [in, out] to torch.nn.Linear's [out, in], or back.

  A tensor that is no matrix stays as it is.
  """
  return tensor.T if is_matrix(name) else tensor


def linear_shape(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
  """The shape that `linear_layout` gives a tensor of `shape`."""
  return shape[::-1] if is_matrix(name) else shape


def check_shapes(actual: Mapping[str, tuple], expected: Mapping[str, tuple], what: str) -> None:
  """Raises ValueError with the missing, extra and misshapen tensors, unless all are as expected.

  Keys are names in the format of the file that `what` names.
  """
  missing = [name for name in expected if name not in actual]
  extra = [name for name in actual if name not in expected]
  misshapen = []
  for name, shape in expected.items():
    if name in actual and tuple(actual[name]) != tuple(shape):
      misshapen.append(f"{name} is {list(actual[name])}, not {list(shape)}")

  # A fault is mostly the same in all layers: their names are joined to keep the message short.
  faults = []
  if missing:
    faults.append(f"missing: {_summarize_names(missing)}")
  if extra:
    faults.append(f"extra: {_summarize_names(extra)}")
  if misshapen:
    faults.append(f"misshapen: {summarize(misshapen, 2, each=60)}")
  if faults:
    raise ValueError(f"{what} does not hold the tensors of its config ({'; '.join(faults)})")


def _summarize_names(names: Iterable[str]) -> str:
  """The first names of a list, layers joined, without what would break a line."""
  return summarize((repr(name)[1:-1] for name in _layer_ranges(names)), 5, each=32)


def _layer_ranges(names: Iterable[str]) -> list[str]:
  """Joins names that differ in the layer alone: h.0-11.ln_1.bias."""
  layers = {}
  for name in names:
    # OpenAI's graph writes h0/, the others h.0.
    number = re.search(r"(?<=h)[./]?\d+", name)
    if number is None:
      layers.setdefault(name, []).append("")
    else:
      template = name[: number.start()] + "{}" + name[number.end() :]
      layers.setdefault(template, []).append(number[0])
  return [template.replace("{}", _range(numbers)) for template, numbers in layers.items()]


def _range(numbers: list[str]) -> str:
  """Formats layer numbers as 3, 0-11 or 0,2,11, after the dot that they may begin with."""
  if len(numbers) == 1:
    return numbers[0]

  dot = numbers[0].rstrip("0123456789")
  layers = sorted(int(number.removeprefix(dot)) for number in numbers)
  first, last = layers[0], layers[-1]
  if layers == list(range(first, last + 1)):
    return f"{dot}{first}-{last}"
  return dot + ",".join(map(str, layers))


def group_by_head(x, n_head: int):
  """Reorders c_attn's columns (the last axis) from [q, k, v] x heads to heads x [q, k, v].

  The model holds them by head, so that a shard of the `model` axis has whole heads.
  """
  lead = x.shape[:-1]
  return np.reshape(np.swapaxes(np.reshape(x, (*lead, 3, n_head, -1)), -3, -2), x.shape)


def group_by_qkv(x, n_head: int):
  """Reorders c_attn's columns back to the canonical order: the inverse of `group_by_head`."""
  lead = x.shape[:-1]
  return np.reshape(np.swapaxes(np.reshape(x, (*lead, n_head, 3, -1)), -3, -2), x.shape)
