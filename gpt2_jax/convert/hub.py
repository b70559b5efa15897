# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of the Hugging Face Hub, by their published names, through huggingface_hub and its cache."""

import pathlib

import huggingface_hub

from gpt2_jax.convert.files import reason
from gpt2_jax.convert.vocabulary import OURS
from gpt2_jax.model import ALIASES

PUBLISHED = {name: f"openai-community/{aliases[0]}" for size, aliases in ALIASES.items() for name in (size, *aliases)}
PUBLISHED["distilgpt2"] = "distilbert/distilgpt2"
SMALL = ["config.json", "tokenizer.json", "vocab.json", "merges.txt", OURS]
SAFETENSORS = ["model.safetensors", "model.safetensors.index.json", "model-*-of-*.safetensors"]
PICKLED = ["pytorch_model.bin", "pytorch_model.bin.index.json", "pytorch_model-*-of-*.bin"]


def fetch(name: str, revision: str | None = None) -> pathlib.Path:
  """The folder of a repository in the cache, fetched if need be; pickled weights only for want of safetensors.

  HF_HUB_OFFLINE=1 keeps to the cache; HF_HOME says where it is. Raises OSError or ValueError with the way out.
  """
  repo = PUBLISHED.get(name, name)
  try:
    path = huggingface_hub.snapshot_download(repo, revision=revision, allow_patterns=SMALL + SAFETENSORS)
    if not any(pathlib.Path(path).glob("model*.safetensors")):
      path = huggingface_hub.snapshot_download(repo, revision=revision, allow_patterns=SMALL + PICKLED)
  except Exception as error:  # the HTTP library's own are no OSErrors
    at = f" at revision {revision}" if revision else ""
    raise OSError(
      f"{name} is no path here, and {repo}{at} cannot be had from the Hub ({type(error).__name__}: {reason(error)})"
    ) from error
  return pathlib.Path(path)
