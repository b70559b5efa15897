# SPDX-License-Identifier: Apache-2.0
"""Process groups of real processes: rendezvous, all-gather, death and exit.

JAX itself is not started here.
"""

import contextlib
import os
import pathlib
import signal
import socket
import subprocess
import sys
import threading
import time

import jax
import pytest

from gpt2_jax import distributed
from gpt2_jax.distributed import process as process_lib
from gpt2_jax.distributed import process_group, rendezvous

ROOT = pathlib.Path(__file__).parents[2]
JOIN = """
import os, signal, sys, time
from gpt2_jax import distributed
from gpt2_jax.distributed import process_group as settings, rendezvous
process = distributed.Process(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
group = distributed._group = rendezvous.rendezvous(process, 60)
group.start()
ranks = distributed.all_gather_json("the start", process.process_index)
assert ranks == list(range(process.process_count))
"""
HANG = "time.sleep(60)"  # as in a collective


def free_port() -> int:
  """A port that is free, as is the next one."""
  while True:
    with socket.socket() as one, socket.socket() as two, contextlib.suppress(OSError):
      one.bind(("", 0))
      two.bind(("", one.getsockname()[1] + 1))
      return one.getsockname()[1]


def exits_of(*actions: str, setting: str = "") -> list[tuple[int, str]]:
  """Status and stderr of a process for each action, taken after the rendezvous."""
  address, env = f"localhost:{free_port()}", os.environ | {"PYTHONPATH": str(ROOT)}
  processes = [
    subprocess.Popen(
      [sys.executable, "-c", f"{JOIN}\n{setting}\n{action}", address, str(len(actions)), str(i)],
      stderr=subprocess.PIPE,
      text=True,
      env=env,
    )
    for i, action in enumerate(actions)
  ]
  try:
    return [(process.wait(90), process.stderr.read().strip()) for process in processes]
  finally:
    for process in processes:
      process.kill()
      process.stderr.close()


def rendezvous_of(*processes: distributed.Process, seconds: int = 20) -> list:
  """What `rendezvous` returns or raises for each process, all at once."""
  ends = [None] * len(processes)

  def one(i):
    try:
      ends[i] = rendezvous.rendezvous(processes[i], seconds)
    except (OSError, ValueError) as error:
      ends[i] = error

  threads = [threading.Thread(target=one, args=(i,)) for i in range(len(processes))]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join(60)
  return ends


def test_a_process_alone_opens_no_socket(monkeypatch):
  monkeypatch.setattr(socket, "socket", None)
  assert distributed.find_process(None, None, None, 1) is None
  with distributed.initialize(None):
    assert not jax.distributed.is_initialized()
    assert (
      distributed.all_gather_json("alone", {"a": 1}) == [{"a": 1}]
      and distributed.broadcast("alone", 2) == 2
      and distributed.is_primary()
    )
    distributed.barrier("alone", 1)
    distributed.check_same("config", {"a": 1})


def test_flags_give_the_rank():
  process = distributed.find_process("[::1]:1234", 4, 3, 1)
  assert (process.host, process.port) == ("::1", 1234)
  assert (process.process_count, process.process_index) == (4, 3)


@pytest.mark.parametrize(
  "flags, message",
  [
    (
      ("h:1", None, None),
      "--processes and --process missing: --coordinator, --processes and --process go together",
    ),
    ((None, 2, 0), "--coordinator missing"),
    (("h", 2, 0), "--coordinator=h is not HOST:PORT"),
    (("h:x", 2, 0), "is not HOST:PORT"),
    (("h:65535", 2, 0), "a port of 1 to 65534"),
    (("h:1", 2, 2), "--process=2 is not one of --processes=2: they count from 0"),
  ],
)
def test_flags_that_do_not_go_together_are_one_line(flags, message):
  with pytest.raises(ValueError, match=message.replace("[", r"\[")):
    distributed.find_process(*flags, 1)


def test_no_method_of_the_group_hides_one_of_its_thread():
  """As `_handle` did, which Python 3.13 has for itself."""
  thread = threading.Thread()
  own = {name for name in vars(distributed.ProcessGroup) if not name.startswith("__")}
  assert own & {*dir(thread), *vars(thread)} == {"run"}


def test_a_tpu_machine_of_several_slices_knows_its_rank(monkeypatch):
  """As GKE tells it: two slices of two hosts, the second host of the second slice."""
  from jax._src.clusters import cloud_tpu_cluster

  monkeypatch.setattr(process_lib, "_on_tpu", lambda: True)
  monkeypatch.setattr(cloud_tpu_cluster, "running_in_cloud_tpu_vm", True)
  slice_environment = {
    "TPU_WORKER_HOSTNAMES": "localhost,other",
    "TPU_WORKER_ID": "1",
    "MEGASCALE_NUM_SLICES": "2",
  }
  slice_environment |= {"MEGASCALE_SLICE_ID": "1", "MEGASCALE_COORDINATOR_ADDRESS": "localhost"}
  for name, value in slice_environment.items():
    monkeypatch.setenv(name, value)
  coordinator = f"localhost:{cloud_tpu_cluster.coordinator_port}"  # another in an older JAX
  expected = distributed.Process(coordinator, 4, 3)
  assert distributed.find_process(None, None, None, 5) == expected


def test_who_misses_the_rendezvous_is_named_by_all_who_did_not():
  address = f"localhost:{free_port()}"
  ends = rendezvous_of(
    distributed.Process(address, 4, 0), distributed.Process(address, 4, 2), seconds=2
  )
  for end in ends:
    assert isinstance(end, TimeoutError)
    assert str(end).startswith(
      "process 1, 3 did not arrive within 2 s; here are 0 ("
    ) and ", 2 (" in str(end)


def test_a_line_about_many_processes_has_a_length():
  (end,) = rendezvous_of(distributed.Process(f"localhost:{free_port()}", 2000, 0), seconds=1)
  assert "process 1, 2, 3, 4, 5, 6, 7, 8, and 1,991 more did not arrive" in str(end)
  assert len(str(end)) < 400


def test_a_process_0_that_does_not_answer_is_named():
  address = f"localhost:{free_port()}"
  (end,) = rendezvous_of(distributed.Process(address, 2, 1), seconds=1)
  assert isinstance(end, TimeoutError) and str(end).startswith(
    "process 0 did not answer at localhost:"
  )


@pytest.mark.parametrize(
  "others, message",
  [
    ([(3, 1)], "was started as one of 3 processes, process 0 as one of 2"),
    ([(3, 1), (3, 1)], "two processes, on .*, were started as process 1"),
  ],
)
def test_ranks_that_do_not_fit_are_refused_everywhere(others, message):
  address = f"localhost:{free_port()}"
  first = distributed.Process(address, 1 + len(others), 0)
  ends = rendezvous_of(
    first, *(distributed.Process(address, *other) for other in others), seconds=5
  )
  with pytest.raises(ValueError, match=message):
    raise ends[0]
  assert str(ends[0]) in [str(end) for end in ends[1:]]


def test_other_code_is_refused_with_the_difference(monkeypatch):
  address, versions = f"localhost:{free_port()}", rendezvous.versions()
  turns = iter([versions, versions | {"jax": "0.0.1"}])
  monkeypatch.setattr(rendezvous, "versions", lambda: next(turns))
  lines = {
    f"runs other code: jax is {a} on process 0 and {b} there"
    for a, b in (
      (jax.__version__, "0.0.1"),
      ("0.0.1", jax.__version__),
    )  # whichever thread comes first
  }
  for end in rendezvous_of(distributed.Process(address, 2, 0), distributed.Process(address, 2, 1)):
    assert isinstance(end, ValueError) and any(line in str(end) for line in lines)


@pytest.mark.parametrize(
  "message",
  [
    b"GET / HTTP/1.1\r\n\r\n",
    b"[" * 100_000 + b"\n",
    b"5\n",
    b'{"a": 1}\n',
    b'["hello", []]\n',
    b"\xff\n",
  ],
  ids=["http", "deep JSON", "a number", "an object", "a list", "no text"],
)
def test_a_stranger_that_connects_is_no_process(message):
  port, ends = free_port(), []
  address = f"localhost:{port}"
  first = threading.Thread(
    target=lambda: ends.append(rendezvous.rendezvous(distributed.Process(address, 2, 0), 20))
  )
  first.start()
  connected, end = False, time.monotonic() + 20
  while not connected and time.monotonic() < end:
    with (
      contextlib.suppress(OSError),
      socket.create_connection(("localhost", port + 1), timeout=1) as stranger,
    ):
      stranger.sendall(message)
      connected = True
  ends.append(rendezvous.rendezvous(distributed.Process(address, 2, 1), 20))
  first.join(20)
  assert connected and [type(end) for end in ends] == [process_group.ProcessGroup] * 2


@pytest.mark.parametrize("victim", [0, 2])
def test_a_killed_process_is_named_by_the_others_which_end_with_75(victim):
  actions = [HANG] * 3
  actions[victim] = "os.kill(os.getpid(), signal.SIGKILL)"
  for i, (status, err) in enumerate(exits_of(*actions)):
    if i == victim:
      assert status == -signal.SIGKILL
    else:
      assert status == distributed.EXIT_RETRY and err.startswith(
        f"error: process {victim} ({socket.gethostname()}) is gone: "
      )
      assert "start the same command again" in err and "\n" not in err


def test_a_process_without_a_heartbeat_is_named():
  """It is stopped, and ends too, as soon as SIGCONT lets it."""
  short = "settings.HEARTBEAT_TIMEOUT, settings.HEARTBEAT_INTERVAL = 2, 0.5"
  child = "if not os.fork(): time.sleep(5); os.kill(os.getppid(), signal.SIGCONT); os._exit(0)"
  ends = exits_of(HANG, f"{child}\nos.kill(os.getpid(), signal.SIGSTOP)\n{HANG}", setting=short)
  assert [status for status, _ in ends] == [distributed.EXIT_RETRY] * 2
  assert "error: process 1 (" in ends[0][1] and "has not answered for 2 s" in ends[0][1]


def test_who_does_not_come_to_a_barrier_is_named():
  wait = "distributed.barrier('the lake', 2)"
  for status, err in exits_of(wait, wait, HANG):
    assert status == distributed.EXIT_RETRY
    assert f"error: process 2 ({socket.gethostname()}) did not arrive at the lake within 2 s" in err


def test_an_error_of_one_ends_the_others_with_its_line():
  failing = "group.fail('no such file'); print('my own line', file=sys.stderr); distributed.exit(2)"
  for failed in (0, 1):
    actions = [HANG] * 3
    actions[failed] = failing
    for i, (status, err) in enumerate(exits_of(*actions, setting="settings.GRACE_PERIOD = 1")):
      assert status == 2
      assert (
        err == "my own line"
        if i == failed
        else f"error: process {failed} ({socket.gethostname()}): no such file" in err
      )


def test_what_differs_is_an_error_of_all_alike():
  same = "distributed.check_same('config', {'a': 1, 'rate': %s})"
  for status, err in exits_of(same % 1, same % 2):
    assert status == 1
    process_1 = f"process 1 ({socket.gethostname()})"
    assert f"{process_1} was started with another config: rate is 1 on process 0 and 2 there" in err


def test_who_said_goodbye_is_not_missed():
  leave = "distributed.barrier('the end'); group.say_goodbye(); time.sleep(%s)"
  assert [status for status, _ in exits_of(leave % 0, leave % 1)] == [0, 0]


def test_a_relay_stays_open_when_the_other_side_ends():
  with socket.create_server(("localhost", 0)) as server:
    near = socket.create_connection(
      ("127.0.0.1", distributed.relay("localhost", server.getsockname()[1]))
    )
    far, _ = server.accept()
    near.sendall(b"ping")
    assert far.recv(9) == b"ping"
    far.sendall(b"pong")
    assert near.recv(9) == b"pong"
    far.close()
    near.settimeout(1)
    with near, pytest.raises(TimeoutError):
      near.recv(9)
