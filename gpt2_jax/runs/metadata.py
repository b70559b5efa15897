# SPDX-License-Identifier: Apache-2.0
"""What identifies a run: its config, its tokenizer and its data, saved with each checkpoint."""

import json

from ml_collections import ConfigDict

from gpt2_jax.data import TokenStore
from gpt2_jax.files import sha256
from gpt2_jax.runs import knobs


def run_metadata(config: ConfigDict, train: TokenStore, validation: TokenStore, tokenizer) -> dict:
  """The metadata of a checkpoint: config, tokenizer, and the manifests of the data (without their
  tokenizer)."""
  data = {}
  for name, store in (("train", train), ("validation", validation)):
    data[name] = {key: value for key, value in store.manifest.items() if key != "tokenizer"}
  return {"config": config.to_dict(), "tokenizer": tokenizer.to_json(), "data": data}


def run_identity(metadata: dict) -> dict:
  """The knobs, and short hashes of the data and the tokenizer: the same on all processes."""
  hashes = {}
  for name, value in knobs.flatten(metadata["data"]).items():
    if name.endswith("sha256"):
      hashes[name] = value
  facts = {"the data": hashes, "the tokenizer": metadata["tokenizer"]}
  identity = knobs.flatten(metadata["config"])
  for name, value in facts.items():
    identity[name] = sha256(json.dumps(value, sort_keys=True).encode())[:12]
  return identity
