# SPDX-License-Identifier: Apache-2.0
"""Parity of two checkpoints: whether they compute the same model, by logits and loss in float32.

Both run over the same tokens. `compare` returns the figures that `gpt2-jax convert --verify`
writes to parity.json.
"""

import dataclasses
import gc
import math
import pathlib
from collections.abc import Callable, Iterable

import jax
import numpy as np

from gpt2_jax.convert import hf, names, pretrained
from gpt2_jax.convert.weights import Weights, add_zero_biases, weights_sha256
from gpt2_jax.files import first_line, local_path, progress, summarize
from gpt2_jax.model import GPT2, ModelConfig
from gpt2_jax.sharding import BATCH, ROWS, axis_size

# Windows whose logits are kept and compared, at least; of the others it is the loss of every token.
KEPT = 2
# Bytes of one model's logits that are kept where nobody says how many windows.
KEPT_BYTES = 2**30

# The fields of a config that decide what is computed.
FUNCTION = ("n_vocab", "n_ctx", "n_embd", "n_head", "n_layer", "use_bias", "gelu", "family")

Forward = Callable[[np.ndarray], np.ndarray]  # tokens [B, T] to float32 logits [B, T, V]


@dataclasses.dataclass(frozen=True)
class Model:
  """One of the two models: its source, config and SHA-256, and its forward pass.

  `load` makes the forward pass, so that only one model is in memory at a time.
  """

  source: str
  config: ModelConfig
  sha256: str | None
  load: Callable[[], Forward]


@dataclasses.dataclass(frozen=True)
class Measurement:
  """Logits of the first windows, and the loss in nats of every predicted token."""

  logits_NTV: np.ndarray
  nats_NT: np.ndarray  # 0 where no token is predicted


# The two models.


def forward(model: GPT2) -> Forward:
  """A GPT2's forward pass on NumPy arrays, without padding of vocabulary or rows."""
  sharding = jax.sharding.NamedSharding(model.mesh, BATCH)
  compiled = jax.jit(lambda model, tokens_BT: model(tokens_BT))

  def run(tokens_BT):
    with jax.set_mesh(model.mesh):
      # The batch has to divide by the axes that shard its rows.
      missing = -len(tokens_BT) % axis_size(*ROWS)
      padded_BT = np.pad(tokens_BT, ((0, missing), (0, 0))).astype(np.int32)
      logits_BTV = compiled(model, jax.device_put(padded_BT, sharding))
      return np.asarray(logits_BTV)[: len(tokens_BT), :, : model.config.n_vocab]

  return run


def load_ours(name_or_path: str) -> Model:
  """Loads any checkpoint for this project's own forward pass, in float32."""
  weights = pretrained.open_weights(name_or_path)

  def load():
    return forward(pretrained.load_pretrained(name_or_path, dtype="float32")[0])

  return Model(weights.source, weights.config, weights_sha256(weights), load)


def load_transformers(name_or_path: str) -> Model:
  """Loads any checkpoint for transformers' own forward pass, in float32.

  A Hugging Face folder it reads itself; of another format it gets the weights as they are read
  here.
  """
  path = pretrained.resolve_checkpoint(name_or_path)
  is_own = (path / "config.json").is_file()
  weights = hf.read(pathlib.Path(path)) if is_own else pretrained.open_weights(name_or_path)

  # Imported here: both are needed for this oracle only, and slow to import.
  try:
    import torch
    from transformers import GPT2LMHeadModel, OpenAIGPTLMHeadModel
  except ImportError as error:
    raise ImportError("the oracle is transformers: pip install torch transformers") from error

  def load():
    try:
      if is_own:
        is_gpt1 = weights.config.family == "gpt1"
        model_class = OpenAIGPTLMHeadModel if is_gpt1 else GPT2LMHeadModel
        model, info = model_class.from_pretrained(
          path, dtype=torch.float32, local_files_only=True, output_loading_info=True
        )
        _check_all_loaded(info["missing_keys"], path)
      else:
        model = _to_transformers(weights)
    except Exception as error:
      # Any kind: it passes on what torch, the Hub's client and safetensors raise.
      raise ValueError(f"transformers cannot load {path}: {first_line(error)}") from error
    model.eval()

    def run(tokens_BT):
      with torch.no_grad():
        return model(torch.from_numpy(tokens_BT.astype(np.int64))).logits.numpy()

    return run

  return Model(f"{path} (transformers' forward)", weights.config, weights_sha256(weights), load)


def _check_all_loaded(missing: Iterable[str], path: pathlib.Path) -> None:
  """Raises ValueError for parameters that transformers has not found, and has drawn at random."""
  if missing := sorted(missing):
    raise ValueError(
      f"it finds no {summarize(map(repr, missing), 3)} there; convert {path.name} to hf, "
      f"which writes transformers' own names, and compare that"
    )


def _to_transformers(weights: Weights):
  """The transformers model of a checkpoint of any format, in float32."""
  import torch
  from transformers import GPT2Config, GPT2LMHeadModel, OpenAIGPTConfig, OpenAIGPTLMHeadModel

  weights = add_zero_biases(weights)
  state = {}
  for name in names.shapes(weights.config):
    tensor = np.array(weights.read(name), np.float32)
    state["transformer." + names.hugging_face_name(name, weights.config)] = torch.from_numpy(tensor)
  wte = names.hugging_face_name("wte", weights.config)
  state["lm_head.weight"] = state[f"transformer.{wte}"]

  payload = hf.config_json(weights.config, "float32", None)
  if weights.config.family == "gpt1":
    model = OpenAIGPTLMHeadModel(OpenAIGPTConfig.from_dict(payload))
  else:
    model = GPT2LMHeadModel(GPT2Config.from_dict(payload))
  model.load_state_dict(state)
  return model


def load_recorded(path: str, config: ModelConfig) -> tuple[Model, tuple[np.ndarray, np.ndarray]]:
  """Loads recorded logits from an .npz file as a model, and its tokens as inputs and labels.

  The file holds `tokens` [B, T] and `logits` [B, T, V]. Raises ValueError for any other.
  """
  # 1. Read the two arrays. NumPy's pickles are refused: they may run code.
  path = local_path(path)
  try:
    with np.load(path, allow_pickle=False) as file:
      tokens_BT, logits_BTV = file["tokens"], file["logits"]
  except (FileNotFoundError, PermissionError, IsADirectoryError):
    raise
  except Exception as error:
    # Any kind: a damaged zip raises many.
    raise ValueError(f"{path} is no .npz file of tokens [B, T] and logits [B, T, V]") from error

  # 2. They belong to each other, and to the config.
  n_vocab = config.n_vocab
  shape = tokens_BT.shape
  if len(shape) != 2 or shape[1] < 2 or logits_BTV.shape != (*shape, n_vocab):
    raise ValueError(
      f"{path} has logits {logits_BTV.shape} for tokens {shape} of {n_vocab}; "
      f"it takes [B, T, {n_vocab}] for [B, T], of two tokens or more"
    )
  is_integer = tokens_BT.dtype.kind in "iu"
  if logits_BTV.dtype.kind not in "fiu":
    raise ValueError(f"the logits in {path} are {str(logits_BTV.dtype)[:40]}, and no numbers")
  if not len(tokens_BT) or not is_integer or not 0 <= tokens_BT.min() <= tokens_BT.max() < n_vocab:
    raise ValueError(f"the tokens in {path} are no integers from 0 to {n_vocab - 1}")

  # 3. The forward pass hands out the rows in order, for `measure` asks for them once and in order.
  labels_BT = np.pad(tokens_BT[:, 1:], ((0, 0), (0, 1)), constant_values=-1)
  rows = iter(logits_BTV)

  def run(tokens_BT):
    return np.stack([next(rows) for _ in tokens_BT])

  return Model(f"{path} (recorded)", config, None, lambda: run), (tokens_BT, labels_BT)


# The tokens.


def token_windows(tokens: np.ndarray, T: int) -> tuple[np.ndarray, np.ndarray]:
  """Inputs and labels [N, T] that predict every token but the first once; -1 is no label."""
  n_labels = len(tokens) - 1
  n_windows = max(1, math.ceil(n_labels / T))
  inputs = np.zeros(n_windows * T, np.int32)
  labels = np.full(n_windows * T, -1, np.int32)
  inputs[:n_labels] = tokens[:-1]
  labels[:n_labels] = tokens[1:]
  return inputs.reshape(n_windows, T), labels.reshape(n_windows, T)


def text_windows(text: str, tokenizer, n_ctx: int) -> tuple[np.ndarray, np.ndarray]:
  """Token windows of a text, of at most `n_ctx` tokens each.

  Raises ValueError without a tokenizer, or for a text of fewer than two tokens.
  """
  if tokenizer is None:
    raise ValueError(
      "the checkpoint has no tokenizer to read the text with; leave --text out, or add its files"
    )
  tokens = np.array(tokenizer.encode(text), np.int32)
  if len(tokens) < 2:
    raise ValueError("the text has fewer than two tokens; there is nothing to predict")
  return token_windows(tokens, min(n_ctx, len(tokens) - 1))


def random_windows(n_vocab: int, n_ctx: int) -> tuple[np.ndarray, np.ndarray]:
  """KEPT windows of seeded random tokens as long as the context, for a comparison without text."""
  tokens_NT = np.random.default_rng(0).integers(0, n_vocab, (KEPT, n_ctx + 1))
  return tokens_NT[:, :-1].astype(np.int32), tokens_NT[:, 1:].astype(np.int32)


# The comparison.


def log_softmax(logits: np.ndarray) -> np.ndarray:
  """Log-softmax over the last axis in float64, so that its own error does not count."""
  logits = logits.astype(np.float64)
  logits -= logits.max(-1, keepdims=True)
  return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def kl_divergence(x_TV: np.ndarray, y_TV: np.ndarray) -> np.ndarray:
  """KL divergence of the distributions of two logits at each position, in nats, [T]."""
  p, q = log_softmax(x_TV), log_softmax(y_TV)
  return (np.exp(p) * (p - q)).sum(-1)


def windows_that_fit(n_windows: int, T: int, n_vocab: int) -> int:
  """How many windows' logits KEPT_BYTES hold: all of a short text, and KEPT at least."""
  fitting = KEPT_BYTES // (T * n_vocab * np.dtype(np.float32).itemsize)
  return min(n_windows, max(KEPT, fitting))


def measure(
  model: Model,
  inputs_NT: np.ndarray,
  labels_NT: np.ndarray,
  rows: int = 1,
  kept_windows: int = KEPT,
) -> Measurement:
  """Runs a model over the windows, `rows` at a time, and keeps the logits of the first windows.

  Raises ValueError for logits that are not finite.
  """
  run = model.load()
  logits, nats = [], []
  for start in progress(range(0, len(inputs_NT), rows), "measuring"):
    logits_BTV = run(inputs_NT[start : start + rows])
    if not np.isfinite(logits_BTV).all():
      raise ValueError(f"{model.source} gives logits that are not finite; are its weights?")

    # Logits of a whole text do not fit in memory: after the first windows only the loss is kept.
    logits += list(logits_BTV[: max(0, kept_windows - start)])
    labels_BT = labels_NT[start : start + rows]
    has_label_BT = labels_BT >= 0
    indices_BT1 = np.maximum(labels_BT, 0)[..., None]
    logp_BT = np.take_along_axis(log_softmax(logits_BTV), indices_BT1, -1)[..., 0]
    nats += list(np.where(has_label_BT, -logp_BT, 0.0))
  return Measurement(np.stack(logits), np.stack(nats))


def compare(
  a: Model,
  b: Model,
  inputs_NT: np.ndarray,
  labels_NT: np.ndarray,
  tolerance: float,
  rows: int = 1,
  kept_windows: int = KEPT,
) -> dict:
  """Compares two models on the same windows; `table` formats the result, parity.json holds it.

  They are the same model if sizes agree, logits differ by `tolerance` at most in the first
  `kept_windows` windows, and the loss of no token differs by more than twice that: no logits
  closer than `tolerance` move a loss further.
  """
  # 1. Measure, one model in memory at a time.
  measured_a = measure(a, inputs_NT, labels_NT, rows, kept_windows)
  gc.collect()
  measured_b = measure(b, inputs_NT, labels_NT, rows, kept_windows)
  gc.collect()

  # 2. Compare over the tokens that both have; a difference of size is another model anyway.
  V = min(a.config.n_vocab, b.config.n_vocab)
  x_NTV = measured_a.logits_NTV[..., :V]
  y_NTV = measured_b.logits_NTV[..., :V]
  kl_NT = np.stack(list(map(kl_divergence, x_NTV, y_NTV)))
  max_logit = float(np.abs(x_NTV - y_NTV).max())
  max_nats = float(np.abs(measured_a.nats_NT - measured_b.nats_NT).max())

  differences = _config_differences(a.config, b.config)
  same_size = not {"n_vocab", "n_ctx"} & differences.keys()

  # 3. The figures. A recorded model has no weights to hash.
  tokens = int((labels_NT >= 0).sum())
  return {
    "a": _summary(a, measured_a, tokens),
    "b": _summary(b, measured_b, tokens),
    "same_weights": None if None in (a.sha256, b.sha256) else a.sha256 == b.sha256,
    "config_differences": differences,
    "windows": len(inputs_NT),
    "windows_compared": len(kl_NT),
    "positions": kl_NT.size,
    "max_abs_logit_difference": max_logit,
    "max_abs_nats_difference": max_nats,
    "kl_nats_mean": float(kl_NT.mean()),
    "kl_nats_max": float(kl_NT.max()),
    "greedy_agreement": float((x_NTV.argmax(-1) == y_NTV.argmax(-1)).mean()),
    "tolerance": tolerance,
    "same_model": same_size and max_logit <= tolerance and max_nats <= 2 * tolerance,
  }


def _config_differences(a: ModelConfig, b: ModelConfig) -> dict:
  """The fields that decide what is computed and are not equal, with both values."""
  differences = {}
  for field in FUNCTION:
    pair = [getattr(a, field), getattr(b, field)]
    if pair[0] != pair[1]:
      differences[field] = pair
  return differences


def _summary(model: Model, measured: Measurement, tokens: int) -> dict:
  """One model's entry in parity.json."""
  return {
    "source": model.source,
    "sha256": model.sha256,
    "parameters": model.config.n_params,
    "loss_nats": float(measured.nats_NT.sum()) / tokens,
    "tokens": tokens,
  }


def table(parity: dict) -> str:
  """Formats what `compare` returns as lines to print."""
  lines = []
  for letter in "ab":
    model = parity[letter]
    lines += [
      f"{letter.upper()}  {model['source']}, {model['parameters']:,} parameters",
      f"   weights sha256 {model['sha256'] or 'not known'}",
      f"   loss {model['loss_nats']:.6f} nats a token over {model['tokens']:,} tokens",
    ]

  same_weights = {True: "identical", False: "differ", None: "not compared"}[parity["same_weights"]]
  lines.append(f"weights         {same_weights}")
  for field, (value_a, value_b) in parity["config_differences"].items():
    lines.append(f"config          {field}: {value_a} | {value_b}")

  max_logit, positions = parity["max_abs_logit_difference"], parity["positions"]
  max_nats, tokens = parity["max_abs_nats_difference"], parity["a"]["tokens"]
  windows = f"{parity['windows_compared']:,} of {parity['windows']:,} windows"
  kl_mean, kl_max = parity["kl_nats_mean"], parity["kl_nats_max"]
  verdict = "the same model" if parity["same_model"] else "NOT the same model"
  lines += [
    f"max |d logit|   {max_logit:.3e} over {positions:,} positions, {windows}",
    f"max |d nats|    {max_nats:.3e} over all {tokens:,} tokens",
    f"KL(A || B)      mean {kl_mean:.3e}, max {kl_max:.3e} nats",
    f"greedy          {100 * parity['greedy_agreement']:.2f} % of positions agree",
    f"verdict         {verdict} at a tolerance of {parity['tolerance']:.0e} on the logits",
  ]
  return "\n".join(lines)
