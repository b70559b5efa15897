# SPDX-License-Identifier: Apache-2.0
"""Hugging Face transformers' GPT-2, and ours with the same weights."""

import jax
import torch
import transformers

from gpt2_jax.convert import names
from gpt2_jax.convert.weights import Weights, to_model
from gpt2_jax.model import GPT2, ModelConfig


def their_model(config: ModelConfig, seed: int = 0):
  """A random transformers GPT-2 of these sizes in float32; biases and gains are noisy too, so that they count."""
  torch.manual_seed(seed)
  sizes = {"n_embd": config.n_embd, "n_layer": config.n_layer, "n_head": config.n_head, "n_positions": config.n_ctx}
  rates = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
  ends = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": 0}
  model = transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=config.n_vocab, **sizes, **rates, **ends))
  with torch.no_grad():
    for parameter in model.parameters():
      if parameter.ndim == 1:
        parameter.add_(0.05 * torch.randn_like(parameter))
  return model


def our_model(theirs, config: ModelConfig) -> GPT2:
  """The same weights in this project's model, on the mesh in force."""
  tensors = theirs.transformer.state_dict()

  def read(name):
    return tensors[names.foreign(name, names.TORCH)].numpy()

  return to_model(Weights(config, read, None, "transformers"), jax.sharding.get_mesh(), config.dtype)
