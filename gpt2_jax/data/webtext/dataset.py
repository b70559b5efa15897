# SPDX-License-Identifier: Apache-2.0
"""The kept documents as a TFDS dataset in ArrayRecord, which `gpt2-jax tokenize` reads."""

import pathlib
import shutil
from collections.abc import Callable, Iterable, Iterator

import numpy as np

from gpt2_jax.data.import_tfds import import_tfds
from gpt2_jax.data.local_files import download_and_prepare
from gpt2_jax.data.webtext.document import Document

tfds = import_tfds()


class Webtext(tfds.core.GeneratorBasedBuilder, skip_registration=True):
  """TFDS builder of the kept documents: one split, "train". Their order is that of their hashes."""

  VERSION = tfds.core.Version("1.0.0")
  # Nothing is downloaded. Without this, TFDS looks for checksums in the folder of this module.
  url_infos = None

  def __init__(self, documents: Callable[[], Iterable[Document]], **kwargs):
    self._documents = documents
    super().__init__(**kwargs)

  def _info(self) -> tfds.core.DatasetInfo:
    text = tfds.features.Text()
    features = {"text": text, "url": text, "language": text, "id": text, "contaminated": np.int64}
    features = tfds.features.FeaturesDict(features)
    return tfds.core.DatasetInfo(builder=self, features=features)

  def _split_generators(self, dl_manager: object) -> dict:
    return {"train": self._generate_examples()}

  def _generate_examples(self) -> Iterator[tuple[str, dict]]:
    for document in self._documents():
      yield document.id, document.to_json() | {"id": document.id}


def write_dataset(documents: Callable[[], Iterable[Document]], folder: pathlib.Path) -> str:
  """Writes the dataset "webtext" into a TFDS folder, and returns the place. Raises ValueError.

  One that is there is replaced only by the job that owns the folder: it was not finished.
  """
  builder = Webtext(documents, data_dir=str(folder), file_format="array_record")
  for stale in pathlib.Path(builder.data_path).parent.glob("*"):
    shutil.rmtree(stale)
  builder = Webtext(documents, data_dir=str(folder), file_format="array_record")

  download_and_prepare(builder)
  return str(builder.data_path)
