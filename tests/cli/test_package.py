# SPDX-License-Identifier: Apache-2.0
"""`import gpt2_jax`: quick, without JAX, and with every public name where editors look for it."""

import ast
import importlib
import pathlib
import pkgutil
import subprocess
import sys

import pytest

import gpt2_jax

SOURCE = pathlib.Path(gpt2_jax.__file__)


def test_the_import_of_the_package_imports_no_jax():
  code = (
    "import sys, gpt2_jax; dir(gpt2_jax); gpt2_jax.ModelConfig(), gpt2_jax.SIZES\n"
    "assert not {'jax', 'flax', 'numpy'} & set(sys.modules)\n"
    "gpt2_jax.GPT2; assert 'jax' in sys.modules\n"
  )
  subprocess.run([sys.executable, "-c", code], check=True, timeout=60, cwd=SOURCE.parents[1])


def imported_for_editors() -> dict[str, str]:
  """The names that the package imports under TYPE_CHECKING, with their modules."""
  names = {}
  for node in ast.walk(ast.parse(SOURCE.read_text())):
    if isinstance(node, ast.ImportFrom) and node.module.startswith("gpt2_jax"):
      names |= {alias.name: node.module for alias in node.names}
  return names


def test_every_public_name_is_one_thing_everywhere():
  names = imported_for_editors()
  assert sorted(gpt2_jax.__all__) == sorted(names) == sorted(gpt2_jax._MODULES)
  assert names == gpt2_jax._MODULES
  for name, module in names.items():
    assert getattr(gpt2_jax, name) is vars(importlib.import_module(module))[name]
  assert set(gpt2_jax.__all__) <= set(dir(gpt2_jax))


def test_no_public_name_is_a_module_of_the_package():
  """The import of such a module would put it in the name's place."""
  modules = {module.name for module in pkgutil.iter_modules(gpt2_jax.__path__)}
  assert not modules & set(gpt2_jax.__all__)


def test_a_module_of_the_package_needs_no_import():
  assert gpt2_jax.chips is importlib.import_module("gpt2_jax.chips")


def test_a_name_that_is_not_there_is_an_attribute_error():
  with pytest.raises(AttributeError, match="no attribute 'load_pretraind'") as caught:
    _ = gpt2_jax.load_pretraind
  assert caught.value.name == "load_pretraind" and caught.value.obj is gpt2_jax
  assert not hasattr(gpt2_jax, "__no_such_dunder__")
