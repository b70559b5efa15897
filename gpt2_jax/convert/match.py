# SPDX-License-Identifier: Apache-2.0
"""Finds the GPT-2 in a state dict: prefixes of wrappers, heads beside the language model's.

torch.compile, DataParallel, FSDP, Lightning, trl and peft write names of their own around GPT-2's.
What stands before `wpe.weight` is the prefix, whatever it is called.
"""

import dataclasses
import re
from collections.abc import Iterable, Mapping

import numpy as np

from gpt2_jax.convert import names
from gpt2_jax.convert.safe_load import StoredTensor
from gpt2_jax.convert.weights import Weights, cast_weights
from gpt2_jax.files import note, summarize

# What a wrapper puts between two parts of a name, at any depth. No name of GPT-2's has them.
WRAPPERS = (
  "_orig_mod",  # torch.compile
  "module",  # DataParallel, DistributedDataParallel, DeepSpeed
  "_forward_module",  # Lightning Fabric
  "_fsdp_wrapped_module",
  "_checkpoint_wrapped_module",  # activation checkpointing
)

# The first parts of GPT-2's own names.
PARTS = ("wte", "wpe", "h", "ln_f")

# The head that turns hidden states into logits; the second form is of 2019.
LM_HEAD = re.compile(r"(?:^|\.)lm_head(?:\.decoder)?\.weight$")

# Heads for another purpose, as transformers, trl and others call them. What reads them, reads the
# hidden states: the language model's logits are the same without.
OTHER_HEAD = re.compile(r"(\w*head\w*|score|summary|classifier|qa_outputs)\.")

# What an adapter that was not merged calls its matrices, and those of its base.
ADAPTER = re.compile(r"\.(lora_\w+|base_layer|original_module|modules_to_save)\.")


# Dtypes, as safetensors calls them and as torch does.
FLOATS = ("F32", "F16", "BF16", "torch.float32", "torch.float16", "torch.bfloat16")
DOUBLES = ("F64", "torch.float64")


@dataclasses.dataclass(frozen=True)
class Match:
  """The tensors of a GPT-2 by their bare names (`h.0.ln_1.weight`), and its lm_head if it has one.

  `taken_off` are parts of the file's names that wrappers put there. `left_out` are other heads.
  """

  tensors: dict[str, StoredTensor]
  head: StoredTensor | None
  taken_off: tuple[str, ...]
  left_out: tuple[str, ...]

  def checked(self, expected: Mapping[str, tuple], what: str) -> dict[str, StoredTensor]:
    """The tensors, by the names of `expected`, which holds their shapes.

    Says on stderr what was taken off the names, and what is left out. Raises ValueError for a
    tensor that is missing, is one more, has another shape, or is no float; for an untied head.
    """
    # 1. A tied head and the embedding are one tensor, of which safetensors' `save_model` keeps one
    #    name.
    tensors, head = dict(self.tensors), self.head
    if head is not None and "wte.weight" not in tensors:
      tensors["wte.weight"], head = head, None
    names.check_shapes({name: x.shape for name, x in tensors.items()}, expected, what)
    check_floats(tensors, what)

    # 2. NaN equals NaN here: that weights are broken does not untie them.
    wte = tensors["wte.weight"]
    if head is not None:
      check_floats({"lm_head.weight": head}, what)
    if head is not None and not np.array_equal(head.read(), wte.read(), equal_nan=True):
      raise ValueError(names.UNTIED.format(what))

    # 3. It is a GPT-2: what is not used is told.
    if self.taken_off:
      parts = summarize(map(repr, self.taken_off), 3)
      note(f"{what}: the names of its tensors are read without {parts}")
    if self.left_out:
      tensors_are = "tensor is" if len(self.left_out) == 1 else "tensors are"
      note(
        f"{what}: {len(self.left_out):,} {tensors_are} left out, being no part of the language "
        f"model: {summarize(map(repr, self.left_out), 3)}"
      )
    return tensors

  def rounded(self, weights: Weights, what: str) -> Weights:
    """The weights, of which float64 is rounded to float32 as it is read; says so on stderr."""
    tensors = self.tensors | ({"lm_head.weight": self.head} if self.head else {})
    doubles = [name for name, tensor in tensors.items() if tensor.dtype in DOUBLES]
    if not doubles:
      return weights
    note(
      f"{what}: {len(doubles):,} tensors are float64, and are rounded to float32: "
      f"{summarize(map(repr, doubles), 2)}"
    )
    return cast_weights(weights, "float32")


def check_floats(tensors: Mapping[str, StoredTensor], what: str) -> None:
  """Raises ValueError unless all of the tensors are plain floats."""
  others = []
  for name, tensor in tensors.items():
    if tensor.dtype not in FLOATS + DOUBLES:
      others.append(f"{name!r} is {tensor.dtype}")
  if others:
    raise ValueError(
      f"{what} has tensors that are no plain floats of 16, 32 or 64 bits: {summarize(others, 4)}"
    )


def find_gpt2(tensors: Mapping[str, StoredTensor], what: str) -> Match:
  """Finds the tensors of the one GPT-2 of a state dict; causal masks are left out.

  Names that GPT-2 does not have stay among the tensors if they may change what it computes. Raises
  ValueError for two models in one, and for an adapter that is not merged.
  """
  # 1. An adapter's matrices change the model, and stand for some of its names.
  if adapters := [name for name in tensors if ADAPTER.search(name)]:
    raise ValueError(
      f"{what} holds {len(adapters):,} tensors of an adapter that is not merged "
      f"({summarize(map(repr, adapters), 2)}); merge it where it was trained (peft's "
      f"merge_and_unload), or give its base and its own folder as the adapter"
    )

  # 2. Sort the tensors: the model's, the lm_head, and other heads'.
  raw_names = _without_wrappers(tensors, what)
  prefix = _prefix(raw_names, what)
  bare, heads, left_out = {}, [], []
  for name, raw_name in raw_names.items():
    if LM_HEAD.search(name):
      heads.append(raw_name)
    elif _is_beside(name, prefix):
      left_out.append(raw_name)
    elif not names.CAUSAL_MASK.match(name.removeprefix(prefix)):
      _add(bare, name.removeprefix(prefix), raw_name, what)

  # 3. One head, or none: then it is the embedding.
  if len(heads) > 1:
    raise ValueError(f"{what} has {len(heads)} heads: {summarize(map(repr, heads), 3)}; keep one")
  head = tensors[heads[0]] if heads else None
  matched = {name: tensors[raw_name] for name, raw_name in bare.items()}
  return Match(matched, head, _taken_off(raw_names, prefix), tuple(left_out))


def _without_wrappers(tensors: Mapping[str, StoredTensor], what: str) -> dict[str, str]:
  """Each name in the file, by the name without the parts that wrappers put in."""
  raw_names = {}
  for raw_name in tensors:
    parts = [part for part in raw_name.split(".") if part not in WRAPPERS]
    _add(raw_names, ".".join(parts), raw_name, what)
  return raw_names


def _add(raw_names: dict[str, str], name: str, raw_name: str, what: str) -> None:
  """Adds a name of the file. Raises ValueError where another one stands for the same tensor."""
  if name in raw_names:
    two = summarize(map(repr, (raw_names[name], raw_name)))
    raise ValueError(f"{what} has two tensors for {name[:80]!r}: {two}; keep one")
  raw_names[name] = raw_name


def _prefix(full_names: Iterable[str], what: str) -> str:
  """What stands before the names of the one GPT-2 in a state dict."""
  prefixes = []
  for name in full_names:
    if name == "wpe.weight" or name.endswith(".wpe.weight"):
      prefixes.append(name.removesuffix("wpe.weight"))
  if len(prefixes) > 1:
    raise ValueError(
      f"{what} holds {len(prefixes)} models, under {summarize(map(repr, prefixes), 3)}; "
      f"save one of them alone"
    )
  if prefixes:
    return prefixes[0]
  return "transformer." if any(name.startswith("transformer.") for name in full_names) else ""


def _taken_off(raw_names: Mapping[str, str], prefix: str) -> tuple[str, ...]:
  """What stands in the file's names and not in GPT-2's: a prefix, and wrappers further in."""
  first = raw_names.get(f"{prefix}wpe.weight", "wpe.weight").removesuffix("wpe.weight")
  parts = [] if first in ("", "transformer.") else [first]
  for wrapper in WRAPPERS:
    part = f"{wrapper}."
    if part not in first and any(f".{part}" in raw_name for raw_name in raw_names.values()):
      parts.append(part)
  return tuple(parts)


def _is_beside(name: str, prefix: str) -> bool:
  """Whether a tensor is beside the model, where it can read hidden states and not change them.

  Of an lm_head GPT-2 has the weight alone: anything else there changes the logits.
  """
  if "lm_head." in name or name.split(".")[0] in PARTS:
    return False
  # Without a prefix, what is no head may be a part of the model.
  is_outside = bool(prefix) and not name.startswith(prefix)
  return is_outside or bool(OTHER_HEAD.match(name.removeprefix(prefix)))
