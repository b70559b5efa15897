# SPDX-License-Identifier: Apache-2.0
"""Multi-LoRA inference: a different adapter of a bank in each row of a batch.

A bank is a model with several adapters over one base (`finetune.peft.stack_adapters`).
"""

import numbers
from collections.abc import Sequence

from gpt2_jax.decoding.kv_cache import InferenceModel
from gpt2_jax.finetune.lora import LoRA, block_linears


def bank_size(decoder: InferenceModel) -> int:
  """The number of adapters in the model's bank; 0 if it has none."""
  for linear in block_linears(decoder.blocks[0]).values():
    weight = linear.w[...]
    if isinstance(weight, LoRA) and weight.lora_a.ndim == 3:
      return weight.lora_a.shape[0]
  return 0


def adapter_numbers(
  decoder: InferenceModel, adapters: int | Sequence[int] | None, n_prompts: int
) -> list[int] | None:
  """The number of each prompt's adapter, from one for all or one for each; None without a bank.

  Raises ValueError unless a model with a bank has a number in its range for each prompt.
  """
  size = bank_size(decoder)
  if adapters is None and size == 0:
    return None
  if adapters is None:
    raise ValueError(
      f"the model has a bank of {size} adapters; give the number of one for each prompt (adapters=)"
    )
  if size == 0:
    raise ValueError("adapters= has numbers in a bank, and the model has none; see stack_adapters")

  if isinstance(adapters, numbers.Integral):
    adapters = [adapters] * n_prompts
  if isinstance(adapters, str) or not hasattr(adapters, "__len__") or len(adapters) != n_prompts:
    raise ValueError(
      f"adapters={str(adapters)[:80]} and {n_prompts} prompts; give one number for each, or one "
      f"for all"
    )
  for number in adapters:
    if not isinstance(number, numbers.Integral) or not 0 <= number < size:
      raise ValueError(
        f"adapter {str(number)[:80]} is not in a bank of {size}; the numbers are 0 to {size - 1}"
      )
  return [int(number) for number in adapters]
