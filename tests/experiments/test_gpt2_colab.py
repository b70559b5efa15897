# SPDX-License-Identifier: Apache-2.0
"""The first notebook: a copy of it runs on a tiny checkpoint, by a kernel of its own."""

import re

import pytest

pytest.importorskip("nbclient")
from tests.experiments import notebooks  # noqa: E402


@pytest.fixture(scope="module")
def executed(tiny_checkpoint, tmp_path_factory):
  """The notebook after a run from its first cell to its last."""
  return notebooks.execute("gpt2_colab.ipynb", tiny_checkpoint, tmp_path_factory.mktemp("cwd"))


def test_it_runs_and_prints_its_results(executed):
  text = notebooks.texts(executed)
  assert "ROMEO:" in text and "nats a token, perplexity" in text
  for cell in ("(?<!LoRA, )", "LoRA, "):
    losses = [float(nats) for nats in re.findall(rf"{cell}step +\d+: ([\d.]+) nats", text)]
    assert len(losses) == 4 and losses == sorted(losses)[::-1], "it does not learn one sentence"
  assert "largest difference of logits: 0.0\n" in text
  assert "'model.safetensors'" in text and "/" not in text.partition("model.safetensors")[2]


def test_its_pictures_are_shown_once(executed):
  """Surprise twice, next tokens, and all heads of a layer, none of them blank."""
  shown = [len(picture) for picture in notebooks.pictures(executed)]
  assert len(shown) == 4 and min(shown) > 5000


def test_its_code_causes_no_warnings(executed):
  """Of its own cells; what a library says of its environment is not the notebook's."""
  assert "/ipykernel_" not in notebooks.texts(executed)
