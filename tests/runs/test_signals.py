# SPDX-License-Identifier: Apache-2.0
"""A signal is heard while XLA compiles: the first says what it does, the second ends at once."""

import os
import signal
import subprocess
import sys
import time

import pytest

# A program that XLA compiles for minutes, all in one call that never comes back to Python.
COMPILE = """
import jax, jax.numpy as jnp
from gpt2_jax.runs.signals import StopSignal
from gpt2_jax.sharding import make_mesh

def program(x):
  for i in range(500):
    x = jnp.sort(jnp.fft.fft(x[: 2000 - i]).real) @ jnp.ones((2000 - i, 2000 - i))
  return x

mesh = make_mesh()
with StopSignal(mesh) as stop:
  lowered = jax.jit(program).lower(jax.ShapeDtypeStruct((2000,), jnp.float32))
  print("compiling", flush=True)
  lowered.compile()
  print("compiled", flush=True)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_are_heard_while_xla_compiles(number):
  process = subprocess.Popen(
    [sys.executable, "-c", COMPILE],
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
    env=os.environ | {"JAX_ENABLE_COMPILATION_CACHE": "false"},
  )
  assert process.stdout.readline() == "compiling\n"
  time.sleep(0.5)
  process.send_signal(number)
  said = process.stderr.readline() + process.stderr.readline()
  assert f"{number.name}: finishing what is under way" in said and process.poll() is None
  process.send_signal(number)
  out, err = process.communicate(timeout=10)
  assert process.returncode == 128 + number and "compiled" not in out
  assert f"{number.name} again: ended at once" in err
