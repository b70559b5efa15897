# SPDX-License-Identifier: Apache-2.0
"""Which mesh, slices of a batch, rematerialization and kernel? A model on paper prunes; the compiler decides."""

import dataclasses
import itertools
from collections.abc import Iterator

from ml_collections import ConfigDict

from gpt2_jax.chips import Topology
from gpt2_jax.fused_attention import suits
from gpt2_jax.metrics import flops_per_token
from gpt2_jax.model import ModelConfig

# Bytes a token and layer that are kept for the backward pass, in units of n_embd x 2 bytes: those that `model` does not
# split, and those that it splits. "dots" keeps what products and attention give; "none" what GELU and norms give, too.
KEPT = {"full": (1, 0), "dots": (3, 8), "none": (5, 12)}
# Forward passes of the matrices that a step computes: one, and what is computed again.
FORWARDS = {"full": 2.0, "dots": 1.05, "none": 1.0}
# Instructions of a head of 1,024 x 64 forward, and backward, on v5e; splash's with the copies around it.
BUNDLES = {"fused": (3200, 6700), "splash": (11_000, 20_000)}
EFFICIENCY = 0.9  # of the peak, in products
MOVED = (80, 200)  # bytes an element of the residual stream that elementwise operations move in a layer, as in KEPT
ROOM = 0.92  # of the HBM: fuller ones are left out


@dataclasses.dataclass(frozen=True)
class Candidate:
  replica: int
  data: int
  model: int
  microbatches: int
  remat: str
  attention: str
  seconds: float  # of a step, on paper: for ranking only
  hbm: float  # bytes a chip, on paper

  def apply(self, config: ConfigDict) -> ConfigDict:
    """The config of this candidate."""
    config = config.copy_and_resolve_references()
    config.mesh.update(replica=self.replica, data=self.data, model=self.model)
    config.microbatches = self.microbatches
    config.model.update(remat=self.remat, attention=self.attention, pad_heads=config.model.n_head % self.model > 0)
    return config

  def __str__(self):
    return (
      f"mesh {self.replica} x {self.data} x {self.model}, {self.microbatches} microbatches, remat {self.remat}, "
      f"{self.attention}"
    )


def candidates(config: ConfigDict, topology: Topology) -> list[Candidate]:
  """All that divide and, on paper, fit; the fastest on paper first. Raises ValueError if there is none."""
  found = []
  K = config.model.n_embd // config.model.n_head
  kernels = [kernel for kernel in BUNDLES if kernel != "fused" or suits(config.model.n_ctx, K)]
  for mesh in _meshes(config, topology):
    for microbatches, remat, kernel in itertools.product(_slices(config, mesh), KEPT, kernels):
      seconds, hbm = _on_paper(config, topology, mesh, microbatches, remat, kernel)
      if hbm < ROOM * topology.chip.hbm:
        found.append(Candidate(*mesh, microbatches, remat, kernel, seconds, hbm))
  if not found:
    raise ValueError(
      f"no mesh of {topology} holds this model with batch_size of {config.batch_size}; "
      f"take more chips, or a batch that divides by them"
    )
  return sorted(found, key=lambda one: one.seconds)


def leading(found: list[Candidate], count: int) -> list[Candidate]:
  """The best of each mesh and remat policy, of each policy one first: there the paper is least to be trusted."""
  best, first = {}, {}
  for one in found:
    best.setdefault((one.replica, one.data, one.model, one.remat), one)
    first.setdefault(one.remat, one)
  return [*first.values(), *(one for one in best.values() if one not in first.values())][:count]


def _meshes(config: ConfigDict, topology: Topology) -> Iterator[tuple[int, int, int]]:
  """Sizes of replica, data, model; slices are whole replicas."""
  D, chips = config.model.n_embd, topology.chips
  for model in (n for n in (1, 2, 4, 8) if chips % n == 0 and 4 * D % n == 0):
    for data in (n for n in range(1, chips // model + 1) if chips // model % n == 0 and D % n == 0):
      replica = chips // model // data
      if replica % topology.slices == 0:
        yield replica, data, model


def _slices(config: ConfigDict, mesh: tuple[int, int, int]) -> Iterator[int]:
  rows = mesh[0] * mesh[1]
  return (2**i for i in range(10) if config.batch_size % (rows * 2**i) == 0)


def _on_paper(config: ConfigDict, topology: Topology, mesh, microbatches: int, remat: str, kernel: str):
  """Seconds and bytes; rough, in the right order."""
  (replica, data, model), chip, model_config = mesh, topology.chip, ModelConfig(**config.model)
  D, L, V, T = model_config.n_embd, model_config.n_layer, model_config.n_vocab, model_config.n_ctx
  heads = -(-model_config.n_head // model)
  layers, table = 12 * L * D * D, V * D
  rows = config.batch_size // (replica * data)  # that a chip holds of a batch
  tokens = rows * T
  whole, split = KEPT[remat]
  kept = 2 * D * L * (split / model + whole) + 6 * V / model
  hbm = 18 * (layers + table) / (data * model) + tokens / microbatches * kept + 6 * table / model

  products = tokens * (flops_per_token(model_config) - 12 * L * T * D) / model * (2 + FORWARDS[remat]) / 3
  forward, backward = BUNDLES[kernel]
  kernels = rows * heads * L * (forward * FORWARDS[remat] + backward) / chip.clock
  elementwise = tokens * L * D * (MOVED[0] + MOVED[1] / model) / chip.hbm_bandwidth
  rings = [n for axis, n in enumerate(topology.shape) if topology.closes(axis)]  # both directions carry
  bandwidth = (2 if data in rings else 1) * chip.link
  # Over more than one axis of the torus the compiler makes an all-reduce and a slice of a reduce-scatter.
  scatter = 2 if data > max(topology.shape) else 1
  gathers = microbatches * (1 + FORWARDS[remat])
  weights = (layers + table) / model
  moved = weights * (2 * gathers + 4 * scatter * microbatches) * (data - 1) / data
  moved += 8 * weights / data * microbatches * (replica - 1) / replica
  moved += 16 * L * tokens * D * (1 + FORWARDS[remat]) * (model - 1) / model  # two all-reduces each way, in float32
  between = 8 * weights / data / chip.dcn if topology.slices > 1 else 0.0
  return products / (EFFICIENCY * chip.flops) + kernels + elementwise + moved / bandwidth + between, hbm
