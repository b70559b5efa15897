# SPDX-License-Identifier: Apache-2.0
"""Time from a Hugging Face checkpoint to the first token, and peak memory while loading.

Each measurement has a process of its own. Cold: the files are not in the page cache (as far as the
kernel heeds the advice), and nothing is compiled. Warm: both are there from a run before.
"""

import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time

# The root in place of experiments/benchmarks/.
if __name__ == "__main__":
  sys.path[0] = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

PARTS = ("import", "load", "first token")
PARAMETERS = {"124M": 124_439_808, "1542M": 1_557_611_200}


def write_random(size: str, path: pathlib.Path) -> None:
  """Writes a model of a published size with random weights in Hugging Face's format."""
  import numpy as np

  from gpt2_jax.convert import hf, names
  from gpt2_jax.convert.weights import Weights
  from gpt2_jax.sizes import model_config

  config, rng = model_config(size), np.random.default_rng(0)
  shapes = names.shapes(config)

  # Small numbers, with gains around 1: no activation may overflow.
  def read(name):
    centered = rng.random(shapes[name], np.float32) - np.float32(0.5)
    return centered * np.float32(0.07) + name.endswith(".g")

  hf.write(Weights(config, read, None, "random"), path)


def child(path: str, devices: int, generate_too: bool) -> None:
  """Loads over `devices` simulated CPU devices, generates a token, prints times and sizes as JSON.

  `generate_too` is whether a token is generated.
  """
  # 1. Imports count: a user waits for them.
  begin = time.perf_counter()
  import jax

  jax.config.update("jax_platforms", "cpu")
  jax.config.update("jax_num_cpu_devices", devices)
  from gpt2_jax.convert.pretrained import load_pretrained
  from gpt2_jax.decoding import generate
  from gpt2_jax.sharding import make_mesh

  # 2. Load and generate.
  mesh = make_mesh(1, -1, 2 if devices > 1 else 1)
  imported = time.perf_counter()
  model, _ = load_pretrained(path, mesh)
  loaded, peak = time.perf_counter(), peak_bytes()
  if generate_too:
    generate(model, [[50256]], 1)
  done = time.perf_counter()

  # 3. Bytes of the model, and of what each device holds of it.
  leaves = jax.tree.leaves(model)
  held = {}
  for leaf in leaves:
    for shard in leaf.addressable_shards:
      held[shard.device.id] = held.get(shard.device.id, 0) + shard.data.nbytes
  result = {
    "import": imported - begin,
    "load": loaded - imported,
    "first token": done - loaded,
    "peak": peak,
    "size": sum(leaf.nbytes for leaf in leaves),
    "device": max(held.values()),
  }
  print(json.dumps(result))


def peak_bytes() -> int:
  """The most memory that this process has had, mapped files included."""
  status = pathlib.Path("/proc/self/status").read_text()
  return 1024 * int(status.split("VmHWM:")[1].split()[0])


def in_a_process(path: pathlib.Path, devices: int, generate_too: bool, cache: str) -> dict:
  """Runs `child` in a process of its own, with `cache` as JAX's compilation cache."""
  command = [sys.executable, __file__, str(path), str(devices), str(int(generate_too))]
  environment = os.environ | {
    "JAX_COMPILATION_CACHE_DIR": cache,
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
  }
  job = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
  return json.loads(job.stdout)


def drop_page_cache(folder: pathlib.Path) -> None:
  """Drops a folder's files from the page cache."""
  for path in folder.iterdir():
    with open(path, "rb") as file:
      os.fsync(file.fileno())
      os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def first_token(path: pathlib.Path, cold: bool, rounds: int, folder: str) -> list[dict]:
  """Seconds of each of PARTS, a dictionary a round."""
  runs = []
  for number in range(rounds):
    # A cold round has a compilation cache of its own; warm ones share the first cold round's.
    cache = f"cache{number}" if cold else "cache0"
    if cold:
      drop_page_cache(path)
    runs.append(in_a_process(path, 1, True, os.path.join(folder, cache)))

  median = {part: sorted(run[part] for run in runs)[rounds // 2] for part in PARTS}
  totals = sorted(sum(run[part] for part in PARTS) for run in runs)
  parts = ", ".join(f"{part} {seconds:.2f}" for part, seconds in median.items())
  spread = f"{totals[rounds // 2]:.2f} s ({totals[0]:.2f}-{totals[-1]:.2f})"
  print(f"load 124M, {'cold' if cold else 'warm'}: first token after {spread}: {parts}", flush=True)
  return runs


def bench_loading(rounds: int) -> dict:
  """Measures, prints and returns seconds to the first token at 124M, and peak memory at 1.5B.

  The latter is on one device and on eight.
  """
  with tempfile.TemporaryDirectory() as folder:
    small, large = (pathlib.Path(folder) / size for size in PARAMETERS)
    write_random("124M", small)
    results = {
      "cold": first_token(small, True, rounds, folder),
      "warm": first_token(small, False, rounds, folder),
    }

    write_random("1542M", large)
    for devices in (1, 8):
      run = in_a_process(large, devices, False, os.path.join(folder, "cache"))
      results[f"1542M on {devices}"] = run
      ratio = run["peak"] / (4 * PARAMETERS["1542M"])
      print(
        f"load 1542M on {devices}: {run['load']:.1f} s, peak {run['peak'] / 1e9:.2f} GB, "
        f"{ratio:.2f} x the checkpoint (target 1.3); "
        f"a device holds {run['device'] / run['size']:.4f} of the model",
        flush=True,
      )
  return results


if __name__ == "__main__":
  child(sys.argv[1], int(sys.argv[2]), sys.argv[3] == "1")
