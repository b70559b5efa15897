# SPDX-License-Identifier: Apache-2.0
"""The data loader: corpus of documents -> token store (tokenized shards) -> the batch of a step."""

from gpt2_jax.data.batches import (
  Batches,
  batch_sha256,
  check_shards,
  count_windows,
  evaluation_batches,
)
from gpt2_jax.data.corpus import (
  CharacterSlice,
  Documents,
  file_documents,
  slice_characters,
  tfds_documents,
)
from gpt2_jax.data.token_store import TokenStore
from gpt2_jax.data.tokenize_corpus import encode_corpus

__all__ = [
  "Batches",
  "CharacterSlice",
  "Documents",
  "TokenStore",
  "batch_sha256",
  "check_shards",
  "count_windows",
  "encode_corpus",
  "evaluation_batches",
  "file_documents",
  "slice_characters",
  "tfds_documents",
]
