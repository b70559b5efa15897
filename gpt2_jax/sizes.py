# SPDX-License-Identifier: Apache-2.0
"""What a GPT-2 is, in numbers: ModelConfig, and the published sizes with their names; and GPT-1.

It imports no JAX, so that a config file can be read, and its knobs be listed, at once.
"""

import dataclasses
import difflib
import math

from gpt2_jax.kernels import CROSS_ENTROPY_KERNELS, KERNELS

FAMILIES = ("gpt2", "gpt1")
GELU = ("tanh", "erf")
DTYPES = ("float32", "bfloat16")
REMAT = ("none", "dots", "attention", "full")


@dataclasses.dataclass(frozen=True)
class ModelConfig:
  """What a GPT-2 is (OpenAI's hparams first), then how it is computed.

  Raises ValueError on what cannot be, with the rule.
  """

  n_vocab: int = 50257
  n_ctx: int = 1024
  n_embd: int = 768
  n_head: int = 12
  n_layer: int = 12
  use_bias: bool = True  # False: as nanoGPT trains, no bias in Linear or LayerNorm
  gelu: str = "tanh"  # "erf" for nanoGPT's checkpoints
  embd_pdrop: float = 0.0
  attn_pdrop: float = 0.0
  resid_pdrop: float = 0.0
  # Mixed precision: the dtype of activations and matmul operands. Parameters, norms, softmax and
  # loss are float32.
  dtype: str = "bfloat16"
  # Zero heads up to a multiple of the mesh's model axis. Attention dropout draws numbers for them.
  pad_heads: bool = False
  attention: str = "auto"  # the kernel that trains and scores, see attention.self_attention
  cross_entropy: str = "auto"  # the kernel of the head and its loss, see loss.next_token_nats
  # What the backward pass recomputes: "none", "dots" (all but matmuls and attention), "attention"
  # (all but attention with its two projections), "full".
  remat: str = "none"
  unroll: int = 1  # layers a step of the scan; n_layer is a Python loop
  family: str = "gpt2"  # "gpt1": LayerNorms after the sums, and none at the end (gpt1.py)

  def __post_init__(self):
    for name in ("n_vocab", "n_ctx", "n_embd", "n_head", "n_layer", "unroll"):
      if getattr(self, name) < 1:
        raise ValueError(f"{name} is {getattr(self, name)}; it is 1 or more")
    if self.n_embd % self.n_head:
      raise ValueError(f"n_embd of {self.n_embd} does not divide by n_head of {self.n_head}")

    choices = {
      "family": FAMILIES,
      "gelu": GELU,
      "remat": REMAT,
      "attention": KERNELS,
      "dtype": DTYPES,
    }
    choices["cross_entropy"] = CROSS_ENTROPY_KERNELS
    for name, allowed in choices.items():
      if getattr(self, name) not in allowed:
        value = str(getattr(self, name))[:80]
        raise ValueError(f"{name} is {value!r}; it is one of {', '.join(allowed)}")
    for name in ("embd_pdrop", "attn_pdrop", "resid_pdrop"):
      rate = getattr(self, name)
      if not 0 <= rate < 1:
        raise ValueError(f"{name} is {rate}; a dropout rate is at least 0 and below 1")

  @property
  def head_size(self) -> int:
    return self.n_embd // self.n_head

  @property
  def n_params(self) -> int:
    """Number of parameters, without padding; the tied head counts once."""
    D = self.n_embd
    norms, biases = (4 * D, 9 * D) if self.use_bias else (2 * D, 0)  # of one layer
    layer = 12 * D * D + norms + biases
    ln_f = 0 if self.family == "gpt1" else norms // 2
    return (self.n_vocab + self.n_ctx) * D + self.n_layer * layer + ln_f

  @property
  def padded_heads(self) -> int:
    """Heads held, on the mesh in force. Raises ValueError where padding is needed and is off."""
    from gpt2_jax.sharding import axis_size, padded

    n = axis_size("model")
    if self.n_head % n and not self.pad_heads:
      raise ValueError(
        f"{self.n_head} heads do not divide the model axis of {n}; "
        f"set --config.model.pad_heads=True"
      )
    return padded(self.n_head, n)

  @property
  def padded_vocab(self) -> int:
    """Rows of wte held, on the mesh in force: a multiple of 128 (50,257 -> 50,304) and of the axes
    that split them."""
    from gpt2_jax.sharding import axis_size, padded

    return padded(self.n_vocab, math.lcm(128, axis_size("model", "data")))


SIZES = {
  "117M": ModelConfig(n_embd=768, n_head=12, n_layer=12),
  "345M": ModelConfig(n_embd=1024, n_head=16, n_layer=24),
  "762M": ModelConfig(n_embd=1280, n_head=20, n_layer=36),
  "1542M": ModelConfig(n_embd=1600, n_head=25, n_layer=48),
  "distilgpt2": ModelConfig(n_embd=768, n_head=12, n_layer=6),
}
GPT1_CONFIG = ModelConfig(
  n_vocab=40478, n_ctx=512, embd_pdrop=0.1, attn_pdrop=0.1, resid_pdrop=0.1, family="gpt1"
)
GPT1_NAMES = ("gpt1", "openai-gpt")
ALIASES = {
  "117M": ("gpt2", "124M"),
  "345M": ("gpt2-medium", "355M"),
  "762M": ("gpt2-large", "774M"),
  "1542M": ("gpt2-xl", "1558M", "1.5B"),
}


def model_config(size: str) -> ModelConfig:
  """The ModelConfig of a published size, by the paper's name or today's.

  Raises ValueError on another, with the nearest.
  """
  names = {}
  for name, aliases in ALIASES.items():
    names |= dict.fromkeys(aliases, name)
  for name in SIZES:
    names[name] = name
  if size not in names:
    near = difflib.get_close_matches(size, names, 1, cutoff=0)[0]
    raise ValueError(
      f"unknown size {size[:80]!r}; did you mean {near!r}? Sizes are {', '.join(names)}"
    )
  return SIZES[names[size]]
