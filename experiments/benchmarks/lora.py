# SPDX-License-Identifier: Apache-2.0
"""A LoRA step of 124M (rank 8 on c_attn and c_proj): ours, peft on torch, and our full step."""

import ctypes
import dataclasses
import gc
import multiprocessing
import pathlib
from collections.abc import Callable

import jax
import peft

from experiments.benchmarks.opponent import our_model, their_model
from experiments.benchmarks.rounds import Row, alternate, forget, random_tokens, tell
from experiments.benchmarks.training import our_train, their_train
from gpt2_jax.finetune.adapter import TRAINED_NAMES
from gpt2_jax.finetune.lora import LoraSettings, add_lora
from gpt2_jax.sharding import make_mesh
from gpt2_jax.sizes import model_config

SHAPES = ((1, 1024), (4, 256))
TARGETS = ("c_attn", "c_proj")


def bench_lora(rounds: int) -> list[Row]:
  rows = []
  for B, T in SHAPES:
    sides = {side: make(B, T) for side, make in SIDES.items()}
    losses = {side: round(step(), 5) for side, step in sides.items()}
    tell(f"loss before the first update: {losses}")
    rows.append(alternate(f"lora 124M {B} x {T} float32", "-", B * T, sides, rounds))
    forget(sides)

  # Memory: a process each, for what one side has allocated the next one would use.
  for B, T in SHAPES:
    peaks = {side: f"{_in_process(side, B, T) / 1e9:.2f} GB" for side in SIDES}
    tell(f"peak memory of a step {B} x {T}, above the imports: {peaks}")
  return rows


# The same base on three sides; both adapters begin with b = 0, so the first losses are the base's.


def _ours(B: int, T: int, is_lora: bool = True) -> Callable[[], float]:
  config = dataclasses.replace(model_config("124M"), dtype="float32", unroll=12)
  model = our_model(their_model(config), config)
  if is_lora:
    settings = LoraSettings(8, 16.0, targets=TARGETS)
    model = jax.jit(lambda model: add_lora(model, settings, jax.random.key(0)))(model)
  trainable = TRAINED_NAMES["lora"] if is_lora else ("*",)
  return our_train(model, random_tokens(B, T + 1), trainable)


def _peft(B: int, T: int) -> Callable[[], float]:
  lora = peft.LoraConfig(
    r=8, lora_alpha=16, target_modules=list(TARGETS), fan_in_fan_out=True, task_type="CAUSAL_LM"
  )
  model = peft.get_peft_model(their_model(model_config("124M")), lora)
  return their_train(model, random_tokens(B, T + 1), "float32", compiled=False)


SIDES = {"ours": _ours, "peft": _peft, "our full": lambda B, T: _ours(B, T, is_lora=False)}


def _in_process(side: str, B: int, T: int) -> int:
  """Peak memory of a side's step, in bytes, by a process of its own."""
  spawn = multiprocessing.get_context("spawn")
  with spawn.Pool(1) as pool:
    return pool.apply(peak_memory, (side, B, T))


def peak_memory(side: str, B: int, T: int) -> int:
  """Resident bytes of this process at the peak of the third step, above those of its imports."""
  jax.config.update("jax_platforms", "cpu")
  before = _resident("VmRSS")
  with jax.set_mesh(make_mesh(1, 1, 1)):
    step = SIDES[side](B, T)

    # Two steps compile and allocate the optimizer's state. What they freed goes back to the system,
    # and the peak that Linux remembers begins anew.
    step()
    step()
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    pathlib.Path("/proc/self/clear_refs").write_text("5")
    step()
    return _resident("VmHWM") - before


def _resident(name: str) -> int:
  """A line of /proc/self/status, in bytes: VmRSS is what is resident, VmHWM its peak."""
  for line in pathlib.Path("/proc/self/status").read_text().splitlines():
    if line.startswith(name):
      return int(line.split()[1]) * 1024
  raise OSError(f"/proc/self/status has no {name}; this measurement needs Linux")
