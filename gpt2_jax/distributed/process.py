# SPDX-License-Identifier: Apache-2.0
"""The rank of this process: its index among how many, by flags or as a TPU machine knows it."""

import dataclasses
import os

import jax

from gpt2_jax.files import first_line


@dataclasses.dataclass(frozen=True)
class Process:
  """The rank (process index) of this process, the number of processes, and the coordinator.

  The coordinator is process 0 at HOST:PORT. It listens on PORT (JAX) and PORT + 1 (ours).
  """

  coordinator: str
  process_count: int
  process_index: int

  def __post_init__(self):
    host, _, port = self.coordinator.rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 65535:
      raise ValueError(
        f"--coordinator={self.coordinator[:100]} is not HOST:PORT with a port of 1 to 65534"
      )

    if not 0 <= self.process_index < self.process_count:
      raise ValueError(
        f"--process={self.process_index} is not one of --processes={self.process_count}: "
        f"they count from 0"
      )

  @property
  def host(self) -> str:
    # an IPv6 address is written in brackets, and connected to without
    return self.coordinator.rpartition(":")[0].strip("[]")

  @property
  def port(self) -> int:
    return int(self.coordinator.rpartition(":")[2])


def find_process(
  coordinator: str | None, processes: int | None, process: int | None, seconds: int
) -> Process | None:
  """Finds the rank of this process: from the flags, else from the TPU machine.

  A TPU machine is asked as JAX asks it: a TPU VM's metadata server, or GKE's environment, slices
  included. Returns None for a process alone.
  """
  flags = {"--coordinator": coordinator, "--processes": processes, "--process": process}
  missing = [flag for flag, value in flags.items() if value is None]
  if not missing:
    return Process(coordinator, processes, process)

  if len(missing) < len(flags):
    raise ValueError(
      f"{' and '.join(missing)} missing: --coordinator, --processes and --process go together"
    )
  return _tpu_process(seconds) if _on_tpu() else None


def _on_tpu() -> bool:
  # This flag asks for chips on the PCI bus, and for libtpu to drive them; it starts no backend.
  from jax._src.cloud_tpu_init import running_in_cloud_tpu_vm

  return running_in_cloud_tpu_vm and "tpu" in (jax.config.jax_platforms or "tpu")


def _tpu_process(seconds: int) -> Process | None:
  # JAX's own detection, which `jax.distributed.initialize` would use. It has no public name, and
  # we need its answer before JAX starts.
  from jax._src.clusters import ClusterEnv

  address = os.environ.get("JAX_COORDINATOR_ADDRESS")
  try:
    detected = ClusterEnv.auto_detect_unset_distributed_params(
      address, None, None, None, None, seconds
    )
  except (OSError, RuntimeError, ValueError) as error:
    raise ValueError(
      f"this TPU machine does not tell which of how many it is ({first_line(error)}); give "
      f"--coordinator=HOST:PORT --processes=N --process=I, on a single one localhost:8482, 1 and 0"
    ) from error

  coordinator, process_count, process_index = detected[:3]
  if None in (coordinator, process_count, process_index):
    return None
  return Process(coordinator, process_count, process_index)
