# SPDX-License-Identifier: Apache-2.0
"""Other people's readers and task definitions, to compare with."""

import os
import pathlib
from collections.abc import Iterable

import pytest

from gpt2_jax.data.import_tfds import import_tfds

tfds = import_tfds()


@pytest.fixture
def prepare(tmp_path):
  """prepare(name, split, **arguments) -> data_dir: a dataset by TFDS's own code for it, from a file
  at hand.

  `arguments` are those of the builder's `_generate_examples`; or `examples`, what that would yield.
  """

  def prepared(name: str, split: str, examples: Iterable | None = None, /, **arguments) -> str:
    try:
      builder = tfds.builder(name, data_dir=str(tmp_path / "tfds"), file_format="array_record")
    except tfds.core.DatasetNotFoundError:
      pytest.skip(f"TFDS's code for {name} needs TensorFlow")
    found = builder._generate_examples(**arguments) if examples is None else iter(examples)
    builder._split_generators = lambda *_: {split: found}
    builder.download_and_prepare()
    return str(tmp_path / "tfds")

  return prepared


@pytest.fixture(scope="session")
def harness_task():
  """harness_task(path, rows, solved=()): lm-evaluation-harness's own task of that YAML file on
  these rows.

  The rows have the fields that its dataset has; `solved` are those of the training set.
  """
  os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
  task = pytest.importorskip("lm_eval.api.task")
  import datasets
  from lm_eval.tasks._yaml_loader import load_yaml

  class Local(task.ConfigurableTask):
    def __init__(self, config: dict, splits: dict):
      self.splits = splits
      super().__init__(config=config)

    def download(self, *_, **__) -> None:
      self.dataset = {
        name: datasets.Dataset.from_list(list(rows)) for name, rows in self.splits.items()
      }

  def made(path: str, rows: Iterable[dict], solved: Iterable[dict] = ()):
    config = load_yaml(pathlib.Path(task.__file__).parents[1] / "tasks" / path, resolve_func=True)
    scored = config.get("test_split") or config.get("validation_split") or "test"
    splits = {scored: rows} | (
      {config["training_split"]: solved or rows} if config.get("training_split") else {}
    )
    splits |= {
      name: rows for key in ("validation_split", "test_split") if (name := config.get(key))
    }
    return Local(config | {"task": path}, splits)

  return made
