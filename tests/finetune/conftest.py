# SPDX-License-Identifier: Apache-2.0
"""What the tests of adapters share: a small base that transformers wrote, and peft over it."""

import numpy as np
import pytest

N_VOCAB, N_CTX = 61, 16


@pytest.fixture(scope="session")
def base_folder(tmp_path_factory):
  """A Hugging Face folder of a random GPT-2 with three heads, none of its tensors at its init."""
  torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
  torch.set_num_threads(1)  # one is fastest for models as small as these
  sizes = {"vocab_size": N_VOCAB, "n_positions": N_CTX, "n_embd": 24, "n_layer": 2, "n_head": 3}
  config = transformers.GPT2Config(**sizes, embd_pdrop=0, attn_pdrop=0, resid_pdrop=0)
  model = transformers.GPT2LMHeadModel(config)
  draw = torch.Generator().manual_seed(0)
  with torch.no_grad():
    for parameter in model.parameters():
      parameter += torch.randn(parameter.shape, generator=draw) * 0.2
  path = tmp_path_factory.mktemp("base") / "base"
  model.save_pretrained(path)
  return path


@pytest.fixture
def their_base(base_folder):
  transformers = pytest.importorskip("transformers")
  return transformers.GPT2LMHeadModel.from_pretrained(base_folder).eval()


@pytest.fixture(scope="session")
def tokens_NT():
  return np.random.default_rng(1).integers(0, N_VOCAB, (2, N_CTX)).astype(np.int32)


@pytest.fixture(scope="session")
def randomized():
  """randomized(module): moves what is trained, and not only zeros, in a peft model."""
  torch = pytest.importorskip("torch")

  def randomize(model):
    draw = torch.Generator().manual_seed(7)
    with torch.no_grad():
      for parameter in model.parameters():
        if parameter.requires_grad:
          parameter += torch.randn(parameter.shape, generator=draw) * 0.2
    return model

  return randomize
