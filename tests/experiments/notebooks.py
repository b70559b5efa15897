# SPDX-License-Identifier: Apache-2.0
"""Runs a copy of a notebook of experiments/ on a local checkpoint; as a command, keeps the outputs.

  python tests/experiments/notebooks.py --checkpoint=PATH

The command runs both notebooks in an empty folder and writes them back with what was printed and
drawn. Their code is not changed: `gpt2` stands in it, and the outputs are of PATH.
"""

import argparse
import os
import pathlib
import re
import tempfile

import jax
import nbclient
import nbformat

ROOT = pathlib.Path(__file__).resolve().parents[2]
NAMES = ("gpt2_colab.ipynb", "evaluate_colab.ipynb")
PUBLISHED = 'CHECKPOINT = "gpt2"'
KEPT_BYTES = 300_000  # of a notebook with its outputs


def read(name: str) -> nbformat.NotebookNode:
  return nbformat.read(ROOT / "experiments" / name, as_version=4)


def execute(name: str, checkpoint: str, folder: pathlib.Path) -> nbformat.NotebookNode:
  """A copy of a notebook after a run of all cells in `folder`, by a kernel of its own.

  In its code the published name is replaced by a local checkpoint.
  """
  book = read(name)
  replaced = 0
  for cell in code_cells(book):
    cell.outputs = []
    replaced += cell.source.count(PUBLISHED)
    cell.source = cell.source.replace(PUBLISHED, f"CHECKPOINT = {str(checkpoint)!r}")
  assert replaced == 1, f"{name} has {PUBLISHED} {replaced} times"

  # What the project needs is here, so that the first cell has nothing to install.
  environment = os.environ | {"JAX_PLATFORMS": "cpu", "MPLBACKEND": INLINE}
  if (ROOT / "gpt2_jax").is_dir():
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
  # Most of the time is XLA compiling: the tests' cache serves the kernel, too.
  if jax.config.jax_compilation_cache_dir:
    environment["JAX_COMPILATION_CACHE_DIR"] = jax.config.jax_compilation_cache_dir
    environment["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.2"
  client = nbclient.NotebookClient(
    book, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(folder)}}
  )
  client.execute(env=environment)
  return book


INLINE = "module://matplotlib_inline.backend_inline"  # as Jupyter and Colab set it


def code_cells(book) -> list:
  return [cell for cell in book.cells if cell.cell_type == "code"]


def texts(book) -> str:
  """All that the cells printed, or returned as text."""
  parts = []
  for cell in code_cells(book):
    for output in cell.outputs:
      parts.append(output.get("text", "") or output.get("data", {}).get("text/plain", ""))
  return "".join(parts)


def pictures(book) -> list[str]:
  """The pictures of all cells, base64."""
  data = [output.get("data", {}) for cell in code_cells(book) for output in cell.outputs]
  return [shown["image/png"] for shown in data if "image/png" in shown]


def merged(outputs: list) -> list:
  """Outputs with what was printed in parts in one, as a notebook's editor saves it."""
  kept = []
  for output in outputs:
    is_stream = output.output_type == "stream"
    if is_stream and kept and kept[-1].get("name") == output.name:
      kept[-1].text += output.text
    else:
      kept.append(output)
  return kept


def keep_outputs(name: str, checkpoint: pathlib.Path) -> None:
  """Runs a notebook under a neutral name of the checkpoint, and writes it with its outputs."""
  with tempfile.TemporaryDirectory() as scratch:
    folder = pathlib.Path(scratch)
    (folder / "shakespeare").symlink_to(checkpoint.resolve())
    run = execute(name, "./shakespeare", folder)

  # The code as it was, and the outputs without times and numbers of this run.
  book = read(name)
  for cell, ran in zip(code_cells(book), code_cells(run), strict=True):
    cell.outputs, cell.execution_count = merged(ran.outputs), ran.execution_count
  text = re.sub(r"0x[0-9a-f]{8,}", "0x...", nbformat.writes(book, version=4))
  assert scratch not in text and str(ROOT) not in text, "outputs name a path of this machine"
  assert len(text) < KEPT_BYTES, f"{name} has {len(text):,} bytes; {KEPT_BYTES:,} is the most"
  (ROOT / "experiments" / name).write_text(text + "\n")


if __name__ == "__main__":
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--checkpoint", type=pathlib.Path, required=True)
  options = parser.parse_args()
  for notebook in NAMES:
    keep_outputs(notebook, options.checkpoint)
