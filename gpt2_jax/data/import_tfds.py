# SPDX-License-Identifier: Apache-2.0
"""TensorFlow Datasets (TFDS), imported where a corpus is opened."""

import os

CHECK = "TEMPORARILY_DISABLE_PROTOBUF_VERSION_CHECK"  # protobuf's own variable


def import_tfds():
  """Imports TFDS, also where tensorflow_metadata is newer than protobuf (as in Google Colab).

  tensorflow_metadata 1.18 and later has code that protobuf 6.31 generated, and asks for 4.25 only
  (github.com/tensorflow/metadata/issues/68). Its messages work with protobuf 5.29, which refuses
  them for their version. So they are loaded without this check, and nothing else is.
  """
  from google.protobuf.runtime_version import VersionError

  try:
    import tensorflow_metadata.proto  # noqa: F401
  except VersionError:
    before = os.environ.get(CHECK)
    os.environ[CHECK] = "true"
    try:
      import tensorflow_metadata.proto  # noqa: F401
    finally:
      os.environ.pop(CHECK)
      if before is not None:
        os.environ[CHECK] = before

  import tensorflow_datasets as tfds

  return tfds
