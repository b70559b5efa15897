# SPDX-License-Identifier: Apache-2.0
"""The token stores of a run, and the tokenizer that made them."""

from collections.abc import Iterator
from typing import Protocol

from jax.sharding import NamedSharding

from gpt2_jax.batch import Batch
from gpt2_jax.data.batches import BatchSource
from gpt2_jax.data.examples import ExampleStore
from gpt2_jax.data.token_store import TokenStore
from gpt2_jax.data.zarr_files import get_json
from gpt2_jax.files import user_path
from gpt2_jax.tokenizer import Tokenizer, load_tokenizer


class RowSource(Protocol):
  """What a run reads: a `TokenStore` of text, or an `ExampleStore` of packed examples."""

  path: str
  manifest: dict

  @property
  def fingerprint(self) -> str:
    """The tokenizer's fingerprint."""
    ...

  def batches(self, n_ctx: int, batch_size: int, seed: int) -> BatchSource:
    """What a run trains on: rows in an order of that seed."""
    ...

  def evaluation_batches(
    self, n_ctx: int, batch_size: int, sharding: NamedSharding, max_rows: int | None = None
  ) -> Iterator[Batch]:
    """All rows in order, or the first `max_rows`; a row that fills up the last batch weighs 0."""
    ...

  def count_rows(self, n_ctx: int) -> int:
    """Rows (windows) in an epoch. Raises ValueError if there is none, or they do not fit."""
    ...

  def sample_prompt(self, length: int) -> list[int]:
    """At most `length` tokens that a sample during training continues."""
    ...


def open_store(path: str) -> TokenStore | ExampleStore:
  """Opens a store of text or of examples, as its manifest says; errors are `TokenStore.open`'s."""
  manifest = get_json(user_path(path), "manifest.json") or {}
  kind = ExampleStore if manifest.get("format") == ExampleStore.FORMAT else TokenStore
  return kind.open(path)


def open_stores(
  train: str, validation: str, tokenizer: str | Tokenizer, n_vocab: int
) -> tuple[RowSource, RowSource, Tokenizer]:
  """Opens the training and validation stores, and loads the tokenizer; all are given by path.

  A tokenizer that is loaded is a checkpoint's, whose model may have a padded vocabulary. Raises
  ValueError if they do not belong together, or the model's vocabulary is another.
  """
  if isinstance(tokenizer, str):
    tokenizer = user_path(tokenizer)
    vocabulary = load_tokenizer(tokenizer)
    fits = vocabulary.vocab_size == n_vocab
  else:
    vocabulary, tokenizer = tokenizer, "the checkpoint's"
    fits = vocabulary.vocab_size <= n_vocab
  if not fits:
    raise ValueError(
      f"the tokenizer {tokenizer} has {vocabulary.vocab_size} tokens, the model {n_vocab}; "
      f"set --config.model.n_vocab={vocabulary.vocab_size}"
    )

  # The manifest tells the tokenizer's fingerprint: ids of another one mean other text.
  stores = []
  for path in (train, validation):
    store = open_store(path)
    if store.fingerprint != vocabulary.fingerprint:
      raise ValueError(
        f"{path} was made with another tokenizer (fingerprint {store.fingerprint[:12]}, "
        f"{tokenizer} has {vocabulary.fingerprint[:12]}); "
        f"set --config.data.tokenizer or tokenize again"
      )
    stores.append(store)
  return *stores, vocabulary
