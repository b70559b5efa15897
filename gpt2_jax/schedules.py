# SPDX-License-Identifier: Apache-2.0
"""Learning rate schedules: linear warmup, then a cosine, or WSD (warmup, stable, decay).

The cosine ends where `steps` says, so a shorter or longer run is another one from its start. WSD
(Hu et al. 2024, "MiniCPM"; Hägele et al. 2024, "Scaling Laws and Compute-Optimal Training Beyond
Fixed Training Durations") stays at its peak and decays in the last `decay_steps`: any checkpoint of
the stable part can branch into its own decay (`branch_from`).
"""

import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

SCHEDULES = ("cosine", "wsd")

# What is left of the decay when a part of it, from 0 to 1, is done. Hägele et al. found 1 - sqrt
# better than linear.
DECAYS = {"linear": lambda part: 1 - part, "1-sqrt": lambda part: 1 - jnp.sqrt(part)}


def make_schedule(config: ConfigDict) -> optax.Schedule:
  """The schedule that a config asks for. Raises ValueError where it cannot be, in one line."""
  knobs = (config.learning_rate, config.steps, config.warmup_steps, config.final_lr_fraction)
  if config.schedule == "cosine":
    if config.decay_steps:
      raise ValueError(
        f"decay_steps is {config.decay_steps}, and schedule is cosine, which decays all the way; "
        f"set --config.schedule=wsd, or --config.decay_steps=0"
      )
    return cosine(*knobs)
  if config.schedule == "wsd":
    return wsd(*knobs, config.decay_steps, config.decay_form)
  raise ValueError(f"schedule is {config.schedule[:80]!r}; it is one of {', '.join(SCHEDULES)}")


def cosine(
  learning_rate: float, steps: int, warmup_steps: int, final_lr_fraction: float
) -> optax.Schedule:
  """Learning rate: linear warmup from lr / (warmup + 1) to lr, then a cosine to
  `final_lr_fraction` of it at `steps`."""
  check_warmup(steps, warmup_steps)
  return optax.warmup_cosine_decay_schedule(
    learning_rate / (warmup_steps + 1),
    learning_rate,
    warmup_steps,
    steps,
    learning_rate * final_lr_fraction,
  )


def wsd(
  learning_rate: float,
  steps: int,
  warmup_steps: int,
  final_lr_fraction: float,
  decay_steps: int,
  decay_form: str,
) -> optax.Schedule:
  """Learning rate: the warmup of `cosine`, then lr, then in the last `decay_steps` a decay to
  `final_lr_fraction` of it at `steps`, in the form of DECAYS. 0 decay steps are none."""
  check_warmup(steps, warmup_steps)
  if decay_form not in DECAYS:
    raise ValueError(f"decay_form is {decay_form[:80]!r}; it is one of {', '.join(DECAYS)}")
  if warmup_steps + decay_steps > steps:
    raise ValueError(
      f"warmup_steps of {warmup_steps} and decay_steps of {decay_steps} are more than {steps} "
      f"steps; set --config.decay_steps lower"
    )

  def schedule(step):
    warmed = jnp.minimum(1.0, (step + 1) / (warmup_steps + 1))
    part = jnp.clip((step - (steps - decay_steps)) / max(decay_steps, 1), 0.0, 1.0)
    left = DECAYS[decay_form](part) if decay_steps else 1.0
    return learning_rate * warmed * (final_lr_fraction + (1 - final_lr_fraction) * left)

  return schedule


def check_warmup(steps: int, warmup_steps: int) -> None:
  """Raises ValueError for a warmup that has no end within the steps."""
  if warmup_steps >= steps:
    raise ValueError(
      f"warmup_steps of {warmup_steps} leaves nothing of {steps} steps; "
      f"set --config.warmup_steps lower"
    )
