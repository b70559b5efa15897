# SPDX-License-Identifier: Apache-2.0
"""From text to batches: documents -> token store -> the batch of a step."""

from gpt2_jax.data.batches import Batches, batch_hash, check_divides, count_windows, evaluation_batches
from gpt2_jax.data.corpus import CharacterSlice, Documents, file_documents, slice_characters, tfds_documents
from gpt2_jax.data.token_store import TokenStore, encode_corpus

__all__ = [
  "Batches",
  "CharacterSlice",
  "Documents",
  "TokenStore",
  "batch_hash",
  "check_divides",
  "count_windows",
  "encode_corpus",
  "evaluation_batches",
  "file_documents",
  "slice_characters",
  "tfds_documents",
]
