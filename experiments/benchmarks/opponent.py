# SPDX-License-Identifier: Apache-2.0
"""The opponent of the benchmarks: transformers' GPT-2, and ours with the same random weights."""

import torch
import transformers

from gpt2_jax.compat import get_mesh
from gpt2_jax.convert import names
from gpt2_jax.convert.weights import Weights, to_model
from gpt2_jax.model import GPT2, ModelConfig


def their_model(config: ModelConfig, seed: int = 0):
  """A random transformers GPT-2 of these sizes, in float32, without dropout.

  Biases and LayerNorm gains are noisy, too: at their initial 0 and 1 an error in them would not
  show.
  """
  torch.manual_seed(seed)

  # Without special tokens no generation ends early.
  their_config = transformers.GPT2Config(
    vocab_size=config.n_vocab,
    n_embd=config.n_embd,
    n_layer=config.n_layer,
    n_head=config.n_head,
    n_positions=config.n_ctx,
    resid_pdrop=0.0,
    embd_pdrop=0.0,
    attn_pdrop=0.0,
    bos_token_id=None,
    eos_token_id=None,
    pad_token_id=0,
  )
  model = transformers.GPT2LMHeadModel(their_config)

  # Biases and gains are the parameters with one axis.
  with torch.no_grad():
    for parameter in model.parameters():
      if parameter.ndim == 1:
        parameter.add_(0.05 * torch.randn_like(parameter))
  return model


def our_model(theirs, config: ModelConfig) -> GPT2:
  """The same weights in this project's model, on the mesh in force."""
  # Through the converter, as a published checkpoint would come.
  tensors = theirs.transformer.state_dict()

  def read(name):
    return tensors[names.translate_name(name, names.TORCH)].numpy()

  weights = Weights(config, read, None, "transformers")
  return to_model(weights, get_mesh(), config.dtype)
