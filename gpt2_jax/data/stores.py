# SPDX-License-Identifier: Apache-2.0
"""The token stores of a run, and the tokenizer that made them."""

from gpt2_jax.data.token_store import TokenStore
from gpt2_jax.files import user_path
from gpt2_jax.tokenizer import Tokenizer, load_tokenizer


def open_stores(
  train: str, validation: str, tokenizer: str, n_vocab: int
) -> tuple[TokenStore, TokenStore, Tokenizer]:
  """Opens the training and validation stores, and loads the tokenizer; all are given by path.

  Raises ValueError if they do not belong together, or the model's vocabulary is another.
  """
  tokenizer = user_path(tokenizer)
  vocabulary = load_tokenizer(tokenizer)
  if vocabulary.vocab_size != n_vocab:
    raise ValueError(
      f"the tokenizer {tokenizer} has {vocabulary.vocab_size} tokens, the model {n_vocab}; "
      f"set --config.model.n_vocab={vocabulary.vocab_size}"
    )

  # The manifest tells the tokenizer's fingerprint: ids of another one mean other text.
  stores = []
  for path in (train, validation):
    store = TokenStore.open(path)
    if store.fingerprint != vocabulary.fingerprint:
      raise ValueError(
        f"{path} was made with another tokenizer (fingerprint {store.fingerprint[:12]}, "
        f"{tokenizer} has {vocabulary.fingerprint[:12]}); "
        f"set --config.data.tokenizer or tokenize again"
      )
    stores.append(store)
  return *stores, vocabulary
