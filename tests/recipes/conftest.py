# SPDX-License-Identifier: Apache-2.0
"""What the tests of recipes share: bytes as tokens with <|endoftext|>, and a model that recites."""

import json

import numpy as np
import pytest

from gpt2_jax.tokenizer import EOT, HuggingFace
from tests.recipes.tiny import CONFIG, LETTERS, N_CTX


@pytest.fixture(scope="session")
def bytes_tokenizer() -> HuggingFace:
  vocab = {token: i for i, token in enumerate([*LETTERS, EOT])}
  payload = json.loads(HuggingFace.from_merges(vocab, []).payload)
  flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
  payload["added_tokens"] = [{"id": vocab[EOT], "content": EOT, "special": True} | flags]
  return HuggingFace(json.dumps(payload))


@pytest.fixture
def reciting(mesh, parameters, place):
  """reciting(start, ids): a GPT-2 that says `ids` from position `start` on, whatever stood before.

  Its blocks add nothing, tokens are orthogonal, and each position holds the token that follows it.
  """
  arrays = {name: np.zeros_like(array) for name, array in parameters(CONFIG).items()}
  for name, array in arrays.items():
    if name.endswith(".g"):
      array += 1
  arrays["wte"] = np.eye(CONFIG.n_vocab, CONFIG.n_embd)

  def make(start: int, ids: list[int]):
    wpe = np.zeros((N_CTX, CONFIG.n_embd))
    for position, token in enumerate(ids, start - 1):
      wpe[position, token] = 100
    with mesh(1, 1, 1):
      return place(CONFIG, arrays | {"wpe": wpe})

  return make
