# SPDX-License-Identifier: Apache-2.0
"""Prints the meshes that `make_mesh` makes of two v5e slices, by libtpu's compile-only client.

A process of its own, since libtpu reads its environment once.
"""

import json
import os

os.environ |= {
  "TPU_SKIP_MDS_QUERY": "1",
  "TPU_WORKER_HOSTNAMES": "localhost",
  "TPU_ACCELERATOR_TYPE": "v5litepod-8",
}
os.environ |= {"ALLOW_MULTIPLE_LIBTPU_LOAD": "1", "TPU_LOG_DIR": "disabled", "JAX_PLATFORMS": "cpu"}

from jax.experimental import topologies  # noqa: E402

from gpt2_jax.sharding import make_mesh  # noqa: E402


def devices(slices: int):
  return topologies.get_topology_desc(
    platform="tpu",
    topology_name="v5e:2x4",
    chip_config_name="default",
    chips_per_host_bounds=(2, 2, 1),
    num_slices=slices,
  ).devices


def mesh_or_error(sizes: str):
  """Sizes of the axes and the slice of each device, by replica; or the error's text."""
  try:
    mesh = make_mesh(*map(int, sizes.split()), devices=devices(2))
  except ValueError as error:
    return str(error)
  return list(mesh.shape.values()), [
    [device.slice_index for device in row.flat] for row in mesh.devices
  ]


if __name__ == "__main__":
  answers = {
    sizes: mesh_or_error(sizes) for sizes in ("2 8 1", "2 2 4", "4 4 1", "1 16 1", "1 2 8")
  }
  print(json.dumps(answers | {"one": list(make_mesh(1, 4, 2, devices=devices(1)).shape.values())}))
