# SPDX-License-Identifier: Apache-2.0
"""What importing the package and using a gs:// path do to the process around it."""

import gc
import pathlib
import subprocess
import sys

import pytest

from gpt2_jax.runs.workdir import Workdir, cloud_errors

ROOT = pathlib.Path(__file__).parents[2]
IMPORT_ALL = """
import os, pkgutil, sys
import jax  # sets variables of its own
from absl import flags
before = dict(os.environ)
import gpt2_jax
import gpt2_jax.runs.workdir
import gpt2_jax.train
for module in pkgutil.walk_packages(gpt2_jax.__path__, "gpt2_jax."):
  # lm_eval sets a variable, and the harness adapter is for those who have imported that
  if module.name in sys.modules or module.name == "gpt2_jax.evaluate.harness":
    continue
  for flag in list(flags.FLAGS):  # two commands may have a flag of one name
    delattr(flags.FLAGS, flag)
  try:
    __import__(module.name)
  except ImportError as error:
    assert "gpt2_jax" not in (error.name or ""), error  # a library that is not installed
  finally:
    changed = {name for name in before.keys() | os.environ.keys()
               if before.get(name) != os.environ.get(name)}
    assert not changed, f"{module.name} changes {changed}"
"""
IMPORT_WORKDIR = """
import os, sys
before = dict(os.environ)
import jax
after_jax = dict(os.environ)
from gpt2_jax.runs import workdir
assert workdir.exists("/") and not workdir.is_remote("/") and os.environ == after_jax
"""
LOCAL_THEN_REMOTE = """
import os, sys
from gpt2_jax.runs.workdir import as_path, exists
assert exists("/") and "EPATH_USE_TF" not in os.environ
assert exists("gs://bucket/file") and not exists("gs://bucket/other")
assert as_path("gs://bucket/file").read_text() == "text"
assert os.environ["EPATH_USE_TF"] == os.environ["GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT"] == "false"
assert "gcsfs" in sys.modules and "tensorflow" not in sys.modules
"""


def run(script: str):
  result = subprocess.run(
    [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=120
  )
  assert result.returncode == 0, result.stderr


def test_imports_change_no_environment_variable(monkeypatch):
  for name in ("EPATH_USE_TF", "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT"):
    monkeypatch.delenv(name, raising=False)
  run(IMPORT_ALL)
  run(IMPORT_WORKDIR)


def test_gs_is_never_left_to_tensorflow_even_after_a_local_path(bucket, monkeypatch):
  for name in ("EPATH_USE_TF", "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT"):
    monkeypatch.delenv(name, raising=False)
  bucket.put("file", b"text")
  run(LOCAL_THEN_REMOTE)


def test_a_refused_upload_leaves_no_loop_around_a_buffer(bucket, monkeypatch):
  """The collector of some Pythons crashes on one; on the others it says what it cannot close."""
  gc.collect()
  unraisable = []
  monkeypatch.setattr(sys, "unraisablehook", lambda args: unraisable.append(str(args)))

  bucket.refuse = "metrics.jsonl"
  with pytest.raises(OSError, match="cannot be reached"), Workdir("gs://bucket/run") as folder:
    (pathlib.Path(folder.path) / "metrics.jsonl").write_text("{}\n")
    folder.upload()
  gc.collect()
  assert not unraisable


def test_a_chain_of_errors_that_leads_back_ends_in_one_line():
  first, second = ValueError("first"), ValueError("second")
  first.__cause__, second.__cause__ = second, first
  refusal = pytest.raises(OSError, match="gs://bucket/x cannot be reached: first")
  with refusal, cloud_errors("gs://bucket/x"):
    raise first
