# SPDX-License-Identifier: Apache-2.0
"""launch/constraints.txt against the project's requirements, and the files that install from it."""

import importlib.metadata
import pathlib
import re
import sys

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = pathlib.Path(__file__).parents[1]
LINES = (ROOT / "launch" / "constraints.txt").read_text().splitlines()
PINS = [Requirement(line) for line in LINES if not line.startswith("#")]
VERSIONS = {canonicalize_name(pin.name): str(pin.specifier).removeprefix("==") for pin in PINS}
EXTRAS = ("tpu", "eval", "console", "test")
PROJECT = "gpt2-jax"


def requirements(name: str, extras: tuple[str, ...]) -> list[Requirement]:
  """What an installed distribution asks for on this machine."""
  asked = map(Requirement, importlib.metadata.requires(name) or [])
  environments = [{"extra": extra} for extra in ("", *extras)]
  return [r for r in asked if r.marker is None or any(map(r.marker.evaluate, environments))]


def test_every_package_that_an_installation_brings_is_pinned_within_its_bounds():
  """A package that no pin names would be installed in its newest version. Seen where the lock is
  what is installed: other versions may ask for other packages."""
  # The first on the path is the one that is imported: setuptools has copies of others at its end.
  versions = {}
  for distribution in importlib.metadata.distributions():
    versions.setdefault(canonicalize_name(distribution.name), distribution.version)
  is_locked = all(versions[name] == VERSIONS[name] for name in versions.keys() & VERSIONS.keys())
  if sys.version_info[:2] != (3, 13) or PROJECT not in versions or not is_locked:
    pytest.skip("other versions are installed here")

  waiting, seen = [(PROJECT, EXTRAS)], set()
  while waiting:
    name, extras = waiting.pop()
    if (name, extras) in seen:
      continue
    seen.add((name, extras))
    for requirement in requirements(name, extras):
      package = canonicalize_name(requirement.name)
      if package not in versions:
        continue
      assert package in VERSIONS, f"{name} asks for {requirement}, which is not pinned"
      if name == PROJECT:
        pin = VERSIONS[package]
        assert requirement.specifier.contains(pin), f"{requirement}, but {package}=={pin}"
      waiting.append((package, tuple(sorted(requirement.extras))))
  assert len(seen) > 50


def test_every_line_is_one_exact_version():
  assert len(VERSIONS) == len(PINS) > 100
  for pin in PINS:
    assert re.fullmatch(r"==[^*,]+", str(pin.specifier)) and not pin.url and not pin.marker
  assert {"jax", "jaxlib", "libtpu", "flax", "gcsfs", "torch", "lm-eval"} <= VERSIONS.keys()


@pytest.mark.parametrize(
  "path, asks",
  [
    ("launch/worker.sh", r"--python (3\.\d+).*--constraint launch/constraints\.txt"),
    ("launch/Dockerfile", r"FROM python:(3\.\d+)-slim.*--constraint launch/constraints\.txt"),
    (".ci/run", r"python(3\.\d+) .*LOCKED=1"),
    ("Makefile", r"LOCKED\),--constraint launch/constraints\.txt.*this Python \((3\.\d+)\)"),
    (".github/workflows/ci.yml", r'gate:.*?python-version: "(3\.\d+)".*?run: \.ci/run'),
  ],
)
def test_machines_images_and_the_gate_install_the_lock_on_one_python(path, asks):
  match = re.search(asks, (ROOT / path).read_text(), re.DOTALL)
  assert match and match[1] == "3.13"
