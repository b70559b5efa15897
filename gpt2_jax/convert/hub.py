# SPDX-License-Identifier: Apache-2.0
"""Downloads checkpoints from the Hugging Face Hub, by published name, through its cache."""

import pathlib
import re

from gpt2_jax.files import first_line
from gpt2_jax.sizes import ALIASES, GPT1_NAMES
from gpt2_jax.tokenizer import OWN_TOKENIZER
from gpt2_jax.tokenizer.companion_files import COMPANIONS, MORE_CHAT_TEMPLATES
from gpt2_jax.tokenizer.folder import VOCABULARIES


def _published_names() -> dict[str, str]:
  """The Hub's repository of every name that a published size has."""
  repositories = {"distilgpt2": "distilbert/distilgpt2"}
  repositories |= dict.fromkeys(GPT1_NAMES, "openai-community/openai-gpt")
  for size, aliases in ALIASES.items():
    for name in (size, *aliases):
      repositories[name] = f"openai-community/{aliases[0]}"
  return repositories


PUBLISHED = _published_names()
CONFIG_AND_TOKENIZER = [
  "config.json",
  OWN_TOKENIZER,
  *VOCABULARIES,
  *COMPANIONS,
  f"{MORE_CHAT_TEMPLATES}/*.jinja",
]
SAFETENSORS = ["model.safetensors", "model.safetensors.index.json", "model-*-of-*.safetensors"]
PICKLED = ["pytorch_model.bin", "pytorch_model.bin.index.json", "pytorch_model-*-of-*.bin"]


ADAPTER = ["adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"]


def is_repository(name: str) -> bool:
  """Whether a name is written as OWNER/NAME, as the Hub has them, and not as a path."""
  return re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name) is not None


def fetch_adapter(name: str) -> pathlib.Path:
  """Downloads an adapter's repository into the Hub's cache unless it is there; its folder.

  Raises OSError.
  """
  return _download(name, name, None, ADAPTER)


def fetch(name: str, revision: str | None = None) -> pathlib.Path:
  """Downloads a repository into the Hub's cache unless it is there; returns its folder.

  Pickled weights are fetched only if there are no safetensors. HF_HUB_OFFLINE=1 keeps to the
  cache; HF_HOME says where it is. Raises OSError or ValueError with what to do.
  """
  repository = PUBLISHED.get(name, name)
  path = _download(name, repository, revision, CONFIG_AND_TOKENIZER + SAFETENSORS)
  if not any(path.glob("model*.safetensors")):
    path = _download(name, repository, revision, CONFIG_AND_TOKENIZER + PICKLED)
  return path


def _download(
  name: str, repository: str, revision: str | None, patterns: list[str]
) -> pathlib.Path:
  """The folder of a repository's files that match. Raises OSError for whatever the Hub raises."""
  # Imported here: `import gpt2_jax` should not load the Hub's client.
  import huggingface_hub

  try:
    path = huggingface_hub.snapshot_download(repository, revision=revision, allow_patterns=patterns)
  except Exception as error:
    # Any kind: the errors of the HTTP library are no OSErrors.
    at_revision = f" at revision {revision}" if revision else ""
    cause = f"{type(error).__name__}: {first_line(error)}"
    raise OSError(
      f"{name} is no path here, and {repository}{at_revision} cannot be had from the Hub ({cause})"
    ) from error
  return pathlib.Path(path)
