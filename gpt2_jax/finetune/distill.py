# SPDX-License-Identifier: Apache-2.0
"""Knowledge distillation: a student learns from a teacher's distribution of the next token.

Source: Sanh et al. 2019, "DistilBERT, a distilled version of BERT", and the script by which its
authors made DistilGPT-2: Hugging Face transformers, examples/research_projects/distillation
(distiller.py; weights 5, 2 and 1 and a temperature of 2 are its README's and its default).
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from gpt2_jax.batch import Batch
from gpt2_jax.linear import Dense
from gpt2_jax.loss import cross_entropy, last_hidden
from gpt2_jax.model import GPT2
from gpt2_jax.quantization import quantize_on_mesh
from gpt2_jax.sharding import unshard

TEACHER_DTYPES = ("float32", "bfloat16", "int8")


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=["teacher"],
  meta_fields=["temperature", "kl_weight", "lm_weight", "cos_weight"],
)
@dataclasses.dataclass(frozen=True)
class Distill:
  """The objective of a student; the weights of its teacher are leaves of it.

  A token's loss is kl_weight T^2 KL(teacher || student) at temperature T, plus lm_weight times
  -log p of the label, plus cos_weight (1 - cosine of the two last hidden states, after the final
  norm). The teacher computes without dropout, and has neither a gradient nor optimizer state.
  """

  teacher: GPT2 | None
  temperature: float = 2.0
  kl_weight: float = 5.0
  lm_weight: float = 2.0
  cos_weight: float = 1.0

  def __call__(self, model, batch: Batch, key=None) -> dict:
    """Sums over the batch: "nats", its three parts without their weights, and "tokens"."""
    # 1. The teacher; nothing of it is kept for the backward pass.
    teacher_BTD, _ = last_hidden(self.teacher, dataclasses.replace(batch, extras={}))
    teacher_BTD = jax.lax.stop_gradient(teacher_BTD)
    teacher_BTV = jax.lax.stop_gradient(self.teacher.head(teacher_BTD))

    # 2. The student, token by token.
    x_BTD, context = last_hidden(model, batch, key)
    logits_BTV, labels_BT = model.head(x_BTD, context), batch.tokens_BT[:, 1:]
    weights = DistillationWeights(self.temperature, self.kl_weight, self.lm_weight)
    nats_BT, kl_BT, lm_BT = distillation_nats(
      logits_BTV, teacher_BTV, labels_BT, model.config.n_vocab, weights, x_BTD.dtype
    )
    parts = {"kl": kl_BT, "lm": lm_BT}
    if self.cos_weight:
      parts["cos"] = cosine_distance(x_BTD, teacher_BTD)
      nats_BT += self.cos_weight * parts["cos"]

    # 3. Loss mask, as in NextToken.
    weights_BT = jnp.ones_like(nats_BT) if batch.weights_BT is None else batch.weights_BT
    nats_BT, weights_BT = jax.lax.optimization_barrier((nats_BT, weights_BT))
    sums = {name: (part_BT * weights_BT).sum() for name, part_BT in parts.items()}
    return sums | {"nats": (nats_BT * weights_BT).sum(), "tokens": weights_BT.sum()}


def cosine_distance(x_BTD, y_BTD):
  """1 - cos(x, y) of each token, float32 [B, T]; torch's CosineEmbeddingLoss of similar pairs."""
  x, y = x_BTD.astype(jnp.float32), y_BTD.astype(jnp.float32)
  squares_BT = (jnp.square(x).sum(-1) + 1e-12) * (jnp.square(y).sum(-1) + 1e-12)
  return 1 - (x * y).sum(-1) * jax.lax.rsqrt(squares_BT)


class DistillationWeights(NamedTuple):
  """What weighs KL and the language model's loss, and the temperature of the former."""

  temperature: float
  kl: float
  lm: float


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def distillation_nats(
  logits_BTV, teacher_BTV, labels_BT, n_vocab: int, weights: DistillationWeights, dtype
):
  """The weighted sum of a token's KL and language model loss, and each alone, float32 [B, T].

  The vocabulary may be padded, and split over `model`: what crosses that axis are sums and maxima
  of a token. Only the first result has a gradient, in the student's logits. This gradient is the
  one array of the logits' size that is kept for the backward pass, in `dtype`: that of the matmul
  which reads it. In bfloat16 it is half of what cross-entropy keeps.
  """
  return _distillation_forward(logits_BTV, teacher_BTV, labels_BT, n_vocab, weights, dtype)[0]


def _distillation_forward(logits_BTV, teacher_BTV, labels_BT, n_vocab, weights, dtype):
  T = weights.temperature
  spec = jax.typeof(logits_BTV).sharding.spec
  token_BTV = jax.lax.broadcasted_iota(jnp.int32, logits_BTV.shape, 2, out_sharding=spec)
  is_token_BTV = token_BTV < n_vocab

  def log_softmax(x_BTV):
    x_BTV = jnp.where(is_token_BTV, x_BTV, -jnp.inf)
    return x_BTV - jax.nn.logsumexp(x_BTV, axis=-1, keepdims=True)

  # 1. KL at the temperature. In the padding p is 0, and both logarithms are minus infinity.
  teacher_logp_BTV, logp_BTV = log_softmax(teacher_BTV / T), log_softmax(logits_BTV / T)
  teacher_p_BTV = jnp.exp(teacher_logp_BTV)
  terms_BTV = jnp.where(is_token_BTV, teacher_p_BTV * (teacher_logp_BTV - logp_BTV), 0.0)
  kl_BT = terms_BTV.sum(-1)

  # 2. The language model's loss, at a temperature of 1.
  lm_BT = cross_entropy(logits_BTV, labels_BT, n_vocab)
  nats_BT = weights.kl * T**2 * kl_BT + weights.lm * lm_BT

  # 3. The gradient in the logits. That of T^2 KL is T times the difference of the distributions.
  is_label_BTV = token_BTV == labels_BT[..., None]
  of_kl_BTV = T * (jnp.exp(logp_BTV) - teacher_p_BTV)
  of_lm_BTV = jnp.exp(log_softmax(logits_BTV)) - is_label_BTV
  gradient_BTV = weights.kl * of_kl_BTV + weights.lm * of_lm_BTV
  return (nats_BT, kl_BT, lm_BT), gradient_BTV.astype(dtype)


def _distillation_backward(n_vocab, weights, dtype, gradient_BTV, d):
  d_BT, _, _ = d
  return gradient_BTV * d_BT[..., None], None, None


distillation_nats.defvjp(_distillation_forward, _distillation_backward)


def distill_objective(settings: ConfigDict) -> Distill:
  """The objective that `settings`, a config's `distill`, asks for; its teacher is not there yet.

  Raises ValueError for a dtype that no teacher has, and where nothing is learned.
  """
  if settings.dtype not in TEACHER_DTYPES:
    allowed = ", ".join(TEACHER_DTYPES)
    raise ValueError(f"distill.dtype is {settings.dtype[:80]!r}; it is one of {allowed}")
  weights = (settings.kl_weight, settings.lm_weight, settings.cos_weight)
  if not any(weights):
    raise ValueError("distill.kl_weight, lm_weight and cos_weight are all 0; set one of them")
  return Distill(None, float(settings.temperature), *map(float, weights))


def as_teacher(model: GPT2, settings: ConfigDict) -> GPT2:
  """The model with its matrices in `settings.dtype`, and all-gathered over `data` unless `sharded`.

  The mesh is in force. Norms, biases and positions stay float32.
  """
  if settings.dtype == "int8":
    model = quantize_on_mesh(model)
  if settings.dtype == "bfloat16":
    model = jax.tree.map(_to_bfloat16, model, is_leaf=_is_dense)
  return model if settings.sharded else jax.tree.map(unshard, model)


def _is_dense(node) -> bool:
  return isinstance(node, Dense)


def _to_bfloat16(node):
  return jax.tree.map(lambda x: x.astype(jnp.bfloat16), node) if _is_dense(node) else node
