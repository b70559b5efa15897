# SPDX-License-Identifier: Apache-2.0
"""The table of estimates beside published measurements; nothing is compiled."""

import json

import pytest

from experiments import calibrate
from gpt2_jax.plan.estimate import ALLOWANCE, KERNELS


def row(name: str, topology: str) -> calibrate.Measured:
  return next(x for x in calibrate.MEASURED if (x.name, x.topology) == (name, topology))


def test_a_published_rate_is_a_time_by_the_flops_that_its_authors_count():
  """16B: 6 N + attention of all pairs, of 6 rows x 2,048 tokens a chip, at 120 TFLOP/s."""
  maxtext = row("MaxText 16B", "v5e:16x16")
  layer = 4 * 4096 * 8192 + 3 * 4096 * 28672
  parameters = 32 * layer + 2 * 32768 * 4096
  flops = (6 * parameters + 12 * 32 * 8192 * 2048) * 6 * 2048
  assert maxtext.measured() == (pytest.approx(flops / 120e12),) * 2


def test_the_lean_is_of_both_ends_and_its_spread_of_the_rows():
  """Kernels skip what is above the diagonal: of 2 x 2 blocks one in four."""
  chat = row("tpuchat 163.6M", "v6e:1x1")
  result = {"work": {"matrix products": 0.15, KERNELS: 0.16}, "exposed": 0.01}
  fast, slow = calibrate.ends_of(chat, result)
  assert (fast, slow) == pytest.approx((0.28, 0.27 * (1 + ALLOWANCE) + 0.01))
  leans = calibrate.leans_of(chat, result)
  assert leans == pytest.approx([fast / 0.2885 - 1, slow / 0.2885 - 1])
  line = calibrate.summary("v6e", [[-0.03, 0.05], [0.01, 0.09]])
  assert line == "v6e, 2 rows: fast end -1 %, sd 3 %; slow end +7 %, sd 3 %"


def test_a_file_of_an_older_version_is_refused_in_one_line(tmp_path):
  chat = row("tpuchat 163.6M", "v6e:1x1")
  path = tmp_path / "tpuchat_163.6M_v6e_1x1.json"
  path.write_text(json.dumps({"work": {"attention kernels": 1.0}, "exposed": 0.0}))
  with pytest.raises(ValueError, match="of an older version of this script: choose another --out"):
    calibrate.estimated(chat, tmp_path)


def test_layers_that_are_alike_are_extrapolated_from_two():
  def result(layers: int) -> dict:
    work = {"matrix products": 0.5 + 0.25 * layers, KERNELS: 0.125 * layers}
    return {"work": work, "exposed": 0.25 + 0.5 * layers}

  assert calibrate.extrapolate([result(1), result(2)], 8) == result(8)
  assert calibrate.extrapolate([result(3)], 8) == result(3)
