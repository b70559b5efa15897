# SPDX-License-Identifier: Apache-2.0
"""Proof that two checkpoints are one model: the same tokens through both in float32, and what came out."""

import dataclasses
import gc
import math
from collections.abc import Callable

import jax
import numpy as np

from gpt2_jax import pretrained
from gpt2_jax.convert import hf, names
from gpt2_jax.convert.weights import digest, progress
from gpt2_jax.model import GPT2, ModelConfig
from gpt2_jax.sharding import BATCH, ROWS, axis_size

KEPT = 2  # windows whose logits are kept, and compared; of the others it is the loss of every token

FUNCTION = ("n_vocab", "n_ctx", "n_embd", "n_head", "n_layer", "use_bias", "gelu")  # of a config: what is computed

Forward = Callable[[np.ndarray], np.ndarray]  # tokens [B, T] to float32 logits [B, T, V]


@dataclasses.dataclass(frozen=True)
class Side:
  """One of the two: where it is from, what it is, and a forward pass that `load` makes when its turn comes."""

  source: str
  config: ModelConfig
  sha256: str | None
  load: Callable[[], Forward]


@dataclasses.dataclass(frozen=True)
class Measured:
  logits_NTV: np.ndarray  # of the first windows
  nats_NT: np.ndarray  # of every predicted token; 0 where there is none


def forward(model: GPT2) -> Forward:
  """A model's forward pass on NumPy arrays, without padding of vocabulary or rows."""
  sharding = jax.sharding.NamedSharding(model.mesh, BATCH)
  compiled = jax.jit(lambda model, tokens_BT: model(tokens_BT))

  def run(tokens_BT):
    with jax.set_mesh(model.mesh):
      missing = -len(tokens_BT) % axis_size(*ROWS)
      placed_BT = jax.device_put(np.pad(tokens_BT, ((0, missing), (0, 0))).astype(np.int32), sharding)
      return np.asarray(compiled(model, placed_BT))[: len(tokens_BT), :, : model.config.n_vocab]

  return run


def ours(name_or_path: str) -> Side:
  """Any checkpoint through this project's model."""
  weights = pretrained.open_weights(name_or_path)
  source, config, sha256 = weights.source, weights.config, digest(weights)
  return Side(source, config, sha256, lambda: forward(pretrained.load_pretrained(name_or_path, dtype="float32")[0]))


def transformers(name_or_path: str) -> Side:
  """A Hugging Face folder or name through transformers' own forward pass, in float32."""
  path = pretrained.find(name_or_path)
  if not hf.recognizes(path):
    raise ValueError(
      f"{path} is no Hugging Face folder, and --oracle=transformers runs one; convert it, or swap the sides"
    )
  weights = pretrained.open_weights(str(path))
  try:
    import torch
    from transformers import GPT2LMHeadModel
  except ImportError as error:
    raise ImportError("the oracle is transformers: pip install torch transformers") from error

  def load():
    model = GPT2LMHeadModel.from_pretrained(path, dtype=torch.float32, local_files_only=True).eval()

    def run(tokens_BT):
      with torch.no_grad():
        return model(torch.from_numpy(tokens_BT.astype(np.int64))).logits.numpy()

    return run

  return Side(f"{path} (transformers' forward)", weights.config, digest(weights), load)


def recorded(path: str, config: ModelConfig) -> tuple[Side, tuple[np.ndarray, np.ndarray]]:
  """The `logits` [B, T, V] that somebody recorded for `tokens` [B, T] in an .npz file, and those tokens as windows."""
  try:
    with np.load(path, allow_pickle=False) as file:
      tokens_BT, logits_BTV = file["tokens"], file["logits"]
  except OSError:
    raise
  except Exception as error:  # a damaged zip raises many kinds
    raise ValueError(f"{path} is no .npz file of tokens [B, T] and logits [B, T, V]") from error
  if tokens_BT.ndim != 2 or tokens_BT.shape[1] < 2 or logits_BTV.shape != (*tokens_BT.shape, config.n_vocab):
    raise ValueError(
      f"{path} has logits {logits_BTV.shape} for tokens {tokens_BT.shape} of {config.n_vocab}; "
      f"it takes [B, T, {config.n_vocab}] for [B, T], of two tokens or more"
    )
  if (
    not len(tokens_BT)
    or tokens_BT.dtype.kind not in "iu"
    or not 0 <= tokens_BT.min() <= tokens_BT.max() < config.n_vocab
  ):
    raise ValueError(f"the tokens in {path} are no integers from 0 to {config.n_vocab - 1}")
  rows = iter(logits_BTV)
  labels_BT = np.pad(tokens_BT[:, 1:], ((0, 0), (0, 1)), constant_values=-1)
  side = Side(f"{path} (recorded)", config, None, lambda: lambda tokens_BT: np.stack([next(rows) for _ in tokens_BT]))
  return side, (tokens_BT, labels_BT)


def windows(tokens: np.ndarray, T: int) -> tuple[np.ndarray, np.ndarray]:
  """Inputs and labels [N, T] that predict every token but the first once; -1 is no label."""
  n = max(1, math.ceil((len(tokens) - 1) / T))
  inputs, labels = np.zeros(n * T, np.int32), np.full(n * T, -1, np.int32)
  inputs[: len(tokens) - 1], labels[: len(tokens) - 1] = tokens[:-1], tokens[1:]
  return inputs.reshape(n, T), labels.reshape(n, T)


def log_softmax(logits: np.ndarray) -> np.ndarray:
  logits = logits.astype(np.float64)
  logits -= logits.max(-1, keepdims=True)
  return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def divergence(x_TV: np.ndarray, y_TV: np.ndarray) -> np.ndarray:
  """KL of the two distributions at each position, nats [T]."""
  p, q = log_softmax(x_TV), log_softmax(y_TV)
  return (np.exp(p) * (p - q)).sum(-1)


def measure(side: Side, inputs_NT: np.ndarray, labels_NT: np.ndarray, rows: int = 1) -> Measured:
  """Logits of the first windows, and the loss of all, `rows` at a time."""
  run, kept, nats = side.load(), [], []
  for start in progress(range(0, len(inputs_NT), rows), "measuring"):
    logits = run(inputs_NT[start : start + rows])
    if not np.isfinite(logits).all():
      raise ValueError(f"{side.source} gives logits that are not finite; are its weights?")
    kept += list(logits[: max(0, KEPT - start)])
    labels = labels_NT[start : start + rows]
    logp = np.take_along_axis(log_softmax(logits), np.maximum(labels, 0)[..., None], -1)[..., 0]
    nats += list(np.where(labels >= 0, -logp, 0.0))
  return Measured(np.stack(kept), np.stack(nats))


def certify(a: Side, b: Side, inputs_NT: np.ndarray, labels_NT: np.ndarray, tolerance: float, rows: int = 1) -> dict:
  """What the two sides say to the same windows, one side in memory at a time; `table` puts it in words.

  They are one model if they have one size, logits differ by `tolerance` at most in the first windows, and the loss of
  no token anywhere by more than such logits allow, twice that.
  """
  found = []
  for side in (a, b):
    found.append(measure(side, inputs_NT, labels_NT, rows))
    gc.collect()
  V = min(a.config.n_vocab, b.config.n_vocab)
  x, y = (side.logits_NTV[..., :V] for side in found)
  kl = np.stack([divergence(*pair) for pair in zip(x, y, strict=True)])
  delta = float(np.abs(x - y).max())
  delta_nats = float(np.abs(found[0].nats_NT - found[1].nats_NT).max())
  one_size = all(getattr(a.config, size) == getattr(b.config, size) for size in ("n_vocab", "n_ctx"))
  tokens = int((labels_NT >= 0).sum())
  return {
    "a": _about(a, found[0], tokens),
    "b": _about(b, found[1], tokens),
    "same_weights": None if None in (a.sha256, b.sha256) else a.sha256 == b.sha256,
    "config_differences": {
      name: [getattr(side.config, name) for side in (a, b)]
      for name in FUNCTION
      if getattr(a.config, name) != getattr(b.config, name)
    },
    "positions": kl.size,
    "max_abs_logit_difference": delta,
    "max_abs_nats_difference": delta_nats,
    "kl_nats_mean": float(kl.mean()),
    "kl_nats_max": float(kl.max()),
    "greedy_agreement": float((x.argmax(-1) == y.argmax(-1)).mean()),
    "tolerance": tolerance,
    "same_model": one_size and delta <= tolerance and delta_nats <= 2 * tolerance,
  }


def _about(side: Side, found: Measured, tokens: int) -> dict:
  size = sum(math.prod(shape) for shape in names.shapes(side.config).values())
  loss = float(found.nats_NT.sum()) / tokens
  return {"source": side.source, "sha256": side.sha256, "parameters": size, "loss_nats": loss, "tokens": tokens}


def table(certificate: dict) -> str:
  """The certificate for people."""
  a, b, lines = certificate["a"], certificate["b"], []
  for letter, side in (("A", a), ("B", b)):
    lines.append(f"{letter}  {side['source']}, {side['parameters']:,} parameters")
    lines.append(f"   weights sha256 {side['sha256'] or 'not known'}")
    lines.append(f"   loss {side['loss_nats']:.6f} nats a token over {side['tokens']:,} tokens")
  lines.append(f"weights         {_words(certificate['same_weights'])}")
  for name, (mine, other) in certificate["config_differences"].items():
    lines.append(f"config          {name}: {mine} | {other}")
  lines.append(
    f"max |d logit|   {certificate['max_abs_logit_difference']:.3e} over {certificate['positions']:,} positions"
  )
  lines.append(f"max |d nats|    {certificate['max_abs_nats_difference']:.3e} over all {a['tokens']:,} tokens")
  lines.append(f"KL(A || B)      mean {certificate['kl_nats_mean']:.3e}, max {certificate['kl_nats_max']:.3e} nats")
  lines.append(f"greedy          {100 * certificate['greedy_agreement']:.2f} % of positions agree")
  verdict = "the same model" if certificate["same_model"] else "NOT the same model"
  lines.append(f"verdict         {verdict} at a tolerance of {certificate['tolerance']:.0e} on the logits")
  return "\n".join(lines)


def _words(same: bool | None) -> str:
  return {True: "identical", False: "differ", None: "not compared"}[same]


def text_windows(text: str, tokenizer, n_ctx: int) -> tuple[np.ndarray, np.ndarray]:
  """Windows of a text's tokens, of `n_ctx` at most. Raises ValueError if there is no tokenizer, or no two tokens."""
  if tokenizer is None:
    raise ValueError("the checkpoint has no tokenizer to read the text with; leave --text out, or add its files")
  tokens = np.array(tokenizer.encode(text), np.int32)
  if len(tokens) < 2:
    raise ValueError("the text has fewer than two tokens; there is nothing to predict")
  return windows(tokens, min(n_ctx, len(tokens) - 1))


def random_windows(n_vocab: int, n_ctx: int) -> tuple[np.ndarray, np.ndarray]:
  """Seeded random tokens in windows as long as the context: what is compared where there is no text."""
  tokens_NT = np.random.default_rng(0).integers(0, n_vocab, (KEPT, n_ctx + 1))
  return tokens_NT[:, :-1].astype(np.int32), tokens_NT[:, 1:].astype(np.int32)
