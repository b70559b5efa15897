#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Fake gcloud and ssh-add, and on the machines fake python3, hostname and the commands; the name
under which this file is called says which.

All state is in the folder $FAKE_CLOUD: scenario.json says what will happen, calls.jsonl what was
called. A machine is machine.json, a worker a home folder in which --command really runs, through
bash. Standard library only, since each call is a process of its own; what takes long to import is
imported where it is needed.
"""

import fcntl
import json
import os
import pathlib
import signal
import sys
import time

CLOUD = pathlib.Path(os.environ["FAKE_CLOUD"])


def scenario() -> dict:
  return json.loads((CLOUD / "scenario.json").read_text())


def next_play(name: str, plays: list):
  """The next of `plays`, then the last one again and again; counted across processes."""
  with open(CLOUD / f"turn-{name}", "a+") as file:
    fcntl.flock(file, fcntl.LOCK_EX)
    file.seek(0)
    count = len(file.read())
    file.write("x")
  return plays[min(count, len(plays) - 1)]


def fail(text: str, status: int = 1):
  print(text, file=sys.stderr)
  sys.exit(status)


def gcloud(arguments: list[str]):
  with open(CLOUD / "calls.jsonl", "a") as file:
    file.write(json.dumps(arguments) + "\n")
  flags = dict(a[2:].split("=", 1) for a in arguments if a.startswith("--") and "=" in a)
  names = [a for a in arguments if not a.startswith("--")]
  machine = CLOUD / "machine.json"
  there = json.loads(machine.read_text()) if machine.exists() else None
  match names:
    case ["compute", "tpus", "queued-resources", "create", name]:
      create(machine, name, flags, arguments)
    case ["compute", "tpus", "queued-resources", "describe", _]:
      describe(machine, there, flags["format"])
    case ["compute", "tpus", "tpu-vm", "describe", node]:
      if not there or node not in there["nodes"]:
        fail("ERROR: (gcloud.compute.tpus.tpu-vm.describe) NOT_FOUND: no such node")
      print("PREEMPTED" if there["lost"] else "READY")
    case ["compute", "tpus", "queued-resources", "delete", _]:
      if not there:
        fail("ERROR: (gcloud.compute.tpus.queued-resources.delete) NOT_FOUND: no such resource")
      machine.unlink()
      if (CLOUD / "workers").exists():
        (CLOUD / "workers").rename(CLOUD / f"deleted-{time.monotonic_ns()}")
    case ["compute", "tpus", "queued-resources", "scp", source, target]:
      import shutil

      for home in homes(there, flags):
        shutil.copy(source, home / target.split(":", 1)[1])
    case ["compute", "tpus", "queued-resources", "ssh", _]:
      ssh(machine, there, flags)
    case ["storage", "ls", url]:
      folder = CLOUD / "bucket" / url.removeprefix("gs://")
      entries = folder.iterdir() if folder.exists() else []
      urls = [f"{url}{entry.name}{'' if entry.suffix else '/'}" for entry in entries]
      print("\n".join(urls)) if urls else fail("ERROR: One or more URLs matched no objects.")
    case _:
      fail(f"ERROR: the fake gcloud does not know {arguments}", 2)


def create(machine, name, flags, arguments):
  play = next_play("create", scenario().get("create", ["ok"]))
  if play != "ok":
    fail(f"ERROR: (gcloud.compute.tpus.queued-resources.create) {play}")
  if machine.exists():
    fail("ERROR: (gcloud.compute.tpus.queued-resources.create) ALREADY_EXISTS")
  count = int(flags.get("node-count", 1))
  nodes = [name] if count == 1 else [f"{flags['node-prefix']}-{i}" for i in range(count)]
  labels = dict([flags["labels"].split("=")]) if "labels" in flags else {}
  states = next_play(
    "states", scenario().get("states", [["WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE"]])
  )
  there = {
    "type": flags["accelerator-type"],
    "labels": labels,
    "nodes": nodes,
    "states": states,
    "lost": False,
  }
  machine.write_text(json.dumps(there | {"spot": "--spot" in arguments}))


def describe(machine, there, form):
  if not there:
    fail("ERROR: (gcloud.compute.tpus.queued-resources.describe) NOT_FOUND: Resource was not found")
  if "failedData" in form:
    print(scenario()["failure"])
    return
  print(
    there["states"][0],
    there["labels"].get("gpt2_jax", ""),
    there["type"],
    ";".join(there["nodes"]),
    sep=",",
  )
  if len(there["states"]) > 1:
    there["states"].pop(0)
    write(machine, there)


def write(path, content):
  fresh = path.with_suffix(f".{os.getpid()}")
  fresh.write_text(json.dumps(content))
  fresh.replace(path)


def homes(there, flags) -> list[pathlib.Path]:
  """The home folders of the workers that --node and --worker name."""
  if not there or there["states"][0] != "ACTIVE" or there["lost"]:
    fail("ERROR: TPU is not in state READY")
  nodes = there["nodes"] if flags["node"] == "all" else [there["nodes"][int(flags["node"])]]
  workers = range(scenario()["workers"]) if flags["worker"] == "all" else [int(flags["worker"])]
  folders = [CLOUD / "workers" / f"{node}-w-{worker}" for node in nodes for worker in workers]
  for home in folders:
    home.mkdir(parents=True, exist_ok=True)
  return folders


def ssh(machine, there, flags):
  import subprocess

  processes = []
  for home in homes(there, flags):
    environment = {
      "HOME": str(home),
      "FAKE_CLOUD": str(CLOUD),
      "PATH": f"{CLOUD}/remote:{os.environ['PATH']}",
    }
    environment["GPT2_JAX_POLL"] = os.environ["GPT2_JAX_POLL"]
    processes.append(subprocess.Popen(["bash", "-c", flags["command"]], cwd=home, env=environment))
  statuses = [process.wait() for process in processes]
  for worker, status in enumerate(statuses):
    if status and len(statuses) > 1:
      print(
        f"##### Command execution on worker {worker} failed with exit status {status}. Continuing."
      )
  if machine.exists() and json.loads(machine.read_text())["lost"]:
    sys.exit(255)
  sys.exit(next((status for status in statuses if status), 0))


def python3(arguments: list[str]):
  """On a worker: pip and uv, which make an environment whose python is the training below."""
  worker = pathlib.Path(os.environ["HOME"]).name
  if arguments[:2] == ["-m", "uv"] and "venv" in arguments:
    program = pathlib.Path(arguments[-1]) / "bin" / "python"
    program.parent.mkdir(parents=True)
    program.symlink_to(__file__)
    (program.parents[1] / "pyvenv.cfg").write_text("version_info = 3.13.0\n")
  elif arguments[:2] == ["-m", "uv"] and worker in next_play(
    f"install-{worker}", scenario().get("install_fails", [[]])
  ):
    fail("error: no space left on device")


def ssh_add(_):
  agent = CLOUD / "agent"
  print(agent.read_text()) if agent.exists() else fail(
    "Could not open a connection to your authentication agent.", 2
  )


def hostname(_):
  print(pathlib.Path(os.environ["HOME"]).name)


def python(arguments: list[str]):
  """A command on a worker. Plays, in turn: steps to save, then `done`, a status, `preempted`, or
  `SIGTERM`. An evaluation finishes as many cells, a hundred to a cell."""
  worker = pathlib.Path(os.environ["HOME"]).name
  plays = scenario()
  heard = []
  if "SIGTERM" in json.dumps(plays):  # before anyone can see that training runs
    signal.signal(signal.SIGTERM, lambda *_: heard.append(1))
  with open(CLOUD / f"trained-{worker}.jsonl", "a") as file:
    file.write(json.dumps(arguments) + "\n")
  steps, end = next_play(f"train-{worker}", plays.get(f"train-{worker}", plays["train"]))
  flags = dict(a[2:].split("=", 1) for a in arguments if a.startswith("--") and "=" in a)
  first = worker.endswith("w-0")
  if first:
    print(f"step {steps}: loss 3.0", flush=True)
    place = flags.get("workdir") or flags.get("out") or "gs://nowhere"
    folder = CLOUD / "bucket" / place.removeprefix("gs://")
    for step in range(0, steps + 1, 100):
      cell = f"cells/{step}.json" if "evaluate" in arguments[0] else f"checkpoints/{step}"
      (folder / cell).mkdir(parents=True, exist_ok=True)
  if end == "preempted":
    vanish(first)
  if end == "SIGTERM":
    while not heard:
      time.sleep(0.02)
    print("SIGTERM: stopped and saved at step 7; the same command resumes from there")
  elif end == "hangs":
    time.sleep(60)
  elif end != "done":
    fail(f"error: status {end} it is", end)


def vanish(first: bool):
  """The machine is taken away: its state says so, and every process of this worker is gone at
  once."""
  machine = CLOUD / "machine.json"
  time.sleep(0.1)
  if first:
    there = json.loads(machine.read_text())
    write(machine, there | {"lost": True, "states": ["ACTIVE", "SUSPENDING", "SUSPENDED"]})
  os.killpg(0, signal.SIGKILL)


if __name__ == "__main__":
  globals()[pathlib.Path(sys.argv[0]).name.replace("-", "_")](sys.argv[1:])
