# SPDX-License-Identifier: Apache-2.0
"""The one name table: what each parameter of a GPT-2 is called, and how it is laid out, in every format there is.

Canonical is OpenAI's: their names with dots, matrices as [in, out], c_attn's columns all queries, then all keys, then
all values. Hugging Face keeps those matrices (its Conv1D); nanoGPT and llm.c hold them turned, [out, in], as
torch.nn.Linear does. llm.c has no names: its file is this table from top to bottom, layers stacked.
"""

import re
from collections.abc import Mapping

import numpy as np

from gpt2_jax.model import ModelConfig

# Letters as in model.py, C columns of c_attn; {} is the layer.
TABLE = (  # canonical, shape, Hugging Face and nanoGPT (after "transformer."), OpenAI's graph (after "model/")
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
MASKS = re.compile(r"h\.\d+\.attn\.(bias|masked_bias)$")  # the causal mask, which old files carry as a buffer
UNTIED = "{} has an lm_head that is not wte; in GPT-2 the head is tied to the embedding"
TORCH = {canonical: torch for canonical, _, torch, _ in TABLE}
OPENAI = {canonical: openai for canonical, _, _, openai in TABLE}
MOST = {"n_vocab": 10**7, "n_ctx": 10**7, "n_embd": 10**6, "n_head": 10**6, "n_layer": 10**4}


def model_config(sizes: Mapping[str, object], what: str, **others) -> ModelConfig:
  """The ModelConfig of sizes that a file states. Raises ValueError if they are none, before they are used."""
  odd = [f"{k} is {str(n)[:40]!r}" for k, n in sizes.items() if type(n) is not int or not 0 < n <= MOST[k]]
  if odd:
    raise ValueError(f"{what} states sizes that no GPT-2 has: {', '.join(odd)}")
  try:
    return ModelConfig(**sizes, **others)
  except (ValueError, TypeError) as error:
    raise ValueError(f"{what} is of no GPT-2: {error}") from error


def shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
  """Canonical names and shapes in the table's order, all layers of each; no biases if the model has none."""
  D, found = config.n_embd, {}
  size = {"V": config.n_vocab, "T": config.n_ctx, "D": D, "C": 3 * D, "F": 4 * D}
  for name, letters, _, _ in TABLE:
    if config.use_bias or not name.endswith(".b"):
      layers = range(config.n_layer if "{}" in name else 1)
      found |= {name.format(layer): tuple(size[letter] for letter in letters) for layer in layers}
  return found


def foreign(name: str, column: Mapping[str, str]) -> str:
  """A canonical name in another column of the table: TORCH or OPENAI."""
  layer = re.search(r"\.(\d+)\.", name)
  return column[re.sub(r"\.\d+\.", ".{}.", name)].format(layer[1] if layer else "")


def is_matrix(name: str) -> bool:
  """Whether it multiplies activations: what nanoGPT and llm.c hold turned."""
  return name.endswith(".w")


def check(found: Mapping[str, tuple], expected: Mapping[str, tuple], what: str) -> None:
  """Raises ValueError with every missing, extra and misshapen name if `found` is not `expected`."""
  missing = _ranges(name for name in expected if name not in found)
  extra = _ranges(name for name in found if name not in expected)
  shape = {name: f" is {list(found[name])}, not {list(expected[name])}" for name in expected if name in found}
  misshapen = [name + shape[name] for name in shape if tuple(found[name]) != tuple(expected[name])]
  faults = [
    f"{kind}: {', '.join(names)}"
    for kind, names in (("missing", missing), ("extra", extra), ("misshapen", misshapen))
    if names
  ]
  if faults:
    raise ValueError(f"{what} does not hold the tensors of its config ({'; '.join(faults)})")


def _ranges(names) -> list[str]:
  """Names that differ in the layer alone, as one: h.0-11.ln_1.bias."""
  layers = {}
  for name in names:
    number = re.search(r"(?<=h)[./]?\d+", name)
    template = name if number is None else name[: number.start()] + "{}" + name[number.end() :]
    layers.setdefault(template, []).append(number[0] if number else "")
  return [name.replace("{}", _span(numbers)) for name, numbers in layers.items()]


def _span(numbers: list[str]) -> str:
  if len(numbers) == 1:
    return numbers[0]
  dot = numbers[0].rstrip("0123456789")
  values = sorted(int(number[len(dot) :]) for number in numbers)
  whole = values == list(range(values[0], values[-1] + 1))
  return dot + (f"{values[0]}-{values[-1]}" if whole else ",".join(map(str, values)))


def head_by_head(x, n_head: int):
  """Columns (the last axis) of c_attn as the model holds them, q, k, v of each head, from the canonical order."""
  lead = x.shape[:-1]
  return np.reshape(np.swapaxes(np.reshape(x, (*lead, 3, n_head, -1)), -3, -2), x.shape)


def all_queries_first(x, n_head: int):
  """The inverse of `head_by_head`."""
  lead = x.shape[:-1]
  return np.reshape(np.swapaxes(np.reshape(x, (*lead, n_head, 3, -1)), -3, -2), x.shape)
