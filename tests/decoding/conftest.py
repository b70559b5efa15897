# SPDX-License-Identifier: Apache-2.0
"""What tests of decoding share."""

import numpy as np
import pytest


@pytest.fixture(scope="session")
def loud_parameters(parameters):
  """loud_parameters(config): sharp attention and loud positions, so that what comes next depends on
  all that came before."""

  def make(config):
    arrays = parameters(config, scale=0.5)
    arrays["wte"] *= 4 / np.linalg.norm(arrays["wte"], axis=1, keepdims=True)
    return arrays | {"wpe": arrays["wpe"] * 4}

  return make
