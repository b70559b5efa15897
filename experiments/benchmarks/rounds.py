# SPDX-License-Identifier: Apache-2.0
"""Sides that take turns, and the table of what they did."""

import dataclasses
import gc
import statistics
import sys
import time
from collections.abc import Callable

import numpy as np
import torch

BEGIN = time.monotonic()


@dataclasses.dataclass
class Row:
  """One line of the table: tokens/s of each side, one value a round."""

  name: str
  target: str
  rates: dict[str, list[float]]

  def ratios(self) -> list[float]:
    """Ours over the best of theirs, round by round."""
    theirs = [rates for side, rates in self.rates.items() if side != "ours"]
    return [ours / max(others) for ours, others in zip(self.rates["ours"], zip(*theirs, strict=True), strict=True)]

  def __str__(self) -> str:
    medians = {side: f"{statistics.median(rates):,.0f}" for side, rates in self.rates.items()}
    ours, ratios = medians.pop("ours"), self.ratios()
    others = ", ".join(f"{side} {rate}" for side, rate in medians.items())
    spread = f"{min(ratios):.2f}-{max(ratios):.2f}"
    return f"{self.name:<34}{ours:>8}  {others:<30}{statistics.median(ratios):>6.2f}  {spread:<12}{self.target}"


HEADER = f"{'tokens/s, median of rounds':<34}{'ours':>8}  {'the others':<30}{'ratio':>6}  {'min-max':<12}target"


def tell(text: str) -> None:
  print(f"[{time.monotonic() - BEGIN:4.0f} s] {text}", file=sys.stderr, flush=True)


def alternate(name: str, target: str, tokens: int, sides: dict[str, Callable], rounds: int, settle: int = 1) -> Row:
  """Warms each side up, then lets them take turns, in another order each round; `tokens` is what one call handles.

  The first `settle` calls of a turn are not timed: a side runs a fifth slower just after another one ran.

  A compiled side that fails is left out, aloud.
  """
  working = {}
  for side, call in sides.items():
    begin = time.perf_counter()
    try:
      call()
    except Exception as error:  # whatever a compiler raises; ours and eager have to work
      if side != "compiled":
        raise
      tell(f"{name}: torch.compile failed, left out: {type(error).__name__}: {str(error).splitlines()[0][:160]}")
      continue
    tell(f"{name}: {side} ready after {time.perf_counter() - begin:.1f} s")
    working[side] = call
  rates = {side: [] for side in working}
  for number in range(rounds):
    order = list(working)
    for side in order if number % 2 == 0 else reversed(order):
      for _ in range(settle):
        working[side]()
      begin = time.perf_counter()
      working[side]()
      rates[side].append(tokens / (time.perf_counter() - begin))
    tell(f"{name}: round {number + 1}/{rounds}: " + ", ".join(f"{s} {r[-1]:,.0f}" for s, r in rates.items()))
  row = Row(name, target, rates)
  tell(f"{HEADER}\n{'':9}{row}")
  return row


def random_tokens(*shape: int, n_vocab: int = 50257, seed: int = 0) -> np.ndarray:
  return np.random.default_rng(seed).integers(0, n_vocab, shape, np.int32)


def forget(sides: dict) -> None:
  """Gives memory back, and torch.compile its recompilation limit."""
  sides.clear()
  torch._dynamo.reset()
  gc.collect()
