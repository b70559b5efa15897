# SPDX-License-Identifier: Apache-2.0
"""A tiny checkpoint for the notebooks."""

import dataclasses
import string

import pytest

from gpt2_jax.convert.pretrained import save_pretrained
from gpt2_jax.model import ModelConfig
from gpt2_jax.tokenizer import Characters

CONFIG = ModelConfig(n_ctx=64, n_embd=32, n_head=4, n_layer=2, dtype="float32")


@pytest.fixture(scope="session")
def tiny_checkpoint(mesh, parameters, place, tmp_path_factory):
  """Random weights with an alphabet of characters, in Hugging Face's format."""
  alphabet = "".join(sorted(string.ascii_letters + string.digits + " !'+,-.:;?\n"))
  config = dataclasses.replace(CONFIG, n_vocab=len(alphabet))
  path = tmp_path_factory.mktemp("checkpoint") / "tiny"
  arrays = parameters(config, scale=0.05)
  with mesh(1, 1, 1):
    save_pretrained(place(config, arrays), Characters(alphabet), str(path))
  return path
