# SPDX-License-Identifier: Apache-2.0
"""The runner itself: each way to end badly is seen as what it is, and the next row runs all the
same. And the tables: how many rows there are."""

import collections

import pytest

from tests.launch.bad_inputs import test_corpora, test_models, test_training
from tests.launch.bad_inputs.runner import LENGTH, Row, judge

COMMANDS = "train tokenize convert evaluate contamination card detect sample console plan".split()
COMMANDS += ["gke", "memorization"]

# What a script does, and what is to be said about it as a row whose error speaks of `x`.
ERROR = "import sys; print('error: x', file=sys.stderr); "
ENDS = {
  "sys.exit(2)": [],
  "open('new', 'w').close(); sys.exit(2)": ["written: new"],
  "open('text', 'a').write('more'); sys.exit(2)": ["written: text"],
  "import os; os.remove('text'); sys.exit(2)": ["written: text"],
  "pass": ["silent"],
  "1 / 0": ["traceback"],
  "sys.exit(3)": ["status 3"],
  "print('y', file=sys.stderr); sys.exit(2)": ["1 other lines"],
  "print('error: y', file=sys.stderr); sys.exit(2)": ["2 lines of an error", "says nothing of 'x'"],
  f"print('x' * {LENGTH}, file=sys.stderr); sys.exit(2)": ["1 other lines"],
  "import os; os._exit(2)": [],
  "import os; os.write(2, b'Traceback of C++'); sys.exit(2)": ["traceback"],
  "import os; os.abort()": ["crashed"],
  "while True: pass": ["hung"],
  "x = bytearray(1 << 40)": ["traceback"],
}


@pytest.fixture(scope="module")
def ready(make, worker, sandbox):
  worker.start = 10  # nothing here imports JAX
  make.write("text", "some")
  sandbox.seal()


@pytest.mark.parametrize("end", ENDS)
def test_each_way_to_end_is_seen(end, ready, worker, sandbox):
  path = sandbox.folder.parent / "script.py"
  path.write_text(ERROR + "\n" + end)
  result = worker.run(path, [], seconds=3)
  faults = judge(Row("train", "a row", "x", ()), result, sandbox.restore())
  faults = sorted(fault.split(" after")[0] for fault in faults)
  assert faults == sorted(ENDS[end])
  assert sandbox.restore() == [] and (sandbox.folder / "text").read_text() == "some"


def test_a_control_has_to_work(ready, worker, sandbox):
  path = sandbox.folder.parent / "script.py"
  for source, faults in (
    ("print(3)", []),
    (ERROR + "sys.exit(2)", ["a control failed with status 2"]),
  ):
    path.write_text(source)
    result = worker.run(path, [])
    assert judge(Row("train", "a control", None, ()), result, sandbox.restore()) == faults


def test_there_are_rows_for_every_command():
  table = test_training.TABLE + test_models.TABLE + test_corpora.TABLE
  names = [str(row) for row in table]
  assert len(set(names)) == len(names)
  counts = collections.Counter(row.command for row in table if row.says is not None)
  assert set(counts) == set(COMMANDS) and min(counts.values()) >= 15 and counts.total() >= 250
  assert {row.command for row in table if row.says is None} == set(COMMANDS)
