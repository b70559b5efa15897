# SPDX-License-Identifier: Apache-2.0
"""Benchmark rounds in which the sides take turns, and the rows of the table."""

import dataclasses
import gc
import statistics
import sys
import time
from collections.abc import Callable

import numpy as np
import torch

from experiments.benchmarks.machine import instruction_set
from gpt2_jax.files import first_line

BEGIN = time.monotonic()


@dataclasses.dataclass
class Row:
  """One line of the table: tokens/s of each side, one value a round."""

  name: str
  target: str
  rates: dict[str, list[float]]

  def ratios(self) -> list[float]:
    """Ours over the best of theirs, round by round."""
    # In one round, so that both sides had the same neighbours on the machine.
    theirs = [rates for side, rates in self.rates.items() if side != "ours"]
    ratios = []
    for ours, *others in zip(self.rates["ours"], *theirs, strict=True):
      ratios.append(ours / max(others))
    return ratios

  def __str__(self) -> str:
    medians = {side: f"{statistics.median(rates):,.0f}" for side, rates in self.rates.items()}
    ours = medians.pop("ours")
    others = ", ".join(f"{side} {rate}" for side, rate in medians.items())

    # The median of the ratios, not the ratio of the medians.
    ratios = self.ratios()
    ratio = f"{statistics.median(ratios):.2f}"
    spread = f"{min(ratios):.2f}-{max(ratios):.2f}"
    cells = (self.name, ours, others, ratio, spread, instruction_set(), self.target)
    return _table_line(*cells)


def _table_line(*cells: str) -> str:
  name, ours, others, ratio, spread, isa, target = cells
  return f"{name:<34}{ours:>8}  {others:<30}{ratio:>6}  {spread:<12}{isa:<18}{target}"


HEADER = _table_line(
  "tokens/s, median of rounds", "ours", "the others", "ratio", "min-max", "CPU", "target"
)


def tell(text: str) -> None:
  """Logs a line with the seconds since the start, on stderr."""
  print(f"[{time.monotonic() - BEGIN:4.0f} s] {text}", file=sys.stderr, flush=True)


def alternate(
  name: str, target: str, tokens: int, sides: dict[str, Callable], rounds: int, settle: int = 1
) -> Row:
  """Measures each side's tokens/s: warm-up, then rounds in which the sides take turns.

  `tokens` is what one call handles. The first `settle` calls of a turn are not timed: a side runs a
  fifth slower just after another one ran. A compiled side that fails is left out, with a line.
  """
  # 1. Warm up, which compiles.
  working = {}
  for side, call in sides.items():
    begin = time.perf_counter()
    try:
      call()
    except Exception as error:  # whatever a compiler raises; ours and eager have to work
      if side != "compiled":
        raise
      reason = first_line(error, limit=160)
      tell(f"{name}: torch.compile failed, left out: {type(error).__name__}: {reason}")
      continue
    tell(f"{name}: {side} ready after {time.perf_counter() - begin:.1f} s")
    working[side] = call

  # 2. Rounds, each in the other order: whatever drifts hits all sides.
  rates = {side: [] for side in working}
  for number in range(rounds):
    order = list(working)
    if number % 2:
      order.reverse()
    for side in order:
      for _ in range(settle):
        working[side]()

      begin = time.perf_counter()
      working[side]()
      rates[side].append(tokens / (time.perf_counter() - begin))
    newest = ", ".join(f"{side} {values[-1]:,.0f}" for side, values in rates.items())
    tell(f"{name}: round {number + 1}/{rounds}: {newest}")

  row = Row(name, target, rates)
  tell(f"{HEADER}\n{'':9}{row}")
  return row


def random_tokens(*shape: int, n_vocab: int = 50257, seed: int = 0) -> np.ndarray:
  return np.random.default_rng(seed).integers(0, n_vocab, shape, np.int32)


def forget(sides: dict) -> None:
  """Frees the sides' memory, and resets torch.compile, which has a limit of recompilations."""
  # The sides hold the last references to models and optimizers.
  sides.clear()
  torch._dynamo.reset()
  gc.collect()
