# SPDX-License-Identifier: Apache-2.0
"""What a CPU can do: its instruction set as each library uses it, and the rate of a large matmul.

A ratio holds on one kind of CPU. With bfloat16 units a library that uses them well is fast, without
them everybody converts; so each row of a benchmark names the instruction set.
"""

import os
import pathlib
import re
import statistics
import time

import jax
import jax.numpy as jnp
import torch

# The best first: what /proc/cpuinfo calls it, and what people do.
INSTRUCTION_SETS = (
  ("amx_bf16", "AMX bfloat16"),
  ("avx512_bf16", "AVX-512 bfloat16"),
  ("avx512f", "AVX-512"),
  ("avx2", "AVX2"),
)
GEMM_SIZE = 2048


def cpu_flags() -> set[str]:
  """The CPU's features by their names in /proc/cpuinfo; empty where there is no such file."""
  cpuinfo = pathlib.Path("/proc/cpuinfo")
  text = cpuinfo.read_text() if cpuinfo.exists() else ""
  line = re.search(r"^flags\s*:(.*)$", text, re.MULTILINE)
  return set(line[1].split()) if line else set()


def instruction_set() -> str:
  """The best instruction set that both sides may use, such as "AVX-512 bfloat16".

  The environment can limit each to an older one, and then both are named. Of a GPU, its name.
  """
  if jax.default_backend() == "gpu":
    return jax.devices()[0].device_kind
  flags = cpu_flags()
  names = [name for flag, name in INSTRUCTION_SETS if flag in flags]
  best = names[0] if names else "unknown CPU"
  xla = re.search(r"--xla_cpu_max_isa=(\w+)", os.environ.get("XLA_FLAGS", ""))
  sides = {
    "XLA": xla[1] if xla else best,
    "torch": os.environ.get("ATEN_CPU_CAPABILITY", best),
  }
  if sides["XLA"].lower() == sides["torch"].lower():
    return sides["XLA"]
  return f"XLA {sides['XLA']}, torch {sides['torch']}"


def gemm_rates(rounds: int) -> dict[str, dict[str, float]]:
  """GFLOP/s of a square matmul by dtype and library, alternately; the median of the rounds."""
  multiply = jax.jit(jnp.matmul)
  rates = {}
  for dtype in ("float32", "bfloat16"):
    a = jnp.ones((GEMM_SIZE, GEMM_SIZE), dtype)
    a_torch = torch.ones((GEMM_SIZE, GEMM_SIZE), dtype=getattr(torch, dtype))
    sides = {"XLA": (multiply, a), "torch": (torch.matmul, a_torch)}

    seconds = {side: [] for side in sides}
    for _ in range(rounds + 1):
      for side, (matmul, matrix) in sides.items():
        begin = time.perf_counter()
        jax.block_until_ready(matmul(matrix, matrix))
        seconds[side].append(time.perf_counter() - begin)

    # The first round compiles.
    flops = 2 * GEMM_SIZE**3
    rates[dtype] = {
      side: flops / statistics.median(times[1:]) / 1e9 for side, times in seconds.items()
    }
  return rates


def describe_machine(rates: dict[str, dict[str, float]]) -> str:
  """One line: the instruction set and the matmul rates of both libraries."""
  parts = []
  for dtype, sides in rates.items():
    each = ", ".join(f"{side} {rate:,.1f}" for side, rate in sides.items())
    parts.append(f"{dtype} {each}")
  return f"{instruction_set()}; matmul of {GEMM_SIZE}^3, GFLOP/s: {'; '.join(parts)}"
