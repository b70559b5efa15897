# SPDX-License-Identifier: Apache-2.0
"""Downloads checkpoints from the Hugging Face Hub, by published name, through its cache."""

import pathlib

from gpt2_jax.convert.vocabulary import OWN_TOKENIZER
from gpt2_jax.files import first_line
from gpt2_jax.sizes import ALIASES


def _published_names() -> dict[str, str]:
  """The Hub's repository of every name that a published size has."""
  repositories = {"distilgpt2": "distilbert/distilgpt2"}
  for size, aliases in ALIASES.items():
    for name in (size, *aliases):
      repositories[name] = f"openai-community/{aliases[0]}"
  return repositories


PUBLISHED = _published_names()
CONFIG_AND_TOKENIZER = [
  "config.json",
  "tokenizer.json",
  "vocab.json",
  "merges.txt",
  OWN_TOKENIZER,
]
SAFETENSORS = ["model.safetensors", "model.safetensors.index.json", "model-*-of-*.safetensors"]
PICKLED = ["pytorch_model.bin", "pytorch_model.bin.index.json", "pytorch_model-*-of-*.bin"]


def fetch(name: str, revision: str | None = None) -> pathlib.Path:
  """Downloads a repository into the Hub's cache unless it is there; returns its folder.

  Pickled weights are fetched only if there are no safetensors. HF_HUB_OFFLINE=1 keeps to the
  cache; HF_HOME says where it is. Raises OSError or ValueError with what to do.
  """
  # Imported here: `import gpt2_jax` should not load the Hub's client.
  import huggingface_hub

  repository = PUBLISHED.get(name, name)
  try:
    path = huggingface_hub.snapshot_download(
      repository, revision=revision, allow_patterns=CONFIG_AND_TOKENIZER + SAFETENSORS
    )
    if not any(pathlib.Path(path).glob("model*.safetensors")):
      path = huggingface_hub.snapshot_download(
        repository, revision=revision, allow_patterns=CONFIG_AND_TOKENIZER + PICKLED
      )
  except Exception as error:
    # Any kind: the errors of the HTTP library are no OSErrors.
    at_revision = f" at revision {revision}" if revision else ""
    cause = f"{type(error).__name__}: {first_line(error)}"
    raise OSError(
      f"{name} is no path here, and {repository}{at_revision} cannot be had from the Hub ({cause})"
    ) from error
  return pathlib.Path(path)
