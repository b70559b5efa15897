# SPDX-License-Identifier: Apache-2.0
"""Private training: what a run must satisfy, what it samples, and the epsilon that it spends.

Epsilon is of the RDP accountant of Google's dp-accounting (Mironov 2017; Canonne et al. 2020), for
Poisson sampling, Gaussian noise, and data sets that differ in one example. What is private are the
weights: metrics.jsonl has losses of the examples, and the seed makes the noise.
"""

import functools

from ml_collections import ConfigDict

from gpt2_jax.data.batches import BatchSource
from gpt2_jax.data.examples import ExampleStore
from gpt2_jax.data.poisson import PoissonBatches, PoissonExamples
from gpt2_jax.data.stores import RowSource
from gpt2_jax.model import ModelConfig
from gpt2_jax.private import check_microbatches

ACCOUNTANT = "RDP of dp-accounting"


def check_private(config: ConfigDict) -> None:
  """Raises ValueError, in one line, for private training that cannot be; the mesh is in force."""
  settings = config.private
  if not settings.clip_norm:
    if settings.noise_multiplier or settings.epsilon or settings.batch_size:
      raise ValueError(
        "private.clip_norm is 0, which is no private training, and other knobs of `private` are "
        "set; set --config.private.clip_norm, as 1.0, or leave them out"
      )
    return

  if settings.epsilon and not settings.noise_multiplier:
    raise ValueError(
      f"private.noise_multiplier is 0, with which no epsilon is finite, and private.epsilon asks "
      f"for {settings.epsilon:g}; set --config.private.noise_multiplier, as 1.0, or epsilon to 0"
    )
  if not 1 <= settings.batch_size <= config.batch_size:
    raise ValueError(
      f"private.batch_size of {settings.batch_size} is not from 1 to batch_size, here "
      f"{config.batch_size}: it is how many examples a batch is expected to draw, and batch_size "
      f"is its room; set --config.private.batch_size"
    )
  check_microbatches(config.batch_size, config.microbatches)
  model = ModelConfig(**config.model)
  if model.padded_heads != model.n_head:
    raise ValueError(
      f"private training has no padded heads, for noise would fill them: n_head is "
      f"{model.n_head}, and the mesh pads it to {model.padded_heads}; set --config.mesh.model to a "
      f"divisor"
    )


def open_batches(config: ConfigDict, train: RowSource) -> BatchSource:
  """What a run trains on: rows in the order of its seed, or for a private run by Poisson sampling.

  Raises ValueError for a private run whose delta, epsilon or room for a batch cannot be.
  """
  settings, n_ctx = config.private, config.model.n_ctx
  if not settings.clip_norm:
    return train.batches(n_ctx, config.batch_size, config.seed)

  # 1. Each row is one example.
  source = PoissonExamples if isinstance(train, ExampleStore) else PoissonBatches
  batches = source(train, n_ctx, config.batch_size, config.seed, settings.batch_size)
  if settings.batch_size > batches.n_rows:
    raise ValueError(
      f"private.batch_size is {settings.batch_size}, and {train.path} has {batches.n_rows:,} "
      f"examples; set --config.private.batch_size to fewer"
    )

  # 2. With a larger delta, a run that publishes an example of each thousand would be private.
  if settings.noise_multiplier and settings.delta > 1 / batches.n_rows:
    raise ValueError(
      f"private.delta of {settings.delta:g} is above 1 / {batches.n_rows:,}, one over the "
      f"examples of {train.path}; set --config.private.delta={0.1 / batches.n_rows:.1g}"
    )

  # 3. The whole run, from its start.
  batches.check_room(config.steps)
  spent = epsilon(settings, batches.rate, config.steps)
  if settings.epsilon and spent > settings.epsilon:
    raise ValueError(
      f"{config.steps:,} steps spend an epsilon of {spent:.3f} at delta {settings.delta:g}, and "
      f"private.epsilon is {settings.epsilon:g}; raise --config.private.noise_multiplier (here "
      f"{settings.noise_multiplier:g}), or lower --config.steps or --config.private.batch_size"
    )
  return batches


def epsilon(settings: ConfigDict, rate: float, steps: int) -> float | None:
  """What `steps` steps spend at `settings.delta`; None without noise, where nothing is private."""
  if not settings.noise_multiplier:
    return None
  return rdp_epsilon(float(settings.noise_multiplier), rate, steps, float(settings.delta))


@functools.lru_cache
def rdp_epsilon(noise_multiplier: float, rate: float, steps: int, delta: float) -> float:
  """Epsilon of `steps` Poisson-sampled Gaussians. Raises ValueError without dp-accounting."""
  try:
    import dp_accounting
  except ImportError as error:
    raise ValueError(
      "private training takes dp-accounting, which accounts for epsilon; "
      "pip install 'gpt2_jax[privacy]'"
    ) from error

  event = dp_accounting.PoissonSampledDpEvent(rate, dp_accounting.GaussianDpEvent(noise_multiplier))
  accountant = dp_accounting.rdp.RdpAccountant()
  accountant.compose(event, steps)
  return float(accountant.get_epsilon(delta))


def privacy_record(config: ConfigDict, batches: BatchSource, step: int) -> dict:
  """What the metadata of a checkpoint say of its privacy, under `private`; {} if it has none."""
  if not config.private.clip_norm:
    return {}
  record = config.private.to_dict() | {
    "accountant": ACCOUNTANT,
    "examples": batches.n_rows,
    "rate": batches.rate,
    "steps": step,
    "epsilon": epsilon(config.private, batches.rate, step),
  }
  return {"private": record}


def privacy_line(config: ConfigDict, batches: BatchSource) -> str | None:
  """What the log says of a private run at its start."""
  settings = config.private
  if not settings.clip_norm:
    return None
  spent = epsilon(settings, batches.rate, config.steps)
  if spent is None:
    return f"DP-SGD clips to {settings.clip_norm:g} and adds no noise: nothing is private"
  return (
    f"DP-SGD: clip {settings.clip_norm:g}, noise {settings.noise_multiplier:g}, "
    f"{settings.batch_size} of {batches.n_rows:,} examples a step; {config.steps:,} steps spend an "
    f"epsilon of {spent:.3f} at delta {settings.delta:g} ({ACCOUNTANT}). Keep the seed and "
    f"metrics.jsonl to yourself: only the weights are private"
  )
