# SPDX-License-Identifier: Apache-2.0
"""Energy and CO2 of a training run, estimated from its chip-hours."""

import dataclasses
import math


@dataclasses.dataclass(frozen=True)
class Power:
  """What turns chip-hours into energy and CO2.

  energy = chip-hours x watts x PUE; CO2 = energy x the carbon intensity of the grid. So it is in
  the Machine Learning Impact calculator (Lacoste et al. 2019, mlco2/impact), which has no PUE (1)
  and rounds the intensity to two digits. DistilGPT-2's card has its figure: 8 V100 for 168 hours at
  300 watts in Azure's East US, 0.37 kg/kWh, are 149.2 kg. Hosts, networks and the making of the
  chips are not in it, unless the PUE or the watts have them.
  """

  watts: float  # of a chip, with its share of the host if that is known
  kg_per_kwh: float  # the carbon intensity of the grid, in kg of CO2 equivalents
  pue: float = 1.0  # power usage effectiveness of the data center

  def __post_init__(self):
    for name, least in (("watts", 0.0), ("kg_per_kwh", 0.0), ("pue", 1.0)):
      value = getattr(self, name)
      if not least <= value < math.inf:
        raise ValueError(f"{name} is {value}; it is a finite number of at least {least:g}")

  def kwh(self, chip_hours: float) -> float:
    return chip_hours * self.watts * self.pue / 1000

  def co2_kg(self, chip_hours: float) -> float:
    return self.kwh(chip_hours) * self.kg_per_kwh
