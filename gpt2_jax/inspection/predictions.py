# SPDX-License-Identifier: Apache-2.0
"""What a model expects: the loss of each token of a text, and the distribution of the next token.

Letters as in model.py.
"""

import dataclasses

import jax
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from gpt2_jax.decoding.kv_cache import InferenceModel, check_finite, last_token
from gpt2_jax.decoding.prompts import BUCKET, check_prompts, pad_prompts
from gpt2_jax.evaluate.loglikelihood import score_rows, sliding_windows
from gpt2_jax.inspection.labels import token_labels
from gpt2_jax.model import GPT2
from gpt2_jax.sharding import RESIDUAL, ROWS, axis_size, padded
from gpt2_jax.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True, eq=False)
class TokenScores:
  """The loss of each token of a text."""

  tokens: list[int]
  labels: list[str]  # the tokens, printable
  nats: np.ndarray  # [T], -log p of each token after those before it; NaN where nothing was before
  is_first_choice: np.ndarray  # [T], whether it was the model's first choice

  @property
  def loss(self) -> float:
    """Mean of nats over the scored tokens."""
    return float(self.nats[~np.isnan(self.nats)].mean())

  @property
  def perplexity(self) -> float:
    """exp(loss): per token of this tokenizer."""
    return float(np.exp(self.loss))

  def __repr__(self) -> str:
    return (
      f"TokenScores({len(self.tokens):,} tokens, loss {self.loss:.3f} nats a token, "
      f"perplexity {self.perplexity:.2f})"
    )


@dataclasses.dataclass(frozen=True, eq=False)
class NextTokens:
  """The most likely next tokens after a text, the first choice first."""

  text: str
  tokens: list[int]
  labels: list[str]  # the tokens, printable
  probabilities: np.ndarray  # [N], float64

  def __repr__(self) -> str:
    shown = [
      f"{label} {probability:.1%}"
      for label, probability in zip(self.labels[:5], self.probabilities[:5], strict=True)
    ]
    more = ", ..." if len(self.tokens) > 5 else ""
    return f"NextTokens({', '.join(shown)}{more})"


def score(model: GPT2, tokenizer: Tokenizer, text: str, stride: int | None = None) -> TokenScores:
  """Scores a text of any length: -log p of each token, in nats.

  The first token is scored after `<|endoftext|>`, as in the evaluation; a tokenizer without that
  token leaves it out. Texts longer than the context are read in windows that slide by `stride`
  tokens (default: the context). Raises ValueError for a text without a token to score,
  FloatingPointError where the model's logits are not finite.
  """
  # 1. Encode.
  ids = encode_text(model, tokenizer, text)
  n_ctx = model.config.n_ctx
  if stride is not None and not 1 <= stride <= n_ctx:
    raise ValueError(f"a stride of {stride} is not from 1 to the context's {n_ctx}")
  start = [] if tokenizer.eot is None else [tokenizer.eot]
  if len(start) + len(ids) < 2:
    raise ValueError(
      f"a text of {len(ids)} tokens leaves none to score; give a longer one (this tokenizer has no "
      f"<|endoftext|> to put before it)"
    )

  # 2. Short texts are padded on the right, which a causal model cannot see, so that few shapes are
  #    compiled.
  read = np.array([*start, *ids], np.int32)
  n_scored = len(read) - 1
  if len(read) <= n_ctx:
    read = np.pad(read, (0, min(padded(n_scored, BUCKET), n_ctx) - n_scored))

  # 3. Score. Without `<|endoftext|>` the first token has no score.
  windows = score_rows(model, sliding_windows(read, n_ctx, stride or n_ctx), batch_size=8)
  nats = np.concatenate([nats for nats, _ in windows])[:n_scored]
  is_first_choice = np.concatenate([first for _, first in windows])[:n_scored]
  unscored = len(ids) - n_scored
  return TokenScores(
    ids,
    token_labels(tokenizer, ids),
    np.concatenate([np.full(unscored, np.nan, nats.dtype), nats]),
    np.concatenate([np.zeros(unscored, bool), is_first_choice]),
  )


def next_tokens(model: GPT2, tokenizer: Tokenizer, text: str, n: int = 10) -> NextTokens:
  """The `n` most likely next tokens after a text, with their probabilities.

  These are the model's own, before any sampler: all `n_vocab` of them sum to 1. The text is read as
  `complete` reads it; of one that is longer than the context the last tokens are read, and an empty
  one is `<|endoftext|>`. Raises ValueError for an `n` that is not from 1 to n_vocab.
  """
  # 1. Encode. The columns are rounded up, so that few shapes are compiled.
  ids = encode_text(model, tokenizer, text)
  config = model.config
  if not 1 <= n <= config.n_vocab:
    raise ValueError(f"{n} next tokens of a vocabulary of {config.n_vocab}; give 1 to that many")
  ids = ids[-config.n_ctx :]
  if not ids:
    ids = [] if tokenizer.eot is None else [tokenizer.eot]
  check_prompts(InferenceModel(model, model.wte[...], []), [ids], n_new=1)

  # 2. The last position's log-probabilities.
  with jax.set_mesh(model.mesh):
    logprobs_V = np.asarray(_next_logprobs(model, *one_row(model, ids)), np.float64)
  check_finite(not np.isfinite(logprobs_V).all())

  # 3. Sort; of equal tokens the first comes first.
  tokens = np.argsort(-logprobs_V, kind="stable")[:n].tolist()
  return NextTokens(text, tokens, token_labels(tokenizer, tokens), np.exp(logprobs_V[tokens]))


@jax.jit
def _next_logprobs(model: GPT2, tokens_BT, length_B):
  """Log-probabilities of the next token after the first row, [V] without padding."""
  x_BTD = model.hidden(model.embed(tokens_BT))[0]
  logits_B1V = jax.sharding.reshard(model.head(last_token(x_BTD, length_B)), RESIDUAL)
  logprobs_B1V = jax.nn.log_softmax(logits_B1V[..., : model.config.n_vocab])
  return jax.sharding.reshard(logprobs_B1V, P())[0, 0]


def encode_text(model: GPT2, tokenizer: Tokenizer, text: str) -> list[int]:
  """The ids of a text. Raises ValueError or TypeError for what is no model, tokenizer or text."""
  if isinstance(model, InferenceModel):
    raise TypeError("give the model itself, as load_pretrained returns it, not for_inference's")
  if tokenizer is None:
    raise ValueError("there is no tokenizer to read the text with; give one, as of load_tokenizer")
  if not isinstance(text, str):
    raise TypeError(f"a text is a str, and this is a {type(text).__name__}")
  return tokenizer.encode(text)


def one_row(model: GPT2, ids: list[int]):
  """One row of tokens on the mesh in force: tokens [B, T] and lengths [B], B and T rounded up.

  The first row holds the ids; the others only fill the mesh, and have length 0.
  """
  T = min(model.config.n_ctx, padded(len(ids), BUCKET))
  tokens_BT, length_B = pad_prompts([ids], (axis_size(*ROWS), T))
  return jax.device_put((tokens_BT, length_B), NamedSharding(model.mesh, P(ROWS)))
