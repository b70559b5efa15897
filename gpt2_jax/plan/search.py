# SPDX-License-Identifier: Apache-2.0
"""Searches mesh, gradient accumulation (microbatches), remat and attention kernel for a TPU slice.

A roofline estimate of step time and HBM ranks and prunes the candidates. It is rough: the compiler
decides among the best of them (gpt2-jax plan --search).
"""

import dataclasses
import itertools
from collections.abc import Iterator

from ml_collections import ConfigDict

from gpt2_jax.chips import Topology
from gpt2_jax.kernels.choose import fused_fits
from gpt2_jax.model import ModelConfig
from gpt2_jax.runs.metrics import flops_per_token

# Activations that each layer keeps for the backward pass, in units of n_embd x 2 bytes a token:
# those that the `model` axis does not split, and those that it splits. "dots" keeps the outputs of
# matmuls and attention; "none" those of GELU and LayerNorm, too.
KEPT = {"full": (1, 0), "dots": (3, 8), "none": (5, 12)}
# Forward passes of the matmuls in a step: one, and what remat computes again.
FORWARDS = {"full": 2.0, "dots": 1.05, "none": 1.0}
# Instructions of an attention head of 1,024 x 64, forward and backward, on v5e. Those of splash
# include the copies around it.
BUNDLES = {"fused": (3200, 6700), "splash": (11_000, 20_000)}
# Of the peak FLOP/s, in matmuls.
EFFICIENCY = 0.9
# Bytes that elementwise operations move in a layer, an element of the residual stream: not split by
# `model` and split, as in KEPT.
MOVED = (80, 200)
# Of the HBM: candidates that need more are left out.
HBM_LIMIT = 0.92


@dataclasses.dataclass(frozen=True)
class Candidate:
  """A mesh and knobs to compile, with their roofline estimate."""

  replica: int
  data: int
  model: int
  microbatches: int
  remat: str
  attention: str
  seconds: float  # of a step: for ranking only
  hbm: float  # bytes a chip

  def apply(self, config: ConfigDict) -> ConfigDict:
    """A copy of the config with this mesh and these knobs."""
    config = config.copy_and_resolve_references()
    config.mesh.update(replica=self.replica, data=self.data, model=self.model)
    config.microbatches = self.microbatches

    # Heads that do not divide by the `model` axis are padded with zero heads.
    pad_heads = config.model.n_head % self.model > 0
    config.model.update(remat=self.remat, attention=self.attention, pad_heads=pad_heads)
    return config

  def __str__(self):
    mesh = f"mesh {self.replica} x {self.data} x {self.model}"
    return f"{mesh}, {self.microbatches} microbatches, remat {self.remat}, {self.attention}"


def candidates(config: ConfigDict, topology: Topology) -> list[Candidate]:
  """All candidates that divide the batch and the model and are estimated to fit, fastest first.

  Raises ValueError if there is none.
  """
  head_size = config.model.n_embd // config.model.n_head
  kernels = list(BUNDLES)
  if not fused_fits(config.model.n_ctx, head_size):
    kernels.remove("fused")

  fitting = []
  for mesh in _meshes(config, topology):
    accumulations = _microbatches(config, mesh)
    for microbatches, remat, kernel in itertools.product(accumulations, KEPT, kernels):
      hbm = _hbm_bytes(config, mesh, microbatches, remat)
      if hbm < HBM_LIMIT * topology.chip.hbm:
        seconds = _roofline_seconds(config, topology, mesh, microbatches, remat, kernel)
        fitting.append(Candidate(*mesh, microbatches, remat, kernel, seconds, hbm))

  if not fitting:
    raise ValueError(
      f"no mesh of {topology} holds this model with batch_size of {config.batch_size}; "
      f"take more chips, or a batch that divides by them"
    )
  return sorted(fitting, key=lambda candidate: candidate.seconds)


def leading(ranked: list[Candidate], count: int) -> list[Candidate]:
  """The fastest candidate of each mesh and remat policy, and among them one of each policy first.

  Policies go first since the roofline is least to be trusted between them.
  """
  of_mesh_and_policy, of_policy = {}, {}
  for candidate in ranked:
    mesh = candidate.replica, candidate.data, candidate.model
    of_mesh_and_policy.setdefault((mesh, candidate.remat), candidate)
    of_policy.setdefault(candidate.remat, candidate)

  first = list(of_policy.values())
  rest = [candidate for candidate in of_mesh_and_policy.values() if candidate not in first]
  return [*first, *rest][:count]


def _meshes(config: ConfigDict, topology: Topology) -> Iterator[tuple[int, int, int]]:
  """Sizes of replica, data and model whose product is the chips; a slice is some whole replicas."""
  D, chips = config.model.n_embd, topology.chips
  for model in (1, 2, 4, 8):
    if chips % model or 4 * D % model:
      continue
    for data in range(1, chips // model + 1):
      if chips // model % data or D % data:
        continue
      replica = chips // model // data
      if replica % topology.slices == 0:
        yield replica, data, model


def _microbatches(config: ConfigDict, mesh: tuple[int, int, int]) -> list[int]:
  """Powers of two into which the batch divides on this mesh."""
  replica, data, _ = mesh
  return [2**i for i in range(10) if config.batch_size % (replica * data * 2**i) == 0]


def _parameters(config: ModelConfig) -> tuple[int, int]:
  """Parameters of all layers and of the token embedding; biases and norms are less than 1 %."""
  return 12 * config.n_layer * config.n_embd * config.n_embd, config.n_vocab * config.n_embd


def _hbm_bytes(
  config: ConfigDict, mesh: tuple[int, int, int], microbatches: int, remat: str
) -> float:
  """Estimated HBM, bytes a chip: state and gradients, activations, logits."""
  replica, data, model = mesh
  model_config = ModelConfig(**config.model)
  D, L, V = model_config.n_embd, model_config.n_layer, model_config.n_vocab
  layers, embedding = _parameters(model_config)
  tokens = (
    config.batch_size // (replica * data) * model_config.n_ctx
  )  # that a chip holds of a batch

  # 18 bytes a parameter: itself, two moments and the gradient in float32, a copy in bfloat16; a
  # frozen one has neither moments nor a gradient, and an adapter is small. Six bytes a logit of one
  # microbatch, and six an entry of the embedding, gathered over `data`.
  of_parameter = 6 if config.adapter.kind else 18
  not_split, split = KEPT[remat]
  kept = 2 * D * L * (split / model + not_split) + 6 * V / model
  state = of_parameter * (layers + embedding) / (data * model)
  return state + tokens / microbatches * kept + 6 * embedding / model


def _roofline_seconds(
  config: ConfigDict,
  topology: Topology,
  mesh: tuple[int, int, int],
  microbatches: int,
  remat: str,
  kernel: str,
) -> float:
  """Estimated seconds of a step: matmuls, attention, elementwise and collectives, one by one."""
  replica, data, model = mesh
  chip = topology.chip
  model_config = ModelConfig(**config.model)
  D, L, T = model_config.n_embd, model_config.n_layer, model_config.n_ctx
  rows = config.batch_size // (replica * data)  # that a chip holds of a batch
  tokens = rows * T

  # 1. Matmuls: a third of the FLOPs is the forward pass, which remat repeats.
  matmul_flops = flops_per_token(model_config) - 12 * L * T * D  # without those of attention
  matmuls = tokens * matmul_flops / model * (2 + FORWARDS[remat]) / 3

  # 2. Attention kernels, a bundle of instructions a cycle.
  heads = -(-model_config.n_head // model)  # of a chip, rounded up
  forward, backward = BUNDLES[kernel]
  kernels = rows * heads * L * (forward * FORWARDS[remat] + backward) / chip.clock

  # 3. Elementwise operations, at the full HBM bandwidth.
  elementwise = tokens * L * D * (MOVED[0] + MOVED[1] / model) / chip.hbm_bandwidth

  # 4. Collectives. Nothing overlaps here: exposed or not, more of them is worse.
  ici, dcn = _communication_seconds(model_config, topology, mesh, microbatches, remat, tokens)
  return matmuls / (EFFICIENCY * chip.flops) + kernels + elementwise + ici + dcn


def _communication_seconds(
  config: ModelConfig,
  topology: Topology,
  mesh: tuple[int, int, int],
  microbatches: int,
  remat: str,
  tokens: int,
) -> tuple[float, float]:
  """Estimated seconds of a step's collectives: over ICI, and between slices over DCN."""
  replica, data, model = mesh
  layers, embedding = _parameters(config)
  weights = (layers + embedding) / model

  # 1. Weights: all-gathers in bfloat16, forward and backward, and reduce-scatters of gradients in
  #    float32, for each microbatch. Over more than one axis of the torus the compiler makes an
  #    all-reduce and a slice of a reduce-scatter.
  scatter = 2 if data > max(topology.shape) else 1
  gathers = microbatches * (1 + FORWARDS[remat])
  moved = weights * (2 * gathers + 4 * scatter * microbatches) * (data - 1) / data

  # 2. Gradients: an all-reduce over the replicas, in float32.
  moved += 8 * weights / data * microbatches * (replica - 1) / replica

  # 3. Activations: two all-reduces over `model` in each direction, in float32.
  activations = 16 * config.n_layer * tokens * config.n_embd
  moved += activations * (1 + FORWARDS[remat]) * (model - 1) / model

  # 4. A `data` axis that fills a ring uses both directions of its links.
  rings = []
  for axis, length in enumerate(topology.shape):
    if topology.wraps_around(axis):
      rings.append(length)
  bandwidth = (2 if data in rings else 1) * topology.chip.ici_bandwidth

  # 5. Gradients once more, between slices.
  between = 0.0
  if topology.slices > 1:
    between = 8 * weights / data / topology.chip.dcn_bandwidth
  return moved / bandwidth, between
