# SPDX-License-Identifier: Apache-2.0
"""Which of how many processes this is: by flags, or as a TPU machine knows it."""

import dataclasses
import os

import jax


@dataclasses.dataclass(frozen=True)
class Place:
  """Which of how many processes this is, and where process 0 is found, HOST:PORT. It listens on PORT and PORT + 1."""

  coordinator: str
  processes: int
  process: int

  def __post_init__(self):
    host, _, port = self.coordinator.rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 65535:
      raise ValueError(f"--coordinator={self.coordinator} is not HOST:PORT with a port of 1 to 65534")
    if not 0 <= self.process < self.processes:
      raise ValueError(f"--process={self.process} is not one of --processes={self.processes}: they count from 0")

  @property
  def host(self) -> str:
    return self.coordinator.rpartition(":")[0].strip("[]")

  @property
  def port(self) -> int:
    return int(self.coordinator.rpartition(":")[2])


def find_place(coordinator: str | None, processes: int | None, process: int | None, seconds: int) -> Place | None:
  """The place that the flags give; without flags the one that a TPU machine knows, else None: a process alone.

  A TPU machine is asked as JAX asks it: a TPU VM's metadata server, GKE's environment, slices included.
  """
  given = {"--coordinator": coordinator, "--processes": processes, "--process": process}
  missing = [flag for flag, value in given.items() if value is None]
  if not missing:
    return Place(coordinator, processes, process)
  if len(missing) < len(given):
    raise ValueError(f"{' and '.join(missing)} missing: --coordinator, --processes and --process go together")
  return _tpu_place(seconds) if _on_tpu() else None


def _on_tpu() -> bool:
  from jax._src.cloud_tpu_init import running_in_cloud_tpu_vm  # chips on the PCI bus, and libtpu to drive them

  return running_in_cloud_tpu_vm and "tpu" in (jax.config.jax_platforms or "tpu")


def _tpu_place(seconds: int) -> Place | None:
  from jax._src.clusters import ClusterEnv

  try:
    known = os.environ.get("JAX_COORDINATOR_ADDRESS")
    found = ClusterEnv.auto_detect_unset_distributed_params(known, None, None, None, None, seconds)
  except (OSError, RuntimeError, ValueError) as error:
    raise ValueError(
      f"this TPU machine does not tell which of how many it is ({first_line(error)}); "
      f"give --coordinator=HOST:PORT --processes=N --process=I, on a single one localhost:8482, 1 and 0"
    ) from error
  return None if None in found[:3] else Place(*found[:3])


def first_line(error: BaseException) -> str:
  return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
