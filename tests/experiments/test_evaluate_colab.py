# SPDX-License-Identifier: Apache-2.0
"""The notebook of evaluation, executed; and what both notebooks keep."""

import re

import pytest

pytest.importorskip("nbclient")
from tests.experiments import notebooks  # noqa: E402


@pytest.fixture(scope="module")
def executed(tiny_checkpoint, tmp_path_factory):
  """The notebook after a run from its first cell to its last."""
  folder = tmp_path_factory.mktemp("cwd")
  return notebooks.execute("evaluate_colab.ipynb", tiny_checkpoint, folder)


def test_its_scores_lie_in_their_intervals(executed):
  text = notebooks.texts(executed)
  scores = re.findall(r": ([+-]?[\d.]+)[^,\n]*, 95 % interval ([+-]?[\d.]+) to ([+-]?[\d.]+)", text)
  assert len(scores) == 6  # two metrics, two differences, two of a text
  assert all(float(low) <= float(value) <= float(high) for value, low, high in scores)
  assert len(notebooks.pictures(executed)) == 1


@pytest.mark.parametrize("name", notebooks.NAMES)
def test_outputs_are_kept_of_a_whole_run(name):
  """Every cell that prints or draws has its output; none is an error, a warning or large."""
  path = notebooks.ROOT / "experiments" / name
  book = notebooks.read(name)
  assert path.stat().st_size < notebooks.KEPT_BYTES
  assert notebooks.pictures(book)

  counts = [cell.execution_count for cell in notebooks.code_cells(book)]
  assert counts == list(range(1, len(counts) + 1))
  for cell in notebooks.code_cells(book):
    kinds = {output.get("name") or output.output_type for output in cell.outputs}
    assert not kinds & {"error", "stderr"}
    shows = [word for word in ("print(", "plot_", "plt.show(") if word in cell.source]
    assert bool(cell.outputs) == bool(shows)


@pytest.mark.parametrize("name", notebooks.NAMES)
def test_the_first_cell_installs_from_the_clone_around_the_notebook(name):
  """One line of pip, which quotes nothing; the badge leads to Colab."""
  book = notebooks.read(name)
  assert "colab-badge.svg" in book.cells[0].source
  first = notebooks.code_cells(book)[0].source
  assert first.count("%pip install") == 1 and 'REPOSITORY = ".."  # @param' in first
