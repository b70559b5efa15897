# SPDX-License-Identifier: Apache-2.0
"""Searches mesh, microbatches, remat, attention kernel and unroll for the fastest step on a slice.

A roofline estimate of step time and HBM ranks what divides and is estimated to fit. It is rough, so
the compiler decides: first among the best of each remat policy, then among the neighbours of the
fastest, which differ from it in one knob by one step (gpt2-jax plan --search).
"""

import dataclasses
import itertools
import math
from collections.abc import Iterator, Mapping

from ml_collections import ConfigDict

from gpt2_jax.chips import Topology
from gpt2_jax.kernels.choose import fused_fits
from gpt2_jax.model import ModelConfig

# Activations that each layer keeps for the backward pass, in units of n_embd x 2 bytes a token:
# those that the `model` axis does not split, and those that it splits. "attention" keeps the
# outputs of its parts; "dots" those of all matmuls; "none" those of GELU and LayerNorm, too.
KEPT = {"full": (1, 0), "attention": (2, 4), "dots": (3, 8), "none": (6, 13)}
# Of the forward pass of a layer's matmuls and of its attention, what remat computes again. The last
# matmul of a block (8 D^2 of 24 D^2) is nobody's input in the backward pass.
RECOMPUTED = {
  "full": (2 / 3, 1.0),
  "attention": (1 / 3, 0.0),
  "dots": (0.0, 0.0),
  "none": (0.0, 0.0),
}
# Instructions of an attention head of 1,024 x 64, forward and backward, on v5e. Those of splash
# include the copies around it.
BUNDLES = {"fused": (4000, 6700), "splash": (11_000, 20_000)}

# Fitted to the twelve compiled plans of experiments/README.md, which they meet to 20 %: matmuls at
# this fraction of the peak, and the activations that they move beside it; elementwise operations
# and copies, bytes an element of the residual stream in each layer, of a logit, of a parameter.
PEAK_FRACTION, MATMUL_TRAFFIC = 1.09, 1.42
LAYER_BYTES = {"full": 73, "attention": 75, "dots": 78, "none": 83}
LOGIT_BYTES, PARAMETER_BYTES = 6.4, 105
# Two TensorCores that show as one chip share its work less than evenly.
MEGACORE = 1.25

# Of the HBM: candidates that need more are left out.
HBM_LIMIT = 0.92
# After a candidate that does not fit, the next one of its policy needs at most this fraction, and
# so many may not fit.
LESS_HBM, POLICY_TRIES = 0.85, 3
# What is predicted to take more times the seconds of the fastest is not compiled.
NEIGHBOUR_LIMIT = 1.25
UNROLL_COST = 1.05
# Layers a step of the scan, beside all of them: more take longer to compile.
UNROLLS = (1, 2, 4)
# Of 24 unrolled layers a compilation takes twice as long as of a loop, of 48 five times: more than
# 24 are tried only as neighbours.
QUICK_UNROLL = 24
POLICIES = ("full", "attention", "dots", "none")  # in the order of what they keep


@dataclasses.dataclass(frozen=True)
class Candidate:
  """A mesh and knobs to compile, with their roofline estimate."""

  replica: int
  data: int
  model: int
  microbatches: int
  remat: str
  attention: str
  unroll: int
  seconds: float = dataclasses.field(compare=False)  # of a step: for ranking only
  hbm: float = dataclasses.field(compare=False)  # bytes a chip

  @property
  def mesh(self) -> tuple[int, int, int]:
    return self.replica, self.data, self.model

  def apply(self, config: ConfigDict) -> ConfigDict:
    """A copy of the config with this mesh and these knobs."""
    config = config.copy_and_resolve_references()
    config.mesh.update(replica=self.replica, data=self.data, model=self.model)
    config.microbatches = self.microbatches

    # Heads that do not divide by the `model` axis are padded with zero heads.
    pad_heads = config.model.n_head % self.model > 0
    config.model.update(
      remat=self.remat, attention=self.attention, pad_heads=pad_heads, unroll=self.unroll
    )
    return config

  def __str__(self):
    mesh = " x ".join(map(str, self.mesh))
    return (
      f"mesh {mesh}, microbatches {self.microbatches}, remat {self.remat}, {self.attention}, "
      f"unroll {self.unroll}"
    )


def candidates(config: ConfigDict, topology: Topology) -> list[Candidate]:
  """All candidates that divide the batch and the model and are estimated to fit, fastest first.

  Raises ValueError if there is none.
  """
  head_size = config.model.n_embd // config.model.n_head
  kernels = list(BUNDLES)
  if not fused_fits(config.model.n_ctx, head_size):
    kernels.remove("fused")
  layers = config.model.n_layer
  unrolls = [n for n in UNROLLS if layers % n == 0]
  unrolls += {config.model.unroll, layers}.difference(unrolls)

  fitting = []
  for mesh in _meshes(config, topology):
    accumulations = _microbatches(config, mesh)
    for microbatches, remat, kernel in itertools.product(accumulations, POLICIES, kernels):
      hbm = _hbm_bytes(config, mesh, microbatches, remat)
      if hbm < HBM_LIMIT * topology.chip.hbm:
        for unroll in unrolls:
          knobs = (*mesh, microbatches, remat, kernel, unroll)
          seconds = _roofline_seconds(config, topology, mesh, *knobs[3:])
          fitting.append(Candidate(*knobs, seconds, hbm))

  if not fitting:
    raise ValueError(
      f"no mesh of {topology} holds this model with batch_size of {config.batch_size}; "
      f"take more chips, or a batch that divides by them"
    )

  # The roofline knows nothing of layers that are unrolled in part: of equal ones, the config's own
  # comes first.
  def speed(candidate: Candidate) -> tuple[float, bool]:
    return candidate.seconds, candidate.unroll != config.model.unroll

  return sorted(fitting, key=speed)


def next_candidate(
  ranked: list[Candidate], measured: Mapping[Candidate, float | None]
) -> Candidate | None:
  """What to compile next; None when nothing is left that is likely to be fast.

  `measured` are the seconds of what was compiled, None for what did not fit.
  """
  fitting = {candidate: s for candidate, s in measured.items() if s is not None}
  fastest = min(fitting, key=fitting.get, default=None)
  limit = NEIGHBOUR_LIMIT * fastest.seconds if fastest else math.inf

  # 1. The best of each remat policy, between which the roofline is least to be trusted. After one
  #    that does not fit, the best that needs clearly less, if it is not much slower than others.
  quick = [candidate for candidate in ranked if candidate.unroll <= QUICK_UNROLL]
  tried = {policy: [] for policy in dict.fromkeys(candidate.remat for candidate in quick)}
  for candidate in measured:
    tried[candidate.remat].append(candidate)
  for policy in sorted(tried, key=lambda policy: len(tried[policy])):
    of_policy = tried[policy]
    if len(of_policy) >= POLICY_TRIES or not fitting.keys().isdisjoint(of_policy):
      continue
    room = min((LESS_HBM * candidate.hbm for candidate in of_policy), default=math.inf)
    for candidate in quick:
      is_fast = not of_policy or candidate.seconds < limit
      if candidate.remat == policy and candidate.hbm <= room and is_fast:
        return candidate

  # 2. The neighbours of what was compiled, the one first that is predicted to be fastest: as much
  #    faster or slower than its neighbour as the roofline says. So what the roofline gets wrong
  #    about a policy or a mesh is learnt, and the search does not stop beside the fastest.
  predicted = {}
  for candidate in ranked:
    if candidate in measured:
      continue
    for neighbour, seconds in fitting.items():
      if _are_neighbours(candidate, neighbour):
        seconds *= candidate.seconds / neighbour.seconds
        # Of layers unrolled in part the roofline knows nothing, and they take longer to compile.
        if candidate.unroll != neighbour.unroll and candidate.seconds >= neighbour.seconds:
          seconds *= UNROLL_COST
        predicted[candidate] = min(seconds, predicted.get(candidate, math.inf))

  likely = min(predicted, key=predicted.get, default=None)
  if likely is None or predicted[likely] > NEIGHBOUR_LIMIT * min(fitting.values()):
    return None
  return likely


def _are_neighbours(one: Candidate, other: Candidate) -> bool:
  """Whether they differ in one knob, by one step: half or twice, the next of a list, any unroll."""
  changes = (
    one.mesh != other.mesh,
    one.microbatches != other.microbatches,
    one.remat != other.remat,
    one.attention != other.attention,
    one.unroll != other.unroll,
  )
  if sum(changes) != 1:
    return False

  # Chips move between two axes of the mesh, two or half as many.
  if one.mesh != other.mesh:
    return sorted(a / b for a, b in zip(one.mesh, other.mesh, strict=True)) == [0.5, 1.0, 2.0]
  if one.microbatches != other.microbatches:
    return one.microbatches / other.microbatches in (0.5, 2.0)
  if one.remat != other.remat:
    return abs(POLICIES.index(one.remat) - POLICIES.index(other.remat)) == 1
  return True


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
  # frozen one has neither moments nor a gradient, and an adapter is small. Four bytes a logit of
  # one microbatch, and six an entry of the embedding, gathered over `data`.
  of_parameter = 6 if config.adapter.kind else 18
  not_split, split = KEPT[remat]
  kept = 2 * D * L * (split / model + not_split) + 4 * V / model
  state = of_parameter * (layers + embedding) / (data * model)
  return state + tokens / microbatches * kept + 6 * embedding / model


def _roofline_seconds(
  config: ConfigDict,
  topology: Topology,
  mesh: tuple[int, int, int],
  microbatches: int,
  remat: str,
  kernel: str,
  unroll: int,
) -> float:
  """Estimated seconds of a step: matmuls, attention, elementwise and collectives, one by one."""
  replica, data, model = mesh
  chip = topology.chip
  model_config = ModelConfig(**config.model)
  D, L, T, V = (
    model_config.n_embd,
    model_config.n_layer,
    model_config.n_ctx,
    model_config.n_vocab,
  )
  rows = config.batch_size // (replica * data)  # that a chip holds of a batch
  tokens = rows * T
  matmul_again, attention_again = RECOMPUTED[remat]

  # 1. Matmuls: three of each, and what is recomputed. A layer's read and write 16 D a token.
  matmul_flops = tokens * 2 * (12 * L * D * D * (3 + matmul_again) + 3 * V * D) / model
  traffic = tokens * L * D * 2 * 16 * (3 + matmul_again) / model
  matmuls = matmul_flops / (PEAK_FRACTION * chip.flops)
  matmuls += MATMUL_TRAFFIC * traffic / chip.hbm_bandwidth

  # 2. Attention kernels, a bundle of instructions a cycle.
  heads = -(-model_config.n_head // model)  # of a chip, rounded up
  forward, backward = BUNDLES[kernel]
  kernels = rows * heads * L * (forward * (1 + attention_again) + backward) / chip.clock

  # 3. Elementwise operations and copies at the full HBM bandwidth.
  moved = _elementwise_bytes(model_config, tokens, model, remat, unroll)
  parameters = sum(_parameters(model_config)) / (data * model)
  moved += parameters * (PARAMETER_BYTES + 12 * (microbatches - 1))
  work = matmuls + kernels + moved / chip.hbm_bandwidth
  if chip.libtpu_config == "megacore":
    work *= MEGACORE

  # 4. Collectives. Nothing overlaps here: exposed or not, more of them is worse.
  return work + _communication_seconds(model_config, topology, mesh, microbatches, remat, tokens)


def _elementwise_bytes(
  config: ModelConfig, tokens: int, model: int, remat: str, unroll: int
) -> float:
  """Estimated HBM traffic of a chip for what is done to activations beside the matmuls."""
  # Two fifths are not split by the `model` axis.
  D, L = config.n_embd, config.n_layer
  moved = tokens * L * D * LAYER_BYTES[remat] * (0.4 + 0.6 / model)
  moved += tokens * config.n_vocab / model * LOGIT_BYTES

  # A scan copies what a layer keeps into a stack and out of it, which reads and writes it twice.
  # Without a loop there is none of it.
  if unroll == L:
    not_split, split = KEPT[remat]
    moved -= 4 * tokens * L * D * (not_split + split / model)
  return moved


def _communication_seconds(
  config: ModelConfig,
  topology: Topology,
  mesh: tuple[int, int, int],
  microbatches: int,
  remat: str,
  tokens: int,
) -> float:
  """Estimated seconds of a step's collectives, over ICI and between slices over DCN."""
  replica, data, model = mesh
  layers, embedding = _parameters(config)
  weights = (layers + embedding) / model

  # 1. Weights: all-gathers in bfloat16, forward and backward, and reduce-scatters of gradients in
  #    float32, for each microbatch. Over more than one axis of the torus the compiler makes an
  #    all-reduce and a slice of a reduce-scatter.
  scatter = 2 if data > max(topology.shape) else 1
  moved = weights * (2 * 2 + 4 * scatter) * microbatches * (data - 1) / data
  seconds = moved / (_links(topology, data) * topology.chip.ici_bandwidth)

  # 2. Gradients: an all-reduce over the replicas of a slice, in float32, once a step.
  within = replica // topology.slices
  moved = 8 * weights / data * (within - 1) / within
  seconds += moved / (_links(topology, within) * topology.chip.ici_bandwidth)

  # 3. Activations: two all-reduces over `model` in each direction, in float32.
  passes = 2 + RECOMPUTED[remat][0]
  activations = 16 * config.n_layer * tokens * config.n_embd
  moved = activations * passes * (model - 1) / model
  seconds += moved / (_links(topology, model) * topology.chip.ici_bandwidth)

  # 4. Gradients once more, between slices: each chip its part of what its slice has summed.
  between = 8 * weights / data / within * (topology.slices - 1) / topology.slices
  return seconds + between / topology.chip.dcn_bandwidth


def _links(topology: Topology, size: int) -> int:
  """Links of a chip that a mesh axis of this size uses: two for each ring of the torus it fills."""
  links, left = 0, size
  for axis in sorted(range(len(topology.shape)), key=lambda axis: topology.shape[axis]):
    if left <= 1:
      break
    length = topology.shape[axis]
    links += 2 if left >= length and topology.wraps_around(axis) else 1
    left = -(-left // length)
  return max(1, links)
