# SPDX-License-Identifier: Apache-2.0
"""Eight simulated CPU devices for every test, and what several test files share."""

import gc
import getpass
import importlib.abc
import importlib.machinery
import logging
import math
import os
import pathlib
import signal
import sys
import tempfile

import hypothesis
import pytest

os.environ["JAX_PLATFORMS"] = "cpu"  # for the processes that tests start, too

# A shell starts its background jobs with Ctrl-C ignored; the processes of tests would inherit it.
signal.signal(signal.SIGINT, signal.default_int_handler)


class NoTensorFlow(importlib.abc.MetaPathFinder, importlib.abc.Loader):
  """Makes an ImportError of `import tensorflow`, as if it were not installed.

  TensorFlow and the triton that torch brings crash in one process, and several libraries import
  TensorFlow wherever it is installed. The one test that asks it for anything starts a process.
  """

  def find_spec(self, name, path=None, target=None):
    return importlib.machinery.ModuleSpec(name, self) if name == "tensorflow" else None

  def create_module(self, spec):
    raise ModuleNotFoundError("TensorFlow is not for this process", name="tensorflow")

  def exec_module(self, module):
    raise NotImplementedError


sys.meta_path.insert(0, NoTensorFlow())

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)

# Most of the suite's time is XLA compiling for eight devices; what is compiled once is kept for the
# next run, and for the processes that tests start.
CACHE = pathlib.Path(tempfile.gettempdir()) / f"gpt2_jax_tests_{getpass.getuser()}"
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(CACHE))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")
jax.config.update("jax_compilation_cache_dir", os.environ["JAX_COMPILATION_CACHE_DIR"])
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)

# A level of LLVM's optimization less takes a fifth of the compiling time away, and no test's sense.
OPTIMIZATION = "--xla_backend_optimization_level=1"
# Simulated devices wait for each other. On a busy machine that may take more than 40 seconds, after
# which XLA aborts the process. Older versions do not know the option.
PATIENCE = "--xla_cpu_collective_call_terminate_timeout_seconds=300"
options = [os.environ.get("XLA_FLAGS", ""), OPTIMIZATION]
if jax.__version_info__ >= (0, 10):
  options.append(PATIENCE)
os.environ["XLA_FLAGS"] = " ".join(filter(None, options))

# A machine that is busy is no failure of a property.
hypothesis.settings.register_profile("busy", deadline=None)
hypothesis.settings.load_profile("busy")

sys.path.append(
  str(pathlib.Path(__file__).parents[1])
)  # where the package is not installed; configs and launch

from gpt2_jax.compat import get_mesh  # noqa: E402
from gpt2_jax.model import GPT2, ModelConfig, name_of  # noqa: E402
from gpt2_jax.sharding import abstract_mesh, concrete, make_mesh  # noqa: E402
from tests.fake_bucket import Bucket  # noqa: E402


def pytest_addoption(parser):
  parser.addoption(
    "--oracles",
    action="store_true",
    help="a test that skips for want of a package, or of data that the environment names, fails",
  )


def _fail_if_incomplete(report, config) -> None:
  """With --oracles: turns a skip into a failure if the environment should have prevented it."""
  if not (report.skipped and config.getoption("--oracles") and isinstance(report.longrepr, tuple)):
    return

  path, line, reason = report.longrepr
  data = [name for name in ("GPT2_JAX_TEST_DATA", "TIKTOKEN_CACHE_DIR") if name in os.environ]
  if "could not import" in reason or any(name in reason for name in data):
    report.outcome = "failed"
    report.longrepr = f"{path}:{line}: {reason} (with --oracles, nothing skips for want of that)"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item):
  report = yield
  _fail_if_incomplete(report, item.config)
  return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector):
  """A whole file that skips."""
  report = yield
  _fail_if_incomplete(report, collector.config)
  return report


def _mesh(*sizes: int):
  return jax.set_mesh(make_mesh(*sizes, devices=jax.devices()[: math.prod(sizes)]))


def _parameters(config: ModelConfig, scale: float = 0.2, seed: int = 0) -> dict[str, np.ndarray]:
  """N(0, scale^2) for every parameter by name (gains around 1, no bias is zero), float64, without
  any padding."""
  rng = np.random.default_rng(seed)
  with jax.sharding.use_abstract_mesh(abstract_mesh(1, 1, 1)):
    model = jax.eval_shape(lambda: GPT2(config, jax.random.key(0)))
  arrays = {}
  for path, leaf in jax.tree_util.tree_leaves_with_path(model):
    name = name_of(path)
    shape = (config.n_vocab, config.n_embd) if name == "wte" else leaf.shape
    arrays[name] = rng.normal(size=shape) * scale + name.endswith(".g")
  return arrays


def _place(config: ModelConfig, arrays: dict[str, np.ndarray]) -> GPT2:
  """The model on the mesh in force that holds `arrays`, with zeros where the mesh asks for
  padding."""
  target = concrete(jax.eval_shape(lambda: GPT2(config, jax.random.key(0))), get_mesh())

  def put(path, leaf):
    array = arrays[name_of(path)]
    room = [(0, size - n) for size, n in zip(leaf.shape, array.shape, strict=True)]
    return jax.device_put(np.pad(array, room).astype(np.float32), leaf.sharding)

  return jax.tree_util.tree_map_with_path(put, target)


def _unpadded(tree, arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
  """The leaves of a model-shaped tree by name, cut to the shapes of `arrays`; fails unless the rest
  is exactly zero."""
  cut = {}
  for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
    name, leaf = name_of(path), np.array(leaf)
    inside = tuple(slice(n) for n in arrays[name].shape)
    cut[name] = leaf[inside].copy()
    leaf[inside] = 0
    assert not leaf.any(), f"the padding of {name} is not zero"
  return cut


# Each compiled program is some mappings of memory, of which Linux allows a process 65,530; at the
# limit XLA crashes while it compiles. A worker compiles thousands of programs.
MAPPINGS = pathlib.Path("/proc/self/maps")
MOST_MAPPINGS = 20_000


@pytest.fixture(scope="module", autouse=True)
def _few_mappings():
  """Forgets the programs of the modules before, once they are many."""
  yield
  if MAPPINGS.exists() and MAPPINGS.read_bytes().count(b"\n") > MOST_MAPPINGS:
    jax.clear_caches()
    gc.collect()


@pytest.fixture(scope="session")
def _server():
  """One for all tests: the clients of gs:// keep their connection."""
  server = Bucket()
  yield server
  server.close()


@pytest.fixture
def bucket(_server, monkeypatch):
  """gs://bucket on localhost, empty."""
  for variable in ("STORAGE_EMULATOR_HOST", "TENSORSTORE_GCS_HTTP_URL"):
    monkeypatch.setenv(variable, _server.url)
  monkeypatch.setenv("GOOGLE_AUTH_TOKEN_FOR_TESTING", "a token")
  logging.getLogger("asyncio").setLevel(
    logging.CRITICAL
  )  # as launch/shell.py does: Orbax leaves errors to it
  _server.reset()
  return _server


@pytest.fixture(scope="session")
def mesh():
  """mesh(replica, data, model): puts a mesh over as many of the devices in force, as a context."""
  return _mesh


@pytest.fixture(scope="session")
def parameters():
  return _parameters


@pytest.fixture(scope="session")
def place():
  return _place


@pytest.fixture(scope="session")
def unpadded():
  return _unpadded


@pytest.fixture(scope="session")
def tokens():
  """tokens(rows, length, n_vocab): random tokens [rows, length], NumPy int32, always the same."""
  return lambda rows, length, n_vocab: (
    np.random.default_rng(1).integers(0, n_vocab, (rows, length)).astype(np.int32)
  )


@pytest.fixture(scope="session")
def put():
  """put(array, spec): the array on the mesh in force."""
  return lambda array, spec: jax.device_put(
    jnp.asarray(np.asarray(array)), jax.sharding.NamedSharding(get_mesh(), spec)
  )
