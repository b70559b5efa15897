# SPDX-License-Identifier: Apache-2.0
"""Installs the project on top of Google Colab's packages, and shows that they stay and it works.

    make colab-check
    python experiments/colab/check.py --lists=cpu --tests tests     # the whole suite, on one list

For each list (`cpu.txt`, `tpu.txt`: what a runtime of Colab has), in an environment made for it:
1. install the list with Python 3.13,
2. install the project from this folder, as the notebook does, and compare all versions,
3. import transformers,
4. run the notebooks from top to bottom, on small checkpoints of their tests, and other tests.
Prints a table, and exits with 1 if a package changed or a step failed. The tests run in a folder
without the package's sources: what they import is what pip installed.
"""

import argparse
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile

FOLDER = pathlib.Path(__file__).resolve().parent
ROOT = FOLDER.parents[1]
PYTHON = (3, 13)  # Colab's

# The notebooks, what differs between versions of JAX, and a text file as a corpus.
TESTS = ("tests/experiments/test_*colab*.py", "tests/test_compat.py", "tests/data/test_corpus.py")
TEST_PACKAGES = ("pytest", "pytest-xdist", "hypothesis", "nbclient", "ipykernel", "psutil")
# What tests read beside themselves; not the package.
BESIDE_TESTS = ("tests", "experiments", "configs", "launch", "setup.py", ".pytest.ini")
TRANSFORMERS = "import transformers; transformers.AutoTokenizer; print(transformers.__version__)"


def main() -> int:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--lists", nargs="+", default=["cpu", "tpu"], choices=["cpu", "tpu"])
  parser.add_argument("--tests", nargs="+", default=TESTS, help="files or globs of tests")
  parser.add_argument("--folder", help="keep the environments in this folder")
  options = parser.parse_args()

  python = find_python()
  with tempfile.TemporaryDirectory(prefix="colab-check-") as scratch:
    folder = pathlib.Path(options.folder or scratch).resolve()
    rows = []
    for name in options.lists:
      rows += check(name, python, folder / name, options.tests)

  print("\n" + table(rows))
  return 0 if all(row[2] for row in rows) else 1


def find_python() -> str:
  """The name of a Python of Colab's version: on the PATH, from pyenv, or from uv."""
  name = "python{}.{}".format(*PYTHON)
  candidates = [sys.executable, shutil.which(name)]
  pyenv = pathlib.Path.home() / ".pyenv" / "versions"
  candidates += sorted(map(str, pyenv.glob("{}.{}*/bin/python".format(*PYTHON))))
  if uv := shutil.which("uv"):
    found = subprocess.run([uv, "python", "find", name[6:]], capture_output=True, text=True)
    candidates.append(found.stdout.strip())

  query = f"import sys; sys.exit(sys.version_info[:2] != {PYTHON})"
  for python in filter(None, candidates):
    if subprocess.run([python, "-c", query], capture_output=True).returncode == 0:
      return python
  raise SystemExit(f"error: Colab has {name}, and none is here; `uv python install {name[6:]}`")


def check(name: str, python: str, folder: pathlib.Path, tests) -> list[tuple[str, str, bool]]:
  """Checks one list in an environment under `folder`: rows of (what, what was seen, is it well)."""
  # 1. The runtime, as Colab hands it out.
  say(f"{name}: installing Colab's packages")
  venv = folder / "venv"
  shutil.rmtree(folder, ignore_errors=True)
  run([python, "-m", "venv", venv])
  pip = [venv / "bin" / "python", "-m", "pip", "--disable-pip-version-check", "install", "-q"]
  run([*pip, "-r", FOLDER / f"{name}.txt"])
  before = installed(venv)

  # 2. The project, without extras: Colab has the JAX of its own accelerator.
  say(f"{name}: installing the project on top")
  source = folder / "source"
  shutil.copytree(ROOT, source, ignore=not_sources)
  run([*pip, source])
  rows = compare_versions(name, before, installed(venv))

  # 3. transformers.
  answer = run([venv / "bin" / "python", "-c", TRANSFORMERS], fails=True)
  line = (answer.stdout.strip() or answer.stderr.strip() or "-").splitlines()[-1]
  rows.append((f"{name}: import transformers", line[:60], answer.returncode == 0))

  # 4. Notebooks and tests. What pytest needs must not move Colab's packages either.
  say(f"{name}: running notebooks and tests")
  pins = folder / "pins.txt"
  pins.write_text("".join(f"{package}=={version}\n" for package, version in before.items()))
  run([*pip, "-c", pins, *TEST_PACKAGES])
  return [*rows, run_tests(name, venv, folder, tests)]


def not_sources(folder: str, names: list[str]) -> list[str]:
  """What is not copied of the project to where pip builds it: a build leaves folders beside it."""
  if pathlib.Path(folder) != ROOT:
    return [name for name in names if name == "__pycache__"]
  return [name for name in names if name.startswith(".") or name in ("build", "runs", "data")]


def compare_versions(name: str, before: dict, after: dict) -> list[tuple[str, str, bool]]:
  """Rows: how many packages stayed as they were, which changed, and what was added."""
  changed = []
  for package, version in before.items():
    if after.get(package) != version:
      changed.append(f"{package} {version} -> {after.get(package, 'removed')}")
  added = [f"{package} {after[package]}" for package in sorted(after.keys() - before.keys())]

  kept = f"{len(before) - len(changed)} of {len(before)}"
  rows = [(f"{name}: packages as before", "; ".join([kept, *changed]), not changed)]
  for package in ("jax", "flax", "numpy", "tokenizers", "huggingface_hub", "transformers"):
    rows.append((f"{name}: {package}", before[package], after.get(package) == before[package]))
  rows.append((f"{name}: added", ", ".join(added), True))
  return rows


def run_tests(name: str, venv: pathlib.Path, folder: pathlib.Path, tests) -> tuple[str, str, bool]:
  """Runs tests against the installed package; a row with pytest's last line."""
  # 1. A copy of what tests read, without the package: it comes from the environment.
  copy = folder / "tests"
  for entry in BESIDE_TESTS:
    source = ROOT / entry
    copying = shutil.copytree if source.is_dir() else shutil.copy
    copy.mkdir(exist_ok=True)
    copying(source, copy / entry)
  paths = []
  for pattern in tests:
    paths += sorted(copy.glob(pattern))

  # 2. pytest, and nothing of the caller's paths.
  environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
  command = [venv / "bin" / "python", "-m", "pytest", "-q", "-ra", "-n", "2", *paths]
  answer = run(command, fails=True, cwd=copy, env=environment)
  lines = answer.stdout.strip().splitlines() or answer.stderr.strip().splitlines() or ["-"]
  if answer.returncode:
    print(answer.stdout, answer.stderr, sep="\n", file=sys.stderr)
  return f"{name}: notebooks and tests", lines[-1].strip("= "), answer.returncode == 0


def installed(venv: pathlib.Path) -> dict[str, str]:
  """The versions of all packages of an environment, by normal name; not the project's own."""
  answer = run([venv / "bin" / "python", "-m", "pip", "list", "--format=freeze"])
  versions = {}
  for line in answer.stdout.splitlines():
    package, _, version = line.partition("==")
    versions[re.sub(r"[-_.]+", "_", package).lower()] = version
  versions.pop("gpt2_jax", None)
  return versions


def run(command, fails: bool = False, **options) -> subprocess.CompletedProcess:
  """Runs a command quietly; where it fails and `fails` is not set, shows why, and exits."""
  answer = subprocess.run(list(map(str, command)), capture_output=True, text=True, **options)
  if answer.returncode and not fails:
    sys.stderr.write(answer.stdout + answer.stderr)
    raise SystemExit(f"error: {' '.join(map(str, command))[:300]} failed")
  return answer


def say(text: str) -> None:
  print(f"{text} ...", file=sys.stderr, flush=True)


def table(rows) -> str:
  width = max(len(row[0]) for row in rows)
  return "\n".join(
    f"{what:{width}}  {'ok ' if well else 'BAD'}  {seen}" for what, seen, well in rows
  )


if __name__ == "__main__":
  sys.exit(main())
