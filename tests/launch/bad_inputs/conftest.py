# SPDX-License-Identifier: Apache-2.0
"""A worker and its sandbox, one of each for a file of the tables."""

import pytest

from tests.launch.bad_inputs import fixtures
from tests.launch.bad_inputs.runner import Sandbox, Worker


@pytest.fixture(scope="module")
def sandbox(tmp_path_factory):
  return Sandbox(tmp_path_factory.mktemp("bad_inputs"))


@pytest.fixture(scope="module")
def worker(sandbox):
  streams = sandbox.folder.parent / "streams"
  streams.mkdir()
  worker = Worker(sandbox.folder, streams)
  yield worker
  worker.close()


@pytest.fixture(scope="module")
def make(sandbox, worker):
  return fixtures.Maker(sandbox, worker)
