# SPDX-License-Identifier: Apache-2.0
"""The notebook, executed by a kernel of its own on a tiny checkpoint in Hugging Face's format."""

import base64
import os
import pathlib
import string

import pytest

from gpt2_jax.convert.pretrained import save_pretrained
from gpt2_jax.model import ModelConfig
from gpt2_jax.tokenizer import Characters

nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture(scope="module")
def executed(mesh, parameters, place, tmp_path_factory):
  """The notebook after a run from its first cell to its last."""
  alphabet = "".join(sorted(string.ascii_letters + string.digits + " .,\n"))
  config = ModelConfig(
    n_vocab=len(alphabet), n_ctx=128, n_embd=16, n_head=4, n_layer=2, dtype="float32"
  )
  path = tmp_path_factory.mktemp("notebook") / "tiny"
  with mesh(1, 1, 1):
    save_pretrained(place(config, parameters(config)), Characters(alphabet), str(path))
  book = nbformat.read(ROOT / "experiments" / "gpt2_colab.ipynb", as_version=4)
  assert not any(cell.get("outputs") for cell in book.cells), "the notebook is kept without outputs"
  environment = os.environ | {
    "GPT2_CHECKPOINT": str(path),
    "PYTHONPATH": str(ROOT),
    "JAX_PLATFORMS": "cpu",
  }
  nbclient.NotebookClient(book, timeout=300, kernel_name="python3").execute(env=environment)
  return book


def texts(book) -> str:
  return "".join(
    output.get("text", "") for cell in book.cells for output in cell.get("outputs", [])
  )


def test_it_runs_and_prints_its_results(executed):
  text = texts(executed)
  assert "In a shocking finding, scientists discovered" in text
  assert "nats a token, perplexity" in text
  assert "verdict         the same model" in text and "weights         identical" in text


def test_it_plots(executed):
  """A plot of the loss of each token and one of attention, neither of them blank."""
  data = [output.get("data", {}) for cell in executed.cells for output in cell.get("outputs", [])]
  pictures = [base64.b64decode(found["image/png"]) for found in data if "image/png" in found]
  assert len(pictures) == 2 and all(len(picture) > 5000 for picture in pictures)
