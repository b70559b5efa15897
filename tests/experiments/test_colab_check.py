# SPDX-License-Identifier: Apache-2.0
"""Google Colab's lists against this project's bounds, and what the check says of a change."""

import ast
import pathlib
import re

import pytest
from packaging.requirements import Requirement

from experiments.colab import check

ROOT = pathlib.Path(__file__).parents[2]
STAY = ("jax", "flax", "numpy", "tokenizers", "huggingface_hub", "transformers")


def listed(name: str) -> dict[str, str]:
  """The versions of a list, by normal name."""
  versions = {}
  for line in (ROOT / "experiments" / "colab" / f"{name}.txt").read_text().splitlines():
    if not line.startswith("#"):
      package, _, version = line.partition("==")
      versions[re.sub(r"[-_.]+", "_", package).lower()] = version
  return versions


def requirements() -> list[Requirement]:
  """What `setup.py` installs without extras."""
  for node in ast.walk(ast.parse((ROOT / "setup.py").read_text())):
    if isinstance(node, ast.keyword) and node.arg == "install_requires":
      return [Requirement(line) for line in ast.literal_eval(node.value)]
  raise AssertionError("setup.py has no list install_requires")


@pytest.mark.parametrize("name", ["cpu", "tpu"])
def test_the_bounds_admit_what_colab_has(name):
  versions = listed(name)
  assert all(package in versions for package in STAY)
  for requirement in requirements():
    version = versions.get(re.sub(r"[-_.]+", "_", requirement.name).lower())
    assert version is None or version in requirement.specifier, f"{requirement}, there {version}"


def test_a_package_that_changed_is_told():
  before = dict.fromkeys(STAY, "1.0") | {"tqdm": "4.0"}
  assert all(row[2] for row in check.compare_versions("cpu", before, before | {"new": "1"}))

  rows = check.compare_versions("cpu", before, before | {"jax": "2.0"})
  assert [row[0] for row in rows if not row[2]] == ["cpu: packages as before", "cpu: jax"]
  assert "6 of 7; jax 1.0 -> 2.0" in rows[0][1]
  assert "cpu: jax  " in check.table(rows) and "BAD" in check.table(rows)
